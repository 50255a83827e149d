"""A part of a pipeline as other runtimes take it: named tensors in, named tensors out, and which sizes vary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.families import (
    Condition,
    conditions_of,
    latent_form,
    predict_with,
    text_form,
)
from prune_lab.runtime import seeded

MODEL = "model"  # what the part is called that predicts, whatever its class
_TIMESTEP = 500.0
_PIXELS = 8.0  # a side, behind one of a latent, in the sizes of examples


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A module whose ``forward(*given)`` takes tensors alone: ``inputs`` in their order."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    examples: Callable[[int, int | None], dict[str, Tensor]]
    """(batch, side of the latent or None for the model's own) -> inputs with numbers of a kind that it is used with."""
    varying: Mapping[str, Mapping[int, str]]
    """By input: the dimensions that vary, as ``batch``, ``height`` or ``width``."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights as they lie in memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.module.state_dict().values())

    @property
    def varies_in_size(self) -> bool:
        """Whether it takes pictures of other sizes than the example's."""
        return any(set(sizes.values()) - {"batch"} for sizes in self.varying.values())

    def answers(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What the module itself answers, in the order of ``outputs``."""
        with torch.no_grad():
            found = self.module(*(inputs[name] for name in self.inputs))
        return found if isinstance(found, tuple) else (found,)

    def elsewhere(self, side: int | None = None) -> dict[str, Tensor]:
        """Inputs of another batch, and where it varies of another height, than those of examples of ``side``."""
        pictures = {name for name, sizes in self.varying.items() if "width" in sizes.values()}
        if not pictures:
            return self.examples(3, side)
        width = self.examples(1, side)[min(pictures)].shape[-1]
        found = self.examples(3, width + 8)
        return {
            name: tensor[..., :width].contiguous() if name in pictures else tensor
            for name, tensor in found.items()
        }

    def of_one_size(self) -> Part:
        """The same part for pictures of one size: only the batch varies."""
        kept = {
            name: {place: size for place, size in sizes.items() if size == "batch"}
            for name, sizes in self.varying.items()
        }
        return dataclasses.replace(self, varying=kept)

    def of_one_shape(self, batch: int, side: int | None = None) -> Part:
        """The same part for ``batch`` rows of latents of ``side`` alone: all its examples are of that shape."""

        def examples(asked: int, _: int | None) -> dict[str, Tensor]:
            found = self.examples(batch + asked, side)
            return {name: tensor[asked:].clone() for name, tensor in found.items()}

        return dataclasses.replace(self, examples=examples, varying={name: {} for name in self.inputs})


def sizes_of(tensor: Tensor) -> dict[int, str]:
    """The dimensions of latents or pictures (B, ..., h, w) that vary, and of what has no height the first."""
    pictures = {tensor.ndim - 2: "height", tensor.ndim - 1: "width"} if tensor.ndim > 3 else {}
    return {0: "batch"} | pictures


# The part that predicts --------------------------------------------------------------------------------------------


class _Predicting(nn.Module):
    """A model called as those of all families are: latents, timesteps, text, and rows of its conditions in order."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], *, reads: bool) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.reads = reads

    def forward(self, *given: Tensor) -> Tensor:
        sample, timestep, *others = given
        text = others.pop(0) if self.reads else sample.new_zeros((sample.shape[0], 0, 0))
        return predict_with(self.model, sample, timestep, text, dict(zip(self.names, others, strict=True)))


def _row(
    condition: Condition, batch: int, side: tuple[int, int], words: int, generator: torch.Generator
) -> Tensor:
    """Rows of a condition: masks that leave words out, sizes in pixels, the number that is always given, else noise."""
    if condition.words:
        mask = torch.ones(batch, words, dtype=torch.int64)
        mask[:, (words + 1) // 2 :] = 0
        return mask
    shape = (batch, *condition.row_shape(*side))
    if condition.whole or condition.classes:
        return torch.zeros(shape, dtype=torch.int64)
    if condition.value is not None:
        return torch.full(shape, float(condition.value))
    if condition.of_size:
        return torch.full(shape, _PIXELS * side[0])
    return torch.randn(shape, generator=generator)


def model_part(model: Any, *, tokens: int | None = None) -> Part:
    """``model`` as a part: sample (B, C, h, w), timestep (B,) float, text (B, L, D) where it reads one, and its
    conditions, each a row (B, ...) -> prediction in the form of the latents.

    ``tokens`` is the length L of the texts, None for what the model is run with where nothing is said.
    """
    conditions, (words, width) = conditions_of(model), text_form(model, tokens)

    def examples(batch: int, side: int | None) -> dict[str, Tensor]:
        generator, form = seeded(0), latent_form(model, side)
        found = {
            "sample": torch.randn(batch, *form, generator=generator),
            "timestep": torch.full((batch,), _TIMESTEP),
        }
        if width:
            found["text"] = torch.randn(batch, words, width, generator=generator)
        rows = {one.name: _row(one, batch, form[-2:], words, generator) for one in conditions}  # type: ignore[arg-type]
        return found | rows

    shown = examples(1, 8)
    return Part(
        MODEL,
        _Predicting(model, tuple(one.name for one in conditions), reads=bool(width)).eval(),
        tuple(shown),
        ("prediction",),
        examples,
        {name: sizes_of(tensor) for name, tensor in shown.items()},
    )
