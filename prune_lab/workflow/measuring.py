"""Steps that measure the teacher: its blocks, the probe, removal impact, and what everything costs."""

from __future__ import annotations

from typing import Any, cast

import pandas as pd
import torch

from prune_lab.blocks import (
    Architecture,
    BlockGroup,
    GroupKind,
    architecture_of,
    block_groups,
    blocks_frame,
)
from prune_lab.config import BUDGET_CONTROLS, PLAN_FILES
from prune_lab.evaluation import generate_latents
from prune_lab.importance import (
    NEEDS_PIPELINE,
    ONE_STEP,
    GenerationSettings,
    ImportanceTable,
    Race,
    ScoreCache,
    ScoringContext,
    check_race,
    criterion_named,
    importance_from_frame,
    score,
    with_psnr,
)
from prune_lab.models import model_digest, resolve_model
from prune_lab.plans import PruningPlan, is_native, read_plans
from prune_lab.probes import (
    Probe,
    encode_captions,
    load_probe,
    make_probe,
    probe_of_latents,
    random_probe,
)
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
from prune_lab.workflow.session import Session

_LATENCY_CHECKS = 8  # plans that tell how well latency is predicted


def ensure_blocks(session: Session) -> Architecture:
    """The inventory of the run's U-Net; writes blocks.csv."""
    run = session.run
    if not run.done(run.blocks):
        write_frame(run.blocks, blocks_frame(session.architecture))
    return session.architecture


def ensure_probe(session: Session) -> Probe:
    """The fixed inputs that scores are measured on; writes probe.safetensors.

    A pipeline gets held-out pictures with their captions, or pictures that it draws itself for ``probe.prompts``; a
    bare U-Net, which has nothing to encode them with, noise.
    """
    run = session.run
    if run.done(run.probe):
        return load_probe(run.probe)
    probe = drawn_probe(session, session.config.probe.seed)
    probe.save(run.probe)
    return probe


def drawn_probe(session: Session, seed: int) -> Probe:
    """The pictures and captions of the run's probe, with noise and timesteps drawn with ``seed``."""
    settings = session.config.probe
    timesteps = settings.timesteps
    if settings.prompts:
        prompts, how = session.probe_prompts, session.config.evaluate
        latents = generate_latents(
            session.pipeline, prompts.texts, (settings.seed,), steps=how.steps, guidance=how.guidance
        )
        return probe_of_latents(
            session.pipeline, latents, prompts.texts, prompts.kinds, timesteps=timesteps, seed=seed
        )
    if session.source.is_pipeline:
        pictures = session.pictures("heldout", settings.samples, settings.seed)
        return make_probe(
            session.pipeline,
            pictures.pixels,
            pictures.captions,
            pictures.groups,
            timesteps=timesteps,
            seed=seed,
        )
    return random_probe(session.source.config, samples=settings.samples, timesteps=timesteps, seed=seed)


def score_groups_of(session: Session) -> tuple[BlockGroup, ...]:
    """The groups in ``score.groups``, kind by kind, and the plans of the files among them.

    Raises PlanError when a file cannot be read, UnknownBlockError when it names a block that is not there.
    """
    groups: list[BlockGroup] = []
    for name in session.config.score.groups:
        if name.endswith(PLAN_FILES):
            plans = read_plans(name, session.architecture)
            groups += [
                BlockGroup(plan.name or plan.text, "plan", plan.removed) for plan in plans if plan.removed
            ]
        else:
            groups += block_groups(
                session.architecture, cast("GroupKind", name)
            )  # the settings have checked it
    return tuple(groups)


def _drawing(session: Session) -> GenerationSettings:
    """How the criteria that look at pictures draw and judge them."""
    prompts, how = session.drawn_prompts, session.config.evaluate
    return GenerationSettings(
        session.pipeline,
        prompts.texts,
        prompts.kinds,
        seeds=how.seeds,
        steps=how.steps,
        guidance=how.guidance,
        scorer=session.scorer,
        scorer_name=how.scorer,
    )


def scoring_context_of(
    session: Session, probe: Probe, drawing: GenerationSettings | None = None
) -> ScoringContext:
    """The run's model asked on ``probe``, with the run's settings and its cache of scores."""
    config = session.config
    guidance, unconditional, inputs = config.score.guidance, None, probe.digest
    if guidance != 1 and session.source.is_pipeline:
        unconditional = probe.with_prompt(*encode_captions(session.pipeline, [""]))
        inputs = f"{inputs}-guided{guidance:g}"
    cache = ScoreCache.open(
        session.run.scores_dir, model=model_digest(session.source), inputs=inputs, precision=config.dtype
    )
    layout = torch.channels_last if config.score.channels_last else torch.contiguous_format
    return ScoringContext(
        session.unet.to(memory_format=layout),
        probe,
        batch=config.score.batch or None,
        seed=config.seed,
        generation=drawing,
        guidance=guidance,
        unconditional=unconditional,
        cache=cache,
        compiled=config.score.compile,
    )


