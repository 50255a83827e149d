"""Multi-objective evolution: a front of impact against cost, by Optuna's NSGA-II, on the measured impact."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna

from prune_lab.blocks import Architecture
from prune_lab.errors import ConfigError
from prune_lab.profiling import CostTable, Metric
from prune_lab.search.budgets import Budget
from prune_lab.search.constraints import Constraints
from prune_lab.search.exact import NATIVE, check_reachable
from prune_lab.search.results import CachedObjective, FrontPoint, ImpactOf, undominated
from prune_lab.search.sampling import sample_near
from prune_lab.search.space import Removed, Space, spaces_of

_NOT_MEASURED = 1e30  # the impact of a plan that breaks a rule: it is not measured, and never wins


def evolve_plans(
    architecture: Architecture,
    costs: CostTable,
    budgets: Sequence[Budget],
    impact_of: ImpactOf,
    constraints: Constraints = NATIVE,
    *,
    folder: Path,
    trials: int = 400,
    population: int = 40,
    seed: int = 0,
) -> tuple[FrontPoint, ...]:
    """The plans within ``budgets`` and ``constraints`` that no other tried one beats in measured impact, MACs and
    latency (MACs alone without prices of latency), fewest MACs first.

    NSGA-II (Deb et al. 2002) as in ``optuna.samplers.NSGAIISampler``: a native plan is one choice per level, any plan
    one choice per block. The first generation is random plans near the budgets; later ones may break a rule, are then
    not measured, and lose against all that break less. Each generation of ``population`` trials is one call of
    ``impact_of``, each plan measured once.

    The trials are kept in ``folder``/evolution.log (Optuna's journal); the same call goes on after an interruption and
    comes to the same end, with more ``trials`` it continues. A folder holds measurements of one ``impact_of``: give
    another one for another model or probe. Raises ConfigError for fewer trials than a population, BudgetError when no
    plan meets the budgets, DataError for a bad measurement.
    """
    if population < 2 or trials < population:
        raise ConfigError(
            f"asked for {trials} trials in populations of {population}; give populations of 2 or more, and a whole one"
        )
    check_reachable(architecture, costs, budgets, constraints=constraints)
    spaces = spaces_of(architecture, costs, budgets, constraints)
    metrics: list[Metric] = ["macs", "latency_ms"] if costs.timed else ["macs"]
    drawn = sample_near(architecture, costs, budgets, population, seed, constraints)
    # Natively there may be plans where there are none in the form that is asked for.
    space = next(one for one in spaces if any(map(one.made_of_options, drawn)))
    first = [plan for plan in drawn if space.made_of_options(plan)]
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet_optuna():
        study = _study(folder / "evolution.log", space, metrics, population, seed)
        objective = CachedObjective(
            impact_of, {_removed(trial): trial.values[0] for trial in _measured(study)}
        )
        while (done := len(_finished(study))) < trials:
            # Randomness of its own for each generation: an interruption in between changes nothing.
            study.sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed + done)
            if done:
                # Chosen before anything is drawn from them: the first trial of a generation would see another order.
                study.sampler.get_parent_population(study, done // population)
            else:
                for plan in first:
                    study.enqueue_trial(_parameters(space, frozenset(plan.removed)))
            _tell(study, space, metrics, objective, min(population - done % population, trials - done))
        points = [_point(space, trial) for trial in _measured(study)]
    return undominated(points, metrics)


@contextlib.contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Without Optuna's lines on the standard error for every trial."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


# Trials --------------------------------------------------------------------------------------------------------


def _study(file: Path, space: Space, metrics: Sequence[Metric], population: int, seed: int) -> Any:
    """The study of these settings in ``file``, cleared of what an interruption left half done."""
    settings = [
        space.architecture.signature,
        [sorted(map(sorted, level)) for level in space.levels],
        [
            (limit.blocks, limit.least, limit.most, *([limit.against] if limit.against else []))
            for limit in space.limits
        ],
        [(budget.metric, budget.limit) for budget in space.budgets],
        [[metric, space.costs.total.amount(metric)] for metric in metrics],
        [population, seed],
    ]
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
    known = {found.study_name for found in optuna.get_all_study_summaries(storage)}
    if name in known and not _finished(optuna.load_study(study_name=name, storage=storage)):
        optuna.delete_study(study_name=name, storage=storage)
    study = optuna.create_study(
        storage=storage, study_name=name, directions=["minimize"] * (1 + len(metrics)), load_if_exists=True
    )
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _finished(study: Any) -> list[Any]:
    return list(study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE]))


def _measured(study: Any) -> list[Any]:
    return [trial for trial in _finished(study) if trial.values[0] < _NOT_MEASURED]


def _removed(trial: Any) -> Removed:
    return frozenset(trial.user_attrs["removed"])


def _point(space: Space, trial: Any) -> FrontPoint:
    plan = space.plan(_removed(trial), f"evolution-{trial.number + 1}")
    return FrontPoint(plan, float(trial.values[0]), space.costs.of(plan).amounts())


def _levels(space: Space) -> list[tuple[str, tuple[Removed, ...]]]:
    """(parameter, options) of every level where there is a choice."""
    return [(f"level {place}", options) for place, options in enumerate(space.levels) if len(options) > 1]


def _parameters(space: Space, removed: Removed) -> dict[str, int]:
    chosen = space.chosen(space.plan(removed))
    return {
        f"level {place}": options.index(option)
        for place, (option, options) in enumerate(zip(chosen, space.levels, strict=True))
        if len(options) > 1
    }


def _tell(
    study: Any, space: Space, metrics: Sequence[Metric], objective: CachedObjective, count: int
) -> None:
    """Ask for ``count`` plans, measure those that are allowed in one batch, and tell how they did."""
    choices = {
        name: optuna.distributions.CategoricalDistribution(range(len(options)))
        for name, options in _levels(space)
    }
    fixed = frozenset().union(*(options[0] for options in space.levels if len(options) == 1))
    trials = [study.ask(fixed_distributions=choices) for _ in range(count)]
    sets = [
        fixed.union(*(options[trial.params[name]] for name, options in _levels(space))) for trial in trials
    ]
    allowed = [removed for removed in sets if space.allows(removed)]
    impacts = dict(zip(allowed, objective.of(allowed).tolist(), strict=True))
    for trial, removed in zip(trials, sets, strict=True):
        cost, whole = space.costs.of(space.plan(removed)), space.costs.total
        broken = sum(
            max(0, limit.least - gone, gone - limit.most)
            for limit in space.limits
            for gone in [limit.gone(removed)]
        )
        over = [max(0.0, cost.amount(b.metric) - b.limit) / whole.amount(b.metric) for b in space.budgets]
        trial.set_constraint("rules", broken)
        trial.set_constraint("budgets", sum(over))
        trial.set_user_attr("removed", sorted(removed))
        study.tell(trial, [impacts.get(removed, _NOT_MEASURED), *(cost.amount(metric) for metric in metrics)])
