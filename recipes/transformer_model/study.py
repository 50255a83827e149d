"""What pruning does to the transformer: impacts of blocks and pairs, a search with controls, a short distillation."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from prune_lab.blocks import BlockGroup
from prune_lab.config import RunConfig, load_config
from prune_lab.importance import ScoringContext, score
from prune_lab.models import load_model, resolve_model
from prune_lab.plans import PruningPlan, plan_of
from prune_lab.probes import random_probe
from prune_lab.runs import open_run
from prune_lab.runtime import write_frame, write_json, write_text
from prune_lab.session import Session, run_scoring_context
from prune_lab.workflow import run_all
from recipes.reference_model.report import write_figure

STUDY = Path(__file__).with_name("study.toml")
DEMO = Path(__file__).parents[2] / "reports" / "demo"
SIZES = (4, 6)  # blocks that a control removes
SHOWN = (".md", ".csv", ".png", ".json")  # of the report; the page with everything inside is large


# The plans that a search has to beat -------------------------------------------------------------------------------


def by_hand(blocks: list[str], size: int) -> dict[str, list[str]]:
    """Of a chain of `blocks`: `size` in a row from its middle, and the last of every few."""
    start, step = (len(blocks) - size) // 2, len(blocks) // size
    return {
        f"contiguous-{size}": blocks[start : start + size],
        f"every-{step}-of-{len(blocks)}": blocks[step - 1 :: step][:size],
    }


def control_plans(name: str) -> tuple[PruningPlan, ...]:
    """For each of SIZES the plans by hand, and the one that removes the blocks of the least weights."""
    source = resolve_model(name)
    architecture = source.architecture
    blocks = [block.name for block in architecture.blocks]
    probe = random_probe(source.config, samples=2, timesteps=2, seed=0)  # weights alone decide; it wants one
    groups = [BlockGroup(block, "block", (block,)) for block in blocks]
    weights = score(ScoringContext(load_model(source), probe), groups, "magnitude", bootstrap=0)
    lightest = [blocks[place] for place in np.argsort(weights.impacts, kind="stable")]
    plans: dict[str, list[str]] = {}
    for size in SIZES:
        plans |= by_hand(blocks, size) | {f"magnitude-{size}": lightest[:size]}
    return tuple(plan_of(architecture, removed, called) for called, removed in plans.items())


# Pairs -------------------------------------------------------------------------------------------------------------


def pair_impacts(session: Session, alone: Mapping[str, float]) -> pd.DataFrame:
    """One row per pair of blocks: first, second, impact of removing both, and the sum of their impacts `alone`."""
    pairs = list(itertools.combinations(alone, 2))
    groups = [BlockGroup(" ".join(pair), "plan", pair) for pair in pairs]
    found = score(run_scoring_context(session), groups, "output-mse", bootstrap=0)
    rows = [(a, b, both, alone[a] + alone[b]) for (a, b), both in zip(pairs, found.impacts, strict=True)]
    return pd.DataFrame(rows, columns=["first", "second", "impact", "sum"])


def draw_pairs(path: Path, pairs: pd.DataFrame) -> None:
    """How many times the sum of the single impacts the impact of a pair is; 1 is additive."""
    names = list(dict.fromkeys([*pairs["first"], *pairs["second"]]))
    ratios = np.full((len(names), len(names)), np.nan)
    for first, second, ratio in zip(
        pairs["first"], pairs["second"], pairs["impact"] / pairs["sum"], strict=True
    ):
        ratios[names.index(second), names.index(first)] = ratio
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(np.log2(ratios), cmap="RdBu_r", vmin=-2, vmax=2)
    for (row_number, column), ratio in np.ndenumerate(ratios):
        if np.isfinite(ratio):
            axis.text(column, row_number, f"{ratio:.1f}", ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    axis.set_title("Impact of a pair over the sum of its blocks' impacts", fontsize=9)
    figure.colorbar(image, ax=axis, label="doublings", shrink=0.8)
    write_figure(figure, path, dpi=100)


# The page ----------------------------------------------------------------------------------------------------------


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _of_run(folder: Path) -> dict[str, str]:
    """What is set beside another model, in words, by row: from the tables of a report."""
    ranking, impacts = pd.read_csv(folder / "ranking.csv"), pd.read_csv(folder / "importance.csv")
    teacher, students = ranking.iloc[0], ranking[ranking["status"] == "ranked"]
    single = impacts[(impacts["kind"] == "block") & ~impacts["starred"]].sort_values("impact")
    order = spearmanr(students["impact_one_shot"], students["loss_after"]).statistic
    least = [f"{row.group} {row.impact:.2g}" for row in single.iloc[:3].itertuples()]
    most = [f"{row.group} {row.impact:.2g}" for row in single.iloc[:-4:-1].itertuples()]
    macs = teacher["macs"]
    near = students[students["macs"].between(0.6 * macs, 0.72 * macs)]
    searched = near[near["origin"] == "search"]  # none where a control is the same plan
    best = (searched if len(searched) else near).nsmallest(1, "loss_after").iloc[0]
    loss = teacher["loss_after"]
    return {
        "parameters": f"{teacher['params'] / 1e6:.2f} M",
        "multiply-adds": f"{macs / 1e6:.0f} M",
        "removable blocks": str(len(single)),
        "held-out loss of the teacher, 96 rows": f"{loss:.3f}",
        "least impact": ", ".join(least),
        "most impact": ", ".join(most),
        "median impact": f"{single['impact'].median():.2g}",
        "best searched plan with 60 to 72 % of the multiply-adds": f"{best['blocks_removed']} blocks, "
        f"{best['macs'] / macs:.0%} left",
        "its loss over the teacher's, cut and repaired": f"{best['loss_before'] - loss:+.3f}",
        "the same, distilled": f"{best['loss_after'] - loss:+.3f}, {best['steps']} steps",
        "rank correlation of impact in one shot and distilled loss": f"{order:.2f} ({len(students)} plans)",
    }


def study_page(ours: Path, pairs: pd.DataFrame, seconds: float, demo: Path = DEMO) -> str:
    """The page (Markdown) from the tables of the report in `ours` and those of the reference model's demo."""
    one, other = _of_run(ours), _of_run(demo)
    ratios = pairs["impact"] / pairs["sum"]
    ranking = pd.read_csv(ours / "ranking.csv")
    whole = ranking.iloc[0]["macs"]
    columns = [
        "plan",
        "blocks removed",
        "multiply-adds",
        "impact",
        "loss, cut and repaired",
        "distilled",
        "tie group",
    ]
    rows = [
        _row(
            [
                row.plan,
                row.blocks_removed,
                f"{row.macs / whole:.0%}",
                f"{row.impact_one_shot:.2g}",
                f"{row.loss_before:.4f}",
                f"{row.loss_after:.4f}",
                f"{row.tie_group:.0f}".replace("nan", ""),
            ]
        )
        for row in ranking.itertuples()
    ]
    lines = [
        "# Pruning the shipped transformer",
        "",
        "One run of `recipes/transformer_model/study.toml` (two CPU cores, float32, one seed; "
        f"{seconds / 60:.0f} minutes), made by `python -m recipes.transformer_model study`. Every subset of the blocks "
        "is a plain, smaller config. [The whole report](report.md).",
        "",
        "## The transformer beside the reference",
        "",
        "The reference's figures are those of [its demo](../../demo/report.md): other plans, and 100 steps.",
        "",
        _row(["", "transformer", "reference U-Net"]),
        "| --- | --- | --- |",
        *(_row([name, one[name], other[name]]) for name in one),
        "",
        "## All plans",
        "",
        _row(columns),
        "| --- |" + " ---: |" * (len(columns) - 1),
        *rows,
        "",
        "Plans of one tie group cannot be told from the first of it on the held-out rows.",
        "",
        "## Pairs",
        "",
        f"All {len(pairs)} pairs were removed too. The impact of a pair is {ratios.median():.2f} times the sum of its "
        f"blocks' impacts in the median, from {ratios.min():.2f} to {ratios.max():.2f}; the order of the pairs by the "
        f"sum agrees with the measured one at {spearmanr(pairs['sum'], pairs['impact']).statistic:.2f} (Spearman).",
        "",
        "![Impact of a pair over the sum of its blocks' impacts](pairs.png)",
        "",
    ]
    return "\n".join(lines)


def study_transformer(out: Path, work: Path, *, config: Path | None = None) -> None:
    """Run the study in `work` (the same call again resumes) and write its report, tables and page into `out`."""
    settings: RunConfig = load_config(STUDY if config is None else config)
    controls = work / "controls.json"
    write_json(controls, [plan.to_json() for plan in control_plans(settings.model)])
    search = dataclasses.replace(settings.search, controls=(*settings.search.controls, str(controls)))
    run = open_run(work / "run", must_exist=False)
    run_all(dataclasses.replace(settings, search=search), run.folder)
    session = Session(run)
    impacts = pd.read_csv(run.report_dir / "importance.csv").set_index("group")["impact"]
    pairs = pair_impacts(session, {str(name): float(impact) for name, impact in impacts.items()})
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob("recovery-*.csv"):  # of plans that another run found
        path.unlink()
    for path in sorted(run.report_dir.iterdir()):
        if path.suffix in SHOWN:
            shutil.copyfile(path, out / path.name)
    write_frame(out / "pairs.csv", pairs)
    draw_pairs(out / "pairs.png", pairs)
    seconds = float(pd.read_csv(out / "steps.csv")["seconds"].sum())
    write_text(out / "README.md", study_page(out, pairs, seconds))
