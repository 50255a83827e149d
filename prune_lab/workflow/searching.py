"""The step that finds plans: the controls, and the best plans under each budget."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from prune_lab.config import BUDGET_CONTROLS
from prune_lab.config.axes import searches_widths
from prune_lab.errors import PlanError, PruneLabError
from prune_lab.forms import why_not, within_form
from prune_lab.plans import PruningPlan, read_plan, read_plans
from prune_lab.profiling import CostTable, PlanCost, activation_table, cost_table
from prune_lab.runs import Run, read_records
from prune_lab.runtime import note, track, write_frame, write_json
from prune_lab.schemas import PLANS_COLUMNS, SEARCHED, SEARCHED_COLUMNS, SEARCHES_COLUMNS
from prune_lab.search import (
    check_reachable,
    check_reachable_narrower,
    parse_budget,
    predicted_impact,
    search_plans,
    split_budgets,
    within,
)
from prune_lab.session import Session
from prune_lab.session.parts import lacking, plans_part, record
from prune_lab.workflow.gates import gate_notes, gate_steps_frame, gates_frame, write_gates
from prune_lab.workflow.measuring import controls, drawn_size, ensure_costs, ensure_latency, ensure_scores
from prune_lab.workflow.objectives import objective_of
from prune_lab.workflow.plan_times import shares_asked, time_notes, timed_changes, with_time
from prune_lab.workflow.solving import Question, controls_for, solved, tries_of
from prune_lab.workflow.targets import budgets_of, constraints_of
from prune_lab.workflow.timed_search import timing_note
from prune_lab.workflow.widths import (
    ensure_width_scores,
    form_of,
    needs_width_scores,
    predicted_of,
    width_notes,
)

# The problem ---------------------------------------------------------------------------------------------------


def costs_of(session: Session) -> CostTable:
    """The cost table of the model, with latency and activation memory where a budget asks for them.

    The weights are in the run's number format. Latency is also there once it has been measured.
    """
    ensure_costs(session)
    asked = " ".join(session.config.search.budgets)
    architecture, dtype = session.architecture, session.dtype
    timed = "latency" in asked or session.run.done(session.run.latency)
    return cost_table(
        architecture,
        latent=drawn_size(session),
        dtype=dtype,
        latency=ensure_latency(session) if timed else None,
        latency_elsewhere=True,  # at the run's service, which may be of another size
        activations=activation_table(architecture, dtype=dtype) if "memory" in asked else None,
    )


# Plans ---------------------------------------------------------------------------------------------------------


def searched(run: Run) -> pd.DataFrame:
    """One row per control and per plan found for a budget: plan_id, origin, name, budget."""
    return read_records(run.searched, SEARCHED).fillna("")


def _named(plans: Sequence[PruningPlan], solver: str, asked: str) -> list[PruningPlan]:
    """The plans, named by solver and budget."""
    prefix = "search" if solver == "exact" else solver
    slug = re.sub(r"[^\w.]+", "-", asked.replace("%", "pct")).strip("-")
    return [plan.named(f"{prefix}-{slug}-{number}") for number, plan in enumerate(plans, 1)]


# The impact of a plan of another form that is worth a line: at most this share of the best native plan's, and less by
# a hundredth of the prediction's mean square.
_CLEARLY, _LESS_BY = 0.5, 0.01


def _note_better_form(question: Question, plans: Sequence[PruningPlan]) -> None:
    """A line where the best plan with code of its own has a far smaller predicted impact than ``plans``, all native."""
    architecture, costs, budgets = question.problem
    rules = dataclasses.replace(question.constraints, form="own")
    try:
        own = search_plans(architecture, question.importance, costs, budgets, constraints=rules)[0]
    except PruneLabError:
        return
    best = min(plans, key=lambda plan: predicted_impact(plan, question.importance))
    impacts = [predicted_impact(plan, question.importance) for plan in (best, own)]
    if impacts[1] > min(_CLEARLY * impacts[0], impacts[0] - _LESS_BY):
        return
    macs = [costs.of(plan).macs / costs.total.macs - 1 for plan in (best, own)]
    note(
        f"{question.asked}: the best native plan has a predicted impact of {impacts[0]:.4g} (macs {macs[0]:+.1%}); one "
        f"with code of its own has {impacts[1]:.4g} (macs {macs[1]:+.1%}): --form own (search.form) finds it"
    )


def _note_repaired(question: Question, plans: Sequence[PruningPlan]) -> None:
    """What was searched for, of each plan: no table holds it, since other searches do not measure it."""
    left = question.impact_of([frozenset(plan.removed) for plan in plans])
    for plan, impact in zip(plans, left, strict=True):
        note(
            f"{plan.name}: impact {impact:.4g} after its repair, which was searched for; by added-up scores, before "
            f"any, {predicted_impact(plan, question.importance):.4g}"
        )


def _write_plans(session: Session) -> tuple[Path, ...]:
    """The files of the plans that were found, and of what was learnt to find them."""
    run = session.run
    architecture, settings = session.architecture, session.config.search
    named_controls = [("control", "", plan) for plan in controls(session, architecture)]
    found = list(named_controls)
    at_budget = [name for name in settings.controls if name in BUDGET_CONTROLS]
    searches: list[dict[str, object]] = []
    learnt: dict[str, tuple[pd.DataFrame, pd.DataFrame]] = {}  # by budget
    asked_for = budgets_of(session.config, architecture)
    if asked_for:
        importance, costs = ensure_scores(session), costs_of(session)
        constraints, impact_of = constraints_of(session.config), objective_of(session)
        units = ensure_width_scores(session) if needs_width_scores(session.config) else None
        for text in track(asked_for, "searching"):
            budgets = tuple(parse_budget(one, architecture, costs) for one in split_budgets(text))
            question = Question(session, costs, budgets, constraints, importance, impact_of, units)
            start, before = time.perf_counter(), impact_of.forwards
            result = solved(question)
            seconds = time.perf_counter() - start
            asked, plans = question.asked, result.plans
            if form_of(settings) == "native" and plans:
                _note_better_form(question, plans)
            row = {"budget": asked, "solver": settings.solver, "plans": len(plans), "seconds": seconds}
            # what the scores took, which the exact solver goes by alone, is no part of it
            spent = {
                "forwards": impact_of.forwards - before + result.forwards,
                "objective": settings.objective,
            }
            searches.append({**row, **spent, "sets_measured": result.measured, **result.statistics})
            if result.gates is not None:
                learnt[asked] = gates_frame(result.gates, asked), gate_steps_frame(result.gates, asked)
            if beyond := [plan.label for _, _, plan in named_controls if not within(plan, budgets, costs)]:
                note(f"controls that are not within {asked}: {', '.join(beyond)}")
            named = _named(plans, settings.solver, asked)
            if settings.objective == "repaired":
                _note_repaired(question, named)
            found += [("search", asked, plan) for plan in named]
            if at_budget:
                found += [("control", asked, plan) for plan in controls_for(question, at_budget)]
    form = form_of(settings)
    found = [(origin, budget, within_form(architecture, plan, form)) for origin, budget, plan in found]
    for plan_id in dict.fromkeys(plan.id for _, _, plan in found):
        same = [(origin, plan) for origin, _, plan in found if plan.id == plan_id]
        names = dict.fromkeys(plan.name for _, plan in same)
        # a plan that the settings name is a control, even where the search finds it too
        origin = "control" if any(origin == "control" for origin, _ in same) else "search"
        write_json(run.plan(plan_id), same[0][1].named(*names, origin=origin).to_json())
    gates = write_gates(run, list(learnt.values()))
    write_frame(run.searches, pd.DataFrame(searches, columns=list(SEARCHES_COLUMNS)))
    rows = [(plan.id, origin, plan.label, budget) for origin, budget, plan in found]
    write_frame(run.searched, pd.DataFrame(rows, columns=list(SEARCHED_COLUMNS)))
    return (*dict.fromkeys(run.plan(plan.id) for _, _, plan in found), *gates)


def _check_measured(session: Session) -> None:
    """Raise BudgetError where no plan meets budgets on latency or memory, by what is measured or counted for them.

    ``check_budgets`` has seen to the others. Needs no scores, which take longer.
    """
    settings, architecture = session.config.search, session.architecture
    asked = budgets_of(session.config, architecture)
    if not any(name in text for text in asked for name in ("latency", "memory")):
        return
    costs, constraints = costs_of(session), constraints_of(session.config)
    for text in asked:
        budgets = [parse_budget(one, architecture, costs) for one in split_budgets(text)]
        if searches_widths(settings):
            deep = "depth" in settings.axes
            blocks = [block.name for block in architecture.blocks if block.removable and deep]
            check_reachable_narrower(costs, blocks, budgets, constraints, channels=settings.round_to or 1)
        else:
            check_reachable(architecture, costs, budgets, constraints=constraints)


def _reads_first(session: Session) -> None:
    """Make what the search reads, so that its plans are known to be of the present scores."""
    if not session.config.search.budgets:
        return
    settings = session.config.search
    words = timing_note(settings.budgets, tries_of(settings.solver))
    if (
        words and not session.run.searched.is_file()
    ):  # whether those of before are still good is not known yet
        note(words)
    _check_measured(session)
    ensure_scores(session)
    if needs_width_scores(session.config):
        ensure_width_scores(session)
    costs_of(session)


def plan_in(session: Session, path: Path) -> PruningPlan:
    """The plan in a file of the run. Raises DataError where it is another plan, PlanError for another model."""
    plan = read_plan(path, session.architecture)
    return plan.named(*plan.names, origin=plan.origin or "control")


def plans_there(session: Session) -> tuple[PruningPlan, ...]:
    """The plans in the folder of the run; nothing is searched. Files of no use are left out."""
    found = []
    for plan_id in session.run.plan_ids():
        with contextlib.suppress(PruneLabError):
            found.append(plan_in(session, session.run.plan(plan_id)))
    return tuple(found)


def ensure_plans(session: Session) -> tuple[PruningPlan, ...]:
    """The plans that become candidates, controls first; writes plans/<id>.json and plans/searched.csv.

    A plan found under several budgets, or found by the search and a control too, is one plan with several names. Plans
    that were put into the folder by hand follow at the end, as controls. Raises BudgetError for a budget that no plan
    meets, DataError for a file of another plan than its name says.
    """
    run = session.run
    part = plans_part(session)
    if not session.manifests.settled(part):
        _reads_first(session)
    if lacking(session, part):
        record(session, part, *_write_plans(session))
    order = dict.fromkeys(searched(run)["plan_id"])
    by_hand = [plan_id for plan_id in run.plan_ids() if plan_id not in order]
    files = [run.plan(plan_id) for plan_id in [*order, *by_hand]]
    return tuple(plan_in(session, path) for path in files)


def relative_costs(cost: PlanCost, whole: PlanCost) -> dict[str, float]:
    """``cost`` in parameters and MACs of both conventions, and the change of each relative to ``whole``."""
    figures: dict[str, float] = {}
    for name in ("params", "macs", "paper_macs"):
        amount = getattr(cost, name)
        figures |= {name: amount, f"{name}_change": amount / getattr(whole, name) - 1}
    return figures


def plans_frame(session: Session) -> pd.DataFrame:
    """One row per plan of the run, in order of ``ensure_plans``, with its cost; columns PLANS_COLUMNS.

    ``narrower`` is the number of widths in the plan.
    ``latency_ms`` is predicted by the run's latency table and missing where none was measured; ``measured_change`` is
    how the time of what the plan leaves compares with the teacher's, in turns, where it was timed already.
    ``predicted_impact`` is the sum of the impacts of the blocks, missing when they have not been scored.
    """
    run = session.run
    plans, costs = ensure_plans(session), costs_of(session)
    importance = ensure_scores(session) if run.done(run.importance) else None
    table = searched(run)
    rows, changes = [], timed_changes(session)
    for plan in plans:
        cost, whole = costs.of(plan), costs.total
        budgets = table.loc[table["plan_id"] == plan.id, "budget"]
        rows.append(
            {
                "plan": plan.label,
                "plan_id": plan.id,
                "origin": plan.origin,
                "budgets": " ".join(budget for budget in budgets if budget),
                "removed": " ".join(plan.removed),
                "widths": " ".join(width.short for width in plan.widths),
                "blocks_removed": len(plan.removed),
                "narrower": len(plan.widths),
                **relative_costs(cost, whole),
                "latency_ms": cost.latency_ms,
                "latency_change": cost.latency_ms / whole.latency_ms - 1
                if cost.latency_ms is not None and whole.latency_ms is not None
                else None,
                "measured_change": changes[plan.id].change if plan.id in changes else None,
                "predicted_impact": None if importance is None else predicted_of(session, plan, importance),
                "native": plan.form == "native" and not left_out(session, plan),
                "form": plan.form,
            }
        )
    return pd.DataFrame(rows, columns=list(PLANS_COLUMNS))


def _found(session: Session, frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``frame`` of plans that were searched."""
    table = searched(session.run)
    return frame[frame["plan_id"].isin(table.loc[table["origin"] == "search", "plan_id"])]