def run_scoring_context(session: Session, *, drawing: bool = False) -> ScoringContext:
    """The run's model with its probe, and with prompts to draw where its criteria, or ``drawing``, ask for pictures."""
    wanted = drawing or NEEDS_PIPELINE & {session.config.score.criterion, *session.config.score.also}
    how = _drawing(session) if session.source.is_pipeline and wanted else None
    return scoring_context_of(session, ensure_probe(session), how)


def criteria_of(session: Session) -> tuple[str, ...]:
    """The criteria to measure, the one that leads first. Raises UnknownCriterionError, and ConfigError for a race that
    the leading one cannot run.
    """
    settings = session.config.score
    names = tuple(dict.fromkeys((settings.criterion, *settings.also)))
    for name in names:
        criterion_named(name)
    if settings.race:
        check_race(settings.criterion)
    return names


def ensure_scores(session: Session) -> ImportanceTable:
    """What each block, pair and stage is worth by the run's criterion; writes importance.csv, last of all.

    Before it importance_parts.csv, per timestep and kind of prompt, and criteria.csv, the same for ``score.also`` too.
    """
    run = session.run
    if run.done(run.importance):
        # A digest of digits alone, or like 12e4, is a name and not a number.
        return importance_from_frame(pd.read_csv(run.importance, dtype={"probe": str, "model": str}))
    settings, names = session.config.score, criteria_of(session)
    groups, context = score_groups_of(session), run_scoring_context(session)
    race = Race(settings.race) if settings.race else None
    tables = [
        score(
            context,
            groups,
            name,
            bootstrap=settings.bootstrap,
            model=session.config.model,
            race=race if name in ONE_STEP else None,
        )
        for name in names
    ]
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
    """The plans in ``search.controls`` for ``architecture``; one without a name is called by its text.

    Those that are found for a budget (``BUDGET_CONTROLS``) are not among them.
    """
    texts = [text for text in session.config.search.controls if text not in BUDGET_CONTROLS]
    plans = [plan for text in texts for plan in read_plans(text, architecture)]
    return tuple(plan if plan.name else plan.named(plan.text) for plan in plans)


def ensure_latency(session: Session) -> LatencyTable:
    """What each block's removal saves in time, and how well that predicts students; writes latency.json.

    The controls calibrate it, random native plans that are no controls tell its error.
    """
    run = session.run
    if run.done(run.latency):
        return latency_table_from_dict(cast("dict[str, Any]", read_json(run.latency)), session.architecture)
    settings = session.config.profile
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
        runs=settings.runs,
        warmup=settings.warmup,
        batch=settings.batch,
        seed=session.config.seed,
    )
    write_json(run.latency, table.as_dict())
    return table


def _reductions(session: Session) -> pd.DataFrame:
    settings = session.config.profile
    own = reduction_table(
        session.architecture,
        controls(session, session.architecture),
        model=session.config.model,
        batch=settings.batch,
        latency=True,
        device=session.device,
        dtype=session.dtype,
        runs=settings.runs,
        warmup=settings.warmup,
    )
    frames = [own]
    for name in session.config.report.also_presets:
        architecture = architecture_of(resolve_model(name).config)
        plans = controls(session, architecture)
        frames.append(reduction_table(architecture, plans, model=name, batch=settings.batch))
    return pd.concat(frames, ignore_index=True)


def _pipeline_shares(session: Session) -> pd.DataFrame:
    settings = session.config.profile
    return profile_pipeline(
        session.pipeline,
        steps=session.config.evaluate.steps,
        batch=settings.batch,
        guidance=session.config.evaluate.guidance,
        runs=settings.runs,
        warmup=settings.warmup,
    )


def ensure_costs(session: Session) -> CostTable:
    """Parameters and MACs of every block of the teacher, for one sample; writes costs.csv."""
    run = session.run
    costs = cost_table(session.architecture)
    if not run.done(run.costs):
        write_frame(run.costs, costs.frame())
    return costs


def ensure_reductions(session: Session) -> pd.DataFrame:
    """What the controls leave of the run's own model, timed, and of ``report.also_presets``, counted without weights.

    Writes reductions.csv, the teacher of each model first.
    """
    run = session.run
    if not run.done(run.reductions):
        write_frame(run.reductions, _reductions(session))
    return pd.read_csv(run.reductions)


def ensure_shares(session: Session) -> pd.DataFrame:
    """Which share of the time of one picture each part of the pipeline takes; writes pipeline.csv.

    Raises RunError when the model is a U-Net alone.
    """
    run = session.run
    if not run.done(run.pipeline_profile):
        write_frame(run.pipeline_profile, _pipeline_shares(session))
    return pd.read_csv(run.pipeline_profile)
