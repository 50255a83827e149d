"""The folder of a run: the only code that says where a file of it lies.

::

    runs/<name>/
        config.toml environment.json
        blocks.csv costs.csv reductions.csv pipeline.csv
        probe.safetensors importance.csv importance_parts.csv criteria.csv scores/ data.safetensors data/
        plans/<id>.json plans/searched.csv plans/searches.csv plans/evolution/ latency.json
        candidates/<id>/ plan.json unet/ profile.json repair.csv repaired/ recovery.csv heldout.csv grids/
                         distilled/unet/
                         pictures_pruned.png pictures_distilled.png
        pictures/teacher.png
        tournament.csv ranking.csv steps.csv curves/
        report/ index.html report.md *.png *.csv

Files appear under their final name only when complete, so a step is done when its file is there.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from prune_lab.config import RunConfig, changed_settings, load_config, to_toml
from prune_lab.errors import RunError
from prune_lab.runtime import write_text

_PLAN_ID = re.compile(r"[0-9a-f]{12}")


@dataclasses.dataclass(frozen=True, slots=True)
class CandidatePaths:
    """Where the files of one candidate lie."""

    folder: Path

    @property
    def plan(self) -> Path:
        """The plan as JSON."""
        return self.folder / "plan.json"

    @property
    def unet(self) -> Path:
        """The U-Net folder as it was cut, before any training."""
        return self.folder / "unet"

    @property
    def repair(self) -> Path:
        """What the repair of the cut tried and what it came to, a row per change."""
        return self.folder / "repair.csv"

    @property
    def repaired(self) -> Path:
        """The U-Net folder after the repair of the cut, before any training."""
        return self.folder / "repaired"

    @property
    def profile(self) -> Path:
        """Parameters, MACs, latency, memory and size on disk as JSON."""
        return self.folder / "profile.json"

    @property
    def recovery(self) -> Path:
        """The losses of the distillation, one row per recorded step."""
        return self.folder / "recovery.csv"

    @property
    def heldout(self) -> Path:
        """The held-out loss of every row at every validation of the distillation: step, row, loss."""
        return self.folder / "heldout.csv"

    @property
    def grids(self) -> Path:
        """Grids of pictures drawn while the student was trained, a file for each step that was asked for."""
        return self.folder / "grids"

    @property
    def distilled(self) -> Path:
        """The folder of the distillation: its checkpoints, and ``unet`` when it is finished."""
        return self.folder / "distilled"

    @property
    def checkpoint(self) -> Path:
        """The state of a distillation that is unfinished, failed, or may be asked to go on."""
        return self.distilled / "checkpoint.safetensors"

    @property
    def distilled_unet(self) -> Path:
        """The U-Net folder after the distillation (averaged weights)."""
        return self.distilled / "unet"

    @property
    def pictures_pruned(self) -> Path:
        """The grid of pictures drawn before training."""
        return self.folder / "pictures_pruned.png"

    @property
    def pictures_distilled(self) -> Path:
        """The grid of pictures drawn after the distillation."""
        return self.folder / "pictures_distilled.png"


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A run folder; every property is a path in it, whether or not the file is there yet."""

    folder: Path

    @property
    def config(self) -> Path:
        """The settings the run was started with, as TOML."""
        return self.folder / "config.toml"

    @property
    def environment(self) -> Path:
        """The machine and library versions behind the measurements, as JSON."""
        return self.folder / "environment.json"

    @property
    def blocks(self) -> Path:
        """The inventory of the teacher's blocks."""
        return self.folder / "blocks.csv"

    @property
    def probe(self) -> Path:
        """The fixed inputs of scoring and validation."""
        return self.folder / "probe.safetensors"

    @property
    def importance(self) -> Path:
        """The removal impact of every block, pair and stage."""
        return self.folder / "importance.csv"

    @property
    def importance_parts(self) -> Path:
        """The impacts per tenth of the noise schedule and per kind of prompt, of all criteria."""
        return self.folder / "importance_parts.csv"

    @property
    def criteria(self) -> Path:
        """The scores by all criteria that were measured, the run's own first."""
        return self.folder / "criteria.csv"

    @property
    def scores_dir(self) -> Path:
        """Every value that was measured for a score, so that it is not measured again."""
        return self.folder / "scores"

    @property
    def comparison_dir(self) -> Path:
        """How the criteria agree with each other and with what was measured: tables, figures and words."""
        return self.folder / "comparison"

    @property
    def costs(self) -> Path:
        """Parameters and MACs of every block, sampler and the rest."""
        return self.folder / "costs.csv"

    @property
    def reductions(self) -> Path:
        """What every plan leaves of the teacher's parameters, MACs and latency."""
        return self.folder / "reductions.csv"

    @property
    def pipeline_profile(self) -> Path:
        """The share of text encoder, U-Net and decoder in one generation."""
        return self.folder / "pipeline.csv"

    @property
    def data(self) -> Path:
        """The cached latents and text embeddings that candidates are trained on."""
        return self.folder / "data.safetensors"

    @property
    def data_dir(self) -> Path:
        """The cache of latents and text embeddings of pictures that the run's settings name."""
        return self.folder / "data"

    @property
    def plans_dir(self) -> Path:
        """The plans that become candidates."""
        return self.folder / "plans"

    @property
    def searches(self) -> Path:
        """A row for each budget: how its plans were found, at what cost, and what the solver says of itself."""
        return self.plans_dir / "searches.csv"

    @property
    def evolution_dir(self) -> Path:
        """The journal of the evolution, by which it goes on."""
        return self.plans_dir / "evolution"

    @property
    def latency(self) -> Path:
        """What each block's removal saves in time, as JSON."""
        return self.folder / "latency.json"

    @property
    def searched(self) -> Path:
        """Which plan came from which budget; written last, so the plans are complete when it is there."""
        return self.plans_dir / "searched.csv"

    def plan(self, plan_id: str) -> Path:
        """The JSON of the plan with this id."""
        return self.plans_dir / f"{_checked_id(plan_id)}.json"

    @property
    def candidates_dir(self) -> Path:
        """One folder per candidate, named by its plan's id."""
        return self.folder / "candidates"

    def candidate(self, plan_id: str) -> CandidatePaths:
        """Where the files of the candidate of this plan lie."""
        return CandidatePaths(self.candidates_dir / _checked_id(plan_id))

    @property
    def pictures_dir(self) -> Path:
        """Pictures that belong to no candidate."""
        return self.folder / "pictures"

    @property
    def curves_dir(self) -> Path:
        """Where trackers such as TensorBoard write the curves of the distillation."""
        return self.folder / "curves"

    @property
    def teacher_pictures(self) -> Path:
        """The grid of pictures the teacher draws."""
        return self.pictures_dir / "teacher.png"

    @property
    def ranking(self) -> Path:
        """The candidates in order, with those left out and why."""
        return self.folder / "ranking.csv"

    @property
    def tournament(self) -> Path:
        """What each rung of the tournament decided about each candidate; only where there was one."""
        return self.folder / "tournament.csv"

    @property
    def steps(self) -> Path:
        """How long each step took when it was last done; written after the report too, and not shown in it."""
        return self.folder / "steps.csv"

    @property
    def report_dir(self) -> Path:
        """Everything the report shows, as files."""
        return self.folder / "report"

    @property
    def report(self) -> Path:
        """The report as one HTML file that works offline."""
        return self.report_dir / "index.html"

    def plan_ids(self) -> tuple[str, ...]:
        """The ids of the plans that are written down, in alphabetical order."""
        names = (path.stem for path in self.plans_dir.glob("*.json"))
        return tuple(sorted(name for name in names if _PLAN_ID.fullmatch(name)))

    def done(self, path: Path) -> bool:
        """Whether the step that writes ``path`` is finished: the file or folder is there and not empty."""
        if path.is_dir():
            return any(path.iterdir())
        return path.is_file() and path.stat().st_size > 0

    def needs(self, path: Path, verb: str) -> Path:
        """``path``, which the step called ``verb`` has written.

        Raises RunError that names the step when it has not.
        """
        if not self.done(path):
            name = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
            raise RunError(
                f"run {self.folder} has no {name} yet; make it with: prune-lab {verb} --run {self.folder}"
            )
        return path


