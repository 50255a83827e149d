"""Depth, width and both, at equal multiply-adds and at equal measured latency, on both shipped models; with controls.

    python -m benchmarks.width --work DIR --out reports/width

At each budget stands the best plan of whole blocks by their scores. At equal multiply-adds, those that it leaves, stand
beside it the best plan of widths, of both, widths by magnitude and by chance, and blocks by chance; at equal time, as
it is measured in turns, plans of widths and of both. Each is distilled with one seed, those of the middle budget with
three: a unit of work is one model, cost, budget and seed. Its rows are appended to ``outcomes.csv`` when it is done, so
that the same command goes on with what is not there, on another machine too: the plans lie beside it. ``DIR`` holds
what a unit that was stopped resumes from. On a GPU all units are distilled side by side:

    python -m benchmarks.width --out reports/width --jobs jobs.json
    python -m benchmarks.outcomes jobs.json --work DIR --out outcomes.jsonl --device cuda --workers 14
    python -m benchmarks.width --out reports/width --lines outcomes.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.outcomes import Job, read_lines
from benchmarks.width_page import write_page
from prune_lab.blocks import Architecture
from prune_lab.config import RunConfig, with_settings
from prune_lab.errors import BudgetError
from prune_lab.evaluation import heldout_loss
from prune_lab.families import Site
from prune_lab.importance import score_units
from prune_lab.importance.intervals import Floats
from prune_lab.plans import PruningPlan, plan_of, read_plans
from prune_lab.profiling import (
    TEACHER,
    CostTable,
    Metric,
    Service,
    Turns,
    cost_table,
    measure_latency_table,
    measure_width_savings,
    time_plans,
)
from prune_lab.runtime import note, write_frame, write_json, write_text
from prune_lab.search import (
    ANY_PLAN,
    Budget,
    depth_and_width,
    narrowed_to,
    random_median,
    search_plans,
)
from prune_lab.session import Session, run_scoring_context, training_and_validation
from prune_lab.workflow import ensure_distilled, ensure_scores, start_run

MODELS = ("reference", "transformer")
BUDGETS = (65, 80, 50)  # percent of the multiply-adds
REPEATED, SEEDS = 65, (0, 1, 2)
EQUAL = ("macs", "latency")
WAYS = {  # beside depth
    "macs": ("width", "both", "width-magnitude", "width-random", "depth-random"),
    "latency": ("width", "both"),
}
BATCH = 8
HALVINGS = 7  # of the predicted time, to find a plan that takes as long as another
_UNKNOWN = float("nan")
PLAN_COLUMNS = (
    *("model", "plan", "way", "equal", "budget", "plan_id", "blocks_removed", "macs", "params"),
    *("time", "time_low", "time_high", "rounds"),
)
OUTCOME_COLUMNS = (
    *("model", "equal", "budget", "seed", "plan", "plan_id", "loss_before", "loss_after", "teacher_loss"),
    *("steps", "batch", "seconds", "torch", "device"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """What is done in one go: the plans of one budget, equal in one cost, distilled with one seed."""

    model: str
    equal: str  # macs or latency
    budget: int
    seed: int


def units(models: Sequence[str], equals: Sequence[str] = EQUAL) -> Iterator[Unit]:
    """All of them, what matters most first."""
    for budget in BUDGETS:
        yield from (Unit(model, equal, budget, SEEDS[0]) for equal in equals for model in models)
    for seed in SEEDS[1:]:
        yield from (Unit(model, equal, REPEATED, seed) for equal in equals for model in models)


def settings(model: str, seed: int, steps: int, batch: int, plans: Sequence[Path]) -> RunConfig:
    """Those of one unit; as in the demo of the reference model, but for the steps and the batch."""
    return with_settings(
        RunConfig(model=model),
        {
            "probe.samples": 96,
            "score.groups": ("block",),
            "search.budgets": (),
            "search.controls": tuple(map(str, plans)) or ("auto",),
            "search.form": "own",  # any plan
            "repair.kind": "none",  # as in the rows that are there
            "distill.steps": steps,
            "distill.batch": batch,
            "distill.pictures": 2048,
            "distill.learning_rate": 2e-4,
            "distill.warmup": min(20, steps),
            "distill.ema_decay": 0.98,
            "distill.seed": seed,
            "distill.checkpoint_every": 50,
            "distill.validate_every": max(1, steps // 3),
        },
    )


# Plans ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """The scores and costs of one model, from which all plans are made."""

    session: Session
    costs: CostTable
    units: Mapping[str, Mapping[Site, Floats]]  # by criterion

    @property
    def architecture(self) -> Architecture:
        return self.session.architecture

    def plan(self, way: str, percent: float, metric: Metric = "macs") -> PruningPlan:
        """The plan of one way that keeps at most ``percent`` of a cost. Raises BudgetError where there is none."""
        costs, importance = self.costs, ensure_scores(self.session)
        limit = percent / 100 * costs.total.amount(metric)
        limit = int(limit) if metric == "macs" else limit
        budget = Budget(metric, limit, f"{metric}<={percent:g}%")
        if way == "depth":
            found = search_plans(self.architecture, importance, costs, (budget,), constraints=ANY_PLAN)[0]
        elif way == "depth-random":
            found = random_median(self.architecture, importance, costs, (budget,), ANY_PLAN)
        elif way == "both":
            found = depth_and_width(costs, importance.block_impacts(), self.units["gate-fisher"], [budget])
        else:
            units = self.units[way.removeprefix("width").removeprefix("-") or "gate-fisher"]
            found = narrowed_to(costs, plan_of(self.architecture, ()), units, metric, limit)
        return found.built("own")

    def turns(self, plans: Mapping[str, PruningPlan], rounds: int) -> Turns:
        """Forward passes of the teacher and of what ``plans`` leave, in turns: eager, float32, on the CPU."""
        service = Service("cpu", "float32")
        return time_plans(self.architecture, plans, service, rounds=rounds, model=self.session.model)

    def as_fast(self, way: str, wanted: float, rounds: int) -> PruningPlan:
        """The plan of ``way`` that takes ``wanted`` of the teacher's time as it is measured in turns, found by halving
        the time that blocks and units are said to take by the latency table. Raises BudgetError where there is none.
        """
        low, high = 5.0, 100.0
        found: list[tuple[float, PruningPlan]] = []
        for _ in range(HALVINGS):
            percent = (low + high) / 2
            try:
                plan = self.plan(way, percent, "latency_ms")
            except BudgetError:
                low = percent
                continue
            ratio = 1 + self.turns({"plan": plan}, rounds).change("plan").change
            found.append((abs(ratio - wanted), plan))
            low, high = (low, percent) if ratio > wanted else (percent, high)
        if not found:
            raise BudgetError(f"No plan of {way} is as fast as {wanted:.3f} of the teacher's time.")
        return min(found, key=lambda one: one[0])[1]


def bench_of(model: str, equal: str, folder: Path, rounds: int) -> Bench:
    """The scores of ``model``, kept in ``folder``, and its costs, in time too where plans are to be equal in it."""
    session = Session(start_run(settings(model, SEEDS[0], 1, 1, ()), folder))
    ensure_scores(session)
    context, tokens = run_scoring_context(session), session.source.tokens
    criteria = ("gate-fisher", "magnitude", "random")
    found = {name: score_units(context, criterion=name).impacts for name in criteria}
    latency = None
    if equal == "latency":
        latency = measure_latency_table(session.model, rounds=rounds, tokens=tokens)
        latency = dataclasses.replace(
            latency, widths=measure_width_savings(session.model, rounds=rounds, tokens=tokens)
        )
    return Bench(session, cost_table(session.architecture, latency=latency, tokens=tokens), found)


def _made(bench: Bench, equal: str, rounds: int) -> dict[str, PruningPlan]:
    """All plans by name, such as ``both-macs-65``; a way that has none within a budget is left out and said to be."""
    plans: dict[str, PruningPlan] = {}
    for percent in sorted(BUDGETS, reverse=True):
        depth = bench.plan("depth", percent)
        left = 100 * bench.costs.of(depth).macs / bench.costs.total.macs
        wanted = 1.0
        if equal == "macs":
            plans[f"depth-macs-{percent}"] = depth
        else:
            wanted += bench.turns({"depth": depth}, rounds).change("depth").change
        for way in WAYS[equal]:
            try:
                found = bench.plan(way, left) if equal == "macs" else bench.as_fast(way, wanted, rounds)
                plans[f"{way}-{equal}-{percent}"] = found
            except BudgetError as error:
                note(f"{way} at {percent} % is left out: {error}")
    return {name: plan.named(name) for name, plan in plans.items()}


def plan_rows(bench: Bench, model: str, plans: Mapping[str, PruningPlan], rounds: int) -> pd.DataFrame:
    """One row per plan, columns PLAN_COLUMNS: its costs, counted and timed, as shares of the teacher's."""
    turns, whole = bench.turns(plans, rounds), bench.costs.total
    rows = []
    for name, plan in plans.items():
        way, equal, budget = name.rsplit("-", 2)
        cost, change = bench.costs.of(plan), turns.change(name)
        shares = cost.macs / whole.macs, cost.params / whole.params
        times = [_UNKNOWN if one is None else 1 + one for one in (change.change, change.low, change.high)]
        rows.append(
            (model, name, way, equal, int(budget), plan.id, len(plan.removed), *shares, *times, rounds)
        )
    assert turns.names[0] == TEACHER
    return pd.DataFrame(rows, columns=list(PLAN_COLUMNS))


