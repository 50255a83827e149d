"""The page of ``benchmarks.runtimes``, and the table of it in the project's README, from the CSV alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from benchmarks.rows import rows_of
from prune_lab.profiling import TEACHER, plan_disagreements
from prune_lab.runtime import write_text

CALLED = {
    "eager": "eager",
    "compiled": "torch.compile",
    "onnx": "onnxruntime",
    "openvino": "OpenVINO",
    "executorch": "ExecuTorch",
}


def _change(rows: pd.DataFrame, intervals: bool) -> str:
    """The change of one plan in per cent, with its interval where there is one and it is wanted."""
    [row] = rows_of(rows)
    if pd.isna(row.latency_change):
        return "not measured"
    found = f"{100 * row.latency_change:.0f}"
    if intervals and pd.notna(row.latency_low):
        found += f" ({100 * row.latency_low:.0f} to {100 * row.latency_high:.0f})"
    return found


def parts_of(frame: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(model, size, its rows): what stands in one table. A service is `cpu float32, 128 x 128, ..., with onnx`."""
    sizes = frame["service"].str.split(",").str[1].str.strip()
    for (model, size), rows in frame.groupby(["model", sizes], sort=False):
        yield str(model), str(size), rows


def table(rows: pd.DataFrame, *, intervals: bool = True) -> list[str]:
    """Lines of Markdown: plans by runtimes; changes in per cent, and milliseconds of the whole model."""
    backends = [name for name in CALLED if name in set(rows["backend"])]
    lines = [
        "| plan | multiply-adds | " + " | ".join(CALLED[name] for name in backends) + " |",
        "| --- " + "| ---: " * (1 + len(backends)) + "|",
    ]
    for plan, of_plan in rows.groupby("plan", sort=False):
        cells = []
        for name in backends:
            one = of_plan[of_plan["backend"] == name]
            if not len(one):
                cells.append("not measured")
            elif plan == TEACHER:
                cells.append(f"{one['median_ms'].iloc[0]:,.1f} ms")
            else:
                cells.append(_change(one, intervals))
        macs = "" if plan == TEACHER else f"{100 * of_plan['macs_change'].iloc[0]:.0f}"
        lines.append(f"| {plan} | {macs} | " + " | ".join(cells) + " |")
    return lines


def in_readme(frame: pd.DataFrame) -> list[str]:
    """The table that stands in the project's README: of the largest model that was timed."""
    *_, (_model, _size, rows) = parts_of(frame)
    return table(rows, intervals=False)


def page(frame: pd.DataFrame) -> str:
    """The report in Markdown."""
    lines = [
        "# What plans save in each runtime",
        "",
        "Made by `python -m benchmarks.runtimes`: one forward pass, random weights, each model in a process of its "
        "own, timed in turns. Changes against the whole model within a round, in per cent: the median, and its 95 % "
        "interval where there were six rounds or more. Other programs were using the machine, so intervals count and "
        "not digits; the CSV has processor time, memory and the load as well.",
        "",
        "Of `widths-65` every part of every block is narrower alike, so that at most 65 % of the multiply-adds stay. "
        "What the search found lies beside this page: the plan of least impact by the scores of the shipped U-Net "
        "([demo](../demo/report.md)) with no more multiply-adds than BK-Base.",
    ]
    for model, size, rows in parts_of(frame):
        first = next(rows_of(rows))
        threads = "thread" if first.threads == 1 else "threads"
        lines += [
            "",
            f"## {model}, pictures of {size.replace(' x ', ' by ')} pixels, {first.tokens} tokens, {first.dtype}, "
            f"{first.threads} {threads}",
            "",
            *table(rows),
            "",
            *(f"- {line}" for line in plan_disagreements(rows)),
        ]
    return "\n".join([*lines, ""])


def write_page(path: Path) -> None:
    """Write README.md beside the table in ``path``."""
    write_text(path.parent / "README.md", page(pd.read_csv(path)))
