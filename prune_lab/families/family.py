"""The nouns that describe a class of models: its units, its stages, and what a smaller model of it looks like.

A family is a row of functions about one diffusers class. Everything outside of ``families`` asks it and knows neither
class names nor module paths.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prune_lab.errors import DataError, UnsupportedModelError

CLIP_TOKENS = 77  # the context length of every CLIP text encoder that Stable Diffusion uses
CLASS_NAME = "_class_name"  # diffusers' own key for the class that a config belongs to

UnitKind = Literal["resnet", "attention", "transformer", "sampler"]
Lane = Literal["left", "middle", "right"]
Form = Literal["native", "neutral", "own", "padded"]
"""How a smaller model is built: a plain config; a plain config with blocks that do nothing; with code of its own; a
plain config with zeros where it is narrower."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One named step of a model's forward pass: a block that a plan may remove, or a sampler between stages."""

    name: str
    path: str  # of the module
    stage: str
    kind: UnitKind
    in_channels: int
    out_channels: int
    skip_channels: int = 0
    """The last of its input channels that arrive by a skip connection, taken from the top of a stack."""
    gives_skip: bool = False
    """Whether its output is also put on the stack of skip connections."""
    hands_on: tuple[str | None, ...] = ("hidden_states",)
    """Inputs that become its outputs when it is gone, by their names in the module's ``forward``; None stays None."""
    in_tuple: bool = False  # whether the module returns a tuple
    main: int = 0  # which of its outputs is on the main path
    self_attention: tuple[
        str, ...
    ] = ()  # module paths of the self-attentions inside, one a transformer layer
    reason: str = ""
    """Why the unit cannot be removed by a plan; empty when it can."""
    stand_in: Callable[[], nn.Module] | None = None
    """Makes what takes its place while it is scored, where it cannot be removed. It is never built into a student."""
    leaves_with: tuple[str, ...] = ()
    """Of a sampler: the blocks that must all be gone for it to leave, in order of execution; none if it stays."""
    changes_others: bool = False
    """Whether other units hold less without it (SD3's last block, which does not write the text): its cost is then what
    a model without it lacks."""
    keeps: tuple[str, ...] = ()
    """Modules inside that others read, by their paths in it: they stay when the unit is gone."""
    inside: str = ""
    """The unit that this one lies inside; its cost is part of that unit's."""
    gone: bool = False
    """Whether it was taken out already, of a student with code of its own: what it hands on still has its place."""

    @property
    def removable(self) -> bool:
        """Whether a plan may remove the unit."""
        return not self.reason

    @property
    def starred(self) -> bool:
        """Whether the unit can only be scored through a stand-in (a star in BK-SDM's figures)."""
        return self.stand_in is not None

    @property
    def takes_skip(self) -> bool:
        """Whether the unit reads a skip connection."""
        return self.skip_channels > 0

    @property
    def main_channels(self) -> int:
        """Input channels that do not arrive by a skip connection."""
        return self.in_channels - self.skip_channels

    @property
    def transformer_layers(self) -> int:
        """Number of transformer layers inside; 0 for a residual block."""
        return len(self.self_attention)

    @property
    def local_name(self) -> str:
        """The name within the stage: ``R2`` of ``Dn1.R2``."""
        return self.name.removeprefix(f"{self.stage}.")


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """Neighbouring units that form one module, and where a map of the model draws them."""

    name: str
    path: str  # of the module
    lane: Lane = "middle"
    row: int = 0  # counted from the top


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """The parts of one model in order of execution, and its diffusers config (``_class_name`` included)."""

    config: Mapping[str, Any]
    stages: tuple[Stage, ...]
    units: tuple[Unit, ...]

    def units_in(self, stage: str, kind: UnitKind | None = None) -> tuple[Unit, ...]:
        """The units of ``stage``, of one kind or of all, in order of execution."""
        return tuple(unit for unit in self.units if unit.stage == stage and kind in (None, unit.kind))

    @property
    def present(self) -> tuple[Unit, ...]:
        """The units that were not taken out already."""
        return tuple(unit for unit in self.units if not unit.gone)

    @property
    def blocks(self) -> tuple[Unit, ...]:
        """The units that together make up the stages: no samplers, and nothing that lies inside another unit."""
        return tuple(unit for unit in self.units if unit.kind != "sampler" and not unit.inside)

    def inner(self, name: str) -> tuple[Unit, ...]:
        """The units inside the unit called ``name``, in order of execution."""
        return tuple(unit for unit in self.units if unit.inside == name)


