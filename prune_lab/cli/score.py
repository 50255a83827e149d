"""The verb that measures what blocks are worth: score. Without a run folder only its table stays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_lab.api.settings import model_or_run, settings_of
from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.output import show


@app.command(short_help="Measure what the model loses without each block.")
def score(
    model: options.OptionalModel = "",
    criterion: Annotated[
        list[str],
        typer.Option(
            help="What is measured: output-mse (default), output-cosine, denoising-loss, latent-shift, clip-score, "
            "image-change, gate-gradient, gate-fisher, gate-path, taylor, magnitude, similarity, architecture-prior, "
            "random; may be repeated: the first leads, all stand side by side."
        ),
    ] = [],  # noqa: B006
    groups: Annotated[
        list[str],
        typer.Option(help="blocks, pairs, triplets, stages, inner, or a file of plans; may be repeated."),
    ] = [],  # noqa: B006
    widths: Annotated[
        str,
        typer.Option(
            "--widths",
            help="Score parts of blocks instead (norm groups, heads, channels), by gate-fisher, gate-gradient, taylor, "
            "magnitude or random.",
            metavar="CRITERION",
        ),
    ] = "",
    samples: Annotated[int | None, options.for_setting("probe.samples")] = None,
    data: options.DataOption = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            "--resolution",
            help="Pixels of the pictures' sides, of a model without a size of its own (FLUX, Wan) and of a model alone "
            "(data.resolution).",
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        options.for_setting("score.stream"),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="All criteria, how they agree, and with what was measured.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="CSV to write; with --compare a folder of tables and figures."),
    ] = None,
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    variant: options.VariantOption = "",
    random_weights: options.RandomWeightsOption = False,
    run: options.RunOption = None,
    config: options.ConfigOption = None,
    assign: options.SetOption = [],  # noqa: B006
    device: options.DeviceOption = None,
    seed: options.SeedOption = None,
    force: options.ForceOption = False,
    every: Annotated[
        bool,
        typer.Option("--all", help="With --widths a row for each unit, not for each site; --json has them."),
    ] = False,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Measure what the model loses when each block, pair and stage is removed, with bootstrap intervals.

    A race is nearly as good for less: --set score.race=0.15 is its share of the naive cost.
    """
    model, run = model_or_run(model, run)
    asked = {
        "score.criterion": criterion[0] if criterion else None,
        "score.also": tuple(criterion[1:]),
        # One of the kinds, also in the plural, or the path of a file as it is.
        "score.groups": tuple(name if "." in name else name.removesuffix("s") for name in groups),
        "probe.samples": samples,
        "data.source": data,
        "data.resolution": resolution,
        "score.stream": stream,
    }
    found_by = options.found_by(revision, subfolder, variant, random_weights)
    if widths and (criterion or groups or compare):
        raise typer.BadParameter(
            "--widths scores parts of blocks: leave out --criterion, --groups and --compare"
        )
    settings = settings_of(model, run, config, assign, {**asked, **found_by}, device=device, seed=seed)
    from prune_lab.api.making import site_scores
    from prune_lab.api.model import Model
    from prune_lab.api.scores import ComparedScores
    from prune_lab.models.protection import check_file, sources_of
    from prune_lab.profiling import check_asked_size
    from prune_lab.runtime import write_frame
    from prune_lab.tables import Table

    if out and not compare:
        out = check_file(out, sources_of(settings), "scores", force=force)

    chosen = Model(settings, run)
    check_asked_size(chosen.source, resolution)
    if widths:
        table = chosen.score_widths(widths, force=force)
    else:
        table = chosen.agreement(out, force=force) if compare else chosen.score(force=force)
    if out and not compare:
        write_frame(out, table.frame())
    if widths and not (every or as_json):
        table = site_scores(table)
    tables: tuple[Table, ...] = (table,)
    if isinstance(table, ComparedScores) and not as_json:
        tables = (table.side_by_side, table.agreement)
    for one in tables:
        show(one, as_json=as_json, wide=wide)
