"""Moments of the activations of student and teacher at a cut, and context managers to try a correction in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from prune_lab.errors import DataError
from prune_lab.families.endings import ending_of
from prune_lab.probes import Probe, evaluating
from prune_lab.repair.fitting import Correction, Moments, moments_of
from prune_lab.repair.folding import Side, layer_features


@dataclass(frozen=True, slots=True)
class FitPoint:
    """The tensor of the student to correct, and the tensors of the teacher that it should become."""

    student_path: str  # of a unit; the tensor is its output or its input
    side: Side  # the side of the cut on which that unit is: before, its output is meant; after, its input
    teacher_paths: tuple[str, ...]  # of units; the target is the mean of their outputs
    refit: bool  # features are the inputs of the unit's last layer; otherwise the channels of the tensor


class _StopForward(Exception):  # noqa: N818 - no error: all outputs are known, the rest of the pass is not needed
    pass


def _as_tensor(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


def _outputs(model: Any, paths: Sequence[str], inputs: dict[str, Any]) -> list[Tensor]:
    """The output of each module, from one forward pass that stops after the last of them."""
    outputs: dict[str, Tensor] = {}
    distinct = set(paths)

    def hook(path: str) -> Callable[..., None]:
        def record(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            outputs[path] = _as_tensor(output)
            if len(outputs) == len(distinct):
                raise _StopForward

        return record

    with contextlib.ExitStack() as stack:
        for path in distinct:
            stack.enter_context(model.get_submodule(path).register_forward_hook(hook(path)))
        with contextlib.suppress(_StopForward):
            model(**inputs, return_dict=False)
    return [outputs[path] for path in paths]


def _tensor_and_features(model: Any, point: FitPoint, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The student's tensor (B, C, H, W) at ``point``, and the features (B, P, F) of the fit."""
    unit = model.get_submodule(point.student_path)
    layer = ending_of(unit).last
    layer_inputs: list[Tensor] = []
    module = unit if point.side == "after" else layer
    with module.register_forward_pre_hook(lambda _module, args: layer_inputs.append(args[0])):
        (output,) = _outputs(model, [point.student_path], inputs)
    tensor = layer_inputs[0] if point.side == "after" else output
    if point.refit:
        return tensor, layer_features(layer, layer_inputs[0])
    return tensor, tensor.flatten(2).transpose(1, 2)


def moments_at(
    student: ModelMixin,
    teacher: ModelMixin,
    point: FitPoint,
    probe: Probe,
    folds: Sequence[int],
    *,
    batch: int,
) -> list[Moments]:
    """The moments of each fold at ``point``; ``folds`` (N,) is the fold, counted from 0, of each row of the probe.

    Raises DataError when an activation is not finite.
    """
    sums: dict[int, Moments] = {}
    with evaluating(student), evaluating(teacher), torch.no_grad():
        pairs = zip(
            probe.batches(batch, student),
            probe.batches(batch, teacher),
            strict=True,
        )
        for (rows, student_inputs), (_, teacher_inputs) in pairs:
            tensor, features = _tensor_and_features(student, point, student_inputs)
            outputs = _outputs(teacher, point.teacher_paths, teacher_inputs)
            target = torch.stack([one.double().to(tensor.device) for one in outputs]).mean(dim=0)
            errors = target - tensor.double()
            if not (errors.isfinite().all() and features.isfinite().all()):
                raise DataError(
                    f"asked to repair at {point.student_path}, found activations that are not finite; "
                    "repair in float32, or check the weights"
                )
            # Row by row to save memory: the features of a convolution are nine times as large as its input.
            for row, fold in enumerate(folds[rows]):
                moments = moments_of(features[row], *(one[row].flatten(1).T for one in (errors, target)))
                sums[fold] = sums[fold] + moments if fold in sums else moments
    return [sums[fold] for fold in sorted(sums)]


def layer_moments_at(
    student: ModelMixin,
    teacher: ModelMixin,
    paths: tuple[str, str],
    probe: Probe,
    folds: Sequence[int],
    *,
    batch: int,
) -> list[Moments]:
    """The moments of each fold of the inputs of a layer of the student, and of what its output lacks of the teacher's.

    ``paths`` are those of the layer in student and teacher. Raises DataError when an activation is not finite.
    """
    sums: dict[int, Moments] = {}
    layer: Any = student.get_submodule(paths[0])
    with evaluating(student), evaluating(teacher), torch.no_grad():
        pairs = zip(probe.batches(batch, student), probe.batches(batch, teacher), strict=True)
        for (rows, student_inputs), (_, teacher_inputs) in pairs:
            read: list[Tensor] = []
            with layer.register_forward_pre_hook(lambda _module, args, read=read: read.append(args[0])):
                (output,) = _outputs(student, paths[:1], student_inputs)
            (target,) = _outputs(teacher, paths[1:], teacher_inputs)
            if isinstance(layer, nn.Conv2d):
                output, target = (one.flatten(2).transpose(1, 2) for one in (output, target))
            count = rows.stop - rows.start  # where a row is several in turn, as of films, they stay together
            features, output, target = (
                one.reshape(count, -1, one.shape[-1])
                for one in (layer_features(layer, read[0]), output, target.to(output.device))
            )
            errors = target.double() - output.double()
            if not (errors.isfinite().all() and features.isfinite().all()):
                raise DataError(
                    f"asked to repair at {paths[0]}, found activations that are not finite; repair in float32, or "
                    "check the weights"
                )
            for row, fold in enumerate(folds[rows]):
                moments = moments_of(features[row], errors[row], target[row])
                sums[fold] = sums[fold] + moments if fold in sums else moments
    return [sums[fold] for fold in sorted(sums)]


@contextlib.contextmanager
def corrected(unit: nn.Module, side: Side, correction: Correction) -> Iterator[None]:
    """Context in which ``correction`` is applied by a hook: to the output of ``unit``, or to its input.

    ``side`` is the side of the cut on which the unit is: before, the output is meant; after, the input. A fold must
    give the same result. Where no fold exists, this shows what the correction would achieve.
    """

    def apply(hidden: Tensor) -> Tensor:
        weight, bias = correction.map.to(hidden), correction.bias.to(hidden)
        return torch.einsum("oc,bchw->bohw", weight, hidden) + bias[:, None, None]

    def correct_output(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        hidden = apply(_as_tensor(output))
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    def correct_input(_module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (apply(args[0]), *args[1:])

    if side == "before":
        handle = unit.register_forward_hook(correct_output)
    else:
        handle = unit.register_forward_pre_hook(correct_input)
    with handle:
        yield


@contextlib.contextmanager
def restored(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which ``parameters`` may be changed; on exit they get their old values back."""
    before = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
