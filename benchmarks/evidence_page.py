"""The page and figure of ``benchmarks.evidence``, from the tables of its folder and of the ranking study alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

from benchmarks.outcome_tables import made_on
from benchmarks.rows import rows_of
from prune_lab.models import resolve_model
from prune_lab.plans import parse_plan
from prune_lab.runtime import write_text

Floats = NDArray[np.float64]
FORECASTS = {  # column of plans.csv: what it is called
    "added_up": "added-up scores",
    "prior": "added-up scores of untrained models",
    "one_shot": "impact in one shot",
    "loss": "loss in one shot",
    "repaired": "loss after the repair",
}
DRAWS, LEAST = 1000, 8
FLIPPED = 4  # places between forecast and outcome from which a plan is a counter-example
SHAPES = "shapes.csv"  # untrained models of full size
PAPERS = "bk-small"
UNTRAINED = ("untrained_0", "untrained_1", "untrained_2")


def tau(one: Floats, other: Floats) -> float:
    """Kendall's tau-b; NaN where one of them is constant."""
    return float(kendalltau(one, other).statistic)


def _interval(draws: Sequence[float]) -> str:
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return f"[{low:.2f}, {high:.2f}]"


def outcome_losses(rows: pd.DataFrame, steps: int) -> pd.DataFrame:
    """Losses at ``steps``, the mean over seeds: a row per plan, a column per held-out row."""
    chosen = rows[rows["step"] == steps]
    return chosen.pivot_table(index="plan_id", columns="row", values="loss", aggfunc="mean")


def agreement(plans: pd.DataFrame, rows: pd.DataFrame, steps: int) -> pd.DataFrame:
    """A row per forecast of the plans of one model and budget: tau-b with the outcome, with intervals."""
    losses = outcome_losses(rows, steps)
    known = plans.set_index("plan_id").loc[losses.index]
    values = {name: known[column].to_numpy(dtype=float) for column, name in FORECASTS.items()}
    for told, some in _looks(rows, steps):
        for step in sorted({int(step) for step in some["step"] if 0 < step < steps}):
            found = outcome_losses(some, step).mean(axis=1)
            # an order of some of the plans compares with no other
            if set(losses.index) <= set(found.index):
                values[f"loss at step {step}{told}"] = found.reindex(losses.index).to_numpy()
    outcome = losses.mean(axis=1).to_numpy()
    generator = np.random.default_rng(0)
    by_row = generator.integers(losses.shape[1], size=(DRAWS, losses.shape[1]))
    by_plan = generator.integers(len(losses), size=(DRAWS, len(losses)))
    resampled = [losses.to_numpy()[:, draw].mean(axis=1) for draw in by_row]
    return pd.DataFrame(
        {
            "forecast": name,
            "tau": tau(column, outcome),
            "rows": _interval([tau(column, one) for one in resampled]),
            "plans": _interval([tau(column[draw], outcome[draw]) for draw in by_plan]),
            "first": known["plan"].iloc[int(np.argmin(column))],
            "regret": float(outcome[int(np.argmin(column))] - outcome.min()),
        }
        for name, column in values.items()
    )


def _looks(rows: pd.DataFrame, steps: int) -> Iterator[tuple[str, pd.DataFrame]]:
    """(What it is called, rows) of the seeds that came to ``steps``, and of those that stopped before.

    The look of a run that goes on to the outcome agrees with it more than a run of its own would: of the latter only
    the plan is the same, not the order of the samples.
    """
    there = rows["seed"].isin(set(rows.loc[rows["step"] == steps, "seed"]))
    yield "", rows[there]
    if not there.all():
        yield ", other seeds", rows[~there]


def flips(plans: pd.DataFrame, rows: pd.DataFrame, steps: int) -> pd.DataFrame:
    """The plans that end at least FLIPPED places from where added-up scores or loss in one shot had them."""
    outcome = outcome_losses(rows, steps).mean(axis=1)
    table = plans[plans["plan_id"].isin(outcome.index)].copy()
    table["outcome"] = outcome.loc[table["plan_id"]].to_numpy()
    for column in ("added_up", "loss", "repaired", "outcome"):
        table[f"rank_{column}"] = table[column].rank().astype(int)
    far = (table[["rank_added_up", "rank_loss"]].sub(table["rank_outcome"], axis=0)).abs().max(axis=1)
    return table[far >= FLIPPED].sort_values("outcome")


def _among(blocks: pd.DataFrame) -> str:
    """The least and the largest agreement of two untrained seeds."""
    found = [
        spearmanr(blocks[one], blocks[other]).statistic
        for place, one in enumerate(UNTRAINED)
        for other in UNTRAINED[place + 1 :]
    ]
    return f"{min(found):.3f} to {max(found):.3f}"


def prior_lines(untrained: pd.DataFrame) -> Iterator[str]:
    """What untrained models say of the blocks of each model, in words."""
    for model, blocks in untrained.groupby("model", sort=False):
        prior = blocks[list(UNTRAINED)].mean(axis=1)
        least, own = (", ".join(_least(blocks, by, LEAST)) for by in (prior, blocks["trained"]))
        yield (
            f"- **{model}** ({len(blocks)} blocks): untrained and trained order agree by "
            f"{spearmanr(prior, blocks['trained']).statistic:.2f} (Spearman), three untrained seeds with each other by "
            f"{_among(blocks)}. Least without training: {least}. Least of the trained model: {own}."
        )


def _least(blocks: pd.DataFrame, by: pd.Series[float], count: int) -> list[str]:
    return blocks["block"][by.sort_values().index[:count]].tolist()


