"""The page and figure of ``benchmarks.losses``, from the tables of its folder alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.outcome_tables import made_on
from benchmarks.paired import INTERVAL, by_seed, compared, shown, verdict
from benchmarks.rows import rows_of
from prune_lab.runtime import write_text

REPAIRED = "+repair"
TOLD = (
    "A variant is what `distill.loss_variant` says (`no-feature`: `distill.feature_weight` 0), trained from the model "
    "as it was cut; `+repair` starts from the repair that a run makes by itself (`repair.kind` best), `+conditioning` "
    "trains with `distill.random_conditioning` 0.5. The weights of all three losses are 1, as a user gets them: the "
    "feature terms have different scales, so a variant is also judged by how much its scale lets it weigh. "
    "`@next-block`: features of a transformer are compared with what the next block reads, and the cut of its first "
    "block is repaired, as it is now; in its other rows features were compared at the end of each quarter of its "
    "blocks, also within a cut, and that cut was not."
)


def differences(rows: pd.DataFrame, against: str) -> pd.DataFrame:
    """A row per model, plan and variant, at the last step of each model: how it ended against ``against``.

    Beside ``raw+repair`` stand only repaired ones.
    """
    found = []
    for (model, plan), some in rows.groupby(["model", "plan"], sort=False):
        last = some[some["step"] == rows.loc[rows["model"] == model, "step"].max()]
        losses = {
            str(name): by_seed(own)
            for name, own in last.groupby("variant", sort=False)
            if REPAIRED not in against or str(name).endswith(REPAIRED)
        }
        if against in losses:
            found.append(compared(losses, against, model=model, plan=plan))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["model", "name"])


def table_lines(table: pd.DataFrame, against: str) -> Iterator[str]:
    """A line per variant of one model, the best mean rank first."""
    plans = list(dict.fromkeys(table["plan"]))
    yield (
        "| variant | "
        + " | ".join(f"{plan}: loss | less `{against}`'s | rank" for plan in plans)
        + " | seeds |"
    )
    yield "| --- |" + " ---: |" * (3 * len(plans) + 1)
    order = table.groupby("name", sort=False)["rank"].mean().sort_values(kind="stable").index
    for name in order:
        own = {row.plan: row for row in rows_of(table[table["name"] == name])}
        cells = [
            f"{own[plan].loss:.4f} | {shown(own[plan], against)} | {own[plan].rank}"
            if plan in own
            else " | | "
            for plan in plans
        ]
        seeds = sorted({row.seeds for row in own.values()})
        yield f"| {name} | {' | '.join(cells)} | {' or '.join(map(str, seeds))} |"


def page(outcomes: pd.DataFrame, rows: pd.DataFrame) -> str:
    """The report in Markdown."""
    lasts = {str(model): int(some["step"].max()) for model, some in rows.groupby("model", sort=False)}
    steps = ", ".join(f"{model} {last} steps" for model, last in lasts.items())
    lines = [
        "# Which feature loss?",
        "",
        f"Made by `python -m benchmarks.losses` ({made_on(outcomes)}; {steps}). {TOLD}",
        "",
        f"Losses are held-out, {rows['row'].nunique()} rows, the same for all; means over training seeds. {INTERVAL} "
        "Bold: below beyond its interval. Ranks are by the difference.",
        "",
    ]
    for against in ("raw", "raw" + REPAIRED):
        table = differences(rows, against)
        if table["name"].nunique() < 2:
            continue
        lines += [
            f"## Against `{against}`",
            "",
            verdict(table, against, "variant"),
            "",
        ]
        for model, some in table.groupby("model", sort=False):
            teacher = outcomes.loc[outcomes["model"] == model, "teacher"].mean()
            lines += [f"{model}, teacher {teacher:.4f}:", "", *table_lines(some, against), ""]
    return "\n".join([*lines, "![Differences from raw](losses.png)", ""])


def draw(rows: pd.DataFrame) -> Figure:
    """The difference of each variant from raw, with its interval: a panel per model, a colour per plan."""
    table = differences(rows, "raw")
    models = list(dict.fromkeys(table["model"]))
    figure = Figure(figsize=(5.5 * len(models), 4.6), layout="constrained")
    for panel, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        own = table[table["model"] == model]
        names = list(dict.fromkeys(own["name"]))
        plans = list(dict.fromkeys(own["plan"]))
        for place, plan in enumerate(plans):
            some = own[own["plan"] == plan]
            heights = [names.index(name) + 0.2 * (place - (len(plans) - 1) / 2) for name in some["name"]]
            ends = np.array([some["difference"] - some["low"], some["high"] - some["difference"]])
            panel.errorbar(some["difference"], heights, xerr=ends, fmt="o", ms=4, lw=1, label=plan)
        panel.axvline(0, color="gray", lw=0.8)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.invert_yaxis()
        panel.locator_params(axis="x", nbins=5)
        panel.set_xlabel("held-out loss less that of raw")
        panel.set_title(model, pad=22)
        # above the points, which may lie anywhere
        panel.legend(
            fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(plans), frameon=False
        )
    return figure


def write_page(out: Path) -> None:
    """README.md and losses.png, from the tables in ``out``; nothing while there is no outcome."""
    if not (out / "rows.parquet").is_file():
        return
    outcomes, rows = pd.read_csv(out / "outcomes.csv"), pd.read_parquet(out / "rows.parquet")
    write_text(out / "README.md", page(outcomes, rows))
    draw(rows).savefig(out / "losses.png", dpi=100)