def timed_plans(session: Session, frame: pd.DataFrame) -> tuple[PruningPlan, ...]:
    """The plans of ``frame``; those that were timed say so, and those that were searched for a time say that, too."""
    plans = ensure_plans(session)
    if frame["measured_change"].isna().all():
        return plans
    shares = shares_asked(session, costs_of(session), _found(session, frame))
    return tuple(with_time(session, plan, share=shares.get(plan.id)) for plan in plans)


def plan_notes(session: Session, frame: pd.DataFrame) -> tuple[str, ...]:
    """What there is to say of the plans of ``frame``: by which scores widths were searched, what gates have learnt,
    and of those that were searched within a budget on latency, how they were timed.
    """
    lines = width_notes(session.config) + gate_notes(session.run)
    if frame["measured_change"].isna().all():
        return lines
    return lines + time_notes(session, costs_of(session), _found(session, frame))


def left_out(session: Session, plan: PruningPlan) -> str:
    """Why ``plan`` cannot become a candidate; empty when it can."""
    return why_not(session.architecture, plan)


def goes_by(plan: PruningPlan, text: str) -> bool:
    """Whether ``text`` is the plan's id, one of its names, or one of these without the budget."""
    return text in (plan.id, *plan.names, *(name.split(" ")[0] for name in plan.names))


def plan_named(plans: tuple[PruningPlan, ...], text: str, session: Session) -> PruningPlan:
    """The one of ``plans`` that ``text`` means: an id, one of its names, or the plan in writing.

    Raises PlanError when it is none of them.
    """
    for plan in plans:
        if goes_by(plan, text):
            return plan
    wanted = [plan.id for plan in read_plans(text, session.architecture)]
    for plan in plans:
        if plan.id in wanted:
            return plan
    known = ", ".join(plan.label for plan in plans)
    raise PlanError(
        f"asked for the plan {text!r}, which is no plan of this run; its plans are {known}: give one of "
        "these, or another folder for another plan"
    )
