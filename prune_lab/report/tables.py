"""The tables of a run folder, read and joined for the report; no new numbers are computed.

Any table may be missing, because a run folder can be read after any step. A missing file is ``None`` here and
"not run yet" on the page; a missing cell stays missing and is never zero.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import pandas as pd

from prune_lab import schemas
from prune_lab.config import load_config
from prune_lab.errors import DataError, RunError
from prune_lab.runs import Manifests, Run, damaged, read_plan_file, read_records, read_typed
from prune_lab.runtime import read_bytes

MAP_COLUMNS = ("name", "stage", "kind", "lane", "row", "position", "removable", "impact", "low", "high")
LAYER_COLUMNS = ("name", "inside", "removable", "impact")
CURVE_COLUMNS = ("plan", "plan_id", "step", "part", "value")


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A plan for the report: its names, its origin, the blocks that it removes, and how its student is built."""

    id: str
    label: str
    origin: str
    removed: tuple[str, ...]
    form: str = "native"
    widths: tuple[str, ...] = ()
    """What stays of blocks that it makes narrower, in words: ``Dn3.A1.heads 2``."""
    stays: tuple[tuple[str, float], ...] = ()
    """The same as shares, by site, where it is known how much there was; maps show it."""


@dataclass(frozen=True, slots=True)
class RunTables:
    """Everything a report shows, read from one run folder; a step that has not been run is ``None`` or empty."""

    title: str
    model: str
    settings: Mapping[str, Any]
    config_digest: str
    environment: Mapping[str, Any]
    blocks: pd.DataFrame | None = None
    importance: pd.DataFrame | None = None
    parts: pd.DataFrame | None = None  # impacts per timestep and kind of prompt, by the run's criterion
    criteria: pd.DataFrame | None = None  # the impacts by all criteria
    costs: pd.DataFrame | None = None
    choices: Mapping[str, Any] | None = (
        None  # which blocks can leave together natively, and samplers with them
    )
    latency: Mapping[str, Any] | None = None  # what each block's removal saves in time
    reductions: pd.DataFrame | None = None
    pipeline: pd.DataFrame | None = None
    ranking: pd.DataFrame | None = None
    tournament: pd.DataFrame | None = None  # names are plan ids
    repairs: pd.DataFrame | None = None
    gates: pd.DataFrame | None = None  # what the solver learned-gates has learnt of each block
    gate_steps: pd.DataFrame | None = None
    steps: pd.DataFrame | None = None
    recoveries: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # by plan id
    plans: tuple[PlanRow, ...] = ()
    roles: tuple[
        Mapping[str, Any], ...
    ] = ()  # where probe, training rows, held-out rows and scorer come from
    prompts: pd.DataFrame | None = None  # of every picture: file, prompt, seed
    teacher_pictures: Path | None = None  # a folder
    pictures: tuple[tuple[PlanRow, Mapping[str, Path]], ...] = ()  # folders by state: pruned, distilled

    def setting(self, section: str, key: str) -> Any:
        """The value of ``key`` in ``[section]`` of the run's settings, ``None`` if there is none."""
        return self.settings.get(section, {}).get(key)


# Reading ---------------------------------------------------------------------------------------------------------


class _Saving(TypedDict):
    name: str
    measured_ms: float


class _Whole(TypedDict):
    median_ms: float


class _Latency(TypedDict):
    """What the report reads of latency.json."""

    whole: _Whole
    scale: float
    savings: list[_Saving]


class _Choices(TypedDict):
    levels: list[list[list[str]]]
    samplers: dict[str, list[str]]
    complete: bool


class _Together(TypedDict):
    blocks: list[str]
    saves: tuple[int, int, int]  # parameters, multiply-adds, those of them in attention products


class _Savings(TypedDict):
    parts: dict[str, tuple[int, int, int]]
    together: list[_Together]


class _ChoicesAndSavings(_Choices, total=False):
    neutral: _Savings  # of a class that has the neutral form


class _Role(TypedDict):
    name: str
    source: str
    count: int | None
    size: int | None


@dataclass(frozen=True, slots=True)
class _Files:
    """Reads files of a run that are there, as the steps left them; ``None`` for one that is not."""

    manifests: Manifests

    def json(self, path: Path, kind: Any) -> Any:
        if not path.exists():
            return None
        found = read_typed(path, kind)
        self.manifests.check(path)
        return found

    def table(self, path: Path, records: schemas.Records) -> pd.DataFrame | None:
        if not path.exists():
            return None
        frame = read_records(path, records)
        self.manifests.check(path)
        return frame

    def prompts(self, path: Path) -> pd.DataFrame | None:
        frame = self.table(path, schemas.PROMPTS)
        for name in () if frame is None else frame["file"]:
            if Path(name).name != name:
                raise damaged(path, f"{name!r}, which is no name of a file in the folder of pictures")
        return frame


