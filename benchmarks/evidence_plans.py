"""The plans whose outcome is foretold, and every forecast of it, of both shipped models at three budgets.

    python -m benchmarks.evidence_plans --out reports/evidence

Writes plans.csv, a row per model, budget and plan: where it comes from, and what is known of it before any training
(added-up scores, the same by the prior of the architecture, impact and held-out loss in one shot, held-out loss after
the repair of the cuts), and untrained.csv, the scores of all blocks beside those of untrained models. Rows of a model
and budget that are there are left. Beside the plans of the search and of BK-SDM stand those that may break a forecast:
runs of neighbours, one level first, the least of 64 random masks.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.width import append
from prune_lab.blocks import block_groups
from prune_lab.config import RunConfig, with_settings
from prune_lab.errors import PruneLabError
from prune_lab.evaluation import heldout_loss
from prune_lab.importance import ImportanceTable, ScoreCache, score, untrained_like
from prune_lab.importance.intervals import Floats
from prune_lab.plans import PruningPlan, plan_of
from prune_lab.profiling import CostTable, cost_table
from prune_lab.repair import repair
from prune_lab.search import (
    ANY_PLAN,
    Budget,
    lowest_one_shot,
    named_plans,
    parse_budget,
    predicted_impact,
    sample_near,
    search_plans,
    split_budgets,
    within,
)
from prune_lab.session import Session, ensure_probe, run_scoring_context, training_and_validation
from prune_lab.surgery import bypassed, materialise
from prune_lab.workflow import ensure_scores, start_run
from prune_lab.workflow.ranking import one_shot_impacts

MODELS = ("reference", "transformer")
BUDGETS = {  # by the name of the budget; transformers have no named plans: 5, 4 and 7 of 12 blocks
    "small": {"reference": "macs<=bk-small, params<=bk-small", "transformer": "macs<=60%"},
    "base": {"reference": "macs<=bk-base, params<=bk-base", "transformer": "macs<=68%"},
    "tiny": {"reference": "macs<=bk-tiny, params<=bk-tiny", "transformer": "macs<=43%"},
}
FORECASTS = ("added_up", "prior", "one_shot", "loss", "repaired")
COLUMNS = (
    *("model", "budget", "plan", "kind", "plan_id", "removed", "params", "macs"),
    *FORECASTS,
    *("teacher_loss", "rows", "torch"),
)
UNTRAINED = (0, 1, 2)  # seeds of the models with random weights
MASKS, RANDOM = 64, 6


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """The scores and costs of one model."""

    session: Session
    costs: CostTable
    importance: ImportanceTable
    priors: Sequence[ImportanceTable]

    @classmethod
    def of(cls, model: str, folder: Path, device: str) -> Bench:
        """Scored on the demo's probe; the untrained models too."""
        settings = {
            "probe.samples": 96,
            "score.groups": ("block",),
            "search.budgets": (),
            "search.form": "own",
        }
        config = with_settings(RunConfig(model=model, device=device, dtype="float32"), settings)
        session = Session(start_run(config, folder))
        importance = ensure_scores(session)
        context = run_scoring_context(session)
        groups = block_groups(session.architecture, "block")
        priors = [
            score(
                dataclasses.replace(context, model=untrained_like(session.model, seed), cache=ScoreCache()),
                groups,
                bootstrap=0,
            )
            for seed in UNTRAINED
        ]
        costs = cost_table(session.architecture, tokens=session.source.tokens)
        return cls(session, costs, importance, priors)

    def budgets(self, text: str) -> tuple[Budget, ...]:
        """What ``text`` asks for."""
        architecture = self.session.architecture
        return tuple(parse_budget(part, architecture, self.costs) for part in split_budgets(text))

    def impacts(self, removed: Sequence[frozenset[str]]) -> Floats:
        """Measured impact of removing each of these sets of blocks."""
        plans = [plan_of(self.session.architecture, one) for one in removed]
        found = one_shot_impacts(self.session, plans)
        return np.array([found[plan.id] for plan in plans])


def _until_within(bench: Bench, order: Sequence[str], budgets: Sequence[Budget]) -> PruningPlan | None:
    """The plan that removes the first of ``order``, as few as the budgets ask for; None where all are not enough."""
    for count in range(1, len(order) + 1):
        plan = plan_of(bench.session.architecture, order[:count])
        if within(plan, budgets, bench.costs):
            return plan
    return None


