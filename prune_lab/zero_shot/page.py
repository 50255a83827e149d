"""The page of an evaluation, in Markdown, and its sheet of pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from prune_lab.report import LIGHT, plain_texts
from prune_lab.report.picture_grids import Column, draw_comparison
from prune_lab.runtime import atomic_write, write_text

_MEANING = {
    "clip": "cosine of the CLIP embeddings of picture and prompt",
    "fid": "Frechet distance of Inception features to the real pictures",
    "is": "Inception score, 10 parts",
    "cmmd": "discrepancy of CLIP embeddings to the real pictures (sigma 10, times 1,000, biased)",
    "precision": "share of pictures inside the real ones (3 neighbours)",
    "recall": "share of real pictures inside the drawn ones (3 neighbours)",
    "diversity": "mean distance between pictures of one prompt",
    "fid-to-teacher": "Frechet distance to the teacher's pictures by other seeds",
    "cmmd-to-teacher": "discrepancy of CLIP embeddings to the teacher's pictures by other seeds",
}


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "-"
    return str(value).replace("|", "\\|")


def _with_interval(row: Mapping[Any, Any], name: str, low: str, high: str) -> str:
    if not math.isfinite(row[name]):
        return "-"
    ends = f" [{row[low]:.4g}, {row[high]:.4g}]" if math.isfinite(row[low]) else ""
    return f"{row[name]:.4g}{ends}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]], note: str) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    lines += [f"| {' | '.join(map(_number, row))} |" for row in rows]
    return [*lines, "", *([f"*{note}*", ""] if note else [])]


def _metrics(frame: pd.DataFrame, note: str) -> list[str]:
    rows = [
        (
            row["model"],
            row["metric"],
            _with_interval(row, "value", "low", "high"),
            _with_interval(row, "difference", "difference_low", "difference_high"),
            row["floor"],
            row["verdict"],
            row["reason"],
        )
        for row in frame.to_dict("records")
    ]
    head = ("model", "metric", "value [95 %]", "minus the teacher [95 %]", "floor", "verdict", "remark")
    return ["## Metrics", "", *_table(head, rows, note)]


def _kinds(frame: pd.DataFrame, note: str) -> list[str]:
    if frame.empty:
        return []
    rows = [
        (
            row["kind"],
            row["prompts"],
            row["model"],
            _with_interval(row, "clip", "low", "high"),
            _with_interval(row, "difference", "difference_low", "difference_high"),
            row["floor"],
            row["verdict"],
        )
        for row in frame.to_dict("records")
    ]
    head = ("kind", "prompts", "model", "CLIP score [95 %]", "minus the teacher [95 %]", "floor", "verdict")
    return [
        *("## By kind of prompt", "", "What is forgotten. Each interval is for one comparison alone.", ""),
        *_table(head, rows, note),
    ]


def _gates(frame: pd.DataFrame, note: str) -> list[str]:
    if frame.empty:
        return []
    rows = [
        (
            f"`{row['gate']}`",
            row["model"],
            _with_interval(row, "value", "low", "high"),
            row["bound"],
            row["verdict"],
            row["reason"],
        )
        for row in frame.to_dict("records")
    ]
    return [
        "## Gates",
        "",
        "Of a multiple of the teacher's value the interval is that of the paired difference, laid around the bound, so "
        "another one than the value has by itself.",
        "",
        *_table(("gate", "model", "value [95 %]", "bound", "verdict", "remark"), rows, note),
    ]


def _steps(models: Sequence[Mapping[str, Any]]) -> str:
    """In how many steps and with what guidance the models drew; of each where they differ."""
    texts = [f"{one['steps']} steps, guidance {one['guidance']:g}" for one in models]
    if len(set(texts)) == 1:
        return texts[0]
    return "; ".join(f"{one['name']}: {text}" for one, text in zip(models, texts, strict=True))


def _conditions(about: Mapping[str, Any]) -> list[str]:
    drawn, how = about["prompts"], about["protocol"]
    height, width = about["side"]
    size = how["resolution"] or "the model's own"
    real = about["real"]
    named_real = (
        "none"
        if real is None
        else f"{real['pictures']:,} of {real['name']}, resized to {width} x {height} without regard to their shape"
    )
    named = "; ".join(
        f"{one['name']} (model {one['model']}, pipeline {one['pipeline']})" for one in about["models"]
    )
    environment = ", ".join(f"{name} {value}" for name, value in about["environment"].items())
    return [
        *("## Conditions", ""),
        f"- Models, the teacher first: {named}.",
        f"- {drawn['drawn']:,} of {drawn['of']:,} prompts of {drawn['file']} ({drawn['digest']}), {drawn['seeds']} "
        f"pictures of each. A generator for each picture, seeded from {drawn['seed']}, the prompt and its number.",
        f"- {_steps(about['models'])}, {how['dtype']}, the model's own scheduler, "
        f"size {size}, judged at {width} x {height} as {how['format'].upper()}, batch {how['batch']}"
        f"{', preset ' + how['preset'] if how['preset'] else ''}.",
        f"- Real pictures: {named_real}.",
        f"- CLIP: {about['clip']}. Inception: {about['inception']}.",
        f"- prune_lab {about['prune_lab']}, {environment}.",
        "",
        "A value is the mean over seeds of the metric of one picture for each prompt. Intervals are over prompts (the "
        "delete-a-group jackknife in 20 groups, of a mean over prompts the t interval), differences are paired, and "
        "the real pictures are taken as they are. The floor is the largest difference between two seeds of the same "
        "model: models whose difference is smaller, or has an interval that holds zero, are not told apart, which does "
        "not say that they are equal. Without a floor (one seed, and diversity, which is between seeds) the interval "
        "alone decides.",
        "",
    ]


def page(
    path: Path, metrics: pd.DataFrame, kinds: pd.DataFrame, gates: pd.DataFrame, about: Mapping[str, Any]
) -> None:
    """Write the page: gates, metrics, kinds, and the conditions of all figures."""
    note = about["protocol"]["note"]
    meanings = [f"- {name}: {text}." for name, text in _MEANING.items()]
    lines = [
        *("# Evaluation", ""),
        *_gates(gates, note),
        *_metrics(metrics, note),
        *(*meanings, ""),
        *_kinds(kinds, note),
        *("## Pictures", "", "![some prompts, drawn by each model](sheet.png)", ""),
        *_conditions(about),
    ]
    write_text(path, "\n".join(lines))


def write_sheet(path: Path, columns: Sequence[Column], labels: Sequence[str]) -> None:
    """Write the pictures of ``columns`` side by side as PNG, a row for each of ``labels``."""
    figure = draw_comparison(columns, labels, {}, LIGHT)
    figure.patch.set(alpha=1.0, facecolor=LIGHT.surface)
    with atomic_write(path) as temporary, plain_texts(figure):
        figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
