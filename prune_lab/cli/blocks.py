"""The verb that lists what there is to remove: blocks."""

from __future__ import annotations

import dataclasses

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.models import model_of
from prune_lab.cli.output import show


@app.command(short_help="List the blocks of MODEL, their cost, what can be removed.")
def blocks(
    model: options.ModelArgument,
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    variant: options.VariantOption = "",
    resolution: options.ResolutionOption = None,
    tokens: options.TokensOption = None,
    frames: options.FramesOption = None,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """List the blocks of MODEL: kind, channels, parameters, MACs, and whether each can be removed.

    MACs are those of one picture, or one film, of the size that the title says; the options choose another.
    """
    chosen = model_of(model, options.found_by(revision, subfolder, variant))
    table = chosen.blocks(resolution=resolution, tokens=tokens, frames=frames)
    if wide and any(table.data["widths"]):
        from prune_lab.width import UNITS_NOTE

        table = dataclasses.replace(table, notes=(*table.notes, UNITS_NOTE))
    show(table, as_json=as_json, wide=wide)
