"""The figure and the page of a comparison of few steps, from its table and its conditions alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from prune_lab.few_steps.frontier import (
    baseline_of,
    best_by_lever,
    beyond,
    first_lever,
    frontier,
    latency_limit,
    quality_column,
)
from prune_lab.report.figures import LIGHT, Theme, freeze_layout, log_axis, new_figure, save_png, style_axes
from prune_lab.runs import read_picture
from prune_lab.runtime import write_text

Row = Any  # a row of the table, by column
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8F7BD6", "#A08060")
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "p")
_CALLED = {"clip": "CLIP score", "psnr_teacher": "likeness to the teacher (dB)"}
_LEVERS = 5
_SHARES = ("0.75x", "0.5x", "0.25x")  # of the baseline's time, for which the page names the lever


def draw_steps(table: pd.DataFrame, theme: Theme) -> Figure:
    """Quality against the time of one picture: a colour per model, whose line joins what it does not beat itself.

    A mark per scheduler; hollow where passes are reused.
    """
    quality = quality_column(table)
    figure = new_figure(theme, 9, 5.5)
    axes = figure.subplots()
    style_axes(axes, theme, grid="both")
    markers = dict(zip(dict.fromkeys(table["scheduler"]), _MARKERS, strict=False))
    for color, (model, rows) in zip(_COLORS, table.groupby("model", sort=False), strict=False):
        front = frontier(rows)
        axes.plot(front["median_ms"], front[quality], color=color, lw=1.3, label=str(model))
        for scheduler, of_scheduler in rows.groupby("scheduler", sort=False):
            for reused, some in of_scheduler.groupby(of_scheduler["reuse"] > 1):
                axes.scatter(
                    some["median_ms"],
                    some[quality],
                    marker=markers[scheduler],
                    s=30,
                    facecolors="none" if reused else color,
                    edgecolors=color,
                    linewidths=1,
                    zorder=3,
                )
    for _, row in frontier(table).iterrows():
        place = (row["median_ms"], row[quality])
        axes.annotate(
            f"{row['steps']}", place, xytext=(0, 6), textcoords="offset points", fontsize=7, color=theme.text
        )
    for scheduler, marker in markers.items():
        axes.scatter([], [], marker=marker, color=theme.muted, s=30, label=str(scheduler))
    if (table["reuse"] > 1).any():
        axes.scatter([], [], marker="o", facecolors="none", edgecolors=theme.muted, s=30, label="with reuse")
    axes.set_xscale("log")
    log_axis(axes, "x", float(table["median_ms"].min()) * 0.9, float(table["median_ms"].max()) * 1.1)
    axes.set_xlabel("milliseconds of one picture (log scale), median", color=theme.text)
    axes.set_ylabel(_CALLED[quality], color=theme.text)
    axes.legend(frameon=False, fontsize=8, labelcolor=theme.text, loc="lower right", ncols=2)
    return figure


def draw_strips(strips: Sequence[tuple[str, NDArray[np.uint8]]], theme: Theme) -> Figure:
    """A row of pictures (H, W, 3) per configuration, with what it is on the left."""
    height, width = strips[0][1].shape[:2]
    scale = 7 / width
    figure = new_figure(theme, 10, len(strips) * (height * scale + 0.06))
    for axes, (label, strip) in zip(np.atleast_1d(figure.subplots(len(strips))), strips, strict=True):
        axes.imshow(strip, interpolation="none")
        axes.set_axis_off()
        axes.text(-8, height / 2, label, fontsize=8, color=theme.text, ha="right", va="center")
    return figure


# The page -------------------------------------------------------------------------------------------------------------


def _reuse(row: Row) -> str:
    return "none" if row["reuse"] == 1 else f"1 of {row['reuse']} whole"


def _clip(row: Row) -> str:
    if pd.isna(row["clip"]):
        return "not measured"
    change = f" ({row['clip_change']:+.3f}, {row['clip_low']:+.3f} to {row['clip_high']:+.3f})"
    return f"{row['clip']:.3f}" + ("" if pd.isna(row["clip_low"]) else change)


def _lines(rows: pd.DataFrame) -> list[str]:
    """Lines of Markdown: a row per configuration."""
    head = (
        *("model", "scheduler", "steps", "reuse", "passes (whole)", "ms (10 to 90 %)", "of the baseline"),
        *("CLIP (change, 95 %)", "PSNR to the teacher", "PSNR to its own many"),
    )
    lines = [f"| {' | '.join(head)} |", "| --- | --- | ---: | --- " + "| ---: " * 6 + "|"]
    for _, row in rows.iterrows():
        cells = (
            *(row["model"], row["scheduler"], row["steps"], _reuse(row)),
            f"{row['passes']:g} ({row['whole']:g})",
            f"{row['median_ms']:.0f} ({row['p10_ms']:.0f} to {row['p90_ms']:.0f})",
            f"{1 + row['latency_change']:.2f}x",
            _clip(row),
            f"{row['psnr_teacher']:.1f} dB",
            f"{row['psnr_own']:.1f} dB",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _quality(row: Row, quality: str) -> str:
    value = _clip(row) if quality == "clip" else f"{row[quality]:.1f}"
    return f"{_CALLED[quality]} {value}"


_MUCH = 0.2  # of the baseline's CLIP score: where more may be lost, too few pictures were compared


def _first(table: pd.DataFrame, limit: str) -> str:
    """Which lever to pull first; empty where nothing is within the limit."""
    found = first_lever(table, limit)
    if found is None:
        return ""
    row, kept = found
    quality = quality_column(table)
    if quality != "clip" or pd.isna(row["clip_high"]):
        why = "the best of those within it; there is no CLIP score with an interval to tell what it loses"
    elif kept:
        why = "the fewest changes that keep the CLIP score, as far as its interval tells"
        lost, whole = -float(row["clip_low"]), float(baseline_of(table)["clip"])
        if lost > _MUCH * abs(whole):
            why += f": it may lose up to {lost:.3f} of {whole:.3f}, more --images tell"
    else:
        why = "the best of those within it, all of which lose"
    return f"pull first: {row['lever']} ({row['model']}, {row['steps']} steps by {row['scheduler']}), {why}"


def lever_lines(table: pd.DataFrame, limit: str, most: int | None = None) -> list[str]:
    """For a ``limit`` on the latency: which lever to pull first, a line for ``most`` of the levers that meet it (None:
    all), the best quality first, and one on the single levers that do not.
    """
    quality, found = quality_column(table), best_by_lever(table, limit)
    lines = [
        f"{row['lever']}: {row['model']}, {row['steps']} steps by {row['scheduler']}, reuse {_reuse(row)}: "
        f"{row['median_ms']:.0f} ms ({1 + row['latency_change']:.2f}x), {_quality(row, quality)}"
        for _, row in found.head(len(found) if most is None else most).iterrows()
    ]
    lines = [_first(table, limit) or f"nothing that was measured is within {limit}", *lines]
    missed = [
        f"{row['lever']} (at best {row['median_ms']:.0f} ms, {1 + row['latency_change']:.2f}x)"
        for _, row in beyond(table, limit).iterrows()
    ]
    return [*lines, f"not within it alone: {', '.join(missed)}"] if missed else lines


def _conditions(table: pd.DataFrame, conditions: Mapping[str, Any]) -> list[str]:
    asked, where, baseline = conditions["asked"], conditions["environment"], baseline_of(table)
    distinct = int(table["pictures"].iloc[0])
    guidance = f"guidance {asked['guidance']:g}, 1 of models that were distilled for few steps"
    return [
        f"{len(table)} configurations, {asked['images']} pictures each from the same prompts ({distinct} different "
        f"ones, each of which counts once in the scores) and the same noise (seed {asked['seed']}), {guidance}. "
        "Time is that of one picture, text encoding and decoding included, "
        f"{asked['rounds']} rounds in turns, after one picture of each that is not counted: {where['device_name']}, "
        f"{where['device']} {where['dtype']}, {where['num_threads']} threads, torch {where['torch']}, diffusers "
        f"{where['diffusers']}. Other programs were using the machine.",
        "",
        f"The baseline is {baseline['model']} in {baseline['steps']} steps by its own scheduler; changes of the CLIP "
        "score are paired by prompt with it, and shares of its time are the median of those within the rounds. The "
        f"likeness is that to the teacher's, and to the model's own, picture in {asked['many']} steps of its own "
        "scheduler. A pass is a call of the model.",
    ]


def steps_page(
    table: pd.DataFrame,
    conditions: Mapping[str, Any],
    findings: Sequence[str] = (),
    *,
    pictures: bool = False,
) -> str:
    """The page in Markdown: conditions, findings, which lever meets a latency, the frontier and the whole table."""
    lines = ["# Fewer steps", "", *_conditions(table, conditions), "", "![quality against time](steps.png)"]
    if pictures:
        about = "The same prompts and noise: the baseline, and what is not beaten in both time and quality."
        lines += ["", about, "", "![pictures](pictures.png)"]
    lines += ["", *findings] if findings else []
    lines += ["", "## Which lever meets a latency", ""]
    for share in _SHARES:
        limit = latency_limit(share, table)
        lines += [
            f"Within {share} of the baseline ({limit:.0f} ms), the best of each lever (the first {_LEVERS}):",
            "",
            *(f"- {line}" for line in lever_lines(table, share, _LEVERS)),
            "",
        ]
    front = frontier(table)
    lines += ["## Not beaten in both time and quality", "", *_lines(front), "", "## All", "", *_lines(table)]
    if conditions["left_out"]:
        lines += ["", "## Left out", "", *(f"- {line}" for line in conditions["left_out"])]
    return "\n".join([*lines, ""])


def _strips(table: pd.DataFrame, pictures: Path) -> list[tuple[str, NDArray[np.uint8]]]:
    """The pictures of the baseline and of what is not beaten, the slowest first, with what they are."""
    shown = pd.concat([baseline_of(table).to_frame().T, frontier(table)[::-1]]).drop_duplicates(
        ["model", "scheduler", "steps", "reuse"]
    )
    return [
        (
            f"{row['model']}, {row['steps']} steps\n{row['scheduler']}, reuse {_reuse(row)}\n{row['median_ms']:.0f} ms",
            read_picture(pictures / f"{row['model']}-{row['scheduler']}-{row['steps']}-{row['reuse']}.png"),
        )
        for _, row in shown.iterrows()
    ]


def write_steps_page(
    folder: Path,
    table: pd.DataFrame,
    conditions: Mapping[str, Any],
    findings: Sequence[str] = (),
    pictures: Path | None = None,
) -> Path:
    """README.md and steps.png in ``folder``, and pictures.png of what lies in ``pictures``, where that is given."""
    figures = {"steps.png": draw_steps(table, LIGHT)}
    if pictures is not None:
        figures["pictures.png"] = draw_strips(_strips(table, pictures), LIGHT)
    for name, figure in figures.items():
        save_png(figure, folder / name, freeze_layout(figure))
    page = steps_page(table, conditions, findings, pictures=(folder / "pictures.png").is_file())
    write_text(folder / "README.md", page)
    return folder / "README.md"