def _runs(bench: Bench, budgets: Sequence[Budget]) -> Iterator[PruningPlan]:
    """The shortest runs of neighbours in order of execution that meet the budgets: the two that remove least."""
    names = [block.name for block in bench.session.architecture.named if block.removable]
    found = [_until_within(bench, names[first:], budgets) for first in range(len(names))]
    plans = sorted((plan for plan in found if plan), key=lambda plan: -bench.costs.of(plan).macs)
    first = plans[0]
    yield first
    apart = [one for one in plans if len({*one.removed} & {*first.removed}) <= len(first.removed) // 2]
    yield from apart[-1:]


def _levels(bench: Bench, budgets: Sequence[Budget]) -> Iterator[tuple[str, PruningPlan]]:
    """Everything of the outermost level first, then of the next; and from the innermost outwards."""
    blocks = [block for block in bench.session.architecture.named if block.removable]
    stages = list(dict.fromkeys(block.stage for block in blocks))
    if len(stages) < 3:
        return
    depth = {stage: min(place, len(stages) - 1 - place) for place, stage in enumerate(stages)}
    for name, sign in (("outer level first", 1), ("inner level first", -1)):
        order = sorted(blocks, key=lambda block: sign * depth[block.stage])
        if plan := _until_within(bench, [block.name for block in order], budgets):
            yield name, plan


def plans_at(bench: Bench, budgets: Sequence[Budget]) -> dict[str, tuple[str, PruningPlan]]:
    """(kind, plan) by name; no two alike."""
    architecture, costs = bench.session.architecture, bench.costs
    found: dict[str, tuple[str, PruningPlan]] = {}

    def add(name: str, kind: str, plan: PruningPlan) -> None:
        if plan.removed not in [one.removed for _, one in found.values()]:
            found[name] = kind, plan

    diverse = 2 if len(architecture.named) < 20 else 4
    searched = search_plans(
        architecture, bench.importance, costs, budgets, count=4, diverse=diverse, constraints=ANY_PLAN
    )
    for number, plan in enumerate(searched, 1):
        add(f"search-{number}", "search", plan)
    for plan in named_plans(architecture)[0]:
        if within(plan, budgets, costs):
            add(plan.label, "bk-sdm", plan)
            break
    (plan,) = search_plans(architecture, bench.priors[0], costs, budgets, constraints=ANY_PLAN)
    add("search-by-prior", "prior", plan)
    for number, plan in enumerate(_runs(bench, budgets), 1):
        add(f"run-of-neighbours-{number}", "counter", plan)
    for name, plan in _levels(bench, budgets):
        add(name.replace(" ", "-"), "counter", plan)
    lowest = lowest_one_shot(architecture, costs, budgets, bench.impacts, ANY_PLAN, draws=MASKS, seed=1)
    add(f"lowest-of-{MASKS}-masks", "counter", lowest)
    drawn = sample_near(architecture, costs, budgets, 33, 2, ANY_PLAN)
    ranked = sorted(drawn, key=lambda plan: predicted_impact(plan, bench.importance))
    for number in range(RANDOM):  # from the best by added-up scores to the worst
        place = number * (len(ranked) - 1) // (RANDOM - 1)
        add(f"random-{number + 1}", "random", ranked[place])
    return found


def rows_of(bench: Bench, model: str, budget: str) -> pd.DataFrame:
    """The plans of one budget with their forecasts, columns COLUMNS."""
    session, rows = bench.session, []
    plans = plans_at(bench, bench.budgets(BUDGETS[budget][model]))
    one_shot = one_shot_impacts(session, [plan for _, plan in plans.values()])
    _, validation = training_and_validation(session)
    teacher, probe, whole = session.model, ensure_probe(session), bench.costs.total
    whole_loss = float(heldout_loss(teacher, validation).double().mean())
    for name, (kind, plan) in plans.items():
        with bypassed(teacher, plan.removed) as pruned:
            loss = float(heldout_loss(pruned, validation).double().mean())
        student = materialise(teacher, plan.built("own")).to(next(teacher.parameters()).device)
        repair(student, teacher, plan.built("own"), probe)
        repaired = float(heldout_loss(student, validation).double().mean())
        cost = bench.costs.of(plan)
        prior = sum(predicted_impact(plan, table) for table in bench.priors) / len(bench.priors)
        forecasts = (predicted_impact(plan, bench.importance), prior, one_shot[plan.id], loss, repaired)
        removed = " ".join(f"-{block}" for block in plan.removed)
        costs = cost.params / whole.params, cost.macs / whole.macs
        said = (whole_loss, len(validation), torch.__version__)
        rows.append((model, budget, name, kind, plan.id, removed, *costs, *forecasts, *said))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def prior_rows(bench: Bench, model: str) -> pd.DataFrame:
    """A row per block: its trained score, and that of the untrained models by seed."""
    trained = bench.importance.block_impacts()
    untrained_scores: list[Mapping[str, float]] = [table.block_impacts() for table in bench.priors]
    rows = [
        {"model": model, "block": block, "trained": impact}
        | {
            f"untrained_{seed}": scores[block]
            for seed, scores in zip(UNTRAINED, untrained_scores, strict=True)
        }
        for block, impact in trained.items()
    ]
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    table = arguments.out / "plans.csv"
    for model in arguments.models.split(","):
        done = pd.read_csv(table) if table.is_file() else pd.DataFrame(columns=list(COLUMNS))
        missing = [one for one in BUDGETS if not ((done["model"] == model) & (done["budget"] == one)).any()]
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench.of(model, Path(folder), arguments.device)
            append(arguments.out / "untrained.csv", prior_rows(bench, model), {"model": model})
            for budget in missing:
                try:
                    append(table, rows_of(bench, model, budget), {"model": model, "budget": budget})
                except PruneLabError as error:
                    print(f"{model}, {budget}: {error}", flush=True)
                print(f"{model}, {budget}: done", flush=True)


if __name__ == "__main__":
    main()
