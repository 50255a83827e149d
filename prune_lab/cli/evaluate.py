"""The verb that draws pictures and judges them: evaluate.

Models are judged in a temporary run folder, or with ``--prompts`` compared by many pictures that are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prune_lab.api.settings import model_or_run, settings_of
from prune_lab.cli import options
from prune_lab.cli.application import app
from prune_lab.cli.models import model_of
from prune_lab.cli.output import emit, records
from prune_lab.config import parse_assignment
from prune_lab.errors import RunError
from prune_lab.runs import open_run, writing

if TYPE_CHECKING:
    from prune_lab.api.evaluating import Evaluation


def _show(found: Evaluation, *, as_json: bool, wide: bool) -> None:
    """Print all tables, the gates last, where they are seen; as JSON one object of lists."""
    if as_json:
        tables = {"metrics": found.metrics, "kinds": found.kinds, "gates": found.gates}
        rows: dict[str, Any] = {name: table.records() for name, table in tables.items()}
        typer.echo(json.dumps(rows | {"code": found.code}, indent=2, ensure_ascii=False, allow_nan=False))
        return
    for table in (found.kinds, found.metrics, found.gates):
        if len(table):
            emit(table.kind, table.records(), as_json=False, wide=wide, title=table.title)
    for line in found.metrics.notes:
        typer.echo(line)
    typer.echo(f"wrote {found.out}: pictures, tables, README.md and sheet.png", err=True)


def _given(named: Mapping[str, object]) -> list[str]:
    """The options of ``named`` that were given."""
    return [name for name, value in named.items() if value]


def _refuse_with_many(given: Sequence[str], found_by: Mapping[str, Any]) -> None:
    """Raise what cannot go with --prompts."""
    if given:
        raise RunError(f"asked to evaluate with --prompts and {' and '.join(given)}; leave one out")
    if any(found_by.values()):
        raise RunError(
            "asked to evaluate with --prompts and a revision, subfolder or variant; give folders of models"
        )


def _refuse_with_few(preset: str, given: Sequence[str], *, one_of: tuple[bool, bool]) -> None:
    """Raise what cannot go without --prompts; ``one_of``: whether models were given, and whether a run was."""
    if preset:
        raise RunError(
            f"asked to evaluate by the preset {preset}, which brings no prompts; give its captions with --prompts, a "
            "file or the folder of captioned pictures, and the pictures with --real"
        )
    if given:
        raise RunError(
            f"asked to evaluate with {given[0]}, which goes with many prompts; give --prompts FILE, too"
        )
    if one_of[0] == one_of[1]:
        raise RunError(
            "asked to evaluate; give models, or --run DIR for the candidates of a run, and not both"
        )


def _pictures_of_run(run: Path) -> list[dict[str, Any]]:
    """The scores of the pictures of a run's teacher and candidates; pictures that are missing are drawn."""
    from prune_lab.runtime import progress_shown
    from prune_lab.workflow import Session, quality_frame

    opened = open_run(run, must_exist=True)
    with progress_shown(), writing(opened):
        return records(quality_frame(Session(opened)))


def _judged(
    models: Sequence[str],
    base: str,
    config: Path | None,
    assign: Sequence[str],
    asked: Mapping[str, Any],
    found_by: Mapping[str, Any],
    *,
    device: str | None,
    seed: int | None,
) -> Iterator[dict[str, Any]]:
    """CLIP score and held-out loss of each model, in a run folder of its own that is removed."""
    for text in models:
        if model_or_run(text, None)[1] is not None:
            raise RunError(
                f"asked to evaluate the model {text}, found a run folder there; give --run {text} for its candidates, "
                "or the folder of one of its models"
            )
    from prune_lab.models import shipped_like

    told: set[str] = set()  # the lines on data that were shown of the models before
    for text in models:
        model = model_of(text, found_by)
        whole = model.source.is_pipeline
        settings = settings_of(
            text if whole else base or shipped_like(model.source),
            None,
            config,
            assign,
            {**asked, **(found_by if whole else {})},
            device=device,
            seed=seed,
        )
        yield from model.judged_in(settings, told).records()


