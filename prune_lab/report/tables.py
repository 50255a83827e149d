"""What the files of a run folder hold, as tables ready to be drawn: joins and selections, no new numbers.

Every table may be missing: a run folder is readable after any step. A missing file is ``None`` here and
"not run yet" on the page; a missing cell stays missing and is never a zero.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from prune_lab.errors import DataError, RunError
from prune_lab.runs import Run
from prune_lab.runtime import read_json
from prune_lab.schemas import (
    BLOCK_COLUMNS,
    COST_COLUMNS,
    IMPORTANCE_COLUMNS,
    PARTS_COLUMNS,
    PIPELINE_COLUMNS,
    PROMPTS_COLUMNS,
    RANKING_COLUMNS,
    RECOVERY_COLUMNS,
    REDUCTION_COLUMNS,
    TOURNAMENT_COLUMNS,
)

MAP_COLUMNS = (
    *("name", "stage", "kind", "lane", "row", "position", "removable"),
    *("impact", "low", "high"),
)
CURVE_COLUMNS = ("plan", "plan_id", "step", "part", "value")


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A plan as the report needs it: what it is called and what it removes."""

    id: str
    label: str
    origin: str
    removed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PictureSet:
    """Folders of pictures of one candidate, for the same prompts and seeds as the teacher's."""

    plan: PlanRow
    pruned: Path | None
    distilled: Path | None


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
    costs: pd.DataFrame | None = None
    reductions: pd.DataFrame | None = None
    pipeline: pd.DataFrame | None = None
    ranking: pd.DataFrame | None = None
    tournament: pd.DataFrame | None = None  # names are plan ids
    steps: pd.DataFrame | None = None
    recoveries: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # by plan id
    plans: tuple[PlanRow, ...] = ()
    prompts: pd.DataFrame | None = None  # of every picture: file, prompt, seed
    teacher_pictures: Path | None = None  # a folder
    pictures: tuple[PictureSet, ...] = ()

    def setting(self, section: str, key: str) -> Any:
        """The value of ``key`` in ``[section]`` of the run's settings, ``None`` when it is not there."""
        return self.settings.get(section, {}).get(key)


def read_run(run: Run) -> RunTables:
    """The tables of ``run`` as far as it has come.

    Raises RunError when the folder holds neither a configuration nor any table, DataError when a file is there but
    lacks a column.
    """
    settings, digest = _read_settings(run.config)
    blocks = _read_table(run.blocks, BLOCK_COLUMNS)
    importance = _read_table(run.importance, IMPORTANCE_COLUMNS)
    reductions = _read_table(run.reductions, REDUCTION_COLUMNS)
    if not settings and blocks is None and importance is None and reductions is None:
        raise RunError(
            f"asked for a report on {run.folder}, found none of config.toml, blocks.csv, importance.csv and "
            "reductions.csv there; make a run first, for example: prune-lab run --config FILE.toml --run DIR"
        )
    ranking = _read_table(run.ranking, RANKING_COLUMNS)
    plans = _read_plans(run, ranking)
    candidates = {plan.id: run.candidate(plan.id) for plan in plans}
    recoveries = {
        plan_id: table
        for plan_id, paths in candidates.items()
        if (table := _read_table(paths.recovery, RECOVERY_COLUMNS)) is not None
    }
    sets = [
        PictureSet(
            plan,
            _if_there(candidates[plan.id].pictures_pruned),
            _if_there(candidates[plan.id].pictures_distilled),
        )
        for plan in plans
    ]
    model = str(settings.get("model", "")) or _model_named_in(importance, reductions)
    return RunTables(
        title=str(settings.get("report", {}).get("title") or f"Pruning {model}"),
        model=model,
        settings=settings,
        config_digest=digest,
        environment=_read_environment(run.environment),
        blocks=blocks,
        importance=importance,
        parts=_leading_parts(_read_table(run.importance_parts, PARTS_COLUMNS), importance),
        costs=_read_table(run.costs, COST_COLUMNS),
        reductions=reductions,
        pipeline=_read_table(run.pipeline_profile, PIPELINE_COLUMNS),
        ranking=ranking,
        tournament=_read_table(run.tournament, TOURNAMENT_COLUMNS),
        steps=_read_table(run.folder / "steps.csv", ("step", "seconds")),
        recoveries=recoveries,
        plans=plans,
        prompts=_read_table(run.picture_prompts, PROMPTS_COLUMNS),
        teacher_pictures=_if_there(run.teacher_pictures),
        pictures=tuple(one for one in sets if one.pruned or one.distilled),
    )


# Tables for the figures ------------------------------------------------------------------------------------------


def block_map_frame(blocks: pd.DataFrame, importance: pd.DataFrame | None) -> pd.DataFrame:
    """One row per block in order of execution with its place in its stage and its impact (NaN: not scored)."""
    frame = blocks[["name", "stage", "kind", "lane", "row", "removable"]].copy()
    frame["position"] = frame.groupby("stage", sort=False).cumcount()
    scores = pd.DataFrame(columns=["name", "impact", "low", "high"])
    if importance is not None:
        scores = importance.loc[importance["kind"] == "block", ["group", "impact", "low", "high"]]
        scores = scores.rename(columns={"group": "name"})
    joined = frame.merge(scores, on="name", how="left", validate="one_to_one")
    return joined.loc[:, list(MAP_COLUMNS)]


