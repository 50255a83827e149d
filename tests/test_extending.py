"""A criterion and a solver added from outside of the package, as the README's "Extending" tells it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prune_lab.blocks import BlockGroup
from prune_lab.config import RunConfig
from prune_lab.config.declaration import CHOICES
from prune_lab.errors import ConfigError, UnknownCriterionError
from prune_lab.families import FAMILIES
from prune_lab.importance import CRITERIA, criterion_named
from prune_lab.importance.context import Samples, SampleScores, ScoringContext
from prune_lab.plans import plan_of
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.workflow import Session, ensure_plans, ensure_scores, start_run
from prune_lab.workflow.solving import SOLVERS, Question, SolverResult


def parameter_share(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """Share of the U-Net's parameters in each group, the same for every sample of the probe."""
    params = {block.name: block.params for block in context.architecture.blocks}
    totals = np.array([sum(params[name] for name in group.blocks) for group in groups], dtype=np.float64)
    samples = Samples.of(context.probe)
    values = np.tile(totals[:, None], (1, len(samples)))
    scales = np.full(len(samples), float(context.architecture.total_params))
    return SampleScores(values, scales, samples, ComputeCost())


def first_block(question: Question) -> SolverResult:
    """The plan that removes the first removable block, whatever the budget."""
    architecture = question.session.architecture
    name = next(block.name for block in architecture.blocks if block.removable)
    return SolverResult((plan_of(architecture, [name]),))


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CRITERIA, "parameter-share", parameter_share)
    monkeypatch.setitem(SOLVERS, "first-block", first_block)
    monkeypatch.setitem(CHOICES, "search.solver", (*CHOICES["search.solver"], "first-block"))


@pytest.fixture
def asked(small_run_config: Callable[..., RunConfig]) -> Callable[[], RunConfig]:
    return lambda: small_run_config(
        probe={"samples": 4, "timesteps": 2},
        score={"criterion": "parameter-share", "groups": ("block",)},
        search={"solver": "first-block", "budgets": ("params<=99%",), "controls": ()},
    )


@pytest.mark.usefixtures("extended")
def test_a_criterion_and_a_solver_from_outside(asked: Callable[[], RunConfig], tmp_path: Path) -> None:
    session = Session(start_run(asked(), tmp_path / "run"))
    table, architecture = ensure_scores(session), session.architecture
    for entry in table.entries:
        share = architecture.block(entry.group.name).params / architecture.total_params
        assert entry.impact == pytest.approx(share)
    (plan,) = ensure_plans(session)
    assert plan.removed == (next(block.name for block in architecture.blocks if block.removable),)
    assert plan.origin == "search"
    scores = pd.read_csv(session.run.importance)
    assert set(scores["criterion"]) == {"parameter-share"}


def test_without_their_rows_they_are_unknown(asked: Callable[[], RunConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.solver"):
        asked()
    with pytest.raises(UnknownCriterionError, match="choose one of"):
        criterion_named("parameter-share")


def test_names_of_choices_are_those_of_the_tables() -> None:
    from prune_lab.distill import FEATURE_VARIANTS
    from prune_lab.engines import ENGINES

    assert set(CHOICES["search.solver"]) == set(SOLVERS)
    assert set(CHOICES["distill.loss_variant"]) == set(FEATURE_VARIANTS)
    assert set(CHOICES["engine.kind"]) == set(ENGINES)
    assert all(family.model_class().__name__ == name for name, family in FAMILIES.items())
