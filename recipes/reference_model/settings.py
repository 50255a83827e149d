"""The whole recipe of the reference model as settings: read from TOML, checked, nothing hidden in code."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prune_lab.errors import ConfigError
from recipes.reference_model.autoencoder import AutoencoderShape
from recipes.reference_model.clip import ClipShape
from recipes.reference_model.denoiser import DenoiserShape
from recipes.reference_model.denoising import Objective
from recipes.reference_model.steps import Recipe

DEFAULT_RECIPE = Path(__file__).with_name("reference.toml")


@dataclass(frozen=True, slots=True)
class TokenizerShape:
    """Size of the vocabulary and the number of tokens a caption is padded or cut to."""

    vocabulary: int = 4096
    length: int = 24


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


def read_recipe(path: Path | None = None) -> ReferenceRecipe:
    """The recipe in the TOML file, or the committed one; sections and settings left out keep their defaults.

    Raises ConfigError when the file cannot be read or names something unknown.
    """
    path = DEFAULT_RECIPE if path is None else path
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the recipe {path} cannot be read ({error}); give a TOML file") from error
    recipe = ReferenceRecipe()
    sections = [one.name for one in dataclasses.fields(recipe)]
    for name, given in found.items():
        if name not in sections:
            raise ConfigError(
                f"the recipe {path} has a section [{name}]; the sections are {', '.join(sections)}"
            )
        recipe = dataclasses.replace(recipe, **{name: _section(name, getattr(recipe, name), given)})
    if recipe.denoiser.text_width != recipe.clip.text_width:
        raise ConfigError(
            f"the recipe gives the denoiser text_width {recipe.denoiser.text_width} and the text tower "
            f"{recipe.clip.text_width}; make them equal"
        )
    return recipe
