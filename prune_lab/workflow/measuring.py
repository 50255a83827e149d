"""Steps that measure the teacher: its blocks, their removal impact, and their cost."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any, cast

import pandas as pd

from prune_lab.blocks import Architecture, BlockGroup, GroupKind, block_groups, blocks_frame
from prune_lab.config import PLAN_FILES
from prune_lab.errors import ConfigError, StorageError
from prune_lab.forms import why_not
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
from prune_lab.plans import PruningPlan, choices_to_json, read_plans, refuse_widths
from prune_lab.profiling import (
    TEACHER,
    ComparedLatency,
    CostTable,
    LatencyTable,
    Service,
    WidthSavings,
    cost_table,
    drawn_latent,
    keep_latency,
    kept_latency,
    latency_file,
    latency_key,
    latency_warnings,
    latency_words,
    measure_latency_table,
    measure_width_savings,
    pixels_per_latent,
    profile_pipeline,
    random_model,
    random_native_plans,
    reduction_table,
    savings_in,
    size_text,
    time_plans,
    turns_of_frame,
)
from prune_lab.runs import read_records
from prune_lab.runtime import note, pick_dtype, write_frame, write_json
from prune_lab.schemas import IMPORTANCE, PIPELINE, REDUCTIONS, ROUNDS, ROUNDS_COLUMNS
from prune_lab.session import Session, ensure_probe, read_scores, run_scoring_context, tell_roles
from prune_lab.session.parts import (
    blocks_part,
    costs_part,
    lacking,
    latency_part,
    record,
    reductions_part,
    rounds_part,
    scores_part,
    shares_part,
)
from prune_lab.workflow.targets import controls_among, service_asked
from prune_lab.workflow.widths import needs_width_scores

_LATENCY_PLANS = (
    4  # that calibrate the latency table, and as many again with which its predictions are compared
)
_LATENCY_ROUNDS = 5  # times profile.runs: the most passes that the table takes
_WIDTH_ROUNDS = 2  # times profile.runs: the most rounds that each narrow model is timed in


def _whole_costs(session: Session) -> CostTable:
    return cost_table(session.architecture, latent=drawn_size(session), dtype=session.dtype)


def ensure_blocks(session: Session) -> Architecture:
    """The inventory of the run's model; writes choices.json and blocks.csv."""
    run, part = session.run, blocks_part(session)
    if lacking(session, part):
        choices = choices_to_json(session.architecture)
        if session.architecture.family.neutral is not None:
            choices["neutral"] = savings_in(_whole_costs(session), "neutral")
        write_json(run.choices, choices)
        write_frame(run.blocks, blocks_frame(session.architecture))
        record(session, part)
    return session.architecture


def score_groups_of(session: Session) -> tuple[BlockGroup, ...]:
    """The groups in ``score.groups``, kind by kind, and the plans of the files among them.

    Raises PlanError when a file cannot be read, UnknownBlockError when it names a block that is not there.
    """
    groups: list[BlockGroup] = []
    for name in session.config.score.groups:
        if name.endswith(PLAN_FILES):
            read = read_plans(name, session.architecture)
            refuse_widths(read, "score")
            plans = (plan for plan in read if plan.removed)
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
    whole = [name for name in names if name not in ONE_STEP]
    if settings.stream and whole:
        raise ConfigError(
            f"asked to score by {', '.join(whole)} with blocks that are read from disk (score.stream), which only "
            f"{', '.join(sorted(ONE_STEP))} can; leave it out"
        )
    return names


def ensure_scores(session: Session) -> ImportanceTable:
    """The scores of blocks, pairs and stages by the run's criterion; writes importance.csv, last of all.

    Writes importance_parts.csv (per timestep and kind of prompt) and criteria.csv (with ``score.also``) before it.
    """
    asked = {session.config.score.criterion, *session.config.score.also}
    with session.streaming() if asked <= ONE_STEP else contextlib.nullcontext():
        return _measured_scores(session)


def _measured_scores(session: Session) -> ImportanceTable:
    run = session.run
    part = scores_part(session)
    if not session.manifests.given(part) and not session.manifests.settled(part):
        if not run.done(run.importance):
            criteria_of(session)  # refused before any work
        ensure_probe(session)
    if not lacking(session, part):
        return read_scores(run)
    settings, names, model = session.config.score, criteria_of(session), session.source.name
    groups = score_groups_of(session)
    tell_roles(session)
    context = run_scoring_context(session)
    session.let_go_of_encoders()
    tables = []
    for name in names:
        race = Race(settings.race) if settings.race and name in ONE_STEP else None
        tables.append(score(context, groups, name, bootstrap=settings.bootstrap, model=model, race=race))
    write_frame(run.importance_parts, pd.concat([table.parts() for table in tables], ignore_index=True))
    write_frame(run.criteria, with_psnr(pd.concat([table.frame() for table in tables], ignore_index=True)))
    write_frame(run.importance, tables[0].frame())
    record(session, part)
    return tables[0]


