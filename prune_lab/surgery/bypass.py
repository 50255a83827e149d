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

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from prune_lab.blocks import architecture_of
from prune_lab.families import Unit
from prune_lab.plans import PruningPlan, chosen_units, gone_with
from prune_lab.surgery.masking import masked


class MainPath:
    """How the latest state on the main path lies in memory; a concatenation with a skip connection hides it.

    Plain attention returns states with the channels last, from which most later layers keep that order.
    """

    def __init__(self) -> None:
        self.form = torch.contiguous_format

    def seen(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """A hook on what writes to the main path."""
        state = output if isinstance(output, Tensor) else output[0]
        last = state.ndim == 4 and not state.is_contiguous()
        last = last and state.is_contiguous(memory_format=torch.channels_last)
        self.form = torch.channels_last if last else torch.contiguous_format


class Bypass(nn.Module):
    """In place of a unit: its inputs that go on without it, in the form in which ``original`` returns its outputs."""

    def __init__(self, original: nn.Module, unit: Unit) -> None:
        super().__init__()
        self._names = tuple(inspect.signature(type(original).forward).parameters)[1:]  # without self
        self._unit = unit
        self.main_path = MainPath()
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
            # As the smaller model's own tensors lie in memory: kernels may round differently on a strided view.
            form = self.main_path.form
            outputs = tuple(
                output[:, : self._unit.main_channels].contiguous(memory_format=form) for output in outputs
            )
        return outputs if self._unit.in_tuple or len(outputs) > 1 else outputs[0]


def stand_in_for(original: nn.Module, unit: Unit) -> nn.Module:
    """What takes the place of the module ``original`` of ``unit`` while it is bypassed."""
    return unit.stand_in() if unit.stand_in else Bypass(original, unit)


@contextlib.contextmanager
def bypassed(
    model: ModelMixin, removed: PruningPlan | Iterable[str], *, stand_in: bool = False
) -> Iterator[ModelMixin]:
    """The same ``model`` without the blocks of ``removed``; the originals return on exit, whatever happens inside.

    Of a plan with widths the units that leave are set to 0 where they are read (``masking``).
    Samplers that leave with these blocks are bypassed too, as ``native_layout`` drops them. With ``stand_in`` blocks
    that cannot be removed are replaced by their stand-in; without it they raise UnremovableBlockError. Unknown names
    raise UnknownBlockError, a plan for another model, or one whose units are not chosen, PlanError.
    """
    architecture = architecture_of(model)
    names = removed.removed if isinstance(removed, PruningPlan) else tuple(removed)
    kept = chosen_units(architecture, removed) if isinstance(removed, PruningPlan) else {}
    gone = gone_with(architecture, names, stand_in=stand_in)
    units = [unit for unit in (*architecture.units, *architecture.layers) if unit.name in gone]
    originals: dict[str, nn.Module] = {unit.path: model.get_submodule(unit.path) for unit in units}
    main_path, hooks = MainPath(), []
    try:
        for unit in units:
            instead = stand_in_for(originals[unit.path], unit)
            if isinstance(instead, Bypass):
                instead.main_path = main_path
            model.set_submodule(unit.path, instead)
        if any(unit.takes_skip for unit in units):
            writers = [architecture.stem, *(unit.path for unit in architecture.units)]
            hooks = [model.get_submodule(path).register_forward_hook(main_path.seen) for path in writers]
        with masked(model, kept):
            yield model
    finally:
        for hook in hooks:
            hook.remove()
        for path, module in originals.items():
            model.set_submodule(path, module)
