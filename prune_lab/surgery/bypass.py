"""Blocks that are bypassed for a trial: the model is as it was afterwards.

Deleting entries of diffusers' module lists is a trap: an up stage zips its residual with its attention blocks and pops
one skip connection for each, so a missing entry silently drops its neighbour. Bypass modules keep that bookkeeping:
they hand on those inputs that the family names. A residual block that reads a skip connection gets both in one tensor,
``[main, skip]``, and hands on the main path.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from diffusers import ModelMixin
from torch import nn

from prune_lab.blocks import architecture_of
from prune_lab.families import Unit
from prune_lab.plans import PruningPlan, gone_with


class Bypass(nn.Module):
    """In place of a unit: its inputs that go on without it, in the form in which ``original`` returns its outputs."""

    def __init__(self, original: nn.Module, unit: Unit) -> None:
        super().__init__()
        self._names = tuple(inspect.signature(type(original).forward).parameters)[1:]  # without self
        self._unit = unit
        for path in unit.keeps:
            # others read it, by its path in the unit
            parents = path.split(".")[:-1]
            place: nn.Module = self
            for parent in parents:
                if not hasattr(place, parent):
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(path.rsplit(".", 1)[-1], original.get_submodule(path))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The named inputs; of one that carries a skip connection too the main path alone."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        outputs: tuple[Any, ...] = tuple(
            None if name is None else given[name] for name in self._unit.hands_on
        )
        if self._unit.takes_skip:
            # Contiguous, as the smaller model's own tensors are: kernels may round differently on a strided view.
            outputs = tuple(output[:, : self._unit.main_channels].contiguous() for output in outputs)
        return outputs if self._unit.in_tuple or len(outputs) > 1 else outputs[0]


def stand_in_for(original: nn.Module, unit: Unit) -> nn.Module:
    """What takes the place of the module ``original`` of ``unit`` while it is bypassed."""
    return unit.stand_in() if unit.stand_in else Bypass(original, unit)


@contextlib.contextmanager
def bypassed(
    model: ModelMixin, removed: PruningPlan | Iterable[str], *, stand_in: bool = False
) -> Iterator[ModelMixin]:
    """The same ``model`` without the blocks of ``removed``; the originals return on exit, whatever happens inside.

    Samplers that leave with these blocks are bypassed too, as ``native_layout`` drops them. With ``stand_in`` blocks
    that cannot be removed are replaced by their stand-in; without it they raise UnremovableBlockError. Unknown names
    raise UnknownBlockError, a plan for another model PlanError.
    """
    architecture = architecture_of(model)
    names = removed.removed if isinstance(removed, PruningPlan) else tuple(removed)
    gone = gone_with(architecture, names, stand_in=stand_in)
    units = [unit for unit in architecture.units if unit.name in gone]
    originals: dict[str, nn.Module] = {unit.path: model.get_submodule(unit.path) for unit in units}
    try:
        for unit in units:
            model.set_submodule(unit.path, stand_in_for(originals[unit.path], unit))
        yield model
    finally:
        for path, module in originals.items():
            model.set_submodule(path, module)