def shape_lines(shapes: pd.DataFrame) -> Iterator[str]:
    """What untrained models of full size say of their blocks, in words."""
    for model, blocks in shapes.groupby("model", sort=False):
        removed = parse_plan(PAPERS, resolve_model(str(model)).architecture).removed
        prior, first = blocks[list(UNTRAINED)].mean(axis=1), blocks.iloc[0]
        least = _least(blocks, prior, len(removed))
        yield (
            f"- **{model}** ({len(blocks)} blocks; {first['latent']} x {first['latent']} latents, {first['rows']} "
            f"random inputs, float32 on a CPU, torch {first['torch']}): three seeds agree with each other by "
            f"{_among(blocks)} (Spearman). Least: {', '.join(least[:LEAST])}. Of the {len(removed)} blocks that "
            f"{PAPERS} removes, {len(set(least) & set(removed))} are among the {len(removed)} least; of the mid stage "
            f"{sum(block.startswith('Md') for block in least)} of {sum(blocks['block'].str.startswith('Md'))}."
        )


def draw(untrained: pd.DataFrame, plans: pd.DataFrame, rows: pd.DataFrame, path: Path) -> None:
    """Trained against untrained scores of both models; outcomes against forecasts of the newest study."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for panel, (model, blocks) in zip(axes, untrained.groupby("model", sort=False), strict=False):
        prior = blocks[list(UNTRAINED)].mean(axis=1)
        panel.loglog(prior, blocks["trained"], "o", ms=4)
        for x, row in zip(prior, rows_of(blocks), strict=True):
            panel.annotate(row.block, (x, row.trained), fontsize=5.5)
        panel.set(title=f"{model}: impact of each block", xlabel="untrained", ylabel="trained")
    steps = int(rows["step"].max())
    outcome = outcome_losses(rows, steps).mean(axis=1)
    known = plans[plans["plan_id"].isin(outcome.index)]
    for kind, some in known.groupby("kind", sort=False):
        axes[2].plot(some["loss"], outcome.loc[some["plan_id"]], "o", ms=5, label=kind)
    for row in rows_of(known):
        axes[2].annotate(row.plan, (row.loss, outcome.loc[row.plan_id]), fontsize=5.5)
    axes[2].set(title=f"loss after {steps} steps", xlabel="loss in one shot")
    axes[2].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def study_lines(model: str, budget: str, plans: pd.DataFrame, rows: pd.DataFrame) -> Iterator[str]:
    """The section of one model and budget."""
    steps, reached = int(rows["step"].max()), rows.groupby("seed")["step"].max()
    seeds = "; ".join(
        f"{last} steps with training seed{'s' * (len(own) > 1)} {', '.join(str(seed) for seed in own.index)}"
        for last, own in sorted(reached.groupby(reached), reverse=True)
    )
    yield from (
        f"## {model}, the budget of {budget}",
        "",
        f"{rows['plan_id'].nunique()} plans, {seeds}; {rows['row'].nunique()} held-out rows.",
        "",
        "| forecast | tau-b | 95 % over rows | 95 % over plans | its first plan | regret |",
        "| --- | ---: | ---: | ---: | --- | ---: |",
    )
    for row in rows_of(agreement(plans, rows, steps)):
        yield f"| {row.forecast} | {row.tau:.2f} | {row.rows} | {row.plans} | {row.first} | {row.regret:.4f} |"
    found = flips(plans, rows, steps)
    if len(found):
        yield from (
            "",
            f"Counter-examples: plans that end {FLIPPED} or more places from where they were foretold.",
            "",
            "| plan | removed | by added-up scores | by loss in one shot | by repaired loss | at the end | loss at the "
            "end |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        )
        for row in rows_of(found):
            ranks = (row.rank_added_up, row.rank_loss, row.rank_repaired, row.rank_outcome)
            told = " | ".join(f"{rank}" for rank in ranks)
            yield f"| {row.plan} | {row.removed} | {told} | {row.outcome:.4f} |"
    yield ""


def of_shapes(out: Path) -> Iterator[str]:
    """The paragraph on models of full size, from SHAPES in ``out``."""
    yield from ("The same of Stable Diffusion's own shapes (`python -m benchmarks.untrained_shapes`):", "")
    yield from shape_lines(pd.read_csv(out / SHAPES))
    yield ""


def write_page(out: Path) -> None:
    """README.md and evidence.png, from the tables in ``out``."""
    plans = pd.read_csv(out / "plans.csv", dtype={"plan_id": str})
    untrained = pd.read_csv(out / "untrained.csv")
    rows, looks = pd.read_parquet(out / "rows.parquet"), pd.read_csv(out / "outcomes.csv")
    lines = [
        "# Can forecasts of the order be trusted?",
        "",
        "Made by `python -m benchmarks.evidence_plans` (plans and forecasts) and `python -m benchmarks.evidence` "
        f"(outcomes; {made_on(looks)}). A loss is held-out, the "
        "same rows for all plans and looks; regret is the loss at the end of a forecast's first plan, less that of the "
        "best. The U-Net's twelve plans at the budget of Small are in [the ranking study](../ranking/README.md).",
        "",
    ]
    for (model, budget), some in rows.groupby(["model", "budget"], sort=False):
        own = plans[(plans["model"] == model) & (plans["budget"] == budget)]
        lines += study_lines(str(model), str(budget), own, some)
    lines += [
        "## How much of the order is the architecture's own?",
        "",
        "The same score (`output-mse`, 96 rows) of models of the same config with random weights, three seeds:",
        "",
        *prior_lines(untrained),
        "",
        *(of_shapes(out) if (out / SHAPES).is_file() else ()),
        "![Trained and untrained scores; outcomes against forecasts](evidence.png)",
        "",
    ]
    draw(untrained, plans, rows, out / "evidence.png")
    write_text(out / "README.md", "\n".join(lines))
