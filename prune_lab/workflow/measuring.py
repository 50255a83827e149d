"""Steps that measure the teacher: its blocks, their removal impact, and their cost."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pandas as pd

from prune_lab.blocks import Architecture, BlockGroup, GroupKind, block_groups, blocks_frame
from prune_lab.config import PLAN_FILES
from prune_lab.errors import ConfigError
from prune_lab.importance import (
    ONE_STEP,
    ImportanceTable,
    Race,
    check_race,
    criterion_named,
    score,
    with_psnr,
)
from prune_lab.models import resolve_model
from prune_lab.plans import PruningPlan, choices_to_json, is_native, read_plans
from prune_lab.profiling import (
    CostTable,
    LatencyTable,
    cost_table,
    latency_table_from_dict,
    measure_latency_table,
    profile_pipeline,
    random_native_plans,
    reduction_table,
)
from prune_lab.runtime import read_json, write_frame, write_json
from prune_lab.session import Session, read_scores, run_scoring_context, tell_roles
from prune_lab.workflow.targets import controls_among

_LATENCY_CHECKS = 8  # plans with which the predicted latency is compared


def ensure_blocks(session: Session) -> Architecture:
    """The inventory of the run's U-Net; writes choices.json and blocks.csv."""
    run = session.run
    if not run.done(run.choices):
        write_json(run.choices, choices_to_json(session.architecture))
    if not run.done(run.blocks):
        write_frame(run.blocks, blocks_frame(session.architecture))
    return session.architecture


def score_groups_of(session: Session) -> tuple[BlockGroup, ...]:
    """The groups in ``score.groups``, kind by kind, and the plans of the files among them.

    Raises PlanError when a file cannot be read, UnknownBlockError when it names a block that is not there.
    """
    groups: list[BlockGroup] = []
    for name in session.config.score.groups:
        if name.endswith(PLAN_FILES):
            plans = (plan for plan in read_plans(name, session.architecture) if plan.removed)
            groups += [BlockGroup(plan.name or plan.text, "plan", plan.removed) for plan in plans]
        else:
            kind = cast("GroupKind", name)  # the settings have checked it
            groups += block_groups(session.architecture, kind)
    return tuple(groups)


def criteria_of(session: Session) -> tuple[str, ...]:
    """The criteria to measure, the one that leads first.

    Raises UnknownCriterionError, and ConfigError for a race that the leading one cannot run, or a missing scorer.
    """
    settings = session.config.score
    names = tuple(dict.fromkeys((settings.criterion, *settings.also)))
    for name in names:
        criterion_named(name)
    if "clip-score" in names and session.source.is_pipeline and not session.scorer_choice.text:
        raise ConfigError(
            f"asked for the criterion clip-score, found no scorer: {session.scorer_choice.reason}; or choose another "
            "criterion"
        )
    if settings.race:
        check_race(settings.criterion)
    return names


def ensure_scores(session: Session) -> ImportanceTable:
    """The scores of blocks, pairs and stages by the run's criterion; writes importance.csv, last of all.

    Writes importance_parts.csv (per timestep and kind of prompt) and criteria.csv (with ``score.also``) before it.
    """
    run = session.run
    if run.done(run.importance):
        return read_scores(run)
    settings, names, model = session.config.score, criteria_of(session), session.config.model
    groups = score_groups_of(session)
    tell_roles(session)
    context = run_scoring_context(session)
    tables = []
    for name in names:
        race = Race(settings.race) if settings.race and name in ONE_STEP else None
        tables.append(score(context, groups, name, bootstrap=settings.bootstrap, model=model, race=race))
    write_frame(run.importance_parts, pd.concat([table.parts() for table in tables], ignore_index=True))
    write_frame(run.criteria, with_psnr(pd.concat([table.frame() for table in tables], ignore_index=True)))
    write_frame(run.importance, tables[0].frame())
    return tables[0]


def scores_frame(session: Session) -> pd.DataFrame:
    """The scores of the run by all its criteria, the one that leads first; RunError before they are measured."""
    run = session.run
    path = run.criteria if run.done(run.criteria) else run.needs(run.importance, "score")
    return pd.read_csv(path, dtype={"probe": str, "model": str})


def controls(session: Session, architecture: Architecture) -> tuple[PruningPlan, ...]:
    """The controls of the run for ``architecture``, without those that are found for a budget."""
    return controls_among(session.config.search, architecture)


def ensure_latency(session: Session) -> LatencyTable:
    """Milliseconds that the removal of each block saves, and the error of such predictions; writes latency.json.

    The controls calibrate the table; its error is measured on random native plans that are no controls.
    """
    run = session.run
    if run.done(run.latency):
        return latency_table_from_dict(cast("dict[str, Any]", read_json(run.latency)), session.architecture)
    calibrate = {
        plan.id: plan
        for plan in controls(session, session.architecture)
        if plan.removed and is_native(session.architecture, plan)
    }
    drawn = random_native_plans(session.architecture, _LATENCY_CHECKS, seed=session.config.seed)
    table = measure_latency_table(
        session.unet,
        calibrate=tuple(calibrate.values()),
        held_out=tuple(plan for plan in drawn if plan.removed and plan.id not in calibrate),
        **dataclasses.asdict(session.config.profile),
        tokens=session.architecture.tokens,
        seed=session.config.seed,
    )
    write_json(run.latency, table.as_dict())
    return table


def ensure_costs(session: Session) -> CostTable:
    """Parameters and MACs of every block of the teacher, for one sample; writes costs.csv."""
    run = session.run
    costs = cost_table(session.architecture, dtype=session.dtype)
    if not run.done(run.costs):
        write_frame(run.costs, costs.frame())
    return costs


def ensure_reductions(session: Session) -> pd.DataFrame:
    """Cost of teacher and controls, of the run's model with latency, and of ``report.also_presets`` without.

    Writes reductions.csv, the teacher of each model first.
    """
    run, settings = session.run, session.config.profile
    if not run.done(run.reductions):
        own = reduction_table(
            session.architecture,
            controls(session, session.architecture),
            model=session.config.model,
            latency=True,
            device=session.device,
            dtype=session.dtype,
            **dataclasses.asdict(settings),
        )
        frames = [own]
        for name in session.config.report.also_presets:
            architecture = resolve_model(name).architecture
            plans = controls(session, architecture)
            frames.append(reduction_table(architecture, plans, model=name, batch=settings.batch))
        write_frame(run.reductions, pd.concat(frames, ignore_index=True))
    return pd.read_csv(run.reductions)


def ensure_shares(session: Session) -> pd.DataFrame:
    """Cost of each part of the pipeline and its share of the time of one picture; writes pipeline.csv.

    Raises RunError when the model is a U-Net alone.
    """
    run, how = session.run, session.config.evaluate
    if not run.done(run.pipeline_profile):
        timing = dataclasses.asdict(session.config.profile)
        shares = profile_pipeline(session.pipeline, steps=how.steps, guidance=how.guidance, **timing)
        write_frame(run.pipeline_profile, shares)
    return pd.read_csv(run.pipeline_profile)
