"""Steps that measure the teacher: its blocks, the probe, removal impact, and what everything costs."""

from __future__ import annotations

from typing import cast

import pandas as pd

from prune_lab.blocks import Architecture, GroupKind, architecture_of, block_groups, blocks_frame
from prune_lab.importance import ImportanceTable, importance_from_frame, score_groups
from prune_lab.models import resolve_model
from prune_lab.plans import PruningPlan, read_plans
from prune_lab.probes import Probe, load_probe, make_probe, random_probe
from prune_lab.profiling import CostTable, cost_table, profile_pipeline, reduction_table
from prune_lab.runs import Run
from prune_lab.runtime import write_frame
from prune_lab.workflow.teacher import Teacher


def ensure_blocks(run: Run, teacher: Teacher | None = None) -> Architecture:
    """The inventory of the run's U-Net; writes blocks.csv."""
    teacher = teacher or Teacher(run)
    if not run.done(run.blocks):
        write_frame(run.blocks, blocks_frame(teacher.architecture))
    return teacher.architecture


def ensure_probe(run: Run, teacher: Teacher | None = None) -> Probe:
    """The fixed inputs that scores are measured on; writes probe.safetensors.

    A pipeline gets held-out pictures with their captions; a bare U-Net, which has nothing to encode them with, noise.
    """
    if run.done(run.probe):
        return load_probe(run.probe)
    teacher = teacher or Teacher(run)
    settings = teacher.config.probe
    if teacher.source.is_pipeline:
        pictures = teacher.pictures("heldout", settings.samples, settings.seed)
        probe = make_probe(
            teacher.pipeline,
            pictures.pixels,
            pictures.captions,
            pictures.groups,
            timesteps=settings.timesteps,
            seed=settings.seed,
        )
    else:
        probe = random_probe(
            teacher.source.config, samples=settings.samples, seed=settings.seed, timesteps=settings.timesteps
        )
    probe.save(run.probe)
    return probe


def ensure_scores(run: Run, teacher: Teacher | None = None) -> ImportanceTable:
    """What removing each block, pair and stage does to the prediction; writes importance.csv."""
    if run.done(run.importance):
        # A digest of digits alone, or like 12e4, is a name and not a number.
        return importance_from_frame(pd.read_csv(run.importance, dtype={"probe": str, "model": str}))
    teacher = teacher or Teacher(run)
    probe = ensure_probe(run, teacher)
    settings = teacher.config.score
    kinds = cast("tuple[GroupKind, ...]", settings.groups)  # the settings have checked them
    table = score_groups(
        teacher.unet,
        [group for kind in kinds for group in block_groups(teacher.architecture, kind)],
        probe,
        criterion=settings.criterion,
        batch=settings.batch,
        bootstrap=settings.bootstrap,
        seed=teacher.config.seed,
        model=teacher.config.model,
    )
    write_frame(run.importance, table.frame())
    return table


def controls(teacher: Teacher, architecture: Architecture) -> tuple[PruningPlan, ...]:
    """The plans in ``search.controls`` for ``architecture``; one without a name is called by its text."""
    texts = teacher.config.search.controls
    plans = [plan for text in texts for plan in read_plans(text, architecture)]
    return tuple(plan if plan.name else plan.named(plan.text) for plan in plans)


def _reductions(teacher: Teacher) -> pd.DataFrame:
    settings = teacher.config.profile
    own = reduction_table(
        teacher.architecture,
        controls(teacher, teacher.architecture),
        model=teacher.config.model,
        batch=settings.batch,
        latency=True,
        device=teacher.device,
        dtype=teacher.dtype,
        runs=settings.runs,
        warmup=settings.warmup,
    )
    frames = [own]
    for name in teacher.config.report.also_presets:
        architecture = architecture_of(resolve_model(name).config)
        plans = controls(teacher, architecture)
        frames.append(reduction_table(architecture, plans, model=name, batch=settings.batch))
    return pd.concat(frames, ignore_index=True)


def _pipeline_shares(teacher: Teacher) -> pd.DataFrame:
    settings = teacher.config.profile
    return profile_pipeline(
        teacher.pipeline,
        steps=teacher.config.evaluate.steps,
        batch=settings.batch,
        guidance=teacher.config.evaluate.guidance,
        runs=settings.runs,
        warmup=settings.warmup,
    )


def ensure_costs(run: Run, teacher: Teacher | None = None) -> CostTable:
    """Parameters and MACs of every block of the teacher, for one sample; writes costs.csv."""
    teacher = teacher or Teacher(run)
    costs = cost_table(teacher.architecture)
    if not run.done(run.costs):
        write_frame(run.costs, costs.frame())
    return costs


def ensure_reductions(run: Run, teacher: Teacher | None = None) -> pd.DataFrame:
    """What the controls leave of the run's own model, timed, and of ``report.also_presets``, counted without weights.

    Writes reductions.csv, the teacher of each model first.
    """
    if not run.done(run.reductions):
        write_frame(run.reductions, _reductions(teacher or Teacher(run)))
    return pd.read_csv(run.reductions)


def ensure_shares(run: Run, teacher: Teacher | None = None) -> pd.DataFrame:
    """Which share of the time of one picture each part of the pipeline takes; writes pipeline.csv.

    Raises RunError when the model is a U-Net alone.
    """
    if not run.done(run.pipeline_profile):
        write_frame(run.pipeline_profile, _pipeline_shares(teacher or Teacher(run)))
    return pd.read_csv(run.pipeline_profile)
