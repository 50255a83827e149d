"""The page on the criteria themselves: Markdown with its figures beside it, from tables computed elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from prune_lab.report.criteria_figures import draw_additivity, draw_agreement, draw_parts, draw_stability
from prune_lab.report.figures import LIGHT, save_png, settle
from prune_lab.report.format import UNKNOWN, count, is_missing
from prune_lab.runtime import write_text


def write_agreement(
    folder: Path, *, model: str, lines: Sequence[str], frames: Mapping[str, pd.DataFrame]
) -> Path:
    """The path of the page in ``folder``: the sentences, a row per criterion, and figures of ``frames``.

    ``frames`` holds summary, agreement, parts, additivity and stability, whose CSV files lie beside it.
    """
    summary, parts = frames["summary"], frames["parts"]
    leader = str(summary["criterion"].iloc[0])
    figures = {
        "agreement.png": draw_agreement(frames["agreement"], LIGHT),
        "additivity.png": draw_additivity(frames["additivity"], LIGHT),
    }
    if (frames["stability"]["part"] == "samples").any():
        figures["stability.png"] = draw_stability(frames["stability"], LIGHT)
    leading = parts[parts["criterion"] == leader]
    if len(leading):
        figures["parts.png"] = draw_parts(leading, LIGHT)
    for name, figure in figures.items():
        save_png(figure, folder / name, settle(figure))
    outcome = bool(summary["outcome_spearman"].notna().any())
    header = ["Criterion", "Samples", "Forward-equivalents", f"with {leader}", "with impact of plans"]
    header += ["with loss after distillation"] if outcome else []
    table = [
        f"| {' | '.join(header)} |",
        "| --- | ---: | ---: |" + " ---: |" * (len(header) - 3),
        *(f"| {' | '.join(_cells(row, outcome))} |" for row in summary.to_dict("records")),
    ]
    page = [
        f"# Criteria compared, {model}",
        "",
        *(f"- {line}" for line in lines),
        "",
        "Spearman's rank correlation with its 95 % interval: over blocks the samples are resampled, over plans the "
        "plans. A criterion without samples has no interval over blocks. Forward-equivalents: of all blocks together.",
        "",
        *table,
        "",
        *(f"![{name.removesuffix('.png').capitalize()}]({name})\n" for name in figures),
    ]
    write_text(folder / "README.md", "\n".join(page))
    return folder / "README.md"


def _cells(row: Mapping[object, object], outcome: bool) -> list[str]:
    cells = [f"`{row['criterion']}`", count(row["samples"]), count(row["forwards"])]
    for name in ("leader", "impact", *(["outcome"] if outcome else [])):
        value, low, high = (
            row[f"{name}_{column}"] for column in ("spearman", "spearman_low", "spearman_high")
        )
        interval = "" if is_missing(low) else f" [{low:.2f}, {high:.2f}]"
        cells.append(UNKNOWN if is_missing(value) else f"{value:.2f}{interval}")
    return cells