def plain_config(source: nn.Module | Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model or config, and the name of its class; without diffusers' other ``_`` entries."""
    config: Mapping[str, Any] = source if isinstance(source, Mapping) else source.config  # type: ignore[assignment]
    named = {} if isinstance(source, Mapping) else {CLASS_NAME: type(source).__name__}
    kept = {name: value for name, value in config.items() if name == CLASS_NAME or not name.startswith("_")}
    return kept | named


def usual_settings(model_class: Any) -> dict[str, Any]:
    """What a config of ``model_class`` that leaves a setting out has there, of those that may be left out."""
    parameters = inspect.signature(model_class.__init__).parameters
    return {name: one.default for name, one in parameters.items() if one.default is not one.empty}


def sample_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the latent by the ``sample_size`` of a config. Raises UnsupportedModelError without one."""
    size = config.get("sample_size")
    if size is None:
        raise UnsupportedModelError(
            "asked for the latent size of a model; its config has no sample_size; pass a latent size"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _followed(path: str, names: Mapping[str, str | None]) -> str | None:
    """The new name of ``path``: its longest beginning in ``names`` is exchanged; as it is where there is none."""
    start, dot = path, "."
    while dot:
        if start in names:
            new = names[start]
            return None if new is None else f"{new}{path[len(start) :]}"
        start, dot, _ = start.rpartition(".")
    return path


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """The plain config of a smaller model, and the names that the modules of the original have in it.

    ``names`` lists module paths of the original with their paths in the smaller model, None for those that are gone.
    Modules and tensors inside a listed one follow it; what is not listed keeps its name.
    """

    config: Mapping[str, Any]
    names: Mapping[str, str | None]
    convert: Mapping[str, Callable[[Tensor], Tensor]] = dataclasses.field(default_factory=dict)
    """By name of a tensor in the smaller model: what makes it of the original's, where it is not the same."""
    frozen: tuple[str, ...] = ()
    """Modules of the smaller model that compute nothing as long as their weights stay: not to be trained."""
    empty: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """By name: shapes of tensors without numbers that the original does not have, or of another shape."""

    def renamed(self, path: str) -> str | None:
        """Path in the smaller model of a module or tensor of the original; None when it is gone."""
        return _followed(path, self.names)

    def sources(self, paths: Iterable[str]) -> dict[str, str]:
        """Path in the original of each module or tensor ``paths`` of the smaller model."""
        origins = {new: old for old, new in self.names.items() if new is not None}
        return {path: _followed(path, origins) or path for path in paths}


# What a model takes beside noisy latents, a timestep and a text ------------------------------------------------------


Joins = Literal["alike", "in a row", "pooled beside"]
"""Texts of two encoders side by side, with one pooled (``alike``: SDXL); those of CLIP before those of T5, with CLIP's
pooled (``in a row``: SD3); those of T5 alone, with CLIP's pooled (``pooled beside``: FLUX)."""

Place = Literal[
    "sample", "timestep_cond", "class_labels", "added_cond_kwargs", "argument", "text", "schedule"
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One tensor that a model takes beside noisy latents, timestep and text; each sample has a row of it."""

    name: str
    place: Place
    """The argument of ``forward`` that it goes into; ``sample`` means further channels, behind the latents,
    ``argument`` one of its own name, ``text`` that it cuts the text, and ``schedule`` that it is the number of its
    timesteps, by which the timestep is divided."""
    shape: tuple[int, ...]
    """Of one row; ``of_picture`` height and width follow."""
    of_picture: bool = (
        False  # it is made of the picture by the VAE, and has ``scale`` values for each latent pixel
    )
    scale: int = 1  # of its height and width to those of the latent
    of_text: bool = False  # the pipeline's ``encode_prompt`` gives it along with the text
    words: bool = False  # a mask, whose rows have a number for each word of the text instead of ``shape``
    of_size: bool = False  # it tells the size of the picture in pixels
    whole: bool = False  # whole numbers
    value: float | None = (
        None  # what a pipeline gives where nothing else is said; None where there is no such number
    )
    classes: int = 0  # of a class: how many there are, counted from 0
    giver: str = ""
    """The method by which a pipeline gives it while it draws; a pipeline without one cannot use the model."""
    reason: str = ""
    """Why no rows of it are made here, and what would work; empty where they are."""

    def row_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one row at a latent of this size."""
        sides = (self.scale * height, self.scale * width)
        return (*self.shape, *sides) if self.of_picture else self.shape


def check_given(conditions: Sequence[Condition], given: Mapping[str, Tensor]) -> None:
    """Raise DataError when ``given`` holds other tensors than ``conditions``: none is ever left out without a word."""
    wanted = {condition.name for condition in conditions}
    if wanted != set(given):
        takes, found = (", ".join(sorted(names)) or "nothing" for names in (wanted, set(given)))
        raise DataError(
            f"asked to run a model that takes {takes} beside latents, timestep and text, found inputs with {found}; "
            "make the probe or the data again with the pipeline of this model"
        )


def arranged(
    config: Mapping[str, Any],
    conditions: Sequence[Condition],
    sample: Tensor,
    timestep: Tensor,
    text: Tensor,
    given: Mapping[str, Tensor],
    *,
    latents: str = "sample",
) -> dict[str, Any]:
    """Keyword arguments of ``forward``: noisy latents (B, C, h, w) as ``latents``, timesteps (B,), text (B, L, D) and
    ``given`` rows of ``conditions``, each in its place.
    """
    inputs: dict[str, Any] = {"timestep": timestep, "encoder_hidden_states": text}
    channels = [sample]
    for condition in conditions:
        row = given[condition.name]
        if condition.words and row.is_floating_point():
            row = row > 0
        if condition.place == "sample":
            channels.append(row)
        elif condition.place == "added_cond_kwargs":
            inputs.setdefault(condition.place, {})[condition.name] = row
        elif condition.place == "argument":
            inputs[condition.name] = row
        else:
            inputs[condition.place] = row
    return {latents: torch.cat(channels, dim=1) if len(channels) > 1 else sample, **inputs}


def noise_alone(config: Mapping[str, Any], output: Any, sample: Tensor) -> Tensor:
    """The prediction (B, C, ...) for noisy latents (B, C, ...) of an output that may hold a variance behind it."""
    channels = sample.shape[1]
    prediction: Tensor = output if output.shape[1] == channels else output[:, :channels]
    return prediction


Removed = frozenset[str]  # names of units that are gone, samplers that leave with them included
Groups = Mapping[str, tuple[str, ...]]  # name of a group: names of its units


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """One linear rule over removed units: as many of ``blocks`` leave as of ``against`` and from ``least`` to ``most``
    more; a unit that is listed twice counts twice.
    """

    blocks: tuple[str, ...]
    most: int
    least: int
    against: tuple[str, ...] = ()


def rule_of_kept(more: Sequence[str], fewer: Sequence[str], least: int, most: int) -> Rule:
    """The rule that of ``more`` from ``least`` to ``most`` more units stay than of ``fewer``."""
    difference = len(more) - len(fewer)
    return Rule(tuple(more), difference - least, difference - most, tuple(fewer))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What is known about one diffusers class of models."""

    model_class: Callable[[], type[Any]]
    """The class; a function, so that it is imported when it is first needed."""
    component: str = "unet"
    """The model's name among the parts of a pipeline."""
    check: Callable[[Mapping[str, Any], Mapping[str, Any]], None] = lambda config, defaults: None
    """Raises UnsupportedModelError for a setting of a config that nothing can be built from; the second argument holds
    the values of what it leaves out."""
    latents: str = "sample"
    """The argument of ``forward`` that holds the noisy latents."""
    channels: Callable[[Mapping[str, Any]], int] = lambda config: int(config["in_channels"])
    """Channels of the noisy latents, unpacked; they are those of the prediction."""
    predicted: Callable[[Mapping[str, Any]], int | None] = lambda config: None
    """Channels of the prediction, unpacked, of a class whose models may predict others than they take; else None."""
    frames: bool = False
    """Whether latents have frames (B, C, F, h, w); a picture is one frame."""
    film: Callable[[Mapping[str, Any]], int] = lambda config: 1
    """Frames of the latent of the film that a model is meant for; 1 of a model of pictures."""
    text: Callable[[Mapping[str, Any]], int] = lambda config: 0
    """Width of the text that a model reads; 0 where it reads none."""
    answers: tuple[str | None, ...] = ("text",)
    """What the pipeline's ``encode_prompt`` gives, in this order: the text, conditions by name, and None for what the
    model is not given."""
    joins: Joins = "alike"
    """How its pipelines put the texts of several encoders together."""
    size: Callable[[Mapping[str, Any]], tuple[int, int]] = sample_size
    """Height and width of the latent that a model is meant for. Raises UnsupportedModelError where it is not known."""
    pixels: Callable[[Mapping[str, Any]], int | None] = lambda config: None
    """Pixels of a picture's side behind one of the latent's, by the VAEs that models of the class are trained with;
    None where that is not known of a model without its pipeline."""
    tokens: Callable[[Mapping[str, Any]], int] = lambda config: CLIP_TOKENS
    """Words of text that a model is run with, where nothing else is said."""
    example_inputs: Callable[..., dict[str, Any]]
    """Keyword arguments of ``forward`` for a config: zeros of the right shapes (``families.example_inputs``)."""
    conditions: Callable[[Mapping[str, Any]], tuple[Condition, ...]] = lambda config: ()
    """What the model of a config takes beside noisy latents, timestep and text, in the order of its channels."""
    arrange: Callable[
        [Mapping[str, Any], Sequence[Condition], Tensor, Tensor, Tensor, Mapping[str, Tensor]],
        dict[str, Any],
    ] = arranged
    """(config, conditions, noisy latents (B, C, h, w), timesteps (B,), text (B, L, D), rows by name of condition) ->
    keyword arguments of ``forward``: packing, places and the scale of the timestep are its business."""
    prediction: Callable[[Mapping[str, Any], Any, Tensor], Tensor] = noise_alone
    """(config, output of ``forward``, noisy latents) -> the prediction in the form of the latents."""
    outline: Callable[[Any], Outline]
    """The parts of a model, which may be on ``meta``. Raises UnsupportedModelError for parts that are not known."""
    layout: Callable[[Outline, Removed], Layout]
    """The smaller model without these units. Raises NonNativePlanError when no plain config describes it."""
    neutral: Callable[[Outline, Removed], Layout] | None = None
    """A plain model that computes the same, in which these units are there and do nothing. Raises FormError where a
    unit cannot; None for a class that has no such form."""
    tied: Callable[[Outline], Sequence[tuple[str, ...]]] = lambda outline: ()
    """Blocks that in the neutral form save something only when all of them are gone."""
    levels: Callable[[Outline], Sequence[Sequence[str]]]
    """Removable units in sets: whether a plan is native is decided in each set alone."""
    more_options: Callable[[Outline, Sequence[str], Removed], Sequence[Removed]] = lambda *_: ()
    """For one of the levels and a native set of its units further options of that level, of other units: where plans
    are native that no choice unit by unit makes up. They are tried, too."""
    rules: Callable[[Outline], Sequence[Rule]] | None = None
    """Where no choice in each set alone tells which plans are native: a plan is native where it keeps to all of these
    rules. None where the levels tell."""
    complete: bool | None = None
    """Whether every native plan is made up of native sets of the levels; None where the levels themselves tell."""
    plans: Mapping[str, Callable[[Outline], Removed]] = dataclasses.field(default_factory=dict)
    """Named plans: the blocks each removes. Raises PlanError for a model that the plan is not defined for."""
    groups: Mapping[str, Callable[[Outline], Groups]] = dataclasses.field(default_factory=dict)
    """Groups of blocks that are removed together, by kind, beside single blocks and stages."""
    stage_features: Callable[[Outline, Removed], Sequence[tuple[str, str]]]
    """Feature points at the ends of the surviving stages: the module that writes there in the original, and the module
    of the original that writes there once ``removed`` is gone."""
    stem: Callable[[Mapping[str, Any]], str]
    """Path of the module, in a model of that config, that writes what the first unit reads."""
    head: Callable[[Mapping[str, Any]], str]
    """Path of the module that writes the prediction."""
    compiled: tuple[str, ...] = ()
    """Class names of the modules that repeat, each worth compiling alone."""

    @property
    def called(self) -> str:
        """What messages call the model: a U-Net or a transformer."""
        return "U-Net" if self.component == "unet" else self.component
