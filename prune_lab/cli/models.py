"""How a verb comes to its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from prune_lab.api.model import Model


def model_of(
    text: str,
    found_by: Mapping[str, object],
    *,
    device: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
) -> Model:
    """The model that ``text`` names, ``found_by`` these settings; what is worth knowing of that goes to stderr."""
    import prune_lab as pl

    asked = {name: value for name, value in found_by.items() if value}
    model = pl.load(text, device=device, dtype=dtype, seed=seed, settings=asked)
    for line in model.source.notes:
        typer.echo(f"note: {line}", err=True)
    return model
