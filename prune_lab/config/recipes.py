"""Ready settings for well-known models on cards of two sizes, as TOML files that ship."""

from __future__ import annotations

from pathlib import Path

from prune_lab.errors import ConfigError

_FOLDER = Path(__file__).resolve().parent / "recipes"


def recipe_names() -> tuple[str, ...]:
    """The names of all recipes, such as ``sd15-24gb``: a model and the memory of a card."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def recipe_path(name: str) -> Path:
    """The TOML file of the recipe ``name``. Raises ConfigError, which lists them, when there is none."""
    if name not in recipe_names():
        raise ConfigError(f"there is no recipe {name!r}; there are {', '.join(recipe_names())}")
    return _FOLDER / f"{name}.toml"


def recipe_about(name: str) -> str:
    """What the recipe ``name`` is for: the first sentence of its file."""
    lines = recipe_path(name).read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("# ") for line in lines[: lines.index("")])
    return comment.split(":")[0]
