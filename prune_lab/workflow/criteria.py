"""All criteria on one model and probe: how they agree, and how well they predict measured outcomes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from prune_lab.blocks import BlockGroup, block_groups
from prune_lab.importance import (
    CRITERIA,
    NEEDS_PIPELINE,
    ONE_STEP,
    ImportanceTable,
    ScoringContext,
    additivity,
    agreement,
    describe_agreement,
    describe_stability,
    predictive_correlation,
    random_plans,
    score,
    stability,
    with_psnr,
)
from prune_lab.plans import PruningPlan, read_plan
from prune_lab.report import write_agreement
from prune_lab.runs import Run, read_records
from prune_lab.runtime import Environment, track, write_frame, write_json
from prune_lab.schemas import RANKING
from prune_lab.session import Session, probe_of, run_scoring_context, scoring_context_of

_RANDOM_PLANS = 40
_OTHER_NOISE = 2  # other draws of noise with which the order is compared
MEASURED = "the measured impact"
OUTCOME = "the loss after distillation"


def _plans_of(session: Session) -> tuple[PruningPlan, ...]:
    files = map(session.run.plan, session.run.plan_ids())
    found = (read_plan(path, session.architecture) for path in files)
    return tuple(plan for plan in found if plan.removed and not plan.widths)  # scores are of whole blocks


def _outcomes(run: Run) -> dict[str, float]:
    """The held-out loss of each plan after its distillation, by plan id; empty where nothing was ranked."""
    if not run.done(run.ranking):
        return {}
    ranking = read_records(run.ranking, RANKING).dropna(subset=["loss_after"])
    rows = ranking[ranking["origin"] != "teacher"]
    return dict(zip(rows["plan_id"].astype(str), rows["loss_after"].astype(float), strict=True))


def _compositions(session: Session) -> tuple[BlockGroup, ...]:
    """Plans of several blocks: pairs, triplets and stages, the run's own plans, and random ones."""
    architecture = session.architecture
    own = [
        BlockGroup(group.name, "plan", group.blocks)
        for kind in ("pair", "triplet", "stage", "inner")
        for group in block_groups(architecture, kind)
        if len(group.blocks) > 1
    ]
    planned = [BlockGroup(plan.label, "plan", plan.removed) for plan in _plans_of(session)]
    drawn = random_plans(architecture, _RANDOM_PLANS, seed=session.config.seed)
    unique = {frozenset(group.blocks): group for group in (*drawn, *own, *planned)}
    return tuple(unique.values())


def _tables(context: ScoringContext, session: Session) -> list[ImportanceTable]:
    """Every criterion that this model can be scored by, on every block that can be removed."""
    blocks = [
        group
        for group in block_groups(session.architecture, "block")
        if session.architecture.block(group.blocks[0]).removable
    ]
    leader = session.config.score.criterion
    names = [leader, *(name for name in CRITERIA if name != leader)]
    names = [name for name in names if context.generation is not None or name not in NEEDS_PIPELINE]
    names = [
        name for name in names if name != "clip-score" or not session.source.is_pipeline or session.scorer
    ]
    model, bootstrap = session.source.name, session.config.score.bootstrap
    return [
        score(context, blocks, name, bootstrap=bootstrap, model=model)
        for name in track(names, "measuring criteria", len(names))
    ]


def _with_other_noise(session: Session, leader: ImportanceTable) -> dict[str, ImportanceTable]:
    """The scores of the leading criterion with other noise and timesteps, by seed; none unless it is of one step."""
    if leader.criterion not in ONE_STEP:
        return {}
    groups, first = [entry.group for entry in leader.entries], session.config.probe.seed + 1
    found = {}
    for seed in range(first, first + _OTHER_NOISE):
        context = scoring_context_of(session, probe_of(session, seed))
        found[f"seed {seed}"] = score(context, groups, leader.criterion, bootstrap=0)
    return found


