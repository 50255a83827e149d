"""Steps that make students: plans, candidates cut from the teacher, their training data, and their distillation."""

from __future__ import annotations

from typing import Literal

import pandas as pd

from prune_lab.candidates import Candidate, build_candidate, load_candidate, load_student
from prune_lab.distill import LatentData, Recovery, cached_data, distill, feature_pairs, load_recovery
from prune_lab.errors import NonNativePlanError, PlanError
from prune_lab.plans import PruningPlan, native_layout, plan_from_json, read_plans
from prune_lab.runs import Run
from prune_lab.runtime import read_json, track, write_frame, write_json
from prune_lab.search import parse_budget, predicted_impact, search_plans
from prune_lab.workflow.measuring import controls, ensure_costs, ensure_scores
from prune_lab.workflow.teacher import Teacher

SEARCHED_COLUMNS = ("plan_id", "origin", "name", "budget")
PLANS_COLUMNS = (
    *("plan", "plan_id", "origin", "budgets", "removed", "blocks_removed", "params", "params_change"),
    *("macs", "macs_change", "paper_macs", "paper_macs_change", "predicted_impact", "native"),
)
RECOVERY_TABLE_COLUMNS = (
    "plan",
    "plan_id",
    "status",
    "steps",
    "loss_before",
    "loss_after",
    "seconds",
    "reason",
)


# Plans -------------------------------------------------------------------------------------------------------


def searched(run: Run) -> pd.DataFrame:
    """One row per control and per plan found for a budget: plan_id, origin, name, budget."""
    return pd.read_csv(run.searched, dtype=str, keep_default_na=False)


def origin_of(run: Run, plan_id: str) -> Literal["control", "search"]:
    """``control`` for a plan that the settings name, also when the search finds it too, else ``search``."""
    rows = searched(run)
    origins = set(rows.loc[rows["plan_id"] == plan_id, "origin"])
    return "search" if origins == {"search"} else "control"  # a plan put there by hand was named, not found


def _write_plans(run: Run, teacher: Teacher) -> None:
    architecture, settings = teacher.architecture, teacher.config.search
    found = [("control", "", plan) for plan in controls(teacher, architecture)]
    if settings.budgets:
        importance, costs = ensure_scores(run, teacher), ensure_costs(run, teacher)
        for text in track(settings.budgets, "searching"):
            budget = parse_budget(text, architecture, costs)
            plans = search_plans(architecture, importance, costs, [budget], count=settings.count)
            found += [("search", budget.text, plan) for plan in plans]
    names: dict[str, list[str]] = {}
    for _, _, plan in found:
        names.setdefault(plan.id, []).append(plan.label)
    for _, _, plan in found:
        joined = " = ".join(dict.fromkeys(names[plan.id]))
        write_json(run.plan(plan.id), plan.named(joined).to_json())
    rows = [(plan.id, origin, plan.label, budget) for origin, budget, plan in found]
    write_frame(run.searched, pd.DataFrame(rows, columns=list(SEARCHED_COLUMNS)))


def ensure_plans(run: Run, teacher: Teacher | None = None) -> tuple[PruningPlan, ...]:
    """The plans that become candidates, controls first; writes plans/<id>.json and plans/searched.csv.

    A plan found under several budgets, or found by the search and a control too, is one plan with the names joined.
    Plans that were put into the folder by hand follow at the end. Raises BudgetError for a budget that no plan meets.
    """
    teacher = teacher or Teacher(run)
    if not run.done(run.searched):
        _write_plans(run, teacher)
    order = dict.fromkeys(searched(run)["plan_id"])
    by_hand = [plan_id for plan_id in run.plan_ids() if plan_id not in order]
    files = [run.plan(plan_id) for plan_id in [*order, *by_hand]]
    return tuple(plan_from_json(read_json(path), teacher.architecture) for path in files)


def plans_frame(run: Run, teacher: Teacher | None = None) -> pd.DataFrame:
    """One row per plan of the run, in order of ``ensure_plans``, with what it leaves; columns PLANS_COLUMNS.

    ``predicted_impact`` is the sum of the impacts of the blocks, missing when they have not been scored.
    """
    teacher = teacher or Teacher(run)
    plans, costs = ensure_plans(run, teacher), ensure_costs(run, teacher)
    importance = ensure_scores(run, teacher) if run.done(run.importance) else None
    table = searched(run)
    rows = []
    for plan in plans:
        cost, whole = costs.of(plan), costs.total
        budgets = table.loc[table["plan_id"] == plan.id, "budget"]
        rows.append(
            {
                "plan": plan.label,
                "plan_id": plan.id,
                "origin": origin_of(run, plan.id),
                "budgets": " ".join(budget for budget in budgets if budget),
                "removed": " ".join(plan.removed),
                "blocks_removed": len(plan.removed),
                "params": cost.params,
                "params_change": cost.params / whole.params - 1,
                "macs": cost.macs,
                "macs_change": cost.macs / whole.macs - 1,
                "paper_macs": cost.paper_macs,
                "paper_macs_change": cost.paper_macs / whole.paper_macs - 1,
                "predicted_impact": None if importance is None else predicted_impact(plan, importance),
                "native": not left_out(teacher, plan),
            }
        )
    return pd.DataFrame(rows, columns=list(PLANS_COLUMNS))


