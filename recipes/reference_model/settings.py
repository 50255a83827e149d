"""Every setting of the reference model: the shapes of its parts, how each is trained, read from TOML and checked."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from prune_lab.errors import ConfigError, DataError

DEFAULT_RECIPE = Path(__file__).with_name("reference.toml")

Sections = TypeVar("Sections")


@dataclass(frozen=True, slots=True)
class TokenizerShape:
    """Size of the vocabulary and the number of tokens a caption is padded or cut to."""

    vocabulary: int = 4096
    length: int = 24


@dataclass(frozen=True, slots=True)
class AutoencoderShape:
    """Widths of the autoencoder; the downsampling factor is 2 ** (stages - 1)."""

    channels: tuple[int, ...] = (32, 64, 128)
    layers: int = 1
    latent_channels: int = 4
    groups: int = 16
    picture: int = 64


@dataclass(frozen=True, slots=True)
class ClipShape:
    """Widths and depths of the two towers."""

    text_width: int = 128
    text_layers: int = 4
    picture_width: int = 192
    picture_layers: int = 4
    heads: int = 4
    patch: int = 8
    picture: int = 64
    shared: int = 128


@dataclass(frozen=True, slots=True)
class DenoiserShape:
    """Widths of the U-Net; its stages and layers are Stable Diffusion's and not a choice."""

    channels: tuple[int, int, int, int] = (32, 64, 128, 128)
    heads: int = 4
    groups: int = 16
    text_width: int = 128
    latent: int = 16
    latent_channels: int = 4


@dataclass(frozen=True, slots=True)
class Objective:
    """What is trained beside the mean squared error of the velocity, so that the inner stages learn something.

    Alone, that error is lowered fastest along the shortest way, through the outermost stages, and what the innermost
    ones say is silenced before it is worth hearing. Three things keep them in use: the readers of `SupervisedDenoiser`,
    rows whose outer stages are `severed` from their skips, and rows whose caption all stages but the mid are deaf to.
    """

    supervision: float = 0.25
    """Weight of each coarse prediction read off the mid and the inner up stages; 0 leaves them out."""
    severed: float = 0.2
    """Share of the noisier pictures of a batch whose outer up stages get no skips."""
    severed_above: int = 400
    """Least timestep at which rows are severed: below it noise, which skips alone carry, is most of the answer."""
    deaf: float = 0.4
    """Share of the pictures of a batch whose caption is heard by the mid stage alone."""
    fade_from: int = 4500
    """Step from which supervision, severed and deaf shrink, linearly."""
    fade_until: int = 0
    """Step at which they have shrunk; 0 for the last one."""
    fade_to: float = 0.25
    """The share of them that is left there."""
    noisier: float = 1.5
    """Timesteps are drawn as 1000 (1 - u^noisier), u uniform: 1 draws all equally often, more, noisy ones."""
    even_from: int = 0
    """Step from which all timesteps are drawn equally often after all, once the layout is learned; 0 for never."""

    def __post_init__(self) -> None:
        shares = all(0 <= share <= 1 for share in (self.severed, self.deaf, self.fade_to))
        weights = self.supervision >= 0 and self.noisier > 0
        if not shares or not weights or not 0 <= self.severed_above <= 1000:
            raise DataError(
                f"cannot train with supervision={self.supervision}, severed={self.severed}, deaf={self.deaf}, "
                f"severed_above={self.severed_above}, fade_to={self.fade_to}, noisier={self.noisier}; supervision is "
                "0 or more, severed, deaf and fade_to are shares, severed_above is a timestep from 0 to 1000, "
                "noisier is above 0"
            )

    def at(self, step: int, steps: int) -> Objective:
        """What counts at a step (from 0) of a training of `steps`."""
        until = self.fade_until or steps
        gone = min(1.0, max(0, step - self.fade_from) / max(1, until - self.fade_from))
        left = 1 - (1 - self.fade_to) * gone
        return replace(
            self,
            supervision=left * self.supervision,
            severed=left * self.severed,
            deaf=left * self.deaf,
            noisier=1.0 if self.even_from and step >= self.even_from else self.noisier,
        )


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast one network is trained. The rate is warmed up, held, then cooled down linearly to zero,

    so a training can be extended, or cut short by cooling down early, without having wasted its first part. One that
    has cooled down goes on by a `restart` (arXiv:1608.03983).
    """

    steps: int
    batch: int
    rate: float
    warmup: int = 100
    cooldown: int = 500
    weight_decay: float = 0.01
    ema: float = 0.999
    seed: int = 0
    restart: int = 0
    """Step at which the rate has cooled down for the first time and is warmed up again; 0 for a single cycle."""
    restart_rate: float = 1e-3
    """What it is warmed up to then; from there it cools down until the last step."""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or self.rate <= 0 or not 0 <= self.ema < 1:
            raise DataError(
                f"cannot train with steps={self.steps}, batch={self.batch}, rate={self.rate}, ema={self.ema}; "
                "steps and batch start at 1, rate is positive, ema lies in [0, 1)"
            )
        if not 0 <= self.restart < self.steps or self.restart_rate <= 0:
            raise DataError(
                f"cannot train with restart={self.restart}, restart_rate={self.restart_rate} and "
                f"steps={self.steps}; a restart comes before the last step, with a positive rate"
            )

    def rate_at(self, step: int) -> float:
        """Learning rate of the step (from 0): linear warm-up, constant, linear cool-down to zero, perhaps again."""
        begin, end, rate, cooldown = 0, self.restart or self.steps, self.rate, self.cooldown
        if step >= end:
            begin, end, rate, cooldown = end, self.steps, self.restart_rate, self.steps - end
        up = min(1.0, (step - begin + 1) / max(1, self.warmup))
        down = min(1.0, (end - step) / max(1, cooldown))
        return rate * min(up, down)

    def ema_at(self, step: int) -> float:
        """Decay of the averaged weights at the step: short at first, so that early weights do not linger."""
        return min(self.ema, (1 + step) / (10 + step))


@dataclass(frozen=True, slots=True)
class ReferenceRecipe:
    """Shapes and training of all parts of the reference model; the text encoder has the shape of the scorer's tower."""

    tokenizer: TokenizerShape = field(default_factory=TokenizerShape)
    autoencoder: AutoencoderShape = field(default_factory=AutoencoderShape)
    autoencoder_training: Recipe = field(default_factory=lambda: Recipe(steps=2000, batch=16, rate=2e-3))
    clip: ClipShape = field(default_factory=ClipShape)
    clip_training: Recipe = field(default_factory=lambda: Recipe(steps=500, batch=160, rate=1.5e-3))
    text_encoder_training: Recipe = field(default_factory=lambda: Recipe(steps=2400, batch=128, rate=3e-3))
    denoiser: DenoiserShape = field(default_factory=DenoiserShape)
    denoiser_objective: Objective = field(default_factory=Objective)
    denoiser_training: Recipe = field(default_factory=lambda: Recipe(steps=5000, batch=64, rate=1e-3))


