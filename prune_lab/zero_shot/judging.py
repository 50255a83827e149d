"""The whole comparison: draw what is missing, extract features, measure, decide, and write it all down."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from prune_lab.cluster import Cluster
from prune_lab.errors import ConfigError, DataError
from prune_lab.models import ModelSource, check_draws_in, check_same_class, choose_scorer, load_scorer
from prune_lab.models.protection import check_apart
from prune_lab.prompts import Prompts
from prune_lab.report.picture_grids import Column
from prune_lab.runtime import (
    Environment,
    note,
    pick_device,
    read_json,
    return_freed,
    without_folders,
    write_frame,
    write_json,
)
from prune_lab.runtime.holders import alone_in, check_ours
from prune_lab.schemas import GATE_COLUMNS, KIND_COLUMNS, METRIC_COLUMNS
from prune_lab.zero_shot.drawing import Drawing, draw_missing, prepare
from prune_lab.zero_shot.features import (
    Extractors,
    Features,
    RealPictures,
    drawn_features,
    drawn_picture,
    load_inception,
    real_features,
)
from prune_lab.zero_shot.gates import Gate, Verdict, decide, exit_code
from prune_lab.zero_shot.measuring import Measured, Sets, estimates, kind_rows, measure, metric_rows, reasons
from prune_lab.zero_shot.page import page, write_sheet
from prune_lab.zero_shot.protocol import Protocol, Row, rows_of

ABOUT = "evaluation.json"  # says that a folder is one of ours, and how its figures came to be
_SHOWN = 8  # prompts on the sheet
_SAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What is compared: models, the first of which is the teacher, prompts, real pictures, and how."""

    models: tuple[ModelSource, ...]
    bases: tuple[ModelSource, ...]  # the pipeline of each; itself where it is one
    prompts: Prompts
    named: str  # what the prompts were called
    out: Path
    protocol: Protocol
    protocols: tuple[Protocol, ...] = ()  # of each model, where some draw in fewer steps; empty: that of all
    images: int | None = None  # prompts that are drawn; None: all
    seeds: int = 1  # pictures of each prompt
    seed: int = 0
    real: RealPictures | None = None
    clip: str = ""  # what load_scorer takes, none, or empty: what there is
    inception: str = ""  # a file
    gates: tuple[Gate, ...] = ()
    device: str = "auto"
    batch: int = 8
    processes: int = 1
    cluster: Cluster | None = None
    force: bool = False

    @property
    def each(self) -> tuple[Protocol, ...]:
        """The protocol of each model."""
        return self.protocols or (self.protocol,) * len(self.models)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What was found: tables, what the gates say, and some pictures of each model."""

    metrics: pd.DataFrame
    kinds: pd.DataFrame
    gates: pd.DataFrame
    code: int
    columns: tuple[Column, ...]
    labels: tuple[str, ...]
    about: dict[str, Any]


# What is needed ----------------------------------------------------------------------------------------------------


def _scorer(task: Task, device: torch.device) -> tuple[Any, str, str]:
    """The CLIP model that judges all models, its name, and why there is none.

    Raises ConfigError where the shipped one is asked to judge others.
    """
    choices = [choose_scorer(task.clip, base) for base in task.bases]
    without = next((one for one in choices if not one.text), None)
    if without is not None:
        return None, "", without.reason
    if len({one.text for one in choices}) > 1:
        return (
            None,
            "",
            f"the models have {' and '.join(dict.fromkeys(one.name for one in choices))}; name one for all",
        )
    return load_scorer(choices[0].text, device=device), without_folders(choices[0].name), ""


def _extractors(task: Task, device: torch.device) -> Extractors:
    clip, name, lacks = _scorer(task, device)
    if not task.inception:
        return Extractors(clip, name, lacks)
    inception, named = load_inception(task.inception, device)
    return Extractors(clip, name, lacks, inception, named)


def _titles(models: Sequence[ModelSource]) -> list[str]:
    """What each model is called in tables and folders: its name, numbered where several have one."""
    found: list[str] = []
    for one in models:
        name = _SAFE.sub("-", one.name).strip(".-") or "model"
        number, title = 2, name
        while title.lower() in {other.lower() for other in found}:
            title, number = f"{name}-{number}", number + 1
        found.append(title)
    return found


def _check_out(task: Task) -> Path:
    """Raise StorageError unless DIR is not there, is empty, or is one of ours."""
    sources: dict[str, tuple[Path | str, ...]] = {
        f"the model {one.name}": one.places for one in (*task.models, *task.bases)
    }
    out = check_apart(task.out, sources)
    about = out / ABOUT
    ours = about.is_file() and isinstance(found := read_json(about), dict) and "prune_lab" in found
    check_ours(out, "evaluate", f"asked to evaluate into {task.out}", ours=ours)
    return out


# Drawing -----------------------------------------------------------------------------------------------------------


def _draw_all(
    task: Task, out: Path, titles: Sequence[str], rows: tuple[Row, ...], device: str
) -> list[dict[str, Any]]:
    jobs = [
        Drawing(
            source,
            base,
            out / title,
            rows,
            protocol,
            device,
            task.batch,
            max(1, torch.get_num_threads() // task.processes),
        )
        for source, base, title, protocol in zip(task.models, task.bases, titles, task.each, strict=True)
    ]
    identities = [prepare(job, force=task.force) for job in jobs]  # refused before anything is drawn
    for job in jobs:
        draw_missing(job, processes=task.processes, cluster=task.cluster)
        return_freed()
    return identities


def _side(out: Path, titles: Sequence[str], rows: Sequence[Row]) -> tuple[int, int]:
    """Height and width of all pictures. Raises DataError where those of two models differ: no figure would be fair."""
    sides = {title: tuple(drawn_picture(out / title, rows[0]).shape[1:]) for title in titles}
    if len(set(sides.values())) > 1:
        found = ", ".join(f"{title} {side[1]} x {side[0]}" for title, side in sides.items())
        raise DataError(f"asked to compare pictures of several sizes ({found}); give one with --resolution")
    height, width = next(iter(sides.values()))
    return height, width


# Tables ------------------------------------------------------------------------------------------------------------


def _metric_frame(found: dict[str, dict[str, Measured]], sets: Sets, note_text: str) -> pd.DataFrame:
    teacher, *_ = found
    rows = []
    for title, one in found.items():
        rows += metric_rows(title, one, None if title == teacher else found[teacher])
    counted = {"prompts": sets.prompts, "seeds": sets.seeds, "note": note_text}
    return pd.DataFrame([row | counted for row in rows], columns=list(METRIC_COLUMNS))


def _verdicts(gates: Sequence[Gate], found: dict[str, dict[str, Measured]]) -> list[Verdict]:
    teacher, *others = found
    return [
        decide(
            gate,
            title,
            estimates(found[title]),
            estimates(found[teacher]),
            reasons(found[title]).get(gate.metric, ""),
        )
        for gate in gates
        for title in others or [teacher]
    ]


def _gate_frame(verdicts: Sequence[Verdict], note_text: str) -> pd.DataFrame:
    rows = [
        (
            one.gate.text,
            one.model,
            one.value,
            one.low,
            one.high,
            one.bound,
            one.decision,
            one.reason,
            note_text,
        )
        for one in verdicts
    ]
    return pd.DataFrame(rows, columns=list(GATE_COLUMNS))


def _pictures(
    out: Path, titles: Sequence[str], rows: Sequence[Row]
) -> tuple[tuple[Column, ...], tuple[str, ...]]:
    """A few prompts from all over the file, one picture of each model for each."""
    first = [row for row in rows if row.number == 0]
    chosen = [first[i] for i in np.unique(np.linspace(0, len(first) - 1, _SHOWN).round().astype(int))]
    columns = tuple(
        Column(
            "", title, "", tuple(drawn_picture(out / title, row).permute(1, 2, 0).numpy() for row in chosen)
        )
        for title in titles
    )
    return columns, tuple(row.prompt for row in chosen)


def _drawn(protocol: Protocol) -> dict[str, Any]:
    return {"steps": protocol.steps, "guidance": protocol.guidance}


def evaluate_models(task: Task) -> Outcome:
    """Compare the models of ``task``; what is drawn already is not drawn again. Writes everything to its folder."""
    if len(task.models) != len({(one.text, one.variant, one.subfolder) for one in task.models}):
        raise ConfigError(
            "asked to evaluate a model beside itself; give each once, and --seeds 2 for its noise floor"
        )
    for source, base in zip(task.models, task.bases, strict=True):
        check_same_class(source, base)
        check_draws_in(source, base)
    out, titles = _check_out(task), _titles(task.models)
    rows = rows_of(task.prompts, task.images, seeds=task.seeds, seed=task.seed, suffix=task.protocol.suffix)
    device = pick_device(task.device)
    extractors = _extractors(task, device)
    with alone_in(out, "evaluate", f"asked to evaluate into {task.out}"):
        about = _about(task, titles, rows, extractors, device)
        if not (
            out / ABOUT
        ).is_file():  # else what is there tells of the tables beside it until these are others
            write_json(out / ABOUT, about)
        identities = _draw_all(task, out, titles, rows, str(device))
        about["models"] = [
            {"name": title, **{key: one[key] for key in ("model", "pipeline")}, **_drawn(protocol)}
            for title, one, protocol in zip(titles, identities, task.each, strict=True)
        ]
        return _judged(task, out, titles, rows, extractors, about)


def _judged(
    task: Task,
    out: Path,
    titles: list[str],
    rows: tuple[Row, ...],
    extractors: Extractors,
    about: dict[str, Any],
) -> Outcome:
    side, said = _side(out, titles, rows), task.protocol.note
    about["side"] = list(side)
    real = real_features(task.real, task.protocol, side, extractors) if task.real is not None else None
    found: dict[str, dict[str, Measured]] = {}
    teacher: Features | None = None
    for title in titles:
        features = drawn_features(out / title, rows, extractors, title)
        teacher = features if teacher is None else teacher
        sets = Sets(len(rows) // task.seeds, task.seeds, real, teacher)
        found[title] = measure(features, sets, extractors, title)
    metrics = _metric_frame(found, sets, said)
    verdicts = _verdicts(task.gates, found)
    kinds = [row.kind for row in rows if row.number == 0]
    by_kind = [row | {"note": said} for row in kind_rows(kinds, found, titles[0])]
    columns, labels = _pictures(out, titles, rows)
    outcome = Outcome(
        metrics,
        pd.DataFrame(by_kind, columns=list(KIND_COLUMNS)),
        _gate_frame(verdicts, said),
        exit_code(verdicts),
        columns,
        labels,
        about,
    )
    write_json(out / ABOUT, about)
    write_frame(out / "metrics.csv", outcome.metrics)
    write_frame(out / "by_kind.csv", outcome.kinds)
    write_frame(out / "gates.csv", outcome.gates)
    write_sheet(out / "sheet.png", columns, labels)
    page(out / "README.md", outcome.metrics, outcome.kinds, outcome.gates, about)
    return outcome


def _about(
    task: Task, titles: Sequence[str], rows: Sequence[Row], extractors: Extractors, device: torch.device
) -> dict[str, Any]:
    """The conditions of the figures, ready for JSON; nothing in it names a folder of this machine."""
    how = task.protocol
    if how.note:
        note(how.note)
    environment = Environment.capture(str(device), how.dtype)
    kept = ("device_name", "dtype", "num_threads", "python", "platform", "torch", "diffusers", "transformers")
    return {
        "prune_lab": environment.prune_lab,
        "models": [{"name": title} for title in titles],
        "prompts": {
            "file": without_folders(task.named),
            "digest": task.prompts.digest,
            "of": len(task.prompts.texts),
            "drawn": len(rows) // task.seeds,
            "seeds": task.seeds,
            "seed": task.seed,
        },
        "protocol": {"preset": how.preset, **how.settings, "batch": task.batch, "note": how.note},
        "real": {"name": without_folders(task.real.name), "pictures": task.real.count} if task.real else None,
        "clip": extractors.clip_name or f"none: {without_folders(extractors.clip_lacks)}",
        "inception": extractors.inception_name or "none",
        "environment": {name: value for name, value in environment.as_dict().items() if name in kept},
    }
