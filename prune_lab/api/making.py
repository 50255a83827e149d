"""Tables of what a model costs, draws and is written as; these need no run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from matplotlib.figure import Figure

from prune_lab.api.plans import Plan, plan_maps
from prune_lab.blocks import Architecture
from prune_lab.config import PLAN_FILES, RunConfig
from prune_lab.errors import BackendError, FormError, UnsupportedModelError
from prune_lab.evaluation import generate, prompts_for
from prune_lab.export import EXPORT_TARGETS, loaded_in_python, padded_widths
from prune_lab.forms import in_form
from prune_lab.models import ModelSource, drawing_asked, load_model, load_pipeline, plain_source
from prune_lab.models.protection import check_apart
from prune_lab.plans import PruningPlan, read_plans
from prune_lab.profiling import (
    BACKENDS,
    Service,
    check_frames,
    cost_table,
    part_disagreements,
    picture_size,
    pixels_per_latent,
    plan_disagreements,
    profile_blocks,
    profile_pipeline,
    reduction_table,
    runtime_table,
    services_of,
    size_text,
)
from prune_lab.report import Column, Theme, draw_comparison, draw_costs
from prune_lab.runs import plan_file
from prune_lab.runtime import duration_text, note, pick_device, pick_dtype
from prune_lab.schemas import SITE_SCORE_COLUMNS
from prune_lab.surgery import chosen_from_files, with_first_units
from prune_lab.tables import Pictures, Table, short_plan
from prune_lab.workflow import macs_per_second
from prune_lab.workflow.sizing import SMALL_MACS


def place_of(settings: RunConfig) -> dict[str, Any]:
    """The device and the number format of ``settings``. Raises DeviceError where there are none such."""
    return {"device": pick_device(settings.device), "dtype": pick_dtype(settings.dtype)}


def plans_of(architecture: Architecture, plans: Sequence[str | Plan]) -> list[PruningPlan]:
    """The ``plans``; one that has no name is called by its text. Raises PlanError for one that cannot be read."""
    found: list[PruningPlan] = []
    for one in plans:
        read = (one.plan,) if isinstance(one, Plan) else read_plans(one, architecture)
        from_file = isinstance(one, str) and plan_file(one)[0].endswith(PLAN_FILES)
        found += [plan if plan.name else plan.named(plan.text if from_file else str(one)) for plan in read]
    return found


def with_units(source: ModelSource, plan: PruningPlan) -> PruningPlan:
    """``plan`` whose widths all say which units stay; where that was open those with the largest weights, or the first
    ones of a model that has no weights, where none is better.
    """
    if source.has_weights:
        return chosen_from_files(plan, source.config, source.weight_paths)
    return with_first_units(plan)


def _as_pruned(source: ModelSource, plan: PruningPlan) -> PruningPlan:
    """``plan`` in the form that ``prune`` builds; as it is where there is none, which has costs and no time."""
    try:
        return in_form(source.architecture, with_units(source, plan))
    except FormError:
        return plan


_WARMUP = 3  # passes of each model before the rounds
_LONG = 60.0  # seconds of timing that are worth a line before


def _note_long_timing(
    source: ModelSource, place: dict[str, Any], sizes: dict[str, Any], calls: int, size: str
) -> None:
    """A line before ``calls`` passes that take long, and how they take less."""
    macs = cost_table(source.architecture, **sizes).total.macs
    if macs < SMALL_MACS:
        return
    seconds = calls * macs / macs_per_second(source.architecture, **place)
    if seconds > _LONG:
        smaller = f"--rounds, --resolution{' or --frames' if 'latent frame' in size else ''}"
        note(
            f"timing takes about {duration_text(seconds)}: {calls} passes of {macs / 1e9:.4g} G multiply-adds or less "
            f"at {size}; smaller {smaller} take less, --no-latency times nothing"
        )


def profile_table(
    source: ModelSource,
    plans: Sequence[PruningPlan],
    place: dict[str, Any],
    scores: pd.DataFrame | None,
    *,
    kind: Literal["reductions", "block costs", "pipeline", "runtimes"],
    backends: Sequence[str] = (),
    latency: bool | None,
    steps: int,
    batch: int,
    resolution: int | None,
    tokens: int | None,
    frames: int | None,
    rounds: int,
) -> Table:
    """What ``plans`` leave, or what each block or each part of the pipeline costs (``Model.profile``)."""
    architecture = source.architecture
    timed = source.has_weights if latency is None else latency
    latent, pixels = picture_size(source, resolution)
    plans = [_as_pruned(source, plan) for plan in plans]
    check_frames(source, frames)
    sizes: dict[str, Any] = {"batch": batch, "latent": latent, "tokens": tokens or source.tokens}
    sizes["frames"] = frames
    title = f"Profile of {source.text} at {size_text(source, latent, tokens, frames)}"
    draw: Callable[[Theme], Figure] | None = None
    notes: tuple[str, ...] = ()
    if timed and kind in ("reductions", "block costs"):
        calls = (rounds + _WARMUP) * (1 + len(plans))
        _note_long_timing(source, place, sizes, calls, size_text(source, latent, tokens, frames))
    if kind == "pipeline":
        pipeline = load_pipeline(source, **place)
        frame = profile_pipeline(pipeline, steps=steps, runs=rounds, **{**sizes, "tokens": tokens})
    elif kind == "block costs":
        if timed:
            model = load_model(source, random_weights=not source.has_weights, **place)
            frame = profile_blocks(model, runs=rounds, **sizes)
            shares = zip(frame["macs"] / frame["macs"].sum(), frame["share"], strict=True)
            notes = part_disagreements(architecture, dict(zip(frame["name"], shares, strict=True)))
        else:
            frame = cost_table(architecture, **sizes).frame()
        draw = partial(draw_costs, frame, scores)
    elif kind == "runtimes":
        service = Service(str(place["device"]), str(place["dtype"]).removeprefix("torch."), **sizes)
        services, side = services_of(service, backends), pixels_per_latent(source)
        frame = runtime_table(architecture, plans, services, model=source.text, rounds=rounds, pixels=side)
        notes = plan_disagreements(frame)
    else:
        service = Service(str(place["device"]), str(place["dtype"]).removeprefix("torch."), **sizes)
        where = service.text(source.config, pixels_per_latent(source)) if timed else ""
        table = {"latency": timed, "runs": rounds, "where": where, **sizes, **place}
        frame = reduction_table(architecture, plans, model=source.text, **table)
        notes = plan_disagreements(frame) if timed else ()
        draw = plan_maps(architecture, plans, scores) if plans else None
    if kind == "reductions" and any(plan.form != "native" for plan in plans):
        frame.insert(2, "form", ["", *(plan.form for plan in plans)])
    if "plan" in frame and any(short_plan(plan.label) != plan.label for plan in plans):
        ids = {plan.label: plan.id for plan in plans}
        frame.insert(2, "plan_id", [ids.get(name, "") for name in frame["plan"]])
    return Table(kind, frame.assign(batch=batch, resolution=pixels), title, draw, notes=notes)


def read_backends(text: str) -> tuple[str, ...]:
    """The backends in ``text``, such as ``eager,openvino``; compile is compiled. Raises BackendError for another."""
    found = tuple(
        "compiled" if one == "compile" else one for one in filter(None, map(str.strip, text.split(",")))
    )
    known = ", ".join(BACKENDS).replace("compiled", "compile")
    for one in found:
        if one == "coreml":
            raise BackendError(
                "asked for times in Core ML, which runs on macOS alone, and was timed nowhere yet; give one of "
                f"{known}"
            )
        if one not in BACKENDS:
            raise BackendError(f"asked for the backend {one:.60}; give one of {known}")
    return tuple(dict.fromkeys(found))


def pruned_table(source: ModelSource, plan: Plan, out: Path, *, written: bool) -> Table:
    """What is, or would be, ``written`` to ``out``: the model without the blocks of ``plan``, in one row."""
    costs = cost_table(source.architecture)
    before, after = costs.total, costs.of(plan.plan)
    row = {
        "model": source.text,
        "plan": plan.label,
        "plan_id": plan.id,
        "folder": str(out),
        "written": written,
        "form": plan.plan.form,
        "blocks_removed": len(plan.removed),
        "narrower": len(plan.plan.widths),
        "params": after.params,
        "params_change": after.params / before.params - 1,
        "macs": after.macs,
        "macs_change": after.macs / before.macs - 1,
    }
    notes = [f"in Python: {loaded_in_python(out)}"] if written else []
    if widths := padded_widths(source):
        notes.append(
            f"{source.name} is a padded student: its own widths ({widths}) stay as zeros at full width and are not in "
            "the new plan; to have both, prune what it was cut from with one plan"
        )
    title = "Written" if written else "Would write"
    return Table("pruned", pd.DataFrame([row]), title, plan.plot().draw, notes=tuple(notes))


def site_scores(parts: Table) -> Table:
    """The scores of parts of blocks with a row for each site: how many units it has, and how far apart these are."""
    by_site = parts.data.groupby("site", sort=False)
    scores = by_site["score"].agg(units="size", least="min", median="median", largest="max")
    frame = scores.join(by_site[["criterion", "samples", "model"]].first()).reset_index()
    notes = (*parts.notes, f"a row for each site; --all shows all {len(parts)} units")
    return Table("site scores", frame[list(SITE_SCORE_COLUMNS)], parts.title, notes=notes)


def drawn_table(
    source: ModelSource,
    prompts: tuple[str, ...],
    seeds: tuple[int, ...],
    place: dict[str, Any],
    *,
    steps: int | None,
    guidance: float | None,
    resolution: int | None = None,
) -> Pictures:
    """What the model draws: a row for each of ``prompts``, a column for each of ``seeds``."""
    prompts = prompts_for(source.config, prompts)
    taken, scale = drawing_asked(source, steps, guidance)
    pipeline = load_pipeline(source, **place)
    pixels = generate(pipeline, prompts, seeds, steps=taken, guidance=scale, resolution=resolution)
    pictures = pixels.permute(0, 2, 3, 1).numpy()
    columns = tuple(
        Column("", f"seed {seed}" if len(seeds) > 1 else "picture", "", tuple(pictures[first :: len(seeds)]))
        for first, seed in enumerate(seeds)
    )
    rows = [(source.text, prompt, seed) for prompt in prompts for seed in seeds]
    return Pictures(
        "grid",
        pd.DataFrame(rows, columns=["plan", "prompt", "seed"]),
        f"Pictures by {source.text}",
        lambda theme: draw_comparison(columns, prompts, {}, theme),
        columns=columns,
        labels=prompts,
    )


def exported_table(
    source: ModelSource, out: Path, to: str, *, dtype: str | None, form: str, force: bool, weights: str
) -> Table:
    """What was written to ``out`` in the format ``to``, in one row, with notes (``Model.export``)."""
    if to not in EXPORT_TARGETS:
        known = ", ".join(EXPORT_TARGETS)
        raise UnsupportedModelError(f"asked to export to {to!r}; formats that can be written: {known}")
    chosen = pick_dtype(dtype) if dtype else None
    out = check_apart(out, {"the model": source.places})  # the plain source may lie elsewhere
    with plain_source(source) as plain:
        written = EXPORT_TARGETS[to](plain, out, dtype=chosen, form=form, force=force, weights=weights)
    row = {
        "model": source.text,
        "format": to,
        "file": str(written.path),
        "tensors": written.num_tensors,
        "bytes": written.num_bytes,
    }
    return Table("exported", pd.DataFrame([row]), "Written", notes=tuple(written.notes))