def scores_frame(session: Session) -> pd.DataFrame:
    """The scores of the run by all its criteria, the one that leads first; RunError before they are measured."""
    run = session.run
    path = run.criteria if run.done(run.criteria) else run.needs(run.importance, "score")
    return read_records(path, IMPORTANCE)


def controls(session: Session, architecture: Architecture) -> tuple[PruningPlan, ...]:
    """The controls of the run for ``architecture``, without those that are found for a budget."""
    return controls_among(session.config.search, architecture)


def drawn_size(session: Session) -> int | None:
    """Side of the latent that the run's model is counted at, as it draws; None for the size in its config."""
    return drawn_latent(session.source, session.config.data.resolution)


def service_of(session: Session) -> Service:
    """Where and how the run's models are to work; raises as ``service_asked`` does."""
    return service_asked(session.config, session.source)


def _where(session: Session) -> str:
    """The run's service in words."""
    return service_of(session).text(session.architecture.config, pixels_per_latent(session.source))


def _own_model(session: Session, service: Service) -> Any:
    """The run's model where it is loaded already, and as the service wants it; None: one of random weights will do."""
    loaded = not {"model", "pipeline"}.isdisjoint(vars(session)) and not session.config.score.channels_last
    place = str(session.device), str(session.dtype).removeprefix("torch.")
    return session.model if loaded and place == (service.device, service.dtype) else None


def _tell(session: Session, table: LatencyTable, words: str) -> None:
    """Lines on ``table``, which begin with ``words``: when and how it was measured, how far it can be relied on, and
    where multiply-adds would mislead.
    """
    sizes: dict[str, Any] = dict(service_of(session).sizes)
    sizes["tokens"] = sizes["tokens"] or session.architecture.tokens
    note(f"{words}{latency_words(table)}")
    for line in latency_warnings(cost_table(session.architecture, **sizes), table):
        note(line)


def ensure_latency(session: Session) -> LatencyTable:
    """Milliseconds that the removal of each block saves at the run's service, and the error of such predictions.

    Writes latency.json: the table that the cache folder of the user keeps for this structure and service, measured
    where there is none. Random native plans calibrate it, and others measure its error. Where plans may make blocks
    narrower it says what that saves, too.
    """
    run, architecture, service = session.run, session.architecture, service_of(session)
    key, part = latency_key(architecture, service), latency_part(session)
    narrows = needs_width_scores(session.config)
    found = None if lacking(session, part) else kept_latency(run.latency, key, architecture)
    if found is not None and (found.widths is not None or not narrows):
        return found
    kept, words = latency_file(key), f"latency at {_where(session)}"
    table = None if session.config.profile.anew else kept_latency(kept, key, architecture)
    before = table
    if table is not None:
        _tell(session, table, f"{words}: kept table, ")
    else:
        table = _measured_latency(session, service)
        _tell(session, table, f"{words}: ")
    if narrows and table.widths is None:
        table = dataclasses.replace(table, widths=_measured_widths(session, service))
        note(f"{words}: {_told_of_widths(table.widths)}")
    if table is not before:
        with contextlib.suppress(
            StorageError
        ):  # a cache folder that cannot be written costs time the next time
            keep_latency(kept, key, table)
    if kept.is_file():
        note(f"latency table: it lies in {kept}; --set profile.anew=true measures it anew")
    keep_latency(run.latency, key, table)
    record(session, part)
    return table


def _measured_latency(session: Session, service: Service) -> LatencyTable:
    architecture, seed, how = session.architecture, session.config.seed, session.config.profile
    place: dict[str, Any] = {"device": service.device, "dtype": pick_dtype(service.dtype)}
    model = _own_model(session, service)
    drawn = random_native_plans(architecture, 2 * _LATENCY_PLANS, seed=seed)
    return measure_latency_table(
        random_model(architecture.config, **place) if model is None else model,
        calibrate=drawn[:_LATENCY_PLANS],
        held_out=drawn[_LATENCY_PLANS:],
        rounds=_LATENCY_ROUNDS * how.runs,
        warmup=how.warmup,
        **service.sizes,
        seed=seed,
        backend=service.backend,
    )


