"""What a run has found so far, as tables and figures that show themselves, and answers to questions about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from prune_lab import runs
from prune_lab.api.plans import Plan, Plans, plan_maps
from prune_lab.api.scores import scores_table
from prune_lab.blocks import blocks_frame
from prune_lab.candidates import State, load_candidate, load_student
from prune_lab.errors import RunError
from prune_lab.report import (
    Column,
    RunTables,
    block_map_frame,
    curve_frame,
    draw_block_map,
    draw_comparison,
    draw_costs,
    draw_curves,
    draw_gates,
    draw_importance,
    draw_parts,
    draw_prediction,
    draw_quality_plane,
    draw_tournament,
    picture_labels,
    plan_styles,
    read_pictures,
    read_run,
)
from prune_lab.runs import Run
from prune_lab.session.parts import costs_part, plans_part, scores_part
from prune_lab.tables import Pictures, Table
from prune_lab.workflow import (
    Session,
    choices_frame,
    compared_plans,
    diagnosis,
    ensure_plans,
    is_well,
    picture_changes,
    plan_named,
    plan_notes,
    plans_frame,
    rungs_frame,
    surprises_frame,
    wider_frame,
    written_report,
)

Found = TypeVar("Found")


@dataclass(frozen=True, repr=False)
class RunResults:
    """What the run in ``folder`` has found so far. A table whose step was not done raises RunError that names it."""

    folder: Path

    def __repr__(self) -> str:
        tables = self.tables
        found = {
            "blocks": tables.blocks,
            "scores": tables.importance,
            "plans": tables.plans or None,
            "losses": tables.recoveries or None,
            "pictures": tables.teacher_pictures,
            "ranking": tables.ranking,
        }
        there = [name for name, table in found.items() if table is not None]
        return f"run {self.folder} of {tables.model}, found so far: {', '.join(there) or 'nothing'}"

    @cached_property
    def run(self) -> Run:
        """Where the files of the run lie."""
        return runs.open_run(self.folder, must_exist=True)

    @cached_property
    def session(self) -> Session:
        """The model of the run, loaded when something asks for it."""
        return Session(self.run)

    @property
    def tables(self) -> RunTables:
        """The files of the run as they are now. Raises DataError for one that is damaged."""
        return read_run(self.run)

    def _found(self, table: Found | None, path: Path, verb: str) -> Found:
        """``table``, which the step called ``verb`` has written to ``path``; RunError when it has not."""
        self.run.needs(path, verb)
        assert table is not None
        return table

    def _check_plans(self) -> None:
        """Raise RunError where the plans, or what they were found by, are not what they were: nothing is made anew."""
        self.run.needs(self.run.searched, "search")
        for part in (scores_part(self.session), costs_part(self.session), plans_part(self.session)):
            verdict = self.session.manifests.verdict(part)
            if verdict.state == "redo":
                raise RunError(
                    f"asked for the plans of {self.folder}, found that {verdict.why}; "
                    f"make them again with: prune-lab run --run {self.folder}"
                )

    @property
    def blocks(self) -> Table:
        """The blocks of the model; as a figure the map of them, coloured by impact where it was scored."""
        tables = self.tables
        frame = blocks_frame(self.session.architecture) if tables.blocks is None else tables.blocks
        mapped = block_map_frame(frame, tables.importance)
        return Table("blocks", frame, f"Blocks of {tables.model}", partial(draw_block_map, mapped))

    @property
    def scores(self) -> Table:
        """The impact of removing each block, pair and stage, with its interval."""
        frame = self._found(self.tables.importance, self.run.importance, "score")
        return Table("scores", frame, "Impact of removal", partial(draw_importance, frame))

    @property
    def criteria(self) -> Table:
        """The scores by all criteria that were measured, the run's own first; several stand side by side."""
        frame = self._found(self.tables.criteria, self.run.criteria, "score")
        return scores_table(frame, "Impact by all criteria")

    @property
    def parts(self) -> Table:
        """The impact of each block by timestep and by kind of prompt."""
        frame = self._found(self.tables.parts, self.run.importance_parts, "score")
        return Table("parts", frame, "Impact by timestep and prompt", partial(draw_parts, frame))

    @property
    def costs(self) -> Table:
        """Parameters and multiply-adds of every block, sampler and the rest, for one sample."""
        tables = self.tables
        frame = self._found(tables.costs, self.run.costs, "run")
        return Table("block costs", frame, "Costs", partial(draw_costs, frame, tables.importance))

    @property
    def reductions(self) -> Table:
        """What the controls leave of parameters, multiply-adds and latency, here and of other models."""
        return Table("reductions", self._found(self.tables.reductions, self.run.reductions, "run"), "Savings")

    @property
    def pipeline(self) -> Table:
        """Which part of the pipeline takes how much of the time of one picture."""
        return Table(
            "pipeline",
            self._found(self.tables.pipeline, self.run.pipeline_profile, "run"),
            "Time of a picture",
        )

    @property
    def plans(self) -> Plans:
        """The plans of the run, controls first, with what they cost and predicted impacts; needs the model's config."""
        self._check_plans()
        scores, architecture = self.tables.importance, self.session.architecture
        found = ensure_plans(self.session)
        shown = tuple(Plan(plan, architecture, scores) for plan in found)
        frame = plans_frame(self.session)
        lines, maps = plan_notes(self.session, frame), plan_maps(architecture, found, scores)
        return Plans("plans", frame, "Plans", maps, notes=lines, plans=shown)

    @property
    def gates(self) -> Table:
        """What the solver learned-gates has learnt of each block: how often it stays, how sure that is; drawn with the
        loss of the steps.

        Raises RunError where another solver has searched.
        """
        tables = self.tables
        self.run.needs(self.run.searched, "search")
        gates, steps = tables.gates, tables.gate_steps
        if gates is None or steps is None:
            solver = tables.setting("search", "solver")
            raise RunError(
                f"asked for the gates of {self.folder}, found plans that {solver} has searched; "
                f"learn them with: prune-lab search --run {self.folder} --solver learned-gates --force"
            )
        return Table("learned gates", gates, "Learned gates", lambda theme: draw_gates(gates, steps, theme))

    @property
    def losses(self) -> Table:
        """Every recorded loss of every candidate; ``part`` is task, output, feature or validation."""
        tables = self.tables
        if not tables.recoveries:
            raise RunError(
                f"run {self.folder} has no losses yet; make them with: prune-lab distill {self.folder}"
            )
        frame, styles = curve_frame(tables), plan_styles(tables.plans)
        return Table("losses", frame, "Losses", lambda theme: draw_curves(frame, tables.plans, styles, theme))

    @property
    def rungs(self) -> Table:
        """What happened to each candidate at each rung; of a run without a tournament, at each validation."""
        tables = self.tables
        ids = tables.tournament if tables.tournament is not None else rungs_frame(self.losses.data)
        labels = {plan.id: plan.label for plan in tables.plans}
        frame = ids.replace({"name": labels, "against": labels})
        styles = plan_styles(tables.plans)
        return Table("rungs", frame, "Rungs", lambda theme: draw_tournament(ids, tables.plans, styles, theme))

    @property
    def ranking(self) -> Table:
        """The candidates by quality at their cost, with those left out and why; the teacher first."""
        tables = self.tables
        frame = self._found(tables.ranking, self.run.ranking, "rank")
        styles = plan_styles(tables.plans)
        return Table("ranking", frame, "Ranking", lambda theme: draw_quality_plane(frame, styles, theme))

    @property
    def surprises(self) -> Table:
        """Where score and outcome disagree: places by impact in one shot and by loss after distillation."""
        tables = self.tables
        frame = self._found(tables.ranking, self.run.ranking, "rank")
        styles = plan_styles(tables.plans)
        return Table(
            "surprises",
            surprises_frame(frame),
            "Places by score and by outcome",
            lambda theme: draw_prediction(frame, styles, theme),
        )

    @property
    def seconds(self) -> Table:
        """How many seconds each step took when it was last done."""
        return Table("seconds", self._found(self.tables.steps, self.run.steps, "run"), "Time of each step")

    # Pictures

    @property
    def picture_changes(self) -> Table:
        """Which pictures differ most from the teacher's: root mean square difference, a share of the full range."""
        tables = self.tables
        prompts = self._found(tables.prompts, self.run.picture_prompts, "rank")
        folders = {
            (plan.label, plan.id, weights): folder
            for plan, states in tables.pictures
            for weights, folder in states.items()
        }
        frame = picture_changes(prompts, self.run.needs(self.run.teacher_pictures, "rank"), folders)
        return Table("picture changes", frame, "Difference from the teacher's pictures")

    def pictures(self, *plans: str, weights: Sequence[str] = (), prompts: Sequence[str] = ()) -> Pictures:
        """The same prompts drawn by the teacher and by ``plans``, as a grid; all plans where none is named.

        ``weights`` are pruned, distilled or both (none named: what there is), ``prompts`` those to show (none named:
        all). Raises RunError for a plan or a prompt without pictures.
        """
        tables = self.tables
        listed = self._found(tables.prompts, self.run.picture_prompts, "rank")
        chosen = listed[listed["prompt"].isin(prompts)] if prompts else listed
        if missing := set(prompts) - set(listed["prompt"]):
            known = "; ".join(listed["prompt"].unique())
            raise RunError(f"asked for pictures of {missing.pop()!r}; the prompts of this run: {known}")
        wanted = {self.plan(text).id for text in plans} or {plan.id for plan, _ in tables.pictures}
        files = chosen["file"].tolist()
        teacher = self.run.needs(self.run.teacher_pictures, "rank")
        columns = [Column("", "teacher", "", read_pictures(teacher, files))]
        for plan, states in tables.pictures:
            for state in (weights or states) if plan.id in wanted else ():
                if state not in states:
                    raise RunError(
                        f"asked for {state} pictures of {plan.label}, found {' and '.join(states)}"
                    )
                columns.append(Column(plan.id, plan.label, state, read_pictures(states[state], files)))
        styles, labels = plan_styles(tables.plans), picture_labels(chosen)
        rows = [(one.title, one.plan_id, one.state, file) for one in columns for file in files]
        return Pictures(
            "grid",
            pd.DataFrame(rows, columns=["plan", "plan_id", "weights", "file"]).merge(chosen, on="file"),
            "Pictures",
            partial(draw_comparison, columns, labels, styles),
            columns=tuple(columns),
            labels=tuple(labels),
        )

    # Questions

    def plan(self, text: str) -> Plan:
        """The plan of the run that ``text`` means: an id, a name, or what it removes. Raises PlanError for another."""
        self._check_plans()
        found = plan_named(ensure_plans(self.session), text, self.session)
        return Plan(found, self.session.architecture, self.tables.importance)

    def why(self, plan: str | Plan, budget: str = "") -> Table:
        """Why each block stays or goes in ``plan``, a row per block.

        ``extra_impact`` is the predicted impact that the best plan which decides the other way costs more, within the
        same budget: that of the plan's search, or else the plan's parameters, or ``budget`` (``macs<=65%``). Raises
        PlanError for a plan that is none of the run's, RunError before blocks are scored.
        """
        chosen = plan if isinstance(plan, Plan) else self.plan(plan)
        frame = choices_frame(self.session, chosen.plan, budget)
        return Table("choices", frame, f"Why these blocks: {chosen.label}", chosen.plot().draw)

    def wider(self, more: float = 0.1, *budgets: str) -> Table:
        """What budgets wider by the share ``more`` would buy, a row per budget (none named: those of the run).

        Raises BudgetError for a budget that cannot be read or met, RunError before blocks are scored.
        """
        if self.run.done(self.run.searched):
            self._check_plans()
        asked = budgets or self.session.config.search.budgets
        return Table(
            "wider budgets", wider_frame(self.session, asked, more), f"What {more:.0%} more budget buys"
        )

    def compare(self, *plans: str) -> Plans:
        """Plans for the run's model side by side: impact measured on the run's probe, predicted impact, losses.

        Raises PlanError for a text that is no plan.
        """
        if self.run.done(self.run.searched):
            self._check_plans()
        frame, found = compared_plans(self.session, plans)
        scores, architecture = self.tables.importance, self.session.architecture
        shown = tuple(Plan(plan, architecture, scores) for plan in found)
        return Plans(
            "plans compared",
            frame,
            f"Plans compared, {self.folder}",
            plan_maps(architecture, found, scores),
            plans=shown,
        )

    def student(self, plan: str, weights: State = "distilled") -> Any:
        """The model of a candidate in eval mode, a plain diffusers model: pruned, repaired or distilled.

        Raises PlanError for a plan that is none of the run's, RunError when there is no such student yet.
        """
        found = self.plan(plan)
        folder = self.run.candidate(found.id).folder
        return load_student(load_candidate(folder, self.session.architecture), weights)

    def report(self) -> Path:
        """The path of report/index.html, written from the tables and pictures that are there.

        Raises DataError where something of the run is not what a step wrote.
        """
        return written_report(self.run)

    def doctor(self) -> Table:
        """What is missing, damaged, stale or left over, and what the next ``prune-lab run`` would do, a row each."""
        return looked_over(self.folder)[0]


def looked_over(folder: str | Path) -> tuple[Table, bool]:
    """(the findings in the run in ``folder``, whether all is well and done). Raises RunError for no run folder."""
    run = Run(Path(folder))
    if not run.config.is_file() and not runs.Manifests(run.folder).started:
        runs.open_run(folder, must_exist=True)  # says what is there instead
    frame = diagnosis(run)
    return Table("doctor", frame, f"Doctor, {run.folder}"), is_well(frame)


def open_run(folder: str | Path) -> RunResults:
    """What the run in ``folder`` has found so far. Raises RunError when no run was started there."""
    results = RunResults(Path(folder))
    _ = results.run
    return results
