"""A model's own forward pass, run for many sets of removed units, where what the sets share is computed once.

The pass itself is never written anew: the model runs as it always does, and only the ``forward`` of its units is
patched. A unit before the first difference to the set before hands back what it gave then, a removed one hands on those
inputs that its family names, the rest compute. Sets go in the order of their decisions, unit by unit, so that all that
begin alike stand together, as words do in a dictionary.

*Serial*, one set in a pass, every number is that of a plain pass, bit for bit. *Wide*, the rows are repeated for
several sets, one copy for each: a unit computes each distinct history once, in one call, and a sum may be rounded
otherwise.

Units may lie inside others (a transformer layer in an attention block). The outer one is then computed when anything in
it differs, once for each difference, and the inner ones share among themselves as the outer ones do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from prune_lab.blocks import Architecture
from prune_lab.errors import ReplayError
from prune_lab.families import Unit
from prune_lab.prefix_sharing.growing import Growth, Marks
from prune_lab.prefix_sharing.sites import Code, Site, coded, grouped, sites_of
from prune_lab.surgery.patching import patched


@dataclass(frozen=True, slots=True)
class _Held:
    """What a unit gave for the last set of a pass, for the sets that begin as that one did."""

    key: Code
    output: Any
    leaves: list[Any]
    spec: TreeSpec
    versions: tuple[int, ...]


# Tensors -------------------------------------------------------------------------------------------------------------


def _versions(leaves: Sequence[Any]) -> tuple[int, ...]:
    """How often each tensor was changed in place; torch does not count it for those made in inference mode."""
    return tuple(
        leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0 for leaf in leaves
    )


def _split(leaves: Sequence[Any], marks: Marks, lanes: int) -> list[list[Any]]:
    """For each lane its part of the leaves."""
    columns = [
        leaf.chunk(lanes) if grows else (leaf,) * lanes for leaf, grows in zip(leaves, marks, strict=True)
    ]
    return [list(lane) for lane in zip(*columns, strict=True)] if columns else [[] for _ in range(lanes)]


def _joined(lanes: Sequence[Sequence[Any]], marks: Marks) -> list[Any]:
    """The opposite of ``_split``."""
    return [
        torch.cat(column) if grows and len(column) > 1 else column[0]
        for column, grows in zip(zip(*lanes, strict=True), marks, strict=True)
    ]


def _check_shared(unit: Unit, lanes: Sequence[Sequence[Any]], marks: Marks) -> None:
    """Raise ReplayError where the unit gives other values for some lanes in a tensor that has no rows to tell them."""
    for column, grows in zip(zip(*lanes, strict=True), marks, strict=True):
        first = column[0]
        if grows or not isinstance(first, Tensor) or first.is_meta:
            continue
        if not all(one is first or torch.equal(one, first) for one in column[1:]):
            raise ReplayError(
                f"asked to run several sets in one pass, found that {unit.name} gives a tensor of shape "
                f"{list(first.shape)}, which has no rows and is another one without some blocks; such a model is "
                "scored set by set (width 1)"
            )


def _picked(leaves: Sequence[Any], marks: Marks, which: Sequence[int], lanes: int) -> list[Any]:
    """The leaves for the lanes ``which`` alone; a view where they are neighbours."""
    if len(which) == lanes:
        return list(leaves)
    start, stop = which[0], which[-1] + 1
    if stop - start == len(which):
        return [
            leaf[start * (len(leaf) // lanes) : stop * (len(leaf) // lanes)] if grows else leaf
            for leaf, grows in zip(leaves, marks, strict=True)
        ]
    parts = _split(leaves, marks, lanes)
    return _joined([parts[number] for number in which], marks)


def _check_form(
    unit: Unit,
    found: Mapping[Code, Sequence[Any]],
    spec: TreeSpec | None,
    leaves: Sequence[Any],
    form: TreeSpec,
) -> None:
    """Raise ReplayError when the unit gives something of another form than it did for the lanes in ``found``."""
    if spec is None:
        return
    shapes = [
        [list(leaf.shape[1:]) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in one]
        for one in (next(iter(found.values())), leaves)
    ]
    if spec != form or shapes[0] != shapes[1]:
        raise ReplayError(
            f"asked for what goes on without {unit.name}, found that it gives {len(shapes[0])} values of shapes "
            f"{shapes[0]} a row, and that its family hands on {len(shapes[1])} of shapes {shapes[1]}; they must agree"
        )


def _layout(output: Any) -> torch.memory_format:
    """How the state on the main path lies in memory: with the channels last, as plain attention gives it, or not."""
    state = output if isinstance(output, Tensor) else output[0]
    last = isinstance(state, Tensor) and state.ndim == 4 and not state.is_contiguous()
    if last and state.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


# The passes ----------------------------------------------------------------------------------------------------------


class _Passes:
    """The passes of one model for sorted ``codes``; what a unit gave lives here from one pass to the next."""

    def __init__(
        self,
        sites: Sequence[Site],
        growth: Mapping[str, Growth] | None,
        at_once: int,
        computed: Callable[[Unit, int], None],
    ) -> None:
        self._sites = sites
        self._growth = growth
        self._at_once = at_once
        self._computed = computed
        self._held: dict[int, _Held] = {}
        self._next_held: dict[int, _Held] = {}
        self._lanes: Sequence[Code] = ()
        self._last: Code = ()
        self._shared = 0  # places whose decisions the next pass begins with too
        self._place = 0  # of the unit that is to be called next
        self._main_path = torch.contiguous_format

    def forwards(self) -> dict[str, Callable[..., Any]]:
        """By path of each module what it answers through meanwhile."""

        def answering(place: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._answer(place, args, kwargs)

        return {site.unit.path: answering(place) for place, site in enumerate(self._sites)}

    def run(self, call: Callable[[], Tensor], codes: Sequence[Code], following: Code | None) -> Tensor:
        """The answer of one pass for ``codes``, a copy of the rows for each; ``following`` is the next pass's first."""
        self._lanes, self._last, self._place = codes, codes[-1], 0
        self._main_path = torch.contiguous_format
        self._shared = 0
        if following is not None:
            pairs = enumerate(zip(codes[-1], following, strict=True))
            self._shared = next((place for place, (one, other) in pairs if one != other), len(following))
        answer = call()
        self._finished(len(self._sites))
        self._held, self._next_held = self._next_held, {}
        return answer

    def _finished(self, end: int) -> None:
        if self._place != end:
            raise ReplayError(
                f"asked to run a model unit by unit, found that its forward pass leaves out "
                f"{self._sites[self._place].unit.name}; its family lists a block that is not used"
            )

    def _arrived(self, place: int) -> None:
        name = self._sites[place].unit.name
        if place < self._place:
            raise ReplayError(
                f"asked to run a model unit by unit, found that its forward pass calls {name} twice or out of the "
                "order that its family gives; such a model cannot be scored by replay"
            )
        if place > self._place:
            raise ReplayError(
                f"asked to run a model unit by unit, found that its forward pass calls {name} where "
                f"{self._sites[self._place].unit.name} should come; its family gives another order"
            )

    def _handed_back(self, place: int) -> _Held | None:
        """What the unit gave in the pass before. Raises ReplayError when it was changed since."""
        held = self._held.get(place)
        if held is not None and _versions(held.leaves) != held.versions:
            raise ReplayError(
                f"asked to hand back what {self._sites[place].unit.name} gave before, found that the model has changed "
                "it in place since; such a model cannot be scored by replay"
            )
        return held

    def _answer(self, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._arrived(place)
        site, lanes = self._sites[place], self._lanes
        first: dict[Code, int] = {}  # of each distinct history the first lane
        for number, code in enumerate(lanes):
            first.setdefault(code[: site.end], number)
        found: dict[Code, list[Any]] = {}
        output: Any = None
        spec: TreeSpec | None = None
        held = self._handed_back(place)
        if held is not None and held.key in first:
            found[held.key], output, spec = held.leaves, held.output, held.spec
        covered = len(lanes) == 1  # the output of one call is that of all lanes
        for keys in self._calls(place, [key for key in first if key not in found]):
            which = [first[key] for key in keys]
            given = self._given(place, args, kwargs, which)
            output = self._called(place, given, [lanes[number] for number in which])
            leaves, form = tree_flatten(output)
            _check_form(site.unit, found, spec, leaves, form)
            spec = form
            found |= zip(keys, self._parts(place, leaves, len(keys)), strict=True)
            covered = len(keys) == len(lanes)
        self._place = site.end
        assert spec is not None
        self._hold(place, found, output, spec)
        if not covered:
            parts, marks = [found[code[: site.end]] for code in lanes], self._marks(place).made
            _check_shared(site.unit, parts, marks)
            joined = _joined(parts, marks)
            output = tree_unflatten(joined, spec)
        if not site.unit.inside:
            self._main_path = _layout(output)
        return output

    def _calls(self, place: int, wanted: Sequence[Code]) -> Iterator[Sequence[Code]]:
        """The histories in wanted, by calls: those that compute the unit, then those that it is removed from."""
        for gone in (False, True):
            keys = [key for key in wanted if key[place] is gone]
            for start in range(0, len(keys), self._at_once):
                yield keys[start : start + self._at_once]

    def _marks(self, place: int) -> Growth:
        assert self._growth is not None, "several lanes, and it is not known what grows with them"
        return self._growth[self._sites[place].unit.path]

    def _given(self, place: int, args: Any, kwargs: Any, which: Sequence[int]) -> tuple[Any, Any]:
        if len(which) == len(self._lanes):
            return args, kwargs
        leaves, spec = tree_flatten((args, kwargs))
        marks = self._marks(place).given
        if len(marks) != len(leaves):
            raise ReplayError(
                f"asked to run {self._sites[place].unit.name} for several sets at a time, found {len(leaves)} values "
                f"among its inputs, and {len(marks)} in a model without weights; such a model is scored set by set"
            )
        if any(isinstance(leaf, Tensor) and mark is None for leaf, mark in zip(leaves, marks, strict=True)):
            raise ReplayError(
                f"asked to run {self._sites[place].unit.name} for several sets at a time, found a tensor among its "
                "inputs where a model without weights gives it none; such a model is scored set by set (width 1)"
            )
        picked: tuple[Any, Any] = tree_unflatten(_picked(leaves, marks, which, len(self._lanes)), spec)
        return picked

    def _called(self, place: int, given: tuple[Any, Any], lanes: Sequence[Code]) -> Any:
        """What the unit gives for ``lanes``, which all keep it or all lack it."""
        (args, kwargs), site = given, self._sites[place]
        if lanes[0][place]:
            handed_on = site.gone(*args, **kwargs)
            if site.unit.takes_skip and not site.unit.stand_in:
                # It was cut from a concatenation, which hides how the main path lies; kernels may round otherwise then.
                return handed_on.contiguous(memory_format=self._main_path)
            return handed_on
        leaves = tree_flatten(given)[0]
        before = _versions(leaves)
        outer, self._lanes, self._place = self._lanes, lanes, place + 1
        try:
            output = site.forward(*args, **kwargs)
        finally:
            self._lanes = outer
        if _versions(leaves) != before:
            raise ReplayError(
                f"asked to share what comes before a difference, found that {site.unit.name} changes one of its inputs "
                "in place, so that it gives more than its output; such a model cannot be scored by replay"
            )
        self._finished(site.end)
        self._place = place
        self._computed(site.unit, len(lanes))
        return output

    def _parts(self, place: int, leaves: Sequence[Any], lanes: int) -> list[list[Any]]:
        return [list(leaves)] if lanes == 1 else _split(leaves, self._marks(place).made, lanes)

    def _hold(self, place: int, found: Mapping[Code, list[Any]], output: Any, spec: TreeSpec) -> None:
        """Keep what the sets of the next pass begin with."""
        end = self._sites[place].end
        key = self._last[:end]
        if end > self._shared or key not in found:
            return
        before = self._held.get(place)
        if before is not None and before.key == key:
            self._next_held[place] = before
            return
        leaves = found[key]
        if len(found) > 1:  # a part of a larger tensor would keep all of it
            leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            output = tree_unflatten(leaves, spec)
        self._next_held[place] = _Held(key, output, leaves, spec, _versions(leaves))


def _state(model: nn.Module) -> list[tuple[str, int, int]]:
    """Which buffers the model has, and how often each was changed in place."""
    return [(name, id(buffer), _versions([buffer])[0]) for name, buffer in model.named_buffers()]


def replayed(
    model: nn.Module,
    architecture: Architecture,
    call: Callable[[int], Tensor],
    removed: Sequence[frozenset[str]],
    *,
    width: int = 1,
    growth: Callable[[], Mapping[str, Growth]] | None = None,
    computed: Callable[[Unit, int], None] = lambda unit, lanes: None,
    at_once: int | None = None,
    compiled: bool = False,
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """(numbers of sets, answer (rows, ...)) of every distinct set in ``removed``, in the order in which they are ready.

    ``call(lanes)`` runs the model on its rows, repeated so many times, and gives its answer. ``width`` sets go in one
    pass; ``growth`` says which tensors grow with them and is asked only where several do. ``computed(unit, lanes)`` is
    told of each unit that is run; at most ``at_once`` sets go into one call of it.
    Raises ReplayError for a model that does something that its units cannot be replayed with: it calls one twice,
    changes what one gave, or keeps state in its buffers.
    """
    sites = sites_of(model, architecture, compiled)
    numbers: dict[Code, list[int]] = {}
    for number, names in enumerate(removed):
        numbers.setdefault(coded(sites, names), []).append(number)
    groups = grouped(sites, list(numbers), width)
    known = growth() if growth is not None and any(len(group) > 1 for group in groups) else None
    passes = _Passes(sites, known, at_once or width, computed)
    before = _state(model)
    for group, following in itertools.zip_longest(groups, groups[1:]):
        with patched(model, passes.forwards()):
            answer = passes.run(lambda: call(len(group)), group, following[0] if following else None)  # noqa: B023
        if _state(model) != before:
            raise ReplayError(
                "asked to run a model unit by unit, found that its forward pass changes a buffer, so that a unit gives "
                "more than its output; such a model cannot be scored by replay"
            )
        for code, part in zip(group, answer.chunk(len(group)), strict=True):
            yield tuple(numbers[code]), part
