"""Every setting of the transformer: its shape and how it is trained, read from TOML and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from prune_lab.errors import ConfigError, DataError
from recipes.reference_model.settings import Recipe, read_sections

DEFAULT_RECIPE = Path(__file__).with_name("transformer.toml")


@dataclass(frozen=True, slots=True)
class TransformerShape:
    """Sizes of the transformer; its width is heads x head_width."""

    layers: int = 12
    heads: int = 6
    head_width: int = 32
    patch: int = 2
    text_width: int = 128
    latent: int = 16
    latent_channels: int = 4

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.head_width, self.patch) < 1 or self.latent % max(1, self.patch):
            raise DataError(
                f"cannot build a transformer of layers={self.layers}, heads={self.heads}, "
                f"head_width={self.head_width}, patch={self.patch} for latent={self.latent}; "
                "all start at 1, and patch divides latent"
            )

    @property
    def width(self) -> int:
        """Numbers per token."""
        return self.heads * self.head_width


@dataclass(frozen=True, slots=True)
class NoiseLevels:
    """How often which timestep is drawn."""

    noisier: float = 1.5
    """Timesteps are drawn as 1000 (1 - u^noisier), u uniform: 1 draws all equally often, more, noisy ones."""
    even_from: int = 0
    """Step from which all timesteps are drawn equally often after all, once the layout is learned; 0 for never."""

    def __post_init__(self) -> None:
        if self.noisier <= 0 or self.even_from < 0:
            raise DataError(
                f"cannot draw timesteps with noisier={self.noisier}, even_from={self.even_from}; "
                "noisier is above 0, even_from a step"
            )

    def at(self, step: int) -> float:
        """The exponent at a step (from 0)."""
        return 1.0 if self.even_from and step >= self.even_from else self.noisier


@dataclass(frozen=True, slots=True)
class TransformerRecipe:
    """Shape and training of the transformer."""

    transformer: TransformerShape = field(default_factory=TransformerShape)
    noise: NoiseLevels = field(default_factory=NoiseLevels)
    training: Recipe = field(default_factory=lambda: Recipe(steps=10_000, batch=48, rate=1.5e-3))


def read_recipe(path: Path | None = None) -> TransformerRecipe:
    """The recipe in the TOML file, or the committed one; sections and settings left out keep their defaults.

    Raises ConfigError when the file cannot be read or names something unknown.
    """
    path = DEFAULT_RECIPE if path is None else path
    try:
        return read_sections(TransformerRecipe(), path)
    except DataError as error:
        raise ConfigError(f"the recipe {path}: {error}") from error
