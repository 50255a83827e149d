"""Runs one part of an exported pipeline with OpenVINO; needs nothing else, and is copied along as ``engine.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ENDING = ".xml"


def load(path: Path, threads: int = 0, precision: str = "f32") -> Callable[[Mapping[str, Any]], list[Any]]:
    """What answers named arrays with the list of its outputs; 0 threads: as many as the runtime finds right.

    Inputs that the part does not take are left aside. It computes in ``precision``, f32, bf16 or f16: left to itself
    OpenVINO takes what is fastest on this processor.
    """
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads  # type: ignore[assignment]
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    taken = [one.get_any_name() for one in compiled.inputs]

    def answer(given: Mapping[str, Any]) -> list[Any]:
        found = compiled({name: given[name] for name in taken})
        return [found[place].copy() for place in range(len(compiled.outputs))]

    return answer