def _section(name: str, known: Any, given: object) -> Any:
    if not isinstance(given, dict):
        raise ConfigError(f"[{name}] of the recipe is {given!r}; it must be a table of settings")
    fields = [one.name for one in dataclasses.fields(known)]
    for key in given:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1) or [", ".join(fields)]
            raise ConfigError(f"[{name}] of the recipe has no setting {key!r}; did you mean {near[0]}?")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return dataclasses.replace(known, **values)


def read_sections(known: Sections, path: Path) -> Sections:
    """The settings in `known`, a dataclass of sections, changed by those in the TOML file.

    Raises ConfigError when the file cannot be read or names something unknown.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the recipe {path} cannot be read ({error}); give a TOML file") from error
    assert dataclasses.is_dataclass(known)
    assert not isinstance(known, type)
    sections = [one.name for one in dataclasses.fields(known)]
    for name, given in found.items():
        if name not in sections:
            raise ConfigError(
                f"the recipe {path} has a section [{name}]; the sections are {', '.join(sections)}"
            )
        known = dataclasses.replace(known, **{name: _section(name, getattr(known, name), given)})
    return known


def read_recipe(path: Path | None = None) -> ReferenceRecipe:
    """The recipe in the TOML file, or the committed one; sections and settings left out keep their defaults.

    Raises ConfigError when the file cannot be read or names something unknown.
    """
    recipe = read_sections(ReferenceRecipe(), DEFAULT_RECIPE if path is None else path)
    if recipe.denoiser.text_width != recipe.clip.text_width:
        raise ConfigError(
            f"the recipe gives the denoiser text_width {recipe.denoiser.text_width} and the text tower "
            f"{recipe.clip.text_width}; make them equal"
        )
    return recipe
