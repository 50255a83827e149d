"""The parts of a run: what each step writes, from what, and under which settings; and which of them are to be made.

Every function that makes something asks ``lacking`` for the parts that are not done, makes these, and records them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from prune_lab.config import SETTINGS, RunConfig, setting_values
from prune_lab.importance import NEEDS_PIPELINE
from prune_lab.models import ModelSource, ScorerChoice
from prune_lab.plans import PruningPlan
from prune_lab.processes import is_main
from prune_lab.runs import CandidatePaths, Manifests, Part, Run
from prune_lab.runtime import note
from prune_lab.session.origins import TEACHER, data_digest, files_digests, scorer_digest

# In this order steps are done; ``workflow.steps`` says what each does.
STEP_NAMES = (
    "blocks",
    "probe",
    "scores",
    "costs",
    "plans",
    "candidates",
    "data",
    "repaired",
    "distilled",
    "reductions",
    "shares",
    "pictures",
    "ranking",
    "report",
)
# The model is known by its digest, wherever it lies.
_BY_DIGEST = ("model", "revision", "subfolder", "variant")


class Bench(Protocol):
    """What a part is declared from; a ``Session`` is one."""

    @property
    def run(self) -> Run: ...
    @property
    def config(self) -> RunConfig: ...
    @property
    def source(self) -> ModelSource: ...
    @property
    def teacher(self) -> str: ...
    @property
    def data_origin(self) -> str: ...
    @property
    def scorer_choice(self) -> ScorerChoice: ...
    @property
    def manifests(self) -> Manifests: ...
    @property
    def trusting(self) -> bool: ...


# Settings ----------------------------------------------------------------------------------------------------------


def reads_evaluation(config: RunConfig, *, drawn: bool) -> str:
    """The first step that draws or judges pictures with the settings of ``[evaluate]``; empty: as they are declared.

    ``drawn``: the model draws the pictures of its probe.
    """
    if config.probe.prompts or drawn:
        return "probe"
    if NEEDS_PIPELINE & {config.score.criterion, *config.score.also}:
        return "scores"
    return "distilled" if config.rank.eta and config.rank.clip else ""


def binding_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that finished results depend on, as JSON values by dotted name."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in setting_values(config).items()
        if not SETTINGS[name].free and name not in _BY_DIGEST
    }


def _settings(bench: Bench, step: str) -> Mapping[str, Any]:
    """Those that the steps up to ``step`` read."""
    early = reads_evaluation(bench.config, drawn=bench.data_origin == "drawn")
    place = STEP_NAMES.index

    def read(name: str) -> bool:
        readers = [SETTINGS[name].read_by, *([early] if early and name.startswith("evaluate.") else [])]
        return min(map(place, readers)) <= place(step)

    return {name: value for name, value in binding_settings(bench.config).items() if read(name)}


# Parts of the run --------------------------------------------------------------------------------------------------


def _part(bench: Bench, step: str, name: str, *outputs: Path, **more: Any) -> Part:
    inputs = {TEACHER: bench.teacher, **more.pop("inputs", {})}
    folder = more.pop("folder", bench.run.folder)
    return Part(step, name, folder, outputs, inputs=inputs, settings=_settings(bench, step), **more)


def _files(bench: Bench, *settings: str) -> dict[str, str]:
    return files_digests(bench.manifests, bench.config, *settings)


def _pictures_given(bench: Bench) -> dict[str, str]:
    """Digests of the pictures that the user gave, and of the prompts that the model draws where there are none."""
    if bench.data_origin == "own":
        return {"data.source": data_digest(bench.manifests, bench.config)}
    return _files(bench, "data.prompts") if bench.data_origin == "drawn" else {}


def _scorer(bench: Bench) -> dict[str, str]:
    return {"scorer": scorer_digest(bench.manifests, bench.scorer_choice)}


def blocks_part(bench: Bench) -> Part:
    """The inventory of the teacher."""
    return _part(bench, "blocks", "blocks", bench.run.choices, bench.run.blocks)


def probe_part(bench: Bench) -> Part:
    """The probe."""
    given = _pictures_given(bench) | _files(bench, "probe.prompts")
    return _part(bench, "probe", "probe", bench.run.probe, inputs=given)


def sources_part(bench: Bench) -> Part:
    """Where rows and scorer come from, in words; it follows from what the other parts read."""
    return Part("probe", "sources", bench.run.folder, (bench.run.sources,))


def scores_part(bench: Bench) -> Part:
    """The scores by all criteria of the run."""
    run, score = bench.run, bench.config.score
    judged = _scorer(bench) if "clip-score" in (score.criterion, *score.also) else {}
    return _part(
        bench,
        "scores",
        "scores",
        run.importance_parts,
        run.criteria,
        run.importance,
        reads=(run.probe,),
        inputs=judged | _files(bench, "score.groups"),
    )


def width_scores_part(bench: Bench, criterion: str = "") -> Part:
    """The scores of the parts of blocks by one criterion; empty: by the one that the run searches with."""
    run, criterion = bench.run, criterion or bench.config.search.widths
    output, given = run.width_scores(criterion), {"criterion": criterion}
    return _part(bench, "scores", f"widths-{criterion}", output, reads=(run.probe,), inputs=given)


def costs_part(bench: Bench) -> Part:
    """The cost table."""
    return _part(bench, "costs", "costs", bench.run.costs)


def latency_part(bench: Bench) -> Part:
    """The latency table."""
    return _part(bench, "plans", "latency", bench.run.latency)


def plans_part(bench: Bench) -> Part:
    """The plans that the settings name and those that were searched."""
    run, budgets = bench.run, bench.config.search.budgets
    reads = [run.importance, run.probe] if budgets else []
    reads += [run.latency] if "latency" in " ".join(budgets) else []
    by_units = budgets and "width" in bench.config.search.axes
    reads += [run.width_scores(bench.config.search.widths)] if by_units else []
    given = _files(bench, "search.controls", "search.budgets")
    return _part(bench, "plans", "plans", run.searches, run.searched, reads=tuple(reads), inputs=given)


def rounds_part(bench: Bench) -> Part:
    """The times of teacher and students, to which later ones are added."""
    return _part(bench, "candidates", "latency_rounds", bench.run.latency_rounds)


def data_part(bench: Bench) -> Part:
    """The encoded training pictures."""
    run = bench.run
    output = run.data if bench.data_origin == "shipped" else run.data_dir
    return _part(bench, "data", "data", output, inputs=_pictures_given(bench), resumes=True)


def validation_part(bench: Bench) -> Part:
    """The held-out rows, where they are written down."""
    reads = (bench.run.data_dir,) if bench.data_origin == "drawn" else ()
    given = _pictures_given(bench)
    return _part(bench, "data", "validation", bench.run.validation, reads=reads, inputs=given)


def captions_part(bench: Bench) -> Part:
    """The other captions of random conditioning."""
    run, given = bench.run, _files(bench, "distill.captions")
    return _part(bench, "distilled", "captions", run.captions, reads=(run.validation,), inputs=given)


def tournament_part(bench: Bench, plans: Iterable[PruningPlan]) -> Part:
    """What the rungs decided about the candidates of ``plans``."""
    judged = _scorer(bench) if bench.config.rank.clip else {}
    known = {"candidates": " ".join(sorted(plan.id for plan in plans))}
    return _part(bench, "distilled", "tournament", bench.run.tournament, inputs=judged | known)


def reductions_part(bench: Bench) -> Part:
    """What the controls leave."""
    run = bench.run
    given = _files(bench, "search.controls")
    return _part(bench, "reductions", "reductions", run.reductions, reads=(run.latency_rounds,), inputs=given)


def shares_part(bench: Bench) -> Part:
    """The times of the parts of the pipeline."""
    return _part(bench, "shares", "shares", bench.run.pipeline_profile)


def _shown(bench: Bench) -> tuple[Path, ...]:
    """What the prompts to draw follow from, where they are captions of held-out rows."""
    return () if bench.config.evaluate.prompts else (bench.run.validation,)


def prompts_part(bench: Bench) -> Part:
    """The prompts and seeds of a set of pictures."""
    given = _pictures_given(bench)
    return _part(bench, "pictures", "prompts", bench.run.picture_prompts, reads=_shown(bench), inputs=given)


def teacher_pictures_part(bench: Bench) -> Part:
    """The pictures of the teacher."""
    run = bench.run
    reads = (run.picture_prompts,)
    return _part(bench, "pictures", "teacher_pictures", run.teacher_pictures, reads=reads)


def ranking_part(bench: Bench, plans: Iterable[PruningPlan]) -> Part:
    """The order of the candidates of ``plans``."""
    run = bench.run
    reads = [run.probe, run.costs, run.reductions, run.latency_rounds, run.validation, run.tournament]
    reads.append(run.teacher_pictures)
    names = {}
    for plan in plans:
        paths = run.candidate(plan.id)
        verdict = paths.distilled / "recovery.json"
        reads += [paths.profile, verdict, paths.heldout, paths.pictures_pruned, paths.pictures_distilled]
        names[f"plan {plan.id}"] = f"{plan.origin}: {', '.join(plan.names)}"
    return _part(bench, "ranking", "ranking", run.ranking, reads=tuple(reads), inputs=names | _scorer(bench))


def steps_part(run: Run) -> Part:
    """How long each step took; it is written after each."""
    return Part("steps", "steps", run.folder, (run.steps,), resumes=True)


SHOWN = (".csv", ".json", ".png", ".toml")  # files that a report reads


def report_part(run: Run) -> Part:
    """The pages of the report, from whatever tables and pictures are there."""
    hidden = {run.report_dir, run.scores_dir, run.curves_dir}
    shown = (
        path
        for path in sorted(run.folder.rglob("*"))
        if path.suffix in SHOWN
        and path != run.steps
        and "manifests" not in path.parts
        and hidden.isdisjoint(path.parents)
    )
    return Part("report", "report", run.folder, (run.report_dir,), reads=tuple(shown))


# Parts of a candidate ----------------------------------------------------------------------------------------------


def _of(bench: Bench, plan: PruningPlan, step: str, name: str, *outputs: Path, **more: Any) -> Part:
    paths = bench.run.candidate(plan.id)
    return _part(bench, step, name, *outputs, folder=paths.folder, label=plan.label, **more)


def pruned_part(bench: Bench, plan: PruningPlan) -> Part:
    """The model as it was cut."""
    paths = bench.run.candidate(plan.id)
    return _of(bench, plan, "candidates", "pruned", paths.plan, paths.pruned)


def profile_part(bench: Bench, plan: PruningPlan) -> Part:
    """The profile of the model as it was cut."""
    paths = bench.run.candidate(plan.id)
    return _of(bench, plan, "candidates", "profile", paths.profile, reads=(paths.pruned,))


def repaired_part(bench: Bench, plan: PruningPlan) -> Part:
    """The model after the repair, and whether it was kept."""
    run, paths = bench.run, bench.run.candidate(plan.id)
    reads = (paths.pruned, run.probe, run.data if bench.data_origin == "shipped" else run.data_dir)
    outputs = (paths.repair, paths.repaired, paths.kept)
    return _of(bench, plan, "repaired", "repaired", *outputs, reads=reads, inputs=_pictures_given(bench))


def repairs_part(bench: Bench, plans: Iterable[PruningPlan]) -> Part:
    """The table of what was repaired."""
    run, plans = bench.run, tuple(plans)
    reads = tuple(path for plan in plans for path in run.candidate(plan.id).repaired_files)
    names = {f"plan {plan.id}": plan.label for plan in plans}
    return _part(bench, "repaired", "repairs", run.repairs, reads=reads, inputs=names)


def distilled_part(bench: Bench, plan: PruningPlan, *, scored: bool) -> Part:
    """The model after the distillation, its losses and its verdict; ``scored``: the loss weights blocks by scores."""
    run, paths = bench.run, bench.run.candidate(plan.id)
    repaired = bench.config.repair.kind != "none"
    reads = [paths.repaired if repaired else paths.pruned, run.validation]
    reads += [run.data] if bench.data_origin == "shipped" else [run.data_dir]
    reads += [run.captions] if bench.config.distill.random_conditioning else []
    reads += [run.importance] if scored else []
    return _of(
        bench,
        plan,
        "distilled",
        "distilled",
        paths.recovery,
        paths.heldout,
        paths.distilled / "recovery.json",
        paths.distilled_model,
        reads=tuple(reads),
        inputs=_pictures_given(bench),
        resumes=True,
    )


def pictures_part(bench: Bench, plan: PruningPlan, state: str) -> Part:
    """The pictures of the candidate in ``state``, pruned or distilled."""
    paths = bench.run.candidate(plan.id)
    folder, model = {
        "pruned": (paths.pictures_pruned, paths.pruned),
        "distilled": (paths.pictures_distilled, paths.distilled_model),
    }[state]
    reads = (model, bench.run.picture_prompts)
    return _of(bench, plan, "pictures", f"pictures_{state}", folder, reads=reads)


# What is to be made ------------------------------------------------------------------------------------------------


def remains_of(part: Part) -> tuple[Path, ...]:
    """What goes when a student is trained anew: its state too, and its grids."""
    paths = CandidatePaths(part.folder)
    return (paths.distilled, paths.grids) if part.name == "distilled" else ()


def lacking(bench: Bench, *parts: Part) -> list[Part]:
    """Those of ``parts`` that are not done. What was made of other inputs, or is damaged, is removed, and a line says
    why; of several processes the main one does so.

    A session that trusts, a worker's, takes what is there as it is.
    """
    if bench.trusting:
        return [part for part in parts if not all(map(bench.run.done, part.outputs))]
    found = [(part, verdict) for part in parts if (verdict := bench.manifests.verdict(part)).state != "done"]
    again = [(part, verdict) for part, verdict in found if verdict.state == "redo"]
    if is_main():
        for part, verdict in again:
            bench.manifests.clear(part, verdict, *remains_of(part))
        if again:
            part, verdict = again[0]
            of = f" of {part.label}" if part.label else ""
            more = f" (and of {len(again) - 1} more)" if len(again) > 1 else ""
            note(f"{part.step}{of}{more}: redone, {verdict.why}")
    return [part for part, _ in found]


def record(bench: Bench, part: Part, *more: Path) -> None:
    """Write down that ``part`` is done (see ``Manifests.record``); of several processes the main one does."""
    if not bench.trusting and is_main():
        bench.manifests.record(part, *more)
