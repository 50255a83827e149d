"""The verb that lists what there is to remove: blocks."""

from __future__ import annotations

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.models import model_of
from prune_lab.cli.output import show


@app.command()
def blocks(
    model: options.ModelArgument,
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    variant: options.VariantOption = "",
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """List the blocks of MODEL: kind, channels, parameters, MACs, and whether each can be removed."""
    chosen = model_of(model, options.found_by(revision, subfolder, variant))
    show(chosen.blocks(), as_json=as_json, wide=wide)