def _measured_widths(session: Session, service: Service) -> WidthSavings:
    how, model = session.config.profile, _own_model(session, service)
    place: dict[str, Any] = {"device": service.device, "dtype": pick_dtype(service.dtype)}
    return measure_width_savings(
        random_model(session.architecture.config, **place) if model is None else model,
        rounds=_WIDTH_ROUNDS * how.runs,
        warmup=how.warmup,
        **service.sizes,
        seed=session.config.seed,
        backend=service.backend,
    )


def _told_of_widths(savings: WidthSavings | None) -> str:
    assert savings is not None
    return (
        f"blocks narrower by a quarter save {savings.measured:.1%} of the time, their parts one by one "
        f"{savings.added_up:.1%}"
    )


def ensure_turns(session: Session, plans: Iterable[PruningPlan]) -> dict[str, ComparedLatency]:
    """The latency of the whole model (TEACHER) and of what each plan leaves that can be built, by id, timed in turns.

    Writes latency_rounds.csv. Plans that were not timed yet are timed together, with the whole model among them once
    more; those that were stay as they are. So a change is always one within the same rounds.
    """
    run, how, part = session.run, session.config.profile, rounds_part(session)
    columns = list(ROUNDS_COLUMNS)
    frame = pd.DataFrame(columns=columns)
    if not lacking(session, part):
        frame = read_records(run.latency_rounds, ROUNDS)
    found: dict[str, ComparedLatency] = {}
    for _, rows in frame.groupby("timing", sort=True):
        found = turns_of_frame(rows).compared() | found  # of the whole model the first timing counts
    missing = {
        plan.id: plan
        for plan in plans
        if plan.changes and plan.id not in found and not why_not(session.architecture, plan)
    }
    if missing or TEACHER not in found:
        service = service_of(session)
        turns = time_plans(
            session.architecture,
            missing,
            service,
            rounds=how.runs,
            warmup=how.warmup,
            model=_own_model(session, service),
            seed=session.config.seed,
        )
        number = 1 + int(frame["timing"].max()) if len(frame) else 1
        parts = [frame, turns.frame().assign(timing=number)[columns]]
        write_frame(run.latency_rounds, pd.concat(parts[len(frame) == 0 :], ignore_index=True))
        record(session, part)
        found = turns.compared() | found
    return found


def ensure_costs(session: Session) -> CostTable:
    """Parameters and MACs of every block of the teacher, for one sample of the size that the run draws; writes
    costs.csv, which says the size.
    """
    run, part, latent = session.run, costs_part(session), drawn_size(session)
    costs = _whole_costs(session)
    if lacking(session, part):
        write_frame(run.costs, costs.frame().assign(size=size_text(session.source, latent)))
        record(session, part)
    return costs


def ensure_reductions(session: Session) -> pd.DataFrame:
    """Cost of teacher and controls, of the run's model with latency, and of ``report.also_presets`` without.

    Writes reductions.csv, the teacher of each model first.
    """
    run, settings = session.run, session.config.profile
    plans, own_name = controls(session, session.architecture), session.source.name
    times = ensure_turns(session, plans)
    part = reductions_part(session)
    if lacking(session, part):
        if own_name in session.config.report.also_presets:
            own_name = f"{own_name} (of this run)"
        own = reduction_table(
            session.architecture,
            plans,
            model=own_name,
            batch=settings.batch,
            latent=drawn_size(session),
            times=times,
            where=_where(session),
        )
        frames = [own]
        for name in session.config.report.also_presets:
            architecture = resolve_model(name).architecture
            plans = controls(session, architecture)
            frames.append(reduction_table(architecture, plans, model=name, batch=settings.batch))
        write_frame(run.reductions, pd.concat(frames, ignore_index=True))
        record(session, part)
    return read_records(run.reductions, REDUCTIONS)


def ensure_shares(session: Session) -> pd.DataFrame:
    """Cost of each part of the pipeline and its share of the time of one picture; writes pipeline.csv.

    Raises RunError when the model is a model alone.
    """
    run, how, part = session.run, session.config.evaluate, shares_part(session)
    if lacking(session, part):
        timing = session.config.profile
        shares = profile_pipeline(
            session.pipeline,
            steps=how.steps,
            guidance=how.guidance,
            batch=timing.batch,
            runs=timing.runs,
            warmup=timing.warmup,
        )
        write_frame(run.pipeline_profile, shares)
        record(session, part)
    return read_records(run.pipeline_profile, PIPELINE)