def left_out(teacher: Teacher, plan: PruningPlan) -> str:
    """Why ``plan`` cannot become a candidate; empty when it can."""
    try:
        native_layout(teacher.architecture, plan)
    except NonNativePlanError as error:
        return str(error)
    return ""


def plan_named(plans: tuple[PruningPlan, ...], text: str, teacher: Teacher) -> PruningPlan:
    """The one of ``plans`` that ``text`` means: an id, a name or one of its joined names, or the plan in writing.

    Raises PlanError when it is none of them.
    """
    for plan in plans:
        if text in (plan.id, plan.name, *plan.name.split(" = ")):
            return plan
    wanted = [plan.id for plan in read_plans(text, teacher.architecture)]
    for plan in plans:
        if plan.id in wanted:
            return plan
    known = ", ".join(plan.label for plan in plans)
    raise PlanError(f"asked for the plan {text!r}, which is no plan of this run; its plans are {known}")


# Candidates --------------------------------------------------------------------------------------------------


def ensure_candidates(run: Run, teacher: Teacher | None = None) -> tuple[Candidate, ...]:
    """Every native plan of the run as a smaller model; writes candidates/<id>/{plan.json, unet/, profile.json}.

    Plans that are not native are left out here and named with the reason in the ranking.
    """
    teacher = teacher or Teacher(run)
    plans = [plan for plan in ensure_plans(run, teacher) if not left_out(teacher, plan)]
    return tuple(_candidate(run, teacher, plan) for plan in track(plans, "building candidates"))


def _candidate(run: Run, teacher: Teacher, plan: PruningPlan) -> Candidate:
    paths = run.candidate(plan.id)
    if not run.done(paths.profile):
        settings = teacher.config.profile
        build_candidate(
            teacher.source,
            plan,
            paths.folder,
            device=teacher.device,
            dtype=teacher.dtype,
            batch=settings.batch,
            runs=settings.runs,
            warmup=settings.warmup,
        )
    return load_candidate(paths.folder, teacher.architecture)


def ensure_data(run: Run, teacher: Teacher | None = None) -> LatentData:
    """Training pictures as latents and text embeddings, the same for every candidate; writes data.safetensors."""
    if run.done(run.data):
        return LatentData.load(run.data)
    teacher = teacher or Teacher(run)
    settings = teacher.config.distill
    pictures = teacher.pictures("train", settings.pictures, settings.seed)
    return cached_data(run.data, teacher.pipeline, pictures.pixels, pictures.captions)


def ensure_distilled(
    run: Run, teacher: Teacher | None = None, *, only: tuple[str, ...] = ()
) -> tuple[Recovery, ...]:
    """What the short distillation makes of each candidate, all on the same data and noise.

    Writes candidates/<id>/{recovery.csv, distilled/}; a candidate that was interrupted goes on from its checkpoint.
    ``only`` names some of the plans (see ``plan_named``). Raises PlanError when a name is none of the run's.
    """
    teacher = teacher or Teacher(run)
    plans = ensure_plans(run, teacher)
    wanted = {plan_named(plans, text, teacher).id for text in only} or {plan.id for plan in plans}
    chosen = [one for one in ensure_candidates(run, teacher) if one.plan.id in wanted]
    return tuple(_distilled(run, teacher, one) for one in track(chosen, "distilling candidates"))


def _distilled(run: Run, teacher: Teacher, candidate: Candidate) -> Recovery:
    steps = teacher.config.distill.steps
    finished = load_recovery(candidate.folder)
    # The settings of a run do not change under it, so what is finished here is what is asked for.
    if finished is not None and finished.steps == steps and run.done(candidate.paths.distilled_unet):
        return finished
    return distill(
        teacher.unet,
        load_student(
            candidate
        ),  # in float32 whatever the teacher's format: rounding first would cost it digits
        feature_pairs(teacher.architecture, candidate.plan),
        ensure_data(run, teacher),
        teacher.pipeline.scheduler,
        teacher.config.distill,
        folder=candidate.folder,
        validation=teacher.validation,
        device=teacher.device,
    )


def recovery_frame(run: Run, teacher: Teacher | None = None) -> pd.DataFrame:
    """One row per candidate that was distilled, in order of the plans; columns RECOVERY_TABLE_COLUMNS."""
    rows = []
    for plan in ensure_plans(run, teacher):
        recovery = load_recovery(run.candidate(plan.id).folder)
        if recovery is not None:
            figures = (recovery.before, recovery.after, recovery.seconds, recovery.reason)
            rows.append((plan.label, plan.id, recovery.status, recovery.steps, *figures))
    return pd.DataFrame(rows, columns=list(RECOVERY_TABLE_COLUMNS))
