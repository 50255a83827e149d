"""Activations at a cut, of the student and of the teacher on the same rows, as moments; and a change tried in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from prune_lab.errors import DataError
from prune_lab.probes import Probe, evaluating
from prune_lab.repair.fitting import Change, Moments, moments_of
from prune_lab.repair.folding import Side, last_layer, layer_features


@dataclass(frozen=True, slots=True)
class Spot:
    """Where to listen: a unit of the student, and the units of the teacher whose outputs are wanted there."""

    student: str  # module path
    side: Side  # of the cut on which that unit stands: its output is what is there, or its input
    wanted: tuple[str, ...]  # module paths; the mean of their outputs
    of_layer: bool  # the features are what the unit's last layer weighs, and not the channels themselves


class _Heard(Exception):  # noqa: N818 - no error: all that is wanted was heard, the rest of the pass is not needed
    pass


def _tensor(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def _outputs(unet: Any, paths: Sequence[str], inputs: dict[str, Any]) -> list[Tensor]:
    """The output of each module, from one pass that stops after the last of them."""
    heard: dict[str, Tensor] = {}
    distinct = set(paths)

    def listener(path: str) -> Callable[..., None]:
        def note(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            heard[path] = _tensor(output)
            if len(heard) == len(distinct):
                raise _Heard

        return note

    with contextlib.ExitStack() as stack:
        for path in distinct:
            stack.callback(unet.get_submodule(path).register_forward_hook(listener(path)).remove)
        with contextlib.suppress(_Heard):
            unet(**inputs, return_dict=False)
    return [heard[path] for path in paths]


def _found(unet: Any, spot: Spot, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What is there (B, C, H, W), and the features (B, P, F) that may change it."""
    unit = unet.get_submodule(spot.student)
    entering: list[Tensor] = []
    module = unit if spot.side == "after" else last_layer(unit)
    handle = module.register_forward_pre_hook(lambda _module, args: entering.append(args[0]))
    try:
        (leaving,) = _outputs(unet, [spot.student], inputs)
    finally:
        handle.remove()
    there = entering[0] if spot.side == "after" else leaving
    if spot.of_layer:
        return there, layer_features(last_layer(unit), entering[0])
    return there, there.flatten(2).transpose(1, 2)


def moments_at(
    student: ModelMixin,
    teacher: ModelMixin,
    spot: Spot,
    probe: Probe,
    folds: Sequence[int],
    *,
    batch: int,
) -> list[Moments]:
    """The moments of each fold; ``folds`` (N,) says which fold, counted from 0, each row of the probe belongs to.

    Raises DataError when an activation is not finite.
    """
    sums: dict[int, Moments] = {}
    with evaluating(student), evaluating(teacher), torch.no_grad():
        pairs = zip(
            probe.batches(batch, student.device, student.dtype),
            probe.batches(batch, teacher.device, teacher.dtype),
            strict=True,
        )
        for (rows, inputs), (_, told) in pairs:
            there, features = _found(student, spot, inputs)
            outputs = [one.double().to(there.device) for one in _outputs(teacher, spot.wanted, told)]
            wanted = torch.stack(outputs).mean(dim=0)
            changes = wanted - there.double()
            if not (changes.isfinite().all() and features.isfinite().all()):
                raise DataError(
                    f"asked to repair at {spot.student}, found activations that are not finite; "
                    "repair in float32, or check the weights"
                )
            # Row by row: the features of a convolution are nine times its input.
            for row, fold in enumerate(folds[rows]):
                pixels = [one[row].flatten(1).T for one in (changes, wanted)]
                found = moments_of(features[row], *pixels)
                sums[fold] = sums[fold] + found if fold in sums else found
    return [sums[fold] for fold in sorted(sums)]


@contextlib.contextmanager
def inserted(unit: nn.Module, side: Side, change: Change) -> Iterator[None]:
    """Inside, the map of ``change`` stands as a module of its own behind ``unit``, or ahead of it.

    ``side`` says on which side of the cut the unit stands.

    It is what a fold must be equal to, and what a repair would be worth where there is no fold.
    """

    def mapped(hidden: Tensor) -> Tensor:
        weight, bias = change.map.to(hidden), change.bias.to(hidden)
        return torch.einsum("oc,bchw->bohw", weight, hidden) + bias[:, None, None]

    def behind(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        hidden = mapped(_tensor(output))
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    def ahead(_module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (mapped(args[0]), *args[1:])

    handle = unit.register_forward_hook(behind) if side == "before" else unit.register_forward_pre_hook(ahead)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def undone(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, ``parameters`` may be changed; on exit they are what they were."""
    before = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
