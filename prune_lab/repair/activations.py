"""Moments of the activations of student and teacher at a cut, and context managers to try a correction in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from prune_lab.errors import DataError
from prune_lab.families import outline_of
from prune_lab.families.endings import Layer, known_ending
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


class OtherPlaces(Exception):  # noqa: N818 - no error: nothing can be fitted at this cut
    """What stands behind a cut has other pixels or tokens than what stands ahead of it."""


def as_tensor(output: Any, main: int = 0) -> Tensor:
    """The state on the main path in what a unit gives, which is number ``main`` of several."""
    tensor: Tensor = output if isinstance(output, Tensor) else output[main]
    return tensor


def mains_of(model: Any) -> dict[str, int]:
    """Which output of a unit is on the main path, by its module path: of a block of text and picture the picture."""
    return {unit.path: unit.main for unit in outline_of(model).units}


def outputs_of(model: Any, paths: Sequence[str], inputs: dict[str, Any]) -> list[Tensor]:
    """The output of each module, from one forward pass that stops after the last of them."""
    outputs: dict[str, Tensor] = {}
    distinct, mains = set(paths), mains_of(model)

    def hook(path: str) -> Callable[..., None]:
        def record(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            outputs[path] = as_tensor(output, mains.get(path, 0))
            if len(outputs) == len(distinct):
                raise _StopForward

        return record

    with contextlib.ExitStack() as stack:
        for path in distinct:
            stack.enter_context(model.get_submodule(path).register_forward_hook(hook(path)))
        with contextlib.suppress(_StopForward):
            model(**inputs, return_dict=False)
    return [outputs[path] for path in paths]


def by_pixel(tensor: Tensor) -> Tensor:
    """(N, P, C) the pixels of pictures (N, C, H, W), or tokens (N, P, C) as they are."""
    return tensor.flatten(2).transpose(1, 2) if tensor.ndim > 3 else tensor


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What a fit needs of some rows of a probe; P counts all pixels of a row, those of all frames of a film."""

    rows: slice
    features: Tensor  # (B, P, F)
    tensor: Tensor  # (B, P, C) of the student
    target: Tensor  # (B, P, C) what it should become, float64
    gate: Tensor | None = None  # (B, C) by which the unit multiplies what the correction goes into


