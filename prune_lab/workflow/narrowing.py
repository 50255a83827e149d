"""A whole model with narrower stages: how many channels within a budget, the cut, and its distillation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from prune_lab.blocks import architecture_of
from prune_lab.distill import Student, distill_together, feature_pairs
from prune_lab.distill.features import FeaturePair, tapped
from prune_lab.engines.training import distill_setup_of
from prune_lab.errors import BudgetError, PlanError, RunError, UnsupportedModelError
from prune_lab.evaluation import heldout_loss
from prune_lab.export import write_narrowed_card
from prune_lab.families import example_inputs, meta_model, plain_config, runs_on_meta
from prune_lab.families.stage_widths import CHANNELS, Level, checked_channels, levels_of, narrower_config
from prune_lab.importance.stage_scores import stage_estimator
from prune_lab.models import ModelSource, load_model, model_digest, resolve_model
from prune_lab.models.streamed import is_streamed
from prune_lab.models.written import form_of_zeros
from prune_lab.plans import parse_plan
from prune_lab.probes import predict
from prune_lab.profiling import COUNTED, CostTable, PlanCost, cost_table
from prune_lab.runtime import Environment, note
from prune_lab.schemas import LEVEL_COLUMNS, NARROWED_COLUMNS
from prune_lab.search import parse_budget, split_budgets
from prune_lab.search.stages import Channels, channels_within, check_reachable
from prune_lab.session import Session, ensure_probe, run_scoring_context, tell_roles
from prune_lab.surgery import pipeline_with, save_model
from prune_lab.width.stages import narrowed_stages

_LISTED = 8  # numbers that a cell shows one by one


@dataclasses.dataclass(frozen=True, slots=True)
class Narrowing:
    """What is asked for: ``channels`` of each stage, or as many as are within ``budgets``; what stays is chosen ``by``
    a criterion. ``trained``: whether the narrower model is distilled.
    """

    channels: Channels = ()
    budgets: tuple[str, ...] = ()
    by: str = "taylor"
    trained: bool = False


def levels_frame(source: ModelSource) -> pd.DataFrame:
    """A row for each level of the model: its stages, channels, and what they can become; columns LEVEL_COLUMNS.

    Raises UnsupportedModelError for a model that is no U-Net.
    """
    rows = []
    for level in levels_of(source.config):
        possible = any(_exists(source, level, one) for one in level.choices[1:3])
        fewer = [str(one) for one in level.choices[1:]] if possible else ["none in a plain config"]
        listed = fewer if len(fewer) <= _LISTED else [*fewer[:2], "...", fewer[-1]]
        rows.append((", ".join(level.stages), level.channels, level.step, " ".join(listed)))
    return pd.DataFrame(rows, columns=list(LEVEL_COLUMNS))


def _exists(source: ModelSource, level: Level, channels: int) -> bool:
    """Whether there is a plain config with so many channels in ``level`` alone."""
    was = source.config[CHANNELS]
    try:
        narrower_config(
            source.config, [channels if place in level.places else one for place, one in enumerate(was)]
        )
    except PlanError:
        return False
    return True


def stage_channels(source: ModelSource) -> str:
    """The channels of each stage of the model, as a person writes them: ``320,640,1280,1280``."""
    return ",".join(map(str, source.config[CHANNELS]))


# The cut -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Cut:
    """The model with ``channels``, untrained, and how much it changes what is predicted."""

    model: Any
    channels: Channels
    impact: float
    costs: tuple[PlanCost, PlanCost]
    """Of the whole model and of this one."""


def _costs_of(session: Session) -> Callable[[Channels], CostTable]:
    """What gives the costs of a model with so many channels; they are counted, without weights."""
    config, tokens = session.source.config, session.source.tokens

    @functools.cache
    def costs(channels: Channels) -> CostTable:
        whole = channels == tuple(config[CHANNELS])
        return cost_table(
            session.architecture if whole else architecture_of(narrower_config(config, channels)),
            tokens=tokens,
        )

    return costs


def _cut(session: Session, how: Narrowing) -> _Cut:
    """The narrower model; of ``how.budgets`` the channels are found by trying."""
    model: Any = session.model
    if is_streamed(model):
        raise UnsupportedModelError(
            f"asked to make stages of {session.source.text} narrower, which is read from disk block by block; it takes "
            "the whole model in memory"
        )
    config, costs = session.source.config, _costs_of(session)
    was = tuple(config[CHANNELS])
    probe = ensure_probe(session)
    answers = predict(model, probe).double()
    with stage_estimator(run_scoring_context(session), how.by) as estimator:

        def tried(channels: Channels) -> tuple[Any, float]:
            made = narrowed_stages(model, channels, estimator)
            change = predict(made, probe).double() - answers
            found = float(change.square().mean() / answers.square().mean())
            share = costs(channels).total.macs / costs(was).total.macs
            note(
                f"tried channels {','.join(map(str, channels))}: {share:.1%} of the multiply-adds, impact {found:.4g}"
            )
            return made, found

        if how.channels:
            channels = checked_channels(config, how.channels)
        else:
            texts = [one for text in how.budgets for one in split_budgets(text)]
            budgets = [parse_budget(text, session.architecture, costs(was)) for text in texts]
            for budget in budgets:
                if budget.metric not in COUNTED:
                    raise BudgetError(
                        f"asked for narrower stages within {budget.text}; give params or macs, or the channels"
                    )

            def total(one: Channels) -> PlanCost:
                return costs(one).total

            check_reachable(levels_of(config), budgets, total)
            channels, _ = channels_within(
                was, levels_of(config), budgets, total, functools.cache(lambda one: tried(one)[1])
            )
        made, impact = tried(channels)  # by chance, another one than while channels were looked for
        return _Cut(made, channels, impact, (costs(was).total, costs(channels).total))


# The distillation ----------------------------------------------------------------------------------------------------


def _shapes(model: Any, paths: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """By path: the shape of what a module of ``model``, on ``meta``, hands on."""
    inputs = example_inputs(plain_config(model), device="meta")
    with runs_on_meta(), tapped(model, paths) as features:
        model(**inputs)
        return {path: tuple(feature.shape) for path, feature in features.items()}


def _pairs(session: Session, channels: Channels) -> tuple[FeaturePair, ...]:
    """The feature points at which the narrower model is as wide as the whole one."""
    pairs = feature_pairs(session.architecture, parse_plan("", session.architecture))
    paths = [pair.teacher_path for pair in pairs]
    config = session.source.config
    whole, narrow = (
        _shapes(meta_model(one), paths) for one in (plain_config(config), narrower_config(config, channels))
    )
    return tuple(pair for pair in pairs if whole[pair.teacher_path] == narrow[pair.teacher_path])


def _notes(session: Session, how: Narrowing, cut: Mapping[str, Any]) -> dict[str, Any]:
    """How the model was made, for its provenance."""
    return {
        **session.source.origin,
        "source_digest": model_digest(session.source),
        "channels_before": list(session.source.config[CHANNELS]),
        "chosen_by": how.by,
        **cut,
        "environment": Environment.capture().as_dict(),
    }


@dataclasses.dataclass(frozen=True, slots=True)
class _Trained:
    """A narrower model after its distillation: its folder, the held-out losses, and what is told of it."""

    model: Path
    teacher: float
    before: float
    after: float
    steps: int
    told: Mapping[str, object]

    @property
    def row(self) -> tuple[float, float, float, int]:
        """Held-out loss of the whole model, after the cut and at the end, and steps."""
        return self.teacher, self.before, self.after, self.steps


def _distilled(session: Session, channels: Channels, pruned: Path) -> _Trained:
    """The model in ``pruned``, with so many ``channels``, distilled from that of ``session``, in the folder beside it.

    Raises RunError where its loss does not stay finite.
    """
    tell_roles(session)
    setup = distill_setup_of(session)
    written = ",".join(map(str, channels))
    student = Student(
        partial(load_model, resolve_model(str(pruned)), device="cpu", dtype=torch.float32),
        _pairs(session, channels),
        pruned.parent,
        label=f"channels {written}",
    )
    if not student.pairs and setup.settings.feature_weight:
        note("no stage is as wide as before: the student learns by the task and output losses alone")
    (recovery,) = distill_together(setup, [student])
    if recovery.status == "failed":
        raise RunError(f"asked to distil channels {written}: {recovery.reason}")
    teacher = float(heldout_loss(session.model, setup.validation).double().mean())
    told = {
        "steps": recovery.steps,
        "samples per step": setup.settings.batch,
        "learning rate": f"{setup.settings.learning_rate:g}",
        "stages whose features were compared": len(student.pairs),
        "held-out loss of the whole model": f"{teacher:.4g}",
        "held-out loss after the cut": f"{recovery.before:.4g}",
        "held-out loss after distillation": f"{recovery.after:.4g}",
    }
    model = pruned.parent / "distilled" / "model"
    return _Trained(model, teacher, recovery.before, recovery.after, recovery.steps, told)


def narrow(session: Session, out: Path, how: Narrowing, *, force: bool = False) -> pd.DataFrame:
    """One row, columns NARROWED_COLUMNS, on the model of ``session`` with narrower stages, which is written to ``out``.

    ``out`` becomes a folder that plain diffusers loads and draws with. With ``how.trained`` the model is distilled
    from the whole one, by task, output and the features of stages that are as wide as before; state lies in the run
    folder, from which the same command goes on. Raises PlanError for channels that no plain config has, BudgetError,
    UnsupportedModelError for a model that is no U-Net, RunError for a distillation without a pipeline.
    """
    source = session.source
    levels_of(source.config)  # says which models have any
    if not source.has_weights:
        raise UnsupportedModelError(
            f"asked to make stages of {source.text} narrower, which has no weights (kind: {source.kind}); give the "
            "folder of a pipeline or of a model; without --out its stages are listed"
        )
    if form := form_of_zeros(source.model_folder):
        raise RunError(
            f"asked to make stages of {source.text} narrower, found a student in the {form} form, whose zeros "
            "stand for what was removed; make stages of its parent narrower first, and prune the result"
        )
    if how.channels:
        narrower_config(source.config, how.channels)
    if how.trained and not source.is_pipeline:
        raise RunError(
            f"asked to distil narrower stages of {source.text}, a {source.called} alone; pictures and captions are "
            "encoded with a VAE and a text encoder: give a pipeline folder or a hub id, or --steps 0"
        )
    cut = _cut(session, how)
    written = ",".join(map(str, cut.channels))
    place = session.run.folder / "narrowed" / f"{how.by}-{written.replace(',', '-')}"
    told = {"channels": list(cut.channels), "impact": cut.impact}
    pruned = place / "pruned"
    save_model(cut.model, pruned, None, _notes(session, how, told))
    trained = _distilled(session, cut.channels, pruned) if how.trained else None
    training: Mapping[str, object] = {} if trained is None else trained.told
    was, now = cut.costs
    notes = _notes(session, how, told | ({"training": training} if training else {}))
    pipeline_with(
        source,
        pruned if trained is None else trained.model,
        out,
        force=force,
        finish=lambda folder: write_narrowed_card(folder, source, notes, cut.costs, training),
    )
    row = (
        *(source.text, stage_channels(source), written, how.by, str(out)),
        *(now.params, now.params / was.params - 1, now.macs, now.macs / was.macs - 1),
        *(cut.impact, *((None, None, None, 0) if trained is None else trained.row)),
    )
    return pd.DataFrame([row], columns=list(NARROWED_COLUMNS))