def _read_settings(path: Path) -> tuple[dict[str, Any], str]:
    if not path.exists():
        return {}, ""
    load_config(path)  # every setting is known, and of its kind
    content = read_bytes(path)
    return tomllib.loads(content.decode("utf-8-sig")), hashlib.sha256(content).hexdigest()[:12]


def _leading_parts(parts: pd.DataFrame | None, importance: pd.DataFrame | None) -> pd.DataFrame | None:
    """The rows of ``parts`` for single blocks, by the first criterion of ``importance``; ``None`` if there are none."""
    if parts is None or importance is None:
        return None
    leading = parts[(parts["criterion"] == importance["criterion"].iloc[0]) & (parts["kind"] == "block")]
    return leading if len(leading) else None


def _read_plans(run: Run, ranking: pd.DataFrame | None, files: _Files) -> tuple[PlanRow, ...]:
    """The plans of ``run`` by which something leaves, controls before searched ones, each group by size."""
    named: dict[str, tuple[str, str]] = {}
    if ranking is not None:
        rows = ranking[ranking["origin"] != "teacher"]
        named = {str(row.plan_id): (str(row.plan), str(row.origin)) for row in rows.itertuples()}
    plans = []
    for plan_id in run.plan_ids():
        path = run.plan(plan_id)
        value = read_plan_file(path)
        files.manifests.check(path)
        name = next(iter(value.get("names", [])), plan_id)
        origin = value.get("origin") or "control"  # written by a person: a control
        label, origin = named.pop(plan_id, (name, origin))
        form = str(value.get("form", "native"))
        widths = tuple(
            f"{site} {kept if isinstance(kept, int) else len(kept)}"
            for site, kept in value.get("widths", {}).items()
        )
        plans.append(PlanRow(plan_id, label, origin, tuple(value["removed"]), form, widths))
    if named:
        raise DataError(
            f"{run.ranking} ranks the plan {next(iter(named))}, found no such file in {run.plans_dir}; "
            "delete ranking.csv and rank again"
        )
    kept = [plan for plan in plans if plan.removed or plan.widths]
    return tuple(sorted(kept, key=lambda plan: (plan.origin != "control", len(plan.removed), plan.label)))


def read_run(run: Run) -> RunTables:
    """The tables that ``run`` has so far.

    Raises RunError when the folder holds neither a configuration nor any table, DataError when a file is damaged or not
    as its step left it, and ConfigError when config.toml is damaged.
    """
    files = _Files(Manifests(run.folder))
    settings, digest = _read_settings(run.config)
    blocks = files.table(run.blocks, schemas.BLOCKS)
    importance = files.table(run.importance, schemas.IMPORTANCE)
    reductions = files.table(run.reductions, schemas.REDUCTIONS)
    if not settings and blocks is None and importance is None and reductions is None:
        raise RunError(
            f"asked for a report on {run.folder}, found none of config.toml, blocks.csv, importance.csv and "
            "reductions.csv there; make a run first, for example: prune-lab run --config FILE.toml --run DIR"
        )
    ranking = files.table(run.ranking, schemas.RANKING)
    plans = _read_plans(run, ranking, files)
    recoveries: dict[str, pd.DataFrame] = {}
    pictures: list[tuple[PlanRow, Mapping[str, Path]]] = []
    for plan in plans:
        paths = run.candidate(plan.id)
        if (recovery := files.table(paths.recovery, schemas.RECOVERY)) is not None:
            recoveries[plan.id] = recovery
        states = {"pruned": paths.pictures_pruned, "distilled": paths.pictures_distilled}
        if drawn := {state: folder for state, folder in states.items() if folder.exists()}:
            pictures.append((plan, drawn))
    drawn_by_all = [run.teacher_pictures, *(folder for _, states in pictures for folder in states.values())]
    files.manifests.check(*(file for folder in drawn_by_all for file in sorted(folder.glob("*.png"))))
    named = [
        str(table["model"].iloc[0]) for table in (importance, reductions) if table is not None and len(table)
    ]
    model = str(settings.get("model", "")) or (named[0] if named else "a model")
    return RunTables(
        title=str(settings.get("report", {}).get("title") or f"Pruning {model}"),
        model=model,
        settings=settings,
        config_digest=digest,
        environment=files.json(run.environment, dict[str, str | int]) or {},
        blocks=blocks,
        importance=importance,
        parts=_leading_parts(files.table(run.importance_parts, schemas.PARTS), importance),
        criteria=files.table(run.criteria, schemas.IMPORTANCE),
        costs=files.table(run.costs, schemas.COSTS),
        choices=files.json(run.choices, _ChoicesAndSavings),
        latency=files.json(run.latency, _Latency),
        reductions=reductions,
        pipeline=files.table(run.pipeline_profile, schemas.PIPELINE),
        ranking=ranking,
        tournament=files.table(run.tournament, schemas.TOURNAMENT),
        repairs=files.table(run.repairs, schemas.REPAIRED),
        gates=files.table(run.gates, schemas.LEARNED_GATES),
        gate_steps=files.table(run.gate_steps, schemas.GATE_STEPS),
        steps=files.table(run.steps, schemas.STEP_SECONDS),
        recoveries=recoveries,
        plans=plans,
        roles=tuple(files.json(run.sources, list[_Role]) or ()),
        prompts=files.prompts(run.picture_prompts),
        teacher_pictures=run.teacher_pictures if run.teacher_pictures.exists() else None,
        pictures=tuple(pictures),
    )


