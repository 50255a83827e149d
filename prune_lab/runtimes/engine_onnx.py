"""Runs one part of an exported pipeline with onnxruntime; needs nothing else, and is copied along as ``engine.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ENDING = ".onnx"


def load(path: Path, threads: int = 0, precision: str = "f32") -> Callable[[Mapping[str, Any]], list[Any]]:
    """What answers named arrays with the list of its outputs; 0 threads: as many as the runtime finds right.

    Inputs that the part does not take are left aside. The numbers are those in the file: ``precision`` decides nothing.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    # Threads that spin while they wait take the core from whoever would use it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = [one.name for one in session.get_inputs()]
    return lambda given: list(session.run(None, {name: given[name] for name in taken}))