def _costs(context: ScoringContext, tables: list[ImportanceTable]) -> dict[str, float]:
    """Forward-equivalents of each criterion by itself, whatever was found in the cache this time."""
    costs = {table.criterion: table.compute.forwards if table.compute else 0.0 for table in tables}
    blocks = [entry.group for entry in tables[0].entries]
    # Every sample costs the same, so one is enough; the three criteria of one step come from the same passes.
    one = ScoringContext(context.model, context.probe.rows([0]))
    walk = score(one, blocks, "output-mse", bootstrap=0).compute
    samples = len(context.probe) * (1 if context.guidance == 1 else 2)
    costs |= dict.fromkeys(ONE_STEP, walk.forwards * samples if walk else 0.0)
    if context.generation is not None:
        costs |= dict.fromkeys(NEEDS_PIPELINE, (1 + len(blocks)) * context.generation.forwards)
    return costs


def compared_criteria(session: Session, folder: Path) -> tuple[tuple[str, ...], pd.DataFrame]:
    """(conclusions as sentences, a row per criterion); writes tables, figures and a page to ``folder``.

    Criteria are compared on every removable block; added up over blocks they are compared with the measured impact of
    plans, and with the loss after distillation of the plans that the run has ranked.
    """
    context = run_scoring_context(session, pictures=True)
    tables, compositions = _tables(context, session), _compositions(session)
    together = score(context, compositions, "output-mse", bootstrap=0, model=session.source.name)
    found = [agreement(tables), predictive_correlation(tables, compositions, together.impacts, MEASURED)]
    outcomes = _outcomes(session.run)
    ranked = [plan for plan in _plans_of(session) if plan.id in outcomes]
    if len(ranked) > 2:
        groups = [BlockGroup(plan.label, "plan", plan.removed) for plan in ranked]
        losses = np.array([outcomes[plan.id] for plan in ranked])
        found.append(predictive_correlation(tables, groups, losses, OUTCOME))
    compared = pd.concat(found, ignore_index=True)
    exact = next(table for table in tables if table.criterion == "output-mse")
    sums, steady = additivity(exact, together), stability(tables[0], _with_other_noise(session, tables[0]))
    costs = _costs(context, tables)
    summary = _summary(tables, compared, costs)
    lines = (*describe_agreement(compared, sums, costs), *describe_stability(steady))
    frames = {
        "summary": summary,
        "agreement": compared,
        "scores": with_psnr(pd.concat([table.frame() for table in tables], ignore_index=True)),
        "parts": pd.concat([table.parts() for table in tables], ignore_index=True),
        "additivity": sums,
        "stability": steady,
    }
    for name, frame in frames.items():
        write_frame(folder / f"{name}.csv", frame)
    environment = Environment.capture(str(session.device), session.config.dtype)
    write_json(folder / "environment.json", environment.as_dict())
    write_agreement(folder, model=session.source.name, lines=lines, frames=frames)
    return lines, summary


def _summary(tables: list[ImportanceTable], compared: pd.DataFrame, costs: dict[str, float]) -> pd.DataFrame:
    """A row per criterion: its agreement with the leader and with measured outcomes, and its cost."""
    leader = tables[0].criterion
    rows = []
    for table in tables:
        own = compared[compared["criterion"] == table.criterion]
        row: dict[str, object] = {
            "criterion": table.criterion,
            "samples": table.entries[0].samples,
            "forwards": costs[table.criterion],
        }
        for name, part in (
            ("leader", own[(own["other"] == leader) & (own["over"] == "blocks")]),
            ("impact", own[own["over"] == MEASURED]),
            ("outcome", own[own["over"] == OUTCOME]),
        ):
            for column in ("spearman", "spearman_low", "spearman_high", "kendall"):
                row[f"{name}_{column}"] = float(part[column].iloc[0]) if len(part) else float("nan")
        rows.append(row)
    return pd.DataFrame(rows)
