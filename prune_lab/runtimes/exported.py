"""A part as torch.export sees it: its graph, of whatever batch and size, which every other runtime starts from."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from prune_lab.errors import BackendError
from prune_lab.models.components import reason_of
from prune_lab.models.silence import quiet
from prune_lab.runtimes.part import Part

_LONGEST = 10000  # of what diffusers embeds timesteps with: the longest wave
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


class _Tabled(nn.Module):
    """``Timesteps`` of diffusers with its frequencies as numbers, those that torch computes.

    A runtime whose exponential rounds otherwise moves a sine of the timestep 500 by a hundred times its rounding.
    """

    def __init__(self, plain: Timesteps) -> None:
        super().__init__()
        half = plain.num_channels // 2
        exponent = -math.log(_LONGEST) * torch.arange(start=0, end=half, dtype=torch.float32)
        self.plain = plain
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(exponent / (half - plain.downscale_freq_shift)))

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = timesteps[:, None].float() * self.frequencies[None, :]
        if self.plain.scale != 1:
            angles = self.plain.scale * angles
        waves = [torch.sin(angles), torch.cos(angles)]
        found = torch.cat(waves[::-1] if self.plain.flip_sin_to_cos else waves, dim=-1)
        return nn.functional.pad(found, (0, 1, 0, 0)) if self.plain.num_channels % 2 else found


@contextlib.contextmanager
def _tabled(module: nn.Module) -> Iterator[None]:
    """Inside, the parts of ``module`` that embed timesteps hold their frequencies as numbers."""
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is Timesteps
    ]
    for parent, name, child in found:
        setattr(parent, name, _Tabled(child))
    try:
        yield
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)


def _program(part: Part, side: int | None, dim: object) -> ExportedProgram:
    inputs = part.examples(_BATCH, side)
    sizes = tuple(dict.fromkeys(part.varying[name], dim) for name in part.inputs)
    given = tuple(inputs[name] for name in part.inputs)
    with torch.no_grad(), without_chatter(), _tabled(part.module):
        return torch.export.export(part.module, given, dynamic_shapes=(sizes,), strict=False)


def _refused(part: Part, error: Exception) -> BackendError:
    return BackendError(
        f"asked for the graph of the {part.name} for another runtime, torch cannot make one ({reason_of(error)}); "
        "use it in torch, such as with --backend compile"
    )


def _without_idle_squeezes(program: ExportedProgram) -> None:
    """Take out what squeezes nothing: exporters make it take out a dimension that only varies, such as the tokens."""
    graph = program.graph_module.graph
    for node in list(graph.find_nodes(op="call_function", target=torch.ops.aten.squeeze.dim)):
        source = node.args[0]
        answered = any(user.op == "output" for user in node.users)  # whose name is in the signature
        if node.meta["val"].ndim == source.meta["val"].ndim and not answered:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    program.graph_module.recompile()


def _holds_elsewhere(program: ExportedProgram, part: Part, side: int | None) -> bool:
    """Whether ``program`` answers as ``part`` does at another size: a graph may hold what the code computed of one."""
    inputs = part.elsewhere(side)
    try:
        with torch.no_grad(), without_chatter():
            found = program.module()(*(inputs[name] for name in part.inputs))
    except Exception:  # whatever its guards raise
        return False
    answers = found if isinstance(found, tuple) else (found,)
    return all(
        one.shape == wanted.shape and torch.allclose(one, wanted, rtol=1e-3, atol=1e-3)
        for one, wanted in zip(answers, part.answers(inputs), strict=True)
    )


def exported(part: Part, side: int | None = None) -> tuple[ExportedProgram, Part]:
    """(graph, part) of ``part``: as it is, or for pictures of ``side`` alone where its code computes with the size.

    Raises BackendError where torch cannot make a graph of it.
    """
    for one in (part, part.of_one_size()) if part.varies_in_size else (part,):
        try:
            program = _program(one, side, Dim.DYNAMIC)
        except Exception as error:  # whatever the exporter raises
            refused = _refused(part, error)
            continue
        if one.varies_in_size and not _holds_elsewhere(program, one, side):
            continue
        _without_idle_squeezes(program)
        return program, one
    raise refused