@app.command(short_help="Draw pictures with models, and judge them.")
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help=options.MODEL_HELP)] = [],  # noqa: B006
    base: Annotated[
        str,
        typer.Option(
            "--base",
            help="Pipeline in which folders of a model alone draw; default: the shipped one of its class.",
        ),
    ] = "",
    prompt: Annotated[
        list[str], typer.Option("--prompt", help="What to draw; may be repeated; default: held-out captions.")
    ] = [],  # noqa: B006
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Compare models, the teacher first, by what they draw for the prompts in a .txt, .csv, .jsonl or "
            ".parquet (column prompt or caption, and kind), or for the captions of a folder of pictures; default or "
            "shipped. Needs --out.",
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of pictures and tables; a stopped command goes on there."),
    ] = None,
    images: Annotated[
        int | None, typer.Option("--images", help="Prompts of the file that are drawn; default: all.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            "--seeds",
            help="Pictures of each prompt; default: 2, which show the noise floor; with --preset 1.",
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            "--preset", help="coco30k: BK-SDM's protocol (25 steps, 7.5, JPEG of 256), but for seeding."
        ),
    ] = "",
    real: Annotated[
        str, typer.Option("--real", help="Real pictures: a folder, .parquet, .tar, .zip, hub id, or shipped.")
    ] = "",
    inception: Annotated[
        Path | None,
        typer.Option("--inception", help="TorchScript file with an Inception; the program in it is run."),
    ] = None,
    clip: Annotated[
        str,
        typer.Option("--clip", help="CLIP model that judges: a folder or hub id, or none (evaluate.scorer)."),
    ] = "",
    gate: Annotated[
        list[str],
        typer.Option(
            "--gate",
            help='"clip>=0.97x teacher", "fid<=20"; may be repeated. Exit code 0: passed, 1: failed, 3: undecided.',
        ),
    ] = [],  # noqa: B006
    teacher: Annotated[str, typer.Option("--teacher", help="The teacher; default: the first MODEL.")] = "",
    resolution: options.ResolutionOption = None,
    batch: Annotated[int, typer.Option("--batch", help="Pictures that are drawn at once.")] = 8,
    processes: Annotated[
        int,
        typer.Option(
            "--processes", help="Processes that draw, each on a GPU of its own where there are several."
        ),
    ] = 1,
    force: options.ForceOption = False,
    data: options.DataOption = None,
    revision: options.RevisionOption = "",
    subfolder: options.SubfolderOption = "",
    variant: options.VariantOption = "",
    run: options.RunOption = None,
    config: options.ConfigOption = None,
    assign: options.SetOption = [],  # noqa: B006
    device: options.DeviceOption = None,
    seed: options.SeedOption = None,
    as_json: options.JsonOption = False,
    wide: options.WideOption = False,
) -> None:
    """Draw and judge: CLIP score and held-out loss of models, or the pictures of a run's teacher and candidates."""
    many = {
        "--out": out,
        "--images": images,
        "--seeds": seeds,
        "--preset": preset,
        "--real": real,
        "--inception": inception,
        "--clip": clip,
        "--gate": gate,
        "--teacher": teacher,
        "--resolution": resolution,
        "--processes": processes > 1,
        "--force": force,
    }
    found_by = options.found_by(revision, subfolder, variant)
    if prompts:
        few = {"--prompt": prompt, "--run": run, "--data": data, "--config": config}
        _refuse_with_many(_given(few), found_by)
        if out is None:
            raise RunError(
                "asked to evaluate with --prompts, which keeps its pictures; give a folder with --out DIR"
            )
        from prune_lab.api.evaluating import evaluate as compare_by_pictures

        found = compare_by_pictures(
            models,
            prompts=prompts,
            out=out,
            images=images,
            seeds=seeds,
            preset=preset,
            real=real,
            inception=inception or "",
            clip=clip,
            gates=gate,
            teacher=teacher,
            base=base,
            resolution=resolution,
            batch=batch,
            processes=processes,
            device=device,
            seed=seed,
            force=force,
            settings=dict(map(parse_assignment, assign)),
        )
        _show(found, as_json=as_json, wide=wide)
        raise typer.Exit(found.code)
    _refuse_with_few(preset, _given(many), one_of=(bool(models), bool(run)))
    if run:
        if config or prompt or data or assign or seed is not None:
            raise RunError(
                f"asked to evaluate {run} with other settings; its pictures are drawn with its own: "
                "give models instead, or change the run's settings with prune-lab run"
            )
        rows = _pictures_of_run(run)
        emit("pictures", rows, as_json=as_json, wide=wide, title=f"Pictures of {run}")
        return
    asked = {
        "evaluate.prompts": tuple(prompt),
        "data.source": data,
        "evaluate.seeds": () if seed is None else (seed,),
    }
    rows = list(_judged(models, base, config, assign, asked, found_by, device=device, seed=seed))
    emit("quality", rows, as_json=as_json, wide=wide, title="Quality")