# Tables for the figures ------------------------------------------------------------------------------------------


def whole_blocks(blocks: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``blocks`` without layers inside others (``Up1.A2.T7``), whose costs are part of their block's."""
    around = blocks["name"].astype(str).str.rpartition(".")[0]
    return blocks[~around.isin(set(blocks["name"]))]


def block_map_frame(blocks: pd.DataFrame, importance: pd.DataFrame | None) -> pd.DataFrame:
    """One row per block in order of execution, with its position in its stage and its impact (NaN: not scored)."""
    frame = whole_blocks(blocks)[["name", "stage", "kind", "lane", "row", "removable"]].copy()
    frame["position"] = frame.groupby("stage", sort=False).cumcount()
    return _with_impacts(frame, importance)[list(MAP_COLUMNS)]


def _with_impacts(frame: pd.DataFrame, importance: pd.DataFrame | None) -> pd.DataFrame:
    """``frame`` with the impact of each of its names, and the ends of its interval; NaN where it was not scored."""
    scores = (
        pd.DataFrame(columns=["kind", "group", "impact", "low", "high"]) if importance is None else importance
    )
    scores = scores[scores["kind"] == "block"].drop(columns="kind").rename(columns={"group": "name"})
    return frame.merge(scores, on="name", how="left", validate="one_to_one")


def layer_map_frame(blocks: pd.DataFrame, importance: pd.DataFrame | None) -> pd.DataFrame:
    """One row per layer inside a block in order of execution: its block, and its impact (NaN: not scored)."""
    layers = blocks[~blocks["name"].isin(whole_blocks(blocks)["name"])][["name", "removable"]].copy()
    layers["inside"] = [str(name).rpartition(".")[0] for name in layers["name"]]
    return _with_impacts(layers, importance)[list(LAYER_COLUMNS)]


def named_layers(layers: pd.DataFrame, plans: Sequence[PlanRow]) -> pd.DataFrame:
    """The rows of ``layers`` (see ``layer_map_frame``) of all blocks of which a score or a plan names a layer."""
    planned = {name for plan in plans for name in plan.removed}
    named = layers.loc[layers["impact"].notna() | layers["name"].isin(planned), "inside"]
    return layers[layers["inside"].isin(named)]


def importance_frame(importance: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The rows of the groups of one ``kind`` (block, pair, stage), largest impact first."""
    return importance[importance["kind"] == kind].sort_values("impact", ascending=False, ignore_index=True)


def curve_frame(tables: RunTables) -> pd.DataFrame:
    """Every logged loss of every candidate: plan, plan_id, step, part (task, output, feature, validation), value."""
    parts = ["task", "output", "feature", "validation"]
    pieces = [
        tables.recoveries[plan.id].melt("step", parts, "part").assign(plan=plan.label, plan_id=plan.id)
        for plan in tables.plans
        if plan.id in tables.recoveries
    ]
    return pd.concat(pieces, ignore_index=True).dropna(subset="value")[list(CURVE_COLUMNS)]


def measured(ranking: pd.DataFrame) -> pd.DataFrame:
    """The rows of candidates, without the teacher, that have a held-out loss before or after distillation."""
    return ranking[
        ranking[["loss_before", "loss_after"]].notna().any(axis=1) & (ranking["origin"] != "teacher")
    ]


def teacher_row(ranking: pd.DataFrame) -> pd.Series[Any] | None:
    """The teacher's row, ``None`` if it was not measured."""
    rows = ranking[ranking["origin"] == "teacher"]
    return None if rows.empty else rows.iloc[0]


def not_dropped(ranking: pd.DataFrame) -> pd.DataFrame:
    """The rows of the teacher and of candidates that the tournament did not drop: only their losses are comparable."""
    return ranking[ranking["status"] != "dropped"]


def dropped(ranking: pd.DataFrame) -> pd.DataFrame:
    """The rows of candidates that the tournament dropped, with the reason."""
    return ranking[ranking["status"] == "dropped"]


def unranked(ranking: pd.DataFrame) -> pd.DataFrame:
    """The rows of candidates without a rank, with the reason; the teacher is not one of them."""
    return ranking[ranking["rank"].isna() & (ranking["origin"] != "teacher")]
