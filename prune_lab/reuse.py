"""Passes that reuse the inside of the pass before: less work for each picture, with the same weights.

Along the denoising steps the inside of a model changes slowly. So every n-th pass is whole, and those in between take
from it what the inner blocks made, and compute the outer ones anew:

- Of a U-Net, as in DeepCache (arXiv:2312.00858): the deep feature, which the inner levels hand to the outer ones, is
  the one of the last whole pass; the outer levels, with their skip connections, are computed.
- Of a transformer, as in Delta-DiT (arXiv:2406.01125): what a run of inner blocks added to the state is added again.

The pass itself is never written anew: the model runs as it always does, and only the ``forward`` of the inner units is
patched, as in ``prefix_sharing``. Any plan will do, students with code of their own too.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prune_lab.errors import UnsupportedModelError
from prune_lab.families import Outline, Unit, family_of, outline_of
from prune_lab.surgery.patching import patched

Kind = Literal["deep feature", "residual"]


@dataclass(frozen=True, slots=True)
class Inside:
    """The units that are not computed in between, neighbours in order of execution, and what is kept of them."""

    units: tuple[Unit, ...]
    kind: Kind
    depth: int
    """Levels of a U-Net, or blocks at either end of a transformer, that every pass computes."""

    @property
    def text(self) -> str:
        """What is reused, for a table."""
        return f"{self.units[0].name} to {self.units[-1].name}"


_TIMES = ("timestep", "timesteps", "t")  # names of a forward's argument


# What lies inside -----------------------------------------------------------------------------------------------------


def _refuse(called: str, found: str, cure: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"asked to reuse the inside of a {called}, found {found}; {cure}")


def _check_balanced(outline: Outline, inner: frozenset[str]) -> None:
    """Raise UnsupportedModelError where a unit outside of ``inner`` reads a skip connection of one inside of it, or the
    other way round: it would be one of an earlier pass.
    """
    skips: list[str] = [""]  # the stem's
    for unit in outline.units:
        if unit.takes_skip:
            giver = skips.pop() if skips else ""
            if (giver in inner) != (unit.name in inner):
                raise _refuse(
                    "U-Net",
                    f"that {unit.name} reads a skip connection of {giver or 'the stem'}, on the other side of the cut",
                    "choose another depth",
                )
        if unit.gives_skip:
            skips.append(unit.name)


def _of_levels(outline: Outline, depth: int) -> tuple[Unit, ...]:
    """What lies further in than the outermost ``depth`` levels of a U-Net, the sampler that leads there included."""
    downs = [stage.name for stage in outline.stages if stage.lane == "left"]
    ups = [stage.name for stage in outline.stages if stage.lane == "right"]
    outer_ups = set(ups[len(ups) - depth :])
    outer_downs = set(downs[:depth])

    def outside(unit: Unit) -> bool:
        if unit.stage == downs[depth - 1] and unit.kind == "sampler":
            return False
        return unit.stage in outer_downs or unit.stage in outer_ups

    return tuple(unit for unit in outline.units if not unit.inside and not outside(unit))


def _inside_of_levels(outline: Outline, depth: int) -> Inside:
    levels = sum(stage.lane == "left" for stage in outline.stages)
    if levels < 2:
        raise _refuse("U-Net", "one level, which nothing lies inside of", "reuse nothing (1)")
    if not 1 <= depth < levels:
        raise _refuse(
            "U-Net", f"{levels} levels and a depth of {depth}", f"give a depth of 1 to {levels - 1}"
        )
    inner = _of_levels(outline, depth)
    _check_balanced(outline, frozenset(unit.name for unit in inner))
    units = tuple(unit for unit in inner if not unit.gone)
    if not units:
        raise _refuse("U-Net", f"no block further in than its outer {depth} levels", "give a smaller depth")
    return Inside(units, "deep feature", depth)


def _alike(units: Sequence[Unit]) -> tuple[Unit, ...]:
    """The longest run of ``units`` that hand on the same inputs, all of them."""
    best: list[Unit] = []
    run: list[Unit] = []
    for unit in units:
        if None in unit.hands_on:
            run = []
            continue
        run = [*run, unit] if run and run[-1].hands_on == unit.hands_on else [unit]
        best = run if len(run) > len(best) else best
    return tuple(best)


def _inside_of_chain(outline: Outline, depth: int | None, called: str) -> Inside:
    units = [unit for unit in outline.present if not unit.inside]
    if len(units) < 3:
        raise _refuse(called, f"{len(units)} blocks, of which none lies inside", "it takes three at least")
    depth = max(1, len(units) // 4) if depth is None else depth
    most = (len(units) - 1) // 2
    if not 1 <= depth <= most:
        raise _refuse(called, f"{len(units)} blocks and a depth of {depth}", f"give a depth of 1 to {most}")
    inner = _alike(units[depth : len(units) - depth])
    if not inner:
        raise _refuse(called, "inner blocks that hand on different inputs", "reuse nothing (1)")
    return Inside(inner, "residual", depth)


def _taken(model: nn.Module) -> inspect.Signature:
    return inspect.signature(type(model).forward)


def _time_of(model: nn.Module) -> str:
    """The argument of ``forward`` that holds the timestep. Raises UnsupportedModelError where there is none."""
    name = next((name for name in _TIMES if name in _taken(model).parameters), "")
    if not name:
        raise _refuse(family_of(model).called, "that its forward takes no timestep", "reuse nothing (1)")
    return name


def inside_of(model: nn.Module, depth: int | None = None) -> Inside:
    """The units of ``model`` that passes in between reuse, with ``depth`` levels or blocks outside of them.

    None: one level of a U-Net, a quarter of the blocks at either end of a transformer. Raises UnsupportedModelError
    with the reason where the model has no such inside, or does not say its timestep.
    """
    family, outline = family_of(model), outline_of(model)
    _time_of(model)
    if any(stage.lane == "left" for stage in outline.stages):
        return _inside_of_levels(outline, 1 if depth is None else depth)
    return _inside_of_chain(outline, depth, family.called)


# Passes ---------------------------------------------------------------------------------------------------------------


def _same(one: Any, other: Any) -> bool:
    """Whether two steps were given the same latents."""
    if one is other:
        return True
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.shape == other.shape and torch.equal(one, other)


@dataclass(slots=True, eq=False)
class Reuse:
    """How many passes there were so far, and of which kind; a call of the model is a pass."""

    every: int
    inside: Inside | None
    whole: int = 0
    reused: int = 0
    _place: int = 0  # of the step among those of its picture
    _lane: int = 0  # which call of its step this is: some pipelines call once with and once without the text
    _reusing: bool = False
    _steps: tuple[Tensor, ...] = ()  # timesteps of the first and the last step
    _sample: Any = None  # the latents of the last call
    _kept: dict[int, dict[str, Any]] = field(default_factory=dict)  # by lane, by name of the unit

    @property
    def passes(self) -> int:
        """Calls of the model."""
        return self.whole + self.reused

    def restart(self) -> None:
        """The next pass is whole: another picture begins."""
        self._steps, self._sample = (), None
        self._kept.clear()

    def begin(self, sample: Any, timestep: Tensor) -> None:
        """A pass begins: whether it is whole follows from how many steps its picture has had."""
        self._next(sample, timestep)
        found = self._kept.get(self._lane)
        self._reusing = found is not None and self._place % self.every > 0
        if self._reusing:
            self.reused += 1
        else:
            self.whole += 1
            self._kept[self._lane] = {}

    def _next(self, sample: Any, timestep: Tensor) -> None:
        """Count the step, or the lane where it is the same step again."""
        before, self._sample = self._sample, sample
        shapes = [one.shape if isinstance(one, Tensor) else None for one in (before, sample)]
        if not self._steps or shapes[0] != shapes[1] or timestep.shape != self._steps[1].shape:
            self._anew(sample, timestep)
            return
        first, last = self._steps
        if torch.equal(timestep, last) and _same(before, sample):
            self._lane += 1
            return
        # Along a picture timesteps go one way. One that is the first again, or turns back, begins another picture.
        turns = float(((timestep - last) * (last - first)).sum()) < 0
        if turns or torch.equal(timestep, first):
            self._anew(sample, timestep)
            return
        self._steps, self._place, self._lane = (first, timestep), self._place + 1, 0

    def _anew(self, sample: Any, timestep: Tensor) -> None:
        """The first step of a picture."""
        self.restart()
        self._sample, self._steps, self._place, self._lane = sample, (timestep, timestep), 0, 0

    # What the units answer

    @property
    def reusing(self) -> bool:
        """Whether the pass that is under way reuses."""
        return self._reusing

    @property
    def kept(self) -> dict[str, Any]:
        """What the last whole pass of the same lane left, by name of the unit."""
        return self._kept[self._lane]


Forward = Callable[..., Any]


def _of_features(reuse: Reuse, inside: Inside, model: nn.Module) -> dict[str, Forward]:
    """By path: the units hand back what they gave in the last whole pass, of which the last one's reaches outside."""

    def answering(unit: Unit, own: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if reuse.reusing:
                return reuse.kept[unit.name]
            found = reuse.kept[unit.name] = own(*args, **kwargs)
            return found

        return forward

    return {unit.path: answering(unit, model.get_submodule(unit.path).forward) for unit in inside.units}


def _of_residuals(reuse: Reuse, inside: Inside, model: nn.Module) -> dict[str, Forward]:
    """By path: the units hand on what they are given, and the last one adds what all of them added before."""
    first, last = inside.units[0], inside.units[-1]
    begun: dict[
        int, tuple[Tensor, ...]
    ] = {}  # what the first was given, and meanwhile what the last unit gave

    def answering(unit: Unit, module: nn.Module) -> Forward:
        own, taken = module.forward, inspect.signature(type(module).forward)
        many = unit.in_tuple or len(unit.hands_on) > 1

        def streams(args: Any, kwargs: Any) -> tuple[Tensor, ...]:
            given = taken.bind(None, *args, **kwargs).arguments
            more = next((n for n, one in taken.parameters.items() if one.kind is one.VAR_KEYWORD), "")
            every = {**given, **given.get(more, {})}
            return tuple(every[name] for name in unit.hands_on if name is not None)

        def answer(found: tuple[Tensor, ...]) -> Any:
            return found if many else found[0]

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = streams(args, kwargs)
            if reuse.reusing:
                if unit is not last:
                    return answer(given)
                added = zip(given, reuse.kept[last.name], strict=True)
                return answer(tuple(one + delta for one, delta in added))
            if unit is first:
                begun[0] = given
            elif any(one is not other for one, other in zip(given, begun[1], strict=True)):
                raise _refuse(
                    family_of(model).called,
                    f"that {unit.name} is not given what the block before it gave",
                    "such blocks cannot be reused as one run: give a larger depth, or reuse nothing (1)",
                )
            output = own(*args, **kwargs)
            begun[1] = tuple(output[: len(given)]) if isinstance(output, tuple) else (output,)
            if unit is last:
                pairs = zip(begun[1], begun[0], strict=True)
                reuse.kept[last.name] = tuple(after - before for after, before in pairs)
                begun.clear()
            return output

        return forward

    return {unit.path: answering(unit, model.get_submodule(unit.path)) for unit in inside.units}


_FORWARDS: Mapping[Kind, Callable[[Reuse, Inside, nn.Module], dict[str, Forward]]] = {
    "deep feature": _of_features,
    "residual": _of_residuals,
}


@contextlib.contextmanager
def reusing(model: nn.Module, every: int, *, depth: int | None = None) -> Iterator[Reuse]:
    """The same ``model`` whose every ``every``-th pass is whole; as it was on exit, bit for bit.

    The first pass of a picture is whole: one that begins is known by its timestep, which jumps back, and by
    ``restart``. With ``every`` 1 all passes are whole, and are only counted. Raises UnsupportedModelError as
    ``inside_of`` does, and in the first pass where something happens between the inner blocks of a transformer.
    """
    if every < 1:
        raise UnsupportedModelError(f"asked to reuse with one whole pass in {every}; give 1 (all) or more")
    inside = inside_of(model, depth) if every > 1 else None
    reuse, taken = Reuse(every, inside), _taken(model)
    latents, time = family_of(model).latents, _time_of(model) if inside else ""

    def begins(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = taken.bind(module, *args, **kwargs).arguments
        reuse.begin(given[latents], torch.as_tensor(given[time]))

    def counts(*_: Any) -> None:
        reuse.whole += 1

    forwards = _FORWARDS[inside.kind](reuse, inside, model) if inside else {}
    hook = (
        model.register_forward_pre_hook(begins, with_kwargs=True)
        if inside
        else model.register_forward_pre_hook(counts)
    )
    try:
        with patched(model, forwards):
            yield reuse
    finally:
        hook.remove()
        reuse.restart()
