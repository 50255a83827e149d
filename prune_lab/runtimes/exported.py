"""A part as torch.export sees it: its graph, of whatever batch and size, which every other runtime starts from."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
from torch.export import Dim, ExportedProgram

from prune_lab.errors import BackendError
from prune_lab.models.components import reason_of
from prune_lab.models.silence import quiet
from prune_lab.runtimes.part import Part

_BATCH = 2  # of the example: a size of 1 would be taken for a constant
_LOGGERS = ("torch", "torch.export", "torch.onnx", "onnxscript", "onnx_ir")


@contextlib.contextmanager
def without_chatter() -> Iterator[None]:
    """Inside, exporters say nothing but errors: what they warn of is their own business."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def _program(part: Part, side: int | None, dim: object) -> ExportedProgram:
    inputs = part.examples(_BATCH, side)
    sizes = tuple(dict.fromkeys(part.varying[name], dim) for name in part.inputs)
    given = tuple(inputs[name] for name in part.inputs)
    with torch.no_grad(), without_chatter():
        return torch.export.export(part.module, given, dynamic_shapes=(sizes,), strict=False)


def exported(part: Part, side: int | None = None) -> tuple[ExportedProgram, Part]:
    """(graph, part) of ``part``: as it is, or for pictures of ``side`` alone where its code computes with the size.

    Raises BackendError where torch cannot make a graph of it.
    """
    try:
        return _program(part, side, Dim.DYNAMIC), part
    except Exception as error:  # whatever the exporter raises
        if not part.varies_in_size:
            raise _refused(part, error) from None
    fixed = part.of_one_size()
    try:
        return _program(fixed, side, Dim.DYNAMIC), fixed
    except Exception as error:  # whatever the exporter raises
        raise _refused(part, error) from None


def _refused(part: Part, error: Exception) -> BackendError:
    return BackendError(
        f"asked for the graph of the {part.name} for another runtime, torch cannot make one ({reason_of(error)}); "
        "use it in torch, such as with --backend compile"
    )