def _gate_of(unit: Any, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    """(B, C) how much more ``unit`` gives for each channel when ``layer``, its last one, gives 1 more."""

    def one_more(_module: nn.Module, _args: tuple[Any, ...], given: Tensor) -> Tensor:
        return given + 1

    with layer.register_forward_hook(one_more):
        more = unit.forward(*args, **kwargs)
    # the same for all tokens: their mean is nearer than each of them
    return (by_pixel(as_tensor(more)).double() - by_pixel(as_tensor(output)).double()).mean(dim=1)


def read_student(
    model: Any, point: FitPoint, run: Callable[[], Any], rows: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(features (B, P, F), tensor (B, P, C), gate (B, C) or None) of the student at ``point``.

    ``run`` runs the model at least as far as the unit there, on a batch of so many ``rows``, and calls the unit itself.
    """
    unit: Any = model.get_submodule(point.student_path)
    ending = known_ending(unit)
    layer_inputs: list[Tensor] = []
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    module = unit if point.side == "after" else ending.last
    with (
        module.register_forward_pre_hook(lambda _module, args: layer_inputs.append(args[0])),
        unit.register_forward_hook(lambda _module, *call: calls.append(call), with_kwargs=True),
    ):
        run()
    ((args, kwargs, output),) = calls
    tensor = by_pixel(layer_inputs[0] if point.side == "after" else as_tensor(output))
    features = layer_features(ending.last, layer_inputs[0]) if point.refit else tensor
    gated = ending.gated and point.side == "before"
    gate = _gate_of(unit, ending.last, args, kwargs, output) if gated else None
    wide = [one.reshape(rows, -1, one.shape[-1]) for one in (features, tensor)]
    return wide[0], wide[1], None if gate is None else gate.reshape(rows, -1, gate.shape[-1]).mean(dim=1)


def target_of(outputs: Sequence[Tensor], like: Tensor) -> Tensor:
    """The mean of the teacher's ``outputs`` in the form (B, P, C) of the student's tensor ``like``, float64.

    Raises OtherPlaces where they are not of the same pixels or tokens.
    """
    if any(one.numel() != like.numel() for one in outputs):
        raise OtherPlaces
    wide = [by_pixel(one).double().to(like.device).reshape(like.shape) for one in outputs]
    return torch.stack(wide).mean(dim=0)


def readings_at(
    student: ModelMixin, teacher: ModelMixin, point: FitPoint, probe: Probe, *, batch: int
) -> Iterator[Reading]:
    """What student and teacher have at ``point``, batch by batch."""
    with evaluating(student), evaluating(teacher), torch.no_grad():
        pairs = zip(probe.batches(batch, student), probe.batches(batch, teacher), strict=True)
        for (rows, student_inputs), (_, teacher_inputs) in pairs:

            def run(inputs: dict[str, Any] = student_inputs) -> None:
                outputs_of(student, [point.student_path], inputs)

            features, tensor, gate = read_student(student, point, run, rows.stop - rows.start)
            outputs = outputs_of(teacher, point.teacher_paths, teacher_inputs)
            yield Reading(rows, features, tensor, target_of(outputs, tensor), gate)


def moments_of_readings(readings: Iterable[Reading], folds: Sequence[int], path: str) -> list[Moments]:
    """The moments of each fold; ``folds`` (N,) is the fold, counted from 0, of each row of the probe.

    Behind a gate g the fit is that of ``g * error / mean(g * g)``, whose shift is the exact least-squares answer, and
    whose map is exact where the gate does not change with the timestep. Raises DataError when an activation is not
    finite.
    """
    sums: dict[int, Moments] = {}
    squares: dict[int, Tensor] = {}  # (C,) of the errors, of each fold
    gates: list[Tensor] = []
    for reading in readings:
        errors = reading.target - reading.tensor.double()
        if not (errors.isfinite().all() and reading.features.isfinite().all()):
            raise DataError(
                f"asked to repair at {path}, found activations that are not finite; "
                "repair in float32, or check the weights"
            )
        if reading.gate is not None:
            gates.append(reading.gate.square())
            errors = errors * reading.gate[:, None, :]
        # Row by row to save memory: the features of a convolution are nine times as large as its input.
        for row, fold in enumerate(folds[reading.rows]):
            moments = moments_of(reading.features[row], errors[row], reading.target[row])
            sums[fold] = sums[fold] + moments if fold in sums else moments
            square = errors[row].square().sum(dim=0)
            squares[fold] = squares[fold] + square if fold in squares else square
    if gates:
        size = torch.cat(gates).mean(dim=0)
        by = torch.where(size > 0, 1 / size, 0.0)
        sums = {
            fold: replace(one, e=one.e * by, xe=one.xe * by, ee=float((squares[fold] * by.square()).sum()))
            for fold, one in sums.items()
        }
    return [sums[fold] for fold in sorted(sums)]


def moments_at(
    student: ModelMixin,
    teacher: ModelMixin,
    point: FitPoint,
    probe: Probe,
    folds: Sequence[int],
    *,
    batch: int,
) -> list[Moments]:
    """The moments of each fold at ``point`` (see ``moments_of_readings``)."""
    readings = readings_at(student, teacher, point, probe, batch=batch)
    return moments_of_readings(readings, folds, point.student_path)


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
                (output,) = outputs_of(student, paths[:1], student_inputs)
            (target,) = outputs_of(teacher, paths[1:], teacher_inputs)
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
        if hidden.ndim == 3:
            return hidden @ weight.T + bias
        return torch.einsum("oc,bc...->bo...", weight, hidden) + bias.reshape(-1, *[1] * (hidden.ndim - 2))

    def correct_output(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        hidden = apply(as_tensor(output))
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
