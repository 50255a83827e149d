"""Runs one part of an exported pipeline with ExecuTorch; needs nothing else, and is copied along as ``engine.py``.

ExecuTorch's Python runtime takes and gives tensors of torch, so torch is in the process. On a device its C++ runtime
reads the same files without.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ENDING = ".pte"
INPUTS = "inputs"  # the method that answers the names of the inputs, in their order, as one text


@contextlib.contextmanager
def without_chatter() -> Iterator[None]:
    """Inside, imports say nothing of what torchao lacks on this machine: nothing here uses it."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def load(path: Path, threads: int = 0, precision: str = "f32") -> Callable[[Mapping[str, Any]], list[Any]]:
    """What answers named arrays with the list of its outputs; 0 threads: as many as the runtime finds right.

    Inputs that the part does not take are left aside; of another shape than it was written for they are refused with
    ValueError. The numbers are those in the file: ``precision`` decides nothing. ``threads`` count for the process.
    """
    with without_chatter():
        import torch
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime
    if threads:
        portable_lib._unsafe_reset_threadpool(threads)
        torch.set_num_threads(threads)
    program = Runtime.get().load_program(path)
    names = program.load_method(INPUTS).execute(())[0].split()
    method = program.load_method("forward")
    shapes = [tuple(method.metadata.input_tensor_meta(place).sizes()) for place in range(len(names))]

    def answer(given: Mapping[str, Any]) -> list[Any]:
        for name, shape in zip(names, shapes, strict=True):
            if given[name].shape != shape:
                raise ValueError(
                    f"{path.name} takes {name} of the shape {shape} alone, got {given[name].shape}"
                )
        found = method.execute([torch.from_numpy(given[name]).contiguous() for name in names])
        return [one.numpy() for one in found]

    return answer