def ensure_plans(model: str, equal: str, work: Path, out: Path, rounds: int) -> Path:
    """The file of the plans of ``model`` equal in one cost, in ``out``; its rows are appended to ``plans.csv``."""
    path, table = out / f"plans-{model}-{equal}.json", out / "plans.csv"
    if not path.is_file():
        bench = bench_of(model, equal, work / model / "scores", rounds)
        plans = _made(bench, equal, rounds)
        append(table, plan_rows(bench, model, plans, rounds), {"model": model, "equal": equal})
        lines = [json.dumps(plan.to_json()) for plan in plans.values()]
        write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
    return path


# Outcomes ------------------------------------------------------------------------------------------------------------


def _same(rows: pd.DataFrame, values: Mapping[str, object]) -> pd.Series[bool]:
    """Which of ``rows`` have these ``values``."""
    return (rows[list(values)] == pd.Series(values)).all(axis=1)


def append(path: Path, rows: pd.DataFrame, instead: Mapping[str, object]) -> None:
    """Write ``rows`` at the end of the table in ``path``, instead of those with these values."""
    if path.is_file():
        before = pd.read_csv(path)
        rows = pd.concat(
            [part for part in (before[~_same(before, instead)], rows) if len(part)], ignore_index=True
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_frame(path, rows)


def outcome_rows(unit: Unit, work: Path, plans: Path, steps: int, batch: int) -> pd.DataFrame:
    """One row per plan of ``unit``, columns OUTCOME_COLUMNS, after its students were distilled; resumes in ``work``."""
    folder = work / unit.model / f"{unit.equal}-{unit.budget}-seed-{unit.seed}"
    session = Session(
        start_run(settings(unit.model, unit.seed, steps, batch, ()), work / unit.model / "scores")
    )
    named = [
        one for one in read_plans(str(plans), session.architecture) if one.label.endswith(f"-{unit.budget}")
    ]
    files = []
    for plan in named:
        files.append(work / unit.model / "plans" / f"{plan.label}.json")
        write_json(files[-1], plan.to_json())
    session = Session(start_run(settings(unit.model, unit.seed, steps, batch, files), folder))
    recoveries = {one.plan_id: one for one in ensure_distilled(session)}
    teacher = float(heldout_loss(session.model, training_and_validation(session)[1]).double().mean())
    versions = importlib.metadata.version("torch")
    rows = []
    for plan in named:
        found = recoveries[plan.id]
        told = (*dataclasses.astuple(unit), plan.label, plan.id)
        rows.append(
            (*told, found.before, found.after, teacher, found.steps, batch, found.seconds, versions, "cpu")
        )
    return pd.DataFrame(rows, columns=list(OUTCOME_COLUMNS))


def study_of(unit: Unit) -> str:
    """What the jobs of ``unit`` and their lines are known by."""
    return " ".join(("width", *map(str, dataclasses.astuple(unit))))


def jobs_of(unit: Unit, plans: Path, steps: int) -> list[Job]:
    """The students of ``unit``, two and two."""
    named = [one for one in json.loads(plans.read_text()) if one["names"][0].endswith(f"-{unit.budget}")]
    looks = max(1, steps // 3)
    return [
        Job(
            study_of(unit),
            unit.model,
            {one["names"][0]: one for one in named[first : first + 2]},
            unit.seed,
            steps,
            looks,
        )
        for first in range(0, len(named), 2)
    ]


def rows_from(unit: Unit, lines: Sequence[Mapping[str, Any]], plans: Path) -> pd.DataFrame:
    """The rows of ``unit`` from what ``benchmarks.outcomes`` wrote; none where a plan of it is not there."""
    named = {
        one["id"]: one["names"][0]
        for one in json.loads(plans.read_text())
        if one["names"][0].endswith(f"-{unit.budget}")
    }
    done = {
        line["plan_id"]: line
        for line in lines
        if line["study"] == study_of(unit) and line["status"] == "done"
    }
    rows = []
    for plan_id, name in named.items():
        if plan_id not in done:
            return pd.DataFrame(columns=list(OUTCOME_COLUMNS))
        line = done[plan_id]
        losses = [sum(line["losses"][step]) / len(line["losses"][step]) for step in ("0", str(line["steps"]))]
        told = (*dataclasses.astuple(unit), name, plan_id, *losses, line["teacher"], line["steps"], BATCH)
        rows.append((*told, line["seconds"], line["torch"], line["device"]))
    return pd.DataFrame(rows, columns=list(OUTCOME_COLUMNS))


def is_done(unit: Unit, path: Path) -> bool:
    """Whether the rows of ``unit`` are in the table in ``path``."""
    if not path.is_file():
        return False
    rows = pd.read_csv(path)
    return bool(_same(rows, dataclasses.asdict(unit)).any())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, help="folder of the runs; resumable")
    parser.add_argument("--out", type=Path, required=True, help="folder of plans, outcomes.csv and the page")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rounds", type=int, default=40, help="of the measurements of latency")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--equal", default=",".join(EQUAL), help="costs that the plans are equal in")
    parser.add_argument("--jobs", type=Path, help="only write what is missing as jobs of benchmarks.outcomes")
    parser.add_argument("--lines", type=Path, help="only read what benchmarks.outcomes wrote")
    parser.add_argument("--most", type=int, default=10**9, help="units that are done before it ends")
    arguments = parser.parse_args()
    table = arguments.out / "outcomes.csv"
    wanted = list(units(arguments.models.split(","), arguments.equal.split(",")))
    waiting = [unit for unit in wanted if not is_done(unit, table)]
    if arguments.jobs or arguments.lines:
        files = {unit: arguments.out / f"plans-{unit.model}-{unit.equal}.json" for unit in waiting}
        if arguments.jobs:
            jobs = [job for unit in waiting for job in jobs_of(unit, files[unit], arguments.steps)]
            write_json(arguments.jobs, [dataclasses.asdict(job) for job in jobs])
            return
        lines = read_lines(arguments.lines)
        for unit in waiting:
            rows = rows_from(unit, lines, files[unit])
            if len(rows):
                append(table, rows, dataclasses.asdict(unit))
        write_page(arguments.out)
        return
    if arguments.work is None:
        parser.error("give --work, the folder that the units are done in")
    for unit in waiting[: arguments.most]:
        plans = ensure_plans(unit.model, unit.equal, arguments.work, arguments.out, arguments.rounds)
        found = outcome_rows(unit, arguments.work, plans, arguments.steps, arguments.batch)
        append(table, found, dataclasses.asdict(unit))
        write_page(arguments.out)
        print(f"{unit.model}, equal {unit.equal}, {unit.budget} %, seed {unit.seed}: done", flush=True)
    write_page(arguments.out)
    print(
        f"threads: {torch.get_num_threads()}; {len(wanted) - len(waiting)} of {len(wanted)} units were there before"
    )


if __name__ == "__main__":
    main()