def importance_frame(importance: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The scores of the groups of one ``kind`` (block, pair, stage), most valuable first."""
    return importance[importance["kind"] == kind].sort_values("impact", ascending=False, ignore_index=True)


def curve_frame(tables: RunTables) -> pd.DataFrame:
    """Every logged loss of every candidate: plan, plan_id, step, part (task, output, feature, validation), value."""
    parts = ["task", "output", "feature", "validation"]
    pieces = [
        recovery.melt(id_vars="step", value_vars=parts, var_name="part", value_name="value").assign(
            plan=plan.label, plan_id=plan.id
        )
        for plan in tables.plans
        if (recovery := tables.recoveries.get(plan.id)) is not None
    ]
    if not pieces:
        return pd.DataFrame(columns=list(CURVE_COLUMNS))
    return pd.concat(pieces, ignore_index=True).dropna(subset="value")[list(CURVE_COLUMNS)]


def measured(ranking: pd.DataFrame) -> pd.DataFrame:
    """The rows of candidates that have a held-out loss, before or after; the teacher is not one of them."""
    return ranking[
        ranking[["loss_before", "loss_after"]].notna().any(axis=1) & (ranking["origin"] != "teacher")
    ]


def teacher_row(ranking: pd.DataFrame) -> pd.Series[Any] | None:
    """The teacher's row, ``None`` when it was not measured."""
    rows = ranking[ranking["origin"] == "teacher"]
    return None if rows.empty else rows.iloc[0]


def at_the_end(ranking: pd.DataFrame) -> pd.DataFrame:
    """The rows whose loss after distillation can be compared: of the teacher and of those with all the steps."""
    return ranking[ranking["status"] != "dropped"]


def dropped(ranking: pd.DataFrame) -> pd.DataFrame:
    """The candidates that the tournament dropped on the way, with the reason."""
    return ranking[ranking["status"] == "dropped"]


def left_out(ranking: pd.DataFrame) -> pd.DataFrame:
    """The candidates without a rank, with the reason; the teacher, which competes with nobody, is not among them."""
    return ranking[ranking["rank"].isna() & (ranking["origin"] != "teacher")]


# Reading ---------------------------------------------------------------------------------------------------------


def _read_settings(path: Path) -> tuple[dict[str, Any], str]:
    if not path.exists():
        return {}, ""
    content = path.read_bytes()
    try:
        settings = tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"asked to read {path} as TOML, found {error}; write the file again") from None
    return settings, hashlib.sha256(content).hexdigest()[:12]


def _read_environment(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"asked to read {path}, found {type(value).__name__}; it should be a JSON object")
    return value


def _read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame | None:
    if not path.exists():
        return None
    try:
        # an id may look like a number: 12e4...
        frame = pd.read_csv(path, dtype=dict.fromkeys(("plan_id", "name", "against"), "str"))
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(
            f"asked to read {path} as CSV, found {error}; delete it and run the step again"
        ) from None
    if missing := [column for column in columns if column not in frame]:
        raise DataError(
            f"asked to read {path}, found no column {', '.join(missing)}; delete it and run the step again"
        )
    return frame


def _leading_parts(parts: pd.DataFrame | None, importance: pd.DataFrame | None) -> pd.DataFrame | None:
    """The single blocks' rows of ``parts`` by the criterion that leads; ``None`` where there are none."""
    if parts is None or importance is None:
        return None
    leading = parts[(parts["criterion"] == importance["criterion"].iloc[0]) & (parts["kind"] == "block")]
    return leading if len(leading) else None


def _read_plans(run: Run, ranking: pd.DataFrame | None) -> tuple[PlanRow, ...]:
    """The plans of ``run`` that remove something, controls before searched ones, each group by size."""
    named: dict[str, tuple[str, str]] = {}
    if ranking is not None:
        rows = ranking[ranking["origin"] != "teacher"]
        named = {str(row.plan_id): (str(row.plan), str(row.origin)) for row in rows.itertuples()}
    plans = []
    for plan_id in run.plan_ids():
        path = run.plan(plan_id)
        value = read_json(path)
        if not isinstance(value, dict) or not isinstance(value.get("removed"), list):
            raise DataError(
                f"asked to read the plan {path}, found no list `removed` in it; write the plan again"
            )
        name = str((value.get("names") or [""])[0])
        label, origin = named.pop(plan_id, (name or plan_id, ""))
        # The guess serves plans without an origin until every step writes it.
        origin = origin or value.get("origin") or ("control" if name.startswith("bk-") else "search")
        plans.append(PlanRow(plan_id, label, origin, tuple(map(str, value["removed"]))))
    if named:
        raise DataError(
            f"{run.ranking} ranks the plan {next(iter(named))}, found no such file in {run.plans_dir}; "
            "delete ranking.csv and rank again"
        )
    kept = [plan for plan in plans if plan.removed]
    return tuple(sorted(kept, key=lambda plan: (plan.origin != "control", len(plan.removed), plan.label)))


def _model_named_in(*tables: pd.DataFrame | None) -> str:
    for table in tables:
        if table is not None and "model" in table and len(table):
            return str(table["model"].iloc[0])
    return "a U-Net"


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None
