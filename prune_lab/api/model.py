"""A model and the verbs on it, each of which returns a table that shows itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState

from prune_lab.api.data import data_table
from prune_lab.api.making import (
    plans_of,
    pruned_table,
    with_units,
)
from prune_lab.api.narrowing import asked_narrowing
from prune_lab.api.plans import Plan, Plans, plan_maps
from prune_lab.api.scores import scores_table
from prune_lab.api.settings import budgets_asked, model_title, settings_by_name
from prune_lab.api.used import Used
from prune_lab.config import (
    PLAN_FILES,
    RunConfig,
    SearchConfig,
    with_settings,
)
from prune_lab.distill import Consistency
from prune_lab.errors import RunError
from prune_lab.export import loaded_in_python, write_card
from prune_lab.forms import form_named, in_form, layout_of, within_form
from prune_lab.models import check_draws_in, check_same_class, load_model, resolve_model, shipped_like
from prune_lab.models.protection import check_apart, check_folder
from prune_lab.plans import PruningPlan, is_native
from prune_lab.processes import init_processes, is_main
from prune_lab.profiling import check_asked_size
from prune_lab.runs import Run, plan_file, read_records
from prune_lab.runs import open_run as run_in
from prune_lab.runtime import output_folder, pick_dtype, progress_shown, write_json
from prune_lab.schemas import IMPORTANCE, RECOVERY_SUMMARY_COLUMNS
from prune_lab.surgery import get_ready_to_prove, prune_pipeline
from prune_lab.tables import Table
from prune_lab.workflow import (
    Session,
    borrow_scores,
    check_budgets,
    check_controls,
    check_unit_criterion,
    compared_criteria,
    distil_consistent,
    distilled_notes,
    ensure_distilled,
    ensure_plans,
    ensure_ranking,
    ensure_scores,
    ensure_width_scores,
    forget,
    goes_by,
    narrow,
    plan_named,
    plan_notes,
    plans_frame,
    quality,
    recovery_frame,
    save_students,
    score_notes,
    scores_frame,
    student_folders,
    timed_plans,
    use_scores,
    width_frame,
)

# What is usual for consistency distillation, where nothing else is asked for.
_CONSISTENCY: dict[str, object] = {"steps": 300, "learning_rate": 1e-4, "ema_decay": 0.95}


class Model(Used):
    """A model and what is found out about it: each verb returns a table that shows itself.

    Results lie in a run folder, which the next verb goes on from: ``score`` before ``search``, its plans before
    ``distill`` and ``rank``. Without ``run`` it is a temporary folder, gone with this object, where changed settings
    redo what they touch; a folder that was named keeps its results, and changed settings raise RunError without
    ``force``.
    """

    # Scores and plans

    def score(self, *, force: bool = False, **settings: object) -> Table:
        """The impact of removing each block, pair and stage, with bootstrap intervals; 0.01 moves the prediction by a
        hundredth of its mean square. By several criteria (``also``) they stand side by side, with how they agree.

        Settings are those of ``score``, ``probe`` and ``data``. Raises ConfigError for a bad one, RunError in a named
        folder that was made with others and without ``force``.
        """
        asked = settings_by_name("score", settings)
        check_asked_size(self.source, asked.get("data.resolution"))  # type: ignore[arg-type]
        with self._opened("score", settings, redo="scores" if force else "") as session:
            ensure_scores(session)
            frame, of = scores_frame(session), model_title(self.settings)
        return scores_table(frame, f"Importance, {of}", self.results.scores.draw, of=of)

    def score_widths(self, criterion: str = "", *, force: bool = False, **settings: object) -> Table:
        """The score of each part of the blocks that can leave alone: a group of a norm, a head, channels in eights.

        ``criterion`` is gate-fisher, gate-gradient, taylor, magnitude or random (empty: that of the settings, with
        which ``search`` searches whatever else was scored). By
        gate-fisher it is an impact as ``score`` has it, if the prediction were linear in the part. Settings are as for
        ``score``. Raises PlanError for a model of which no width is known, and as ``score`` does.
        """
        criterion = criterion or self.settings.search.widths
        check_unit_criterion(criterion)  # before anything is removed
        with self._opened("score", settings, redo="scores" if force else "") as session:
            ensure_width_scores(session, criterion)
            frame = width_frame(session, criterion)
            title = f"Importance inside blocks by {criterion}, {model_title(self.settings)}"
        return Table("width scores", frame, title, notes=score_notes(self.settings, criterion))

    def agreement(self, out: str | Path | None = None, *, force: bool = False, **settings: object) -> Table:
        """How all criteria agree on this model, and with what was measured, a row per criterion; conclusions as notes.

        Tables, figures and a page of them are written to ``out``, or to the run folder. Settings are as for ``score``.
        """
        if out:
            out = check_folder(out, self._read_by(self.settings), force=force)
        with self._opened("score", settings, redo="scores" if force else "") as session:
            if out:
                with output_folder(Path(out), force=force) as folder:
                    lines, frame = compared_criteria(session, folder)
            else:
                lines, frame = compared_criteria(session, session.run.comparison_dir)
        return Table("agreement", frame, f"Agreement of criteria, {model_title(self.settings)}", notes=lines)

    def search(
        self,
        *,
        macs: str = "",
        params: str = "",
        latency: str = "",
        memory: str = "",
        lender: str | Path | None = None,
        importance: str | Path | None = None,
        force: bool = False,
        **settings: object,
    ) -> Plans:
        """The plans that lose least within budgets that hold together, such as ``macs="65%"``; scores first if need be.

        A budget is a share (``65%``, ``0.7x``), an amount (``150G``, ``35ms``, ``2GiB``) or a plan (``as:bk-small``).
        ``lender`` is a finished run whose scores are searched with and which stays as it is, ``importance`` a CSV of
        scores. Settings are those of ``search``. Raises BudgetError for a budget that cannot be read or met, RunError
        where there is no such file.
        """
        budgets = budgets_asked(macs, params, latency, memory)
        asked = ({"budgets": list(budgets)} if budgets else {}) | settings
        wanted = with_settings(self.settings, settings_by_name("search", asked))
        with progress_shown():  # where notes are seen
            check_controls(wanted)  # before anything is removed or scored
            check_budgets(wanted)
        if importance is not None:
            if not Path(importance).is_file():
                raise RunError(
                    f"asked to search with {importance}, found no such file; write one with: prune-lab score"
                )
            read_records(Path(importance), IMPORTANCE)  # before anything is removed
        with self._opened("search", asked, redo="plans" if force else "") as session:
            if lender is not None:
                borrow_scores(run_in(lender, must_exist=True), session)
            if importance is not None and not session.run.done(session.run.importance):
                use_scores(session, Path(importance))
            return self._shown_plans(session)

    def _shown_plans(self, session: Session) -> Plans:
        found, frame, scores = ensure_plans(session), plans_frame(session), self._scores()
        shown = tuple(Plan(plan, self.architecture, scores) for plan in timed_plans(session, frame))
        title = f"Plans for {model_title(self.settings)}"
        maps, lines = plan_maps(self.architecture, found, scores), plan_notes(session, frame)
        return Plans("plans", frame, title, maps, notes=lines, plans=shown)

    # Students

    def prune(
        self,
        plan: str | Plan,
        out: str | Path,
        *,
        form: str | None = None,
        dtype: str | None = None,
        variant: str = "",
        force: bool = False,
        dry_run: bool = False,
    ) -> Table:
        """Write the model without the blocks of ``plan`` to the folder ``out``, which plain diffusers loads.

        ``form`` is native, neutral, own or padded (``prune_lab.forms``); None: native where a plain config describes
        what is left, else with code of its own, which diffusers has to be told to trust. Where a width of the plan says
        how many units stay and not which, those with the largest weights do.

        A process of its own loads it and compares it with the model without these blocks before the folder gets its
        name. ``dtype`` converts the weights, ``variant`` names their files (``fp16``). Raises FormError with the reason
        for a plan that cannot be built in the form, StorageError where ``out`` holds something and ``force`` is not
        given. With ``dry_run`` only the costs come back.
        """
        out = check_folder(
            out, {"the model": self.source.places, "the plan": (plan_file(str(plan))[0],)}, force=force
        )
        if not dry_run:
            get_ready_to_prove()  # it imports meanwhile
        named = plan if isinstance(plan, Plan) else self.plan(plan)
        named = dataclasses.replace(named, plan=with_units(self.source, named.plan))
        asked = None if form is None else form_named(form)
        # says what is in the way, also with dry_run
        chosen = dataclasses.replace(named, plan=in_form(self.architecture, named.plan, asked))
        if not dry_run:
            how: dict[str, Any] = {
                "dtype": pick_dtype(dtype) if dtype else None,
                "variant": variant,
                "force": force,
                "finish": lambda folder: write_card(folder, chosen.plan, self.source),
            }
            with progress_shown():
                prune_pipeline(self.source, chosen.plan, Path(out), **how)
        return pruned_table(self.source, chosen, Path(out), written=not dry_run)

    def narrow(
        self,
        channels: str | Sequence[int] = "",
        out: str | Path | None = None,
        *,
        macs: str = "",
        params: str = "",
        by: str = "taylor",
        steps: int = 0,
        force: bool = False,
        **settings: object,
    ) -> Table:
        """Write the model with fewer ``channels`` in whole stages, ``"256,512,1024,1024"``, to the folder ``out``.

        ``macs`` and ``params`` are budgets within which the channels are found. What stays is chosen ``by`` taylor,
        magnitude or random. With ``steps`` the narrower model is distilled from this one; settings are those of
        ``distill`` and ``data``, and the same call again goes on. ``levels`` says what stages can become. Raises
        PlanError for channels that no plain config has, BudgetError for a budget that cannot be met,
        UnsupportedModelError for a model that is no U-Net.
        """
        how = asked_narrowing(channels, budgets_asked(macs, params, "", ""), by, steps)
        if out is None:
            raise RunError("asked for narrower stages without a folder to write; give --out DIR")
        out = check_folder(out, self._read_by(self.settings), force=force)
        get_ready_to_prove()  # it imports meanwhile
        asked = settings_by_name("distill", settings) | ({"distill.steps": steps} if steps else {})
        with self._opened("distill", asked, force=force) as session:
            frame = narrow(session, Path(out), how, force=force)
        notes = (f"in Python: {loaded_in_python(Path(out))}",)
        return Table("narrowed", frame, f"{self.source.text} with narrower stages", notes=notes)

    def data(self, out: str | Path, *, pictures: int = 0, force: bool = False, **settings: object) -> Table:
        """Training data in the folder ``out``, to distil from with ``source=out``: the model draws ``count`` pictures.

        Settings are those of ``data``: ``prompts`` names a file of prompts or the list that ships (``default``), and
        with ``source`` pictures of one's own are encoded instead. The first ``pictures`` of them are decoded to PNG.
        The same call again goes on where it was stopped. Raises DataError for what cannot be read.
        """
        # The source in the model's own settings is what students learn from.
        asked = {"data.source": ""} | settings_by_name("data", settings)
        table = data_table(with_settings(self.settings, asked), Path(out), force=force, pictures=pictures)
        assert table is not None, "only the command line starts several processes"
        return table

    def distill(
        self, *plans: str | Plan, out: str | Path | None = None, force: bool = False, **settings: object
    ) -> Table:
        """Retrain students from the model, all on one teacher pass per batch: ``plans``, or all that were searched.

        Their losses before and after come back; with ``out`` the students are written there too, as folders that plain
        diffusers loads. Settings are those of ``distill`` and ``data``. The same call again resumes. Raises PlanError
        for a plan that cannot be read or built, RunError without any plan.
        """
        if not self.source.is_pipeline:
            raise RunError(
                f"asked to distil students of {self.source.text}, a {self.source.called} alone (kind: "
                f"{self.source.kind}); pictures and captions are encoded with a VAE and a text encoder: give a "
                "pipeline folder or a hub id"
            )
        plans = tuple(self._with_units(plan) for plan in plans)
        wanted = with_settings(self.settings, settings_by_name("distill", settings))
        sources = self._read_by(wanted)
        if out and len(plans) == 1:
            out = check_folder(out, sources, force=force)
        elif out:  # each student has its own folder in it
            out = check_apart(out, sources)
        run = Run(self.folder)
        usual = SearchConfig()
        searches = dataclasses.replace(self.settings.search, form=usual.form) != usual
        if plans and not run.config.is_file() and not searches:
            # Nothing was searched, nor is to be: these alone, in the form that ``prune`` gives them.
            settings |= {"search.budgets": [], "search.controls": [str(plan) for plan in plans]}
            native = all(is_native(self.architecture, one) for one in plans_of(self.architecture, plans))
            if not native and self.settings.search.form == usual.form:
                settings = {"search.form": "own"} | settings
        elif not plans and self._temporary and not run.done(run.searched):
            raise RunError("asked to distil without a plan; give plans, such as 'bk-small', or search first")
        init_processes()
        with self._opened("distill", settings, force=force) as session:
            with PartialState().main_process_first():
                named = [self._in_run(session, plan) for plan in plans]
                for one in named:
                    layout_of(self.architecture, one)  # what cannot be built says so before anything is drawn
                ids = tuple(one.id for one in named)
                if force and is_main():
                    forget(session.run, "distilled", plan_ids=ids or None)
            if out:
                for folder in student_folders(session, Path(out), only=ids).values():
                    check_folder(folder, sources, force=force)
            ensure_distilled(session, only=ids)
            if not is_main():
                return Table("recovery", pd.DataFrame(columns=list(RECOVERY_SUMMARY_COLUMNS)))
            frame, notes = recovery_frame(session), distilled_notes(session, only=ids)
            written = save_students(session, Path(out), only=ids, force=force) if out else ()
        return Table(
            "recovery",
            frame,
            f"Recovery after {self.settings.distill.steps} steps",
            self.results.losses.draw if len(frame) else None,
            notes=(
                *notes,
                *(f"student: {path}; in Python: {loaded_in_python(path)}" for path in written),
            ),
        )

    def distill_steps(
        self,
        student: str | Path | Model,
        out: str | Path,
        *,
        guidance: float = 7.5,
        grid: int = 50,
        force: bool = False,
        **settings: object,
    ) -> Table:
        """Teach ``student`` to draw in about four steps, from this model as its teacher (LCM, arXiv:2310.04378).

        ``out`` becomes a pipeline folder that plain diffusers draws with in 4 steps and with a guidance of 1: the
        ``guidance`` of the teacher, which draws in ``grid`` steps, is baked in. ``student`` may be this model itself.
        Settings are those of ``distill`` and ``data``; here 300 steps at a learning rate of 1e-4 and an average with a
        decay of 0.95 are usual. The same call again resumes. Raises UnsupportedModelError for a model of flow matching,
        or that reads no text, RunError where its folder holds the work of other settings.
        """
        how = Consistency(guidance, grid)
        source = student.source if isinstance(student, Model) else resolve_model(str(student))
        asked = settings_by_name("distill", _CONSISTENCY) | settings_by_name("distill", settings)
        out = check_folder(out, {**self._read_by(self.settings), "the student": source.places}, force=force)
        with self._opened("distill", asked, force=force) as session:
            frame = distil_consistent(session, source, Path(out), how, force=force)
        notes = (
            f"student: {out}; draw with 4 steps and a guidance of 1",
            f"in Python: {loaded_in_python(Path(out))}; "
            'pipeline("a cat", num_inference_steps=4, guidance_scale=1.0).images[0].save("cat.png")',
        )
        return Table("consistency", frame, f"Consistency distillation of {source.text}", notes=notes)

    def _with_units(self, plan: str | Plan) -> str | Plan:
        """``plan``, in writing where it was so, which says which units of its widths stay."""
        if isinstance(plan, Plan):
            return dataclasses.replace(plan, plan=with_units(self.source, plan.plan))
        if "~" not in plan or plan_file(plan)[0].endswith(PLAN_FILES):
            return plan
        return with_units(self.source, self.plan(plan).plan).text

    def _in_run(self, session: Session, plan: str | Plan) -> PruningPlan:
        """``plan`` among those of the run, where it is written down if it is none of them yet and can be built."""
        known = ensure_plans(session)
        text = plan.id if isinstance(plan, Plan) else plan
        if any(goes_by(one, text) for one in known) or not (isinstance(plan, Plan) or self._temporary):
            return plan_named(known, text, session)
        (read,) = plans_of(self.architecture, (plan,))
        found = within_form(self.architecture, read, form_named(self.settings.search.form))
        if found.id not in {one.id for one in known}:
            layout_of(self.architecture, found)
            write_json(session.run.plan(found.id), found.to_json())
            forget(session.run, "ranking")  # it was made without this one
        return found

    def rank(self, *, distill: bool = False, force: bool = False, **settings: object) -> Table:
        """The candidates by quality at their cost: held-out loss, CLIP score, size, with ties and who was left out.

        With ``distill``, or settings of ``rank`` or ``distill`` such as ``eta=2, steps=500``, they are distilled first,
        by successive halving where ``eta`` is given. Raises RunError as ``score`` does.
        """
        names = settings_by_name("rank", settings)
        with self._opened("rank", names, force=force) as session:
            if force:
                forget(session.run, "ranking")
            if distill or any(name.startswith(("distill.", "rank.")) for name in names):
                ensure_distilled(session)
            frame = ensure_ranking(session).frame()
        return Table("ranking", frame, f"Ranking of {self._named}", self.results.ranking.draw)

    # How good it is

    def evaluate(self, *prompts: str, base: str = "", **settings: object) -> Table:
        """Held-out loss of the model, and the CLIP score of what it draws for ``prompts`` (none: held-out captions).

        A model alone draws in the pipeline ``base``, by default the shipped one with a model of its class. Settings are
        those of ``evaluate``. Raises ConfigError for a base of another class.
        """
        asked = settings_by_name("evaluate", ({"prompts": list(prompts)} if prompts else {}) | settings)
        how = self.settings
        if not self.source.is_pipeline:
            how = dataclasses.replace(how, model=base or shipped_like(self.source))
        return self.judged_in(with_settings(how, asked))

    def judged_in(self, settings: RunConfig, told: set[str] | None = None) -> Table:
        """What ``evaluate`` finds with these ``settings``, whose model is the pipeline in which a model alone draws.

        ``told`` are lines on the data that need not be shown again; those that are shown are added.
        """
        with Model(settings)._opened("evaluate", {}) as session:
            check_same_class(self.source, session.source)
            check_draws_in(self.source, session.source)
            # the device first: loading is what can fail
            model = (
                session.model if self.source.is_pipeline else load_model(self.source, device=session.device)
            )
            found = quality(session, model, told)
            row = {"model": self.source.text, "pictures": len(session.prompts), **found}
        return Table("quality", pd.DataFrame([row]), "Quality")