def open_run(folder: Path | str, *, must_exist: bool) -> Run:
    """The run in ``folder``; nothing is created.

    Raises RunError when ``folder`` is a file, or when ``must_exist`` and it is not a run folder.
    """
    run = Run(Path(folder))
    if run.folder.exists() and not run.folder.is_dir():
        raise RunError(f"asked for the run folder {folder}, found a file there; give the path of a folder")
    if must_exist and not run.config.is_file():
        found = "a folder without config.toml" if run.folder.is_dir() else "nothing"
        raise RunError(
            f"asked for the run folder {folder}, found {found} there; "
            f"start a run with: prune-lab run --config FILE.toml --run {folder}"
        )
    return run


def load_run_config(run: Run) -> RunConfig:
    """The settings that ``run`` was started with.

    Raises RunError when it was not started, ConfigError when its file is damaged.
    """
    return load_config(run.needs(run.config, "run --config FILE.toml"))


def settle_config(run: Run, config: RunConfig) -> None:
    """Write ``config`` into a new run, or make sure that a run made before has the same settings.

    Raises RunError naming the settings that changed: tables made under two settings do not belong in one folder.
    """
    if not run.done(run.config):
        write_text(run.config, to_toml(config))
        return
    changed = changed_settings(load_config(run.config), config)
    if changed:
        raise RunError(
            f"run {run.folder} was started with other settings ({', '.join(changed)}); "
            "give another --run folder, or the config it was started with"
        )


def _checked_id(plan_id: str) -> str:
    # ids become folder names, and some arrive from the command line
    if not _PLAN_ID.fullmatch(plan_id):
        raise RunError(
            f"{plan_id!r} is not the id of a plan; an id is 12 hexadecimal digits, see the plans folder"
        )
    return plan_id
