"""The verb that lists what there is to remove: blocks."""

from __future__ import annotations

from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import emit, records
from prune_lab.cli.run_context import model_found


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
    from prune_lab.blocks import UNKNOWN_LATENT, blocks_frame

    architecture = model_found(model, revision=revision, subfolder=subfolder, variant=variant).architecture
    title = f"Blocks of {model}"
    if architecture.outline.config.get("sample_size") is None:
        side = UNKNOWN_LATENT
        title += f" (its config has no sample_size: multiply-adds are those of a {side} x {side} latent)"
    emit("blocks", records(blocks_frame(architecture)), as_json=as_json, wide=wide, title=title)
