"""A transformer as a chain of equal blocks: one row describes a class, whatever takes place around its blocks.

What diffusers calls such a model is a few lists of blocks that run one after the other. Every block reads and writes
tensors of one shape, so a chain without some of its blocks is the same class with fewer of them, renumbered. What sets
a class apart (a last block of its own, a block that others read, counted blocks) is said in its row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from torch import Tensor

from prune_lab.errors import NonNativePlanError
from prune_lab.families.family import (
    Condition,
    Family,
    Joins,
    Layout,
    Outline,
    Place,
    Removed,
    Rule,
    Stage,
    Unit,
    arranged,
    noise_alone,
    plain_config,
    sample_size,
    usual_settings,
)
from prune_lab.families.transformer_settings import check_settings

Config = Mapping[str, Any]
Size = tuple[int, int]  # height and width of the latent
Kept = Mapping[
    str, tuple[int, ...]
]  # path of a list of blocks: places, counted from 0, of those that are left


# What goes in ---------------------------------------------------------------------------------------------------------


as_arguments = functools.partial(arranged, latents="hidden_states")
STEPS = 1000  # by which most pipelines divide the timestep for a model that wants the share of noise
# Others divide it by the length of the schedule, which the scheduler says.
LENGTH = Condition(name="schedule_length", place="schedule", shape=(), whole=True, value=STEPS)


def grid(*sides: int, like: Tensor) -> Tensor:
    """The places of a grid of these sides in order, one a row (N, number of sides), as numbers on the device of
    ``like``.
    """
    axes = (torch.arange(side, dtype=like.dtype) for side in sides)
    return torch.cartesian_prod(*axes).reshape(-1, len(sides)).to(like.device)


def counted(mask: Tensor) -> Tensor:
    """A mask (B, L) for a model that counts the words of each row while it runs: on ``meta`` there is nothing to count,
    so it leaves no word out there and is on the CPU.
    """
    return torch.ones(mask.shape, dtype=torch.bool) if mask.is_meta else mask.bool()


def word_mask(name: str, shape: tuple[int, ...] = (), place: Place = "argument") -> Condition:
    """The mask of the words of a text, by the name of its argument; ``shape`` is that of a text of fixed length."""
    return Condition(name=name, place=place, shape=shape, of_text=True, words=not shape, whole=True)


def heads(config: Config) -> int:
    """Width of the blocks: attention heads by their width."""
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


@functools.cache
def _defaults(class_name: str) -> Config:
    return usual_settings(getattr(diffusers, class_name))


def refuse_an_empty_chain(kept: Kept) -> None:
    """Raise NonNativePlanError where no block is left of a chain whose last block is another than the others."""
    if not any(kept.values()):
        raise NonNativePlanError(
            "no block would be left, and the last one has parts that no other has: keep one block"
        )


def one_stays(outline: Outline) -> list[Rule]:
    """The rule of such a chain."""
    names = tuple(unit.name for unit in outline.units)
    return [Rule(names, most=len(names) - 1, least=0)]


# The blocks -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """One list of blocks: where it is, how its blocks are called, and which of their inputs go on without them."""

    letter: str  # of the names: B1, B2, ...; also the name of the stage
    path: str = "transformer_blocks"
    setting: str = "num_layers"  # that says how many there are
    hands_on: tuple[str | None, ...] = ("hidden_states",)
    last_hands_on: tuple[str | None, ...] = ()  # of the last block, where it answers with less
    last_is_less: bool = (
        False  # whether the last block has less in it, and so has another that becomes the last
    )
    main: str = "hidden_states"  # the input that carries the picture
    in_tuple: bool = False
    self_attention: tuple[str, ...] = ()  # paths in a block

    def units(self, count: int, width: int) -> list[Unit]:
        """The ``count`` blocks of the list in order of execution."""
        return [
            Unit(
                name=f"{self.letter}{i + 1}",
                path=f"{self.path}.{i}",
                stage=self.letter,
                kind="transformer",
                in_channels=width,
                out_channels=width,
                hands_on=(self.last_hands_on if i == count - 1 else ()) or self.hands_on,
                in_tuple=self.in_tuple,
                self_attention=tuple(f"{self.path}.{i}.{path}" for path in self.self_attention),
                main=self.hands_on.index(self.main),
                changes_others=self.last_is_less and 0 < i == count - 1,
            )
            for i in range(count)
        ]


JOINT = ("encoder_hidden_states", "hidden_states")  # what a block of two streams answers with, text first


def _number(path: str) -> int:
    return int(path.rsplit(".", 1)[1])


def kept_blocks(lists: Sequence[Blocks], outline: Outline, removed: Removed) -> Kept:
    """The places of the blocks that are left, list by list."""
    return {
        blocks.path: tuple(
            _number(unit.path) for unit in outline.units_in(blocks.letter) if unit.name not in removed
        )
        for blocks in lists
    }


def renumbered(lists: Sequence[Blocks], outline: Outline, kept: Kept) -> Layout:
    """The same class with the blocks ``kept``, in the order in which they were."""
    names: dict[str, str | None] = {unit.path: None for unit in outline.units}
    config = dict(outline.config)
    for blocks in lists:
        config[blocks.setting] = len(kept[blocks.path])
        names |= {f"{blocks.path}.{old}": f"{blocks.path}.{new}" for new, old in enumerate(kept[blocks.path])}
    return Layout(config, names)


def _features(
    lists: Sequence[Blocks], outline: Outline, removed: Removed, points: int = 4
) -> list[tuple[str, str]]:
    """The state at the ends of the four quarters of each list, as the next block that stays reads it.

    Without ``removed`` it is written by the last block that is left until there; in the model it stands behind the
    removed blocks that follow on that one. What stands between them is no aim of a student: the repair of the cut, and
    the loss of the outputs, draw the same tensor to what the next block reads. Lists are looked at one by one, as the
    state may have another form in the next: behind the last block of one stands its own end.
    """
    found: dict[str, str] = {}  # by what writes it: two ends with the same last block are one point
    for blocks in lists:
        units = outline.units_in(blocks.letter)
        stay = [place for place, unit in enumerate(units) if unit.name not in removed]
        ends = sorted({-(-len(units) * part // points) for part in range(1, points + 1)} - {0})
        for end in ends:
            writers = [place for place in stay if place < end]
            if writers:
                reader = next((place for place in stay if place > writers[-1]), len(units))
                found[units[writers[-1]].path] = units[reader - 1].path
    return [(path, origin) for origin, path in found.items()]


# A row ----------------------------------------------------------------------------------------------------------------

Arrange = Callable[..., dict[str, Any]]
Finish = Callable[[Outline, Layout, Kept], Layout]


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """A diffusers class whose blocks stand in ``lists``, in order of execution: what of ``Family`` it says itself.

    Every function of a config is given one in which nothing is left out.
    """

    class_name: str
    lists: tuple[Blocks, ...]
    _: dataclasses.KW_ONLY
    text: Callable[[Config], int]
    stem: str | Callable[[Config], str]
    head: str | Callable[[Config], str] = "proj_out"
    arrange: Arrange = as_arguments
    prediction: Callable[[Config, Any, Tensor], Tensor] = noise_alone
    answers: tuple[str | None, ...] = ("text",)
    joins: Joins = "alike"
    channels: Callable[[Config], int] = lambda config: int(config["in_channels"])
    predicted: Callable[[Config], int | None] = lambda config: None
    film: Callable[[Config], int] | None = None
    """How many frames the latent of a film has that the model is meant for; None of a model of pictures."""
    size: Callable[[Config], Size] = sample_size
    pixels: Callable[[Config], int | None] = lambda config: None
    tokens: Callable[[Config], int] = lambda config: 77
    padded: bool = False
    """Whether a text always has as many words as ``tokens`` says."""
    width: Callable[[Config], int] = heads
    """Of what the blocks read and write."""
    conditions: Callable[[Config], tuple[Condition, ...]] = lambda config: ()
    finish: Finish = lambda outline, layout, kept: layout
    """Completes the layout of a smaller model, or raises NonNativePlanError."""
    adapt: Callable[[Outline], Outline] = lambda outline: outline
    """Completes the outline."""
    levels: Callable[[Outline], Sequence[Sequence[str]]] | None = None
    rules: Callable[[Outline], Sequence[Rule]] | None = None
    compiled: tuple[str, ...] = ()
    complete: bool = True
    component: str = "transformer"
    latents: str = "hidden_states"

    def whole(self, config: Config) -> Config:
        """``config`` with the defaults of the class for what it leaves out."""
        return {**_defaults(self.class_name), **config}

    def named(self, path: str | Callable[[Config], str], config: Config) -> str:
        """The ``path`` of a module, which may hang on the config."""
        return path if isinstance(path, str) else path(self.whole(config))

    def outline(self, model: Any) -> Outline:
        """The parts of a model of the class."""
        config = plain_config(model)
        width = self.width(config)
        counts = [len(model.get_submodule(blocks.path)) for blocks in self.lists]
        units = [
            unit
            for blocks, count in zip(self.lists, counts, strict=True)
            for unit in blocks.units(count, width)
        ]
        stages = tuple(Stage(blocks.letter, blocks.path, row=row) for row, blocks in enumerate(self.lists))
        return self.adapt(Outline(MappingProxyType(config), stages, tuple(units)))

    def layout(self, outline: Outline, removed: Removed) -> Layout:
        """The smaller model without ``removed``. Raises NonNativePlanError where ``finish`` does."""
        kept = kept_blocks(self.lists, outline, removed)
        return self.finish(outline, renumbered(self.lists, outline, kept), kept)

    def example_inputs(
        self,
        config: Config,
        *,
        batch: int = 1,
        latent: int | None = None,
        tokens: int | None = None,
        frames: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        """Keyword arguments of ``forward``; see ``families.example_inputs``."""
        config = self.whole(config)
        sides = self.size(config) if latent is None else (latent, latent)
        width = self.text(config)
        length = self.tokens(config) if tokens is None or self.padded else tokens
        words = length if width else 0
        film = () if self.film is None else (frames or self.film(config),)

        def zeros(*shape: int, form: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch, *shape, device=device, dtype=form)

        def row(condition: Condition) -> Tensor:
            form = torch.long if condition.whole else dtype
            shape = condition.row_shape(*sides)
            if condition.place == "sample":  # behind the latents, in each of their frames
                shape = (*condition.shape, *film, *sides)
            found = zeros(*((words,) if condition.words else shape), form=form)
            if condition.place == LENGTH.place:
                return found + STEPS
            return found + 1 if condition.words else found

        wanted = self.conditions(config)
        return self.arrange(
            config,
            wanted,
            zeros(self.channels(config), *film, *sides),
            zeros(form=torch.long),
            zeros(words, width),
            {one.name: row(one) for one in wanted},
        )

    def family(self) -> Family:
        """What is known about the class."""
        lists, whole = self.lists, self.whole
        return Family(
            model_class=lambda: getattr(diffusers, self.class_name),
            component=self.component,
            latents=self.latents,
            channels=lambda config: self.channels(whole(config)),
            predicted=lambda config: self.predicted(whole(config)),
            text=lambda config: self.text(whole(config)),
            answers=self.answers,
            joins=self.joins,
            frames=self.film is not None,
            film=lambda config: 1 if self.film is None else self.film(whole(config)),
            check=functools.partial(check_settings, [blocks.setting for blocks in lists]),
            size=lambda config: self.size(whole(config)),
            pixels=lambda config: self.pixels(whole(config)),
            tokens=lambda config: self.tokens(whole(config)),
            example_inputs=self.example_inputs,
            conditions=lambda config: self.conditions(whole(config)),
            arrange=lambda config, *given: self.arrange(whole(config), *given),
            prediction=lambda config, output, sample: self.prediction(whole(config), output, sample),
            outline=self.outline,
            layout=self.layout,
            levels=self.levels or (lambda outline: [[unit.name] for unit in outline.units if unit.removable]),
            rules=self.rules,
            complete=self.complete,
            stage_features=lambda outline, removed: _features(lists, outline, removed),
            stem=lambda config: self.named(self.stem, config),
            head=lambda config: self.named(self.head, config),
            compiled=self.compiled,
        )


def refused(reason: str) -> Finish:
    """A class of which no block can leave natively, for ``reason``."""

    def finish(outline: Outline, layout: Layout, kept: Kept) -> Layout:
        if any(len(kept[stage.path]) < len(outline.units_in(stage.name)) for stage in outline.stages):
            raise NonNativePlanError(reason)
        return layout

    return finish
