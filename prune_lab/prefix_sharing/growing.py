"""Which tensors hold a row of their own for every row of a model's inputs.

Several sets of blocks are computed in one pass by repeating the rows. A block's inputs are then taken apart by sets,
and only some of them have the rows as their first dimension: positions, and what is computed once for a batch, do not.
Shapes alone cannot tell (four rows, or four words?), so a model on ``meta`` is run with two numbers of rows. Masks keep
their values there: where texts are of one length some models give their blocks no mask at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from prune_lab.blocks import Architecture
from prune_lab.errors import ReplayError
from prune_lab.families import Unit, meta_model, runs_on_meta
from prune_lab.runtime import device_of
from prune_lab.surgery.patching import patched

Marks = tuple[bool | None, ...]
"""One for each leaf: whether its first dimension grows with the rows; None for what is no tensor."""

FEW, MORE = 2, 3  # rows of the two runs


def _shapes(leaves: Sequence[Any]) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves)


def _kind(leaf: Any) -> Any:
    """Shape and dtype of a tensor, and the values of a mask."""
    if not isinstance(leaf, Tensor):
        return leaf
    values = leaf.cpu().numpy().tobytes() if leaf.dtype == torch.bool and not leaf.is_meta else b""
    return (tuple(leaf.shape), leaf.dtype, values)


def marks_of(few: Any, more: Any) -> Marks:
    """The marks of a tree of tensors that was made for ``FEW`` and for ``MORE`` rows."""
    shapes = (_shapes(tree_flatten(tree)[0]) for tree in (few, more))
    return tuple(
        None if one is None or other is None else bool(one and other) and one[0] * MORE == other[0] * FEW
        for one, other in zip(*shapes, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Growth:
    """The marks of one call of a unit's module: of its arguments, ``(args, kwargs)``, and of what it gives."""

    given: Marks
    made: Marks


@dataclass(frozen=True, slots=True)
class Kinds:
    """The inputs of a model without their values: a tree, and the kind of each tensor in it; of masks the values."""

    tree: str
    leaves: tuple[Any, ...]

    @staticmethod
    def of(inputs: Mapping[str, Any]) -> Kinds:
        """The kinds of keyword arguments of a model's ``forward``."""
        leaves, spec = tree_flatten(dict(inputs))
        return Kinds(treespec_dumps(spec), tuple(map(_kind, leaves)))

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Inputs of these kinds, of zeros, with the masks as they were; floating point numbers are of ``dtype``."""
        leaves = []
        for kind in self.leaves:
            if not isinstance(kind, tuple):
                leaves.append(kind)
                continue
            shape, own, values = kind
            if own is torch.bool:  # on the CPU: a model may count in it, which meta cannot
                mask = (
                    torch.frombuffer(bytearray(values), dtype=own) if values else torch.ones(shape, dtype=own)
                )
                leaves.append(mask.reshape(shape).to("cpu" if device.type == "meta" else device))
                continue
            leaves.append(torch.zeros(shape, dtype=dtype if own.is_floating_point else own, device=device))
        found: dict[str, Any] = tree_unflatten(leaves, treespec_loads(self.tree))
        return found


def _watched(model: Any, paths: Sequence[str], inputs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(arguments, result) of the last call of each module in a forward pass."""
    seen: dict[str, tuple[Any, Any]] = {}

    def watching(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = forward(*args, **kwargs)
            seen[path] = ((args, kwargs), found)
            return found

        return call

    modules = {path: model.get_submodule(path) for path in paths}
    with patched(model, {path: watching(path, module.forward) for path, module in modules.items()}):
        model(**inputs, return_dict=False)
    return seen


def _growth(model: Any, units: Sequence[Unit], kinds: tuple[Kinds, Kinds]) -> Mapping[str, Growth]:
    paths = [unit.path for unit in units]
    with torch.inference_mode(False), torch.no_grad():
        few, more = (_watched(model, paths, one.inputs(device_of(model), model.dtype)) for one in kinds)
    for unit in units:
        if unit.path not in few:
            raise ReplayError(
                f"asked to share what comes before {unit.name}, found that the forward pass of the model never calls "
                f"it ({unit.path}); its family lists a block that is not used"
            )
    return {
        path: Growth(*(marks_of(one, other) for one, other in zip(few[path], more[path], strict=True)))
        for path in paths
    }


@functools.lru_cache(maxsize=64)
def _without_weights(architecture: Architecture, kinds: tuple[Kinds, Kinds]) -> Mapping[str, Growth] | None:
    """What ``growth`` gives; None where the model does not run on ``meta``, since it reads values."""
    try:
        with runs_on_meta():
            return _growth(meta_model(architecture.config), architecture.outline.present, kinds)
    except ReplayError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None


def growth(
    model: Any, architecture: Architecture, inputs: Callable[[int], Mapping[str, Any]]
) -> Mapping[str, Growth]:
    """By path of each unit's module: which of its arguments and results grow with the rows of ``inputs(copies)``, those
    that are computed, repeated so many times.

    The model itself is run only where one without weights cannot be. Raises ReplayError for a unit whose module is not
    called.
    """
    kinds = Kinds.of(inputs(FEW)), Kinds.of(inputs(MORE))
    found = _without_weights(architecture, kinds)
    return _growth(model, architecture.outline.present, kinds) if found is None else found
