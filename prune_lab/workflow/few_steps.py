"""The verb that tells which lever to pull for a latency: models, schedulers, steps and reuse, with quality and time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from prune_lab.errors import ConfigError, DataError, RunError, StorageError
from prune_lab.evaluation import clip_scores, drawing_of, save_grid
from prune_lab.families import embedding_width
from prune_lab.few_steps.frontier import OWN, baseline_of, frontier, lever_of
from prune_lab.few_steps.measuring import (
    Configuration,
    Drawn,
    configurations,
    draw_in,
    guidance_of,
    psnr,
    time_pictures,
)
from prune_lab.few_steps.schedulers import fitting_scheduler
from prune_lab.models import (
    ModelSource,
    choose_scorer,
    folder_digest,
    load_pipeline,
    load_scorer,
    of_shipped_family,
    pipeline_digest,
)
from prune_lab.profiling import Turns, change_of, turns_of_frame
from prune_lab.prompts import read_prompts
from prune_lab.ranking.paired import paired_difference
from prune_lab.runs import read_typed
from prune_lab.runtime import (
    Environment,
    atomic_write,
    note,
    read_bytes,
    read_json,
    track,
    write_frame,
    write_json,
)
from prune_lab.schemas import FEW_STEPS_COLUMNS
from prune_lab.session.prompts import shipped_rows
from prune_lab.workflow.few_steps_work import StepsWork, Work, pass_macs, speed_of

_SHOWN = 8  # pictures of each configuration that are written
_TIMED_IN = ("cpu", "device", "device_name", "num_threads", "torch")  # of the environment: what times hang on


@dataclass(frozen=True, slots=True)
class StepsAsked:
    """What is compared, and how; the same numbers make the same pictures."""

    steps: tuple[int, ...] = (4, 8, 12, 25)
    schedulers: tuple[str, ...] = (OWN, "dpmsolver++", "unipc")
    reuse: tuple[int, ...] = ()
    many: int = 50
    prompts: str = ""  # a file; empty: held-out captions of the shipped models, else the list that ships
    images: int = 24
    guidance: float = 7.5
    rounds: int = 6
    scorer: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "reuse": 2, "images": 1, "rounds": 2, "many": 1}
        for name, bound in least.items():
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if value < bound:
                    raise ConfigError(f"asked for {name} = {value}; give at least {bound}")
        if not self.steps or not self.schedulers:
            raise ConfigError(
                "asked to compare few steps without steps or schedulers; give one of each at least"
            )
        if not math.isfinite(self.guidance) or self.guidance < 1:
            raise ConfigError(f"asked for guidance = {self.guidance}; give at least 1, which is none")


@dataclass(frozen=True, slots=True, eq=False)
class StepsFound:
    """The table, columns FEW_STEPS_COLUMNS; what was left out and why; where and how it was measured."""

    table: pd.DataFrame
    lines: tuple[str, ...]
    conditions: dict[str, Any]


def is_of_steps(folder: Path) -> bool:
    """Whether ``compare_steps`` wrote into ``folder``: what it drew lies there, or how it measured."""
    about = folder / "environment.json"
    if (folder / "drawn").is_dir() or not about.is_file():
        return (folder / "drawn").is_dir()
    try:
        found = read_json(about)
    except (DataError, StorageError):
        return False
    return isinstance(found, dict) and {"asked", "left_out", "models"} <= found.keys()


def prompts_of(source: ModelSource, asked: StepsAsked) -> tuple[str, ...]:
    """The prompts that all models draw: those of a file, held-out captions of a shipped model, or the list that ships.

    Raises DataError where there are fewer than asked for.
    """
    if not embedding_width(source.config):
        raise DataError(
            f"asked to compare few steps of {source.text}, which reads no text; CLIP scores and prompts are needed"
        )
    if not asked.prompts and of_shipped_family(source):
        return tuple(shipped_rows("heldout", asked.images, asked.seed)["caption"])
    texts = read_prompts(asked.prompts or "default").texts
    if len(texts) < asked.images:
        raise DataError(
            f"asked for {asked.images} pictures, found {len(texts)} prompts; ask for fewer images"
        )
    return texts[: asked.images]


def _names(sources: Sequence[ModelSource]) -> tuple[str, ...]:
    """What the models are called: by the last part of what names them, as long as that is clear."""
    short = [Path(source.text).name or source.text for source in sources]
    names = short if len(set(short)) == len(short) else [source.text for source in sources]
    if len(set(names)) < len(names):
        raise RunError("asked to compare few steps of a model with itself; name each model once")
    return tuple(names)


def _copy(file: Path, to: Path) -> None:
    with atomic_write(to) as temporary:
        temporary.write_bytes(read_bytes(file))


class _Comparison:
    """The models with what they draw; finished rows and times lie in the folder and are not made again."""

    def __init__(
        self,
        sources: Sequence[ModelSource],
        asked: StepsAsked,
        out: Path,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        for source in sources:
            if not source.is_pipeline:
                raise RunError(
                    f"asked to draw with {source.text}, a {source.called} alone; give a pipeline folder or a hub id"
                )
        self.asked, self.out, self.device, self.dtype = asked, out, device, dtype
        self.environment = Environment.capture(str(device), str(dtype).removeprefix("torch."))
        names = _names(sources)
        self.teacher = names[0]
        self.sources = dict(zip(names, sources, strict=True))
        self.digests = {name: pipeline_digest(source) for name, source in self.sources.items()}
        self.prompts = prompts_of(sources[0], asked)
        choice = choose_scorer(asked.scorer, sources[0])
        self.scorer_text, self.no_scorer = choice.text, choice.reason
        self.pipelines = {
            name: load_pipeline(source, device=device, dtype=dtype) for name, source in self.sources.items()
        }
        self.scorer = load_scorer(choice.text, device=device) if choice.text else None
        judge = Path(choice.text)  # another scorer may come to lie where one lay
        self.judged_by = folder_digest(judge) if choice.text and judge.is_dir() else choice.text
        self._many: dict[str, Drawn] = {}
        self.expected: StepsWork | None = None  # until the first pictures tell how long it takes

    def _draw(self, one: Configuration) -> Drawn:
        seeds, start = (self.asked.seed,), time.perf_counter()
        drawn = draw_in(self.pipelines[one.model], one, self.prompts, seeds, guidance=self.asked.guidance)
        expected, self.expected = self.expected, None
        if expected is not None and (line := expected.after(one, time.perf_counter() - start)):
            note(line)
        return drawn

    def _many_of(self, model: str) -> Configuration:
        return Configuration(model, OWN, self.asked.many)

    def many(self, model: str) -> Drawn:
        """What ``model`` draws in many steps of its own scheduler."""
        if model not in self._many:
            self._many[model] = self._draw(self._many_of(model))
        return self._many[model]

    def _key(self, one: Configuration) -> str:
        scheduler, _ = fitting_scheduler(one.scheduler, self.pipelines[one.model].scheduler)
        asked = self.asked
        said = [
            *(self.digests[self.teacher], self.digests[one.model], scheduler.to_json_string()),
            *(one.steps, one.reuse, asked.many, asked.guidance, asked.seed, self.prompts),
            *(self.judged_by, str(self.device), str(self.dtype)),
        ]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]

    def _file(self, one: Configuration) -> Path:
        return self.out / "drawn" / f"{self._key(one)}.json"

    def _is_drawn(self, one: Configuration) -> bool:
        path = self._file(one)
        return path.is_file() and path.with_suffix(".png").is_file()

    def quality(self, one: Configuration) -> dict[str, Any]:
        """Scores of each picture, likeness to many steps, and passes; read back where it was drawn already."""
        path = self._file(one)
        grid, shown = path.with_suffix(".png"), self.out / "pictures" / f"{one.name.replace('/', '-')}.png"
        if self._is_drawn(one):
            _copy(grid, shown)  # others may have been drawn under this name since
            return read_typed(path, dict[str, Any])
        drawn = self.many(one.model) if one == self._many_of(one.model) else self._draw(one)
        scores = (
            clip_scores(self.scorer, drawn.pictures, self.prompts).tolist() if self.scorer is not None else []
        )
        found = {
            "configuration": one.name,
            "passes": drawn.passes,
            "whole": drawn.whole,
            "clip": scores,
            "psnr_teacher": psnr(drawn.pictures, self.many(self.teacher).pictures),
            "psnr_own": psnr(drawn.pictures, self.many(one.model).pictures),
        }
        save_grid(grid, drawn.pictures[:_SHOWN], columns=_SHOWN)
        _copy(grid, shown)
        write_json(path, found)
        return found

    def _timing(self, asked: Sequence[Configuration]) -> list[Any]:
        # What was timed elsewhere, or with other threads, is no time of here.
        here = {name: self.environment.as_dict()[name] for name in _TIMED_IN}
        return [[one.name for one in asked], [self._key(one) for one in asked], self.asked.rounds, here]

    def _are_timed(self, asked: Sequence[Configuration]) -> bool:
        path, about = self.out / "rounds.csv", self.out / "rounds.json"
        return path.is_file() and about.is_file() and bool(read_json(about) == self._timing(asked))

    def work(self, found: Sequence[Configuration]) -> StepsWork:
        """What of ``found`` is to be drawn and to be timed; what others are compared with is drawn again for them."""
        to_draw = [one for one in found if not self._is_drawn(one)]
        models = dict.fromkeys((self.teacher, *(one.model for one in to_draw))) if to_draw else ()
        needed = dict.fromkeys((*to_draw, *map(self._many_of, models)))
        # one picture of each before the rounds is not counted
        timed = 0 if self._are_timed(found) else self.asked.rounds + 1
        macs = pass_macs(self.sources)

        def amount(one: Configuration) -> float:
            samples = 2 if guidance_of(self.pipelines[one.model], self.asked.guidance) > 1 else 1
            return float(one.steps * samples * macs.get(one.model, 1))

        parts = tuple(
            Work(one, len(self.prompts) * (one in needed), timed * (one in found), amount(one))
            for one in dict.fromkeys((*found, *needed))
        )
        busy = macs and any(part.pictures for part in parts)
        speed = speed_of(self.sources[self.teacher], self.device, self.dtype) if busy else None
        return StepsWork(parts, len(self.prompts), speed)

    def times(self, asked: Sequence[Configuration]) -> Turns:
        """One picture of each in every round; read back where the same were timed already."""
        path, about = self.out / "rounds.csv", self.out / "rounds.json"
        if self._are_timed(asked):
            return turns_of_frame(pd.read_csv(path))
        turns = time_pictures(
            self.pipelines,
            asked,
            self.prompts[0],
            guidance=self.asked.guidance,
            rounds=self.asked.rounds,
            device=self.device,
            seed=self.asked.seed,
        )
        write_frame(path, turns.frame())
        write_json(about, self._timing(asked))
        return turns


def _table(
    comparison: _Comparison, found: Sequence[Configuration], drawn: Sequence[dict[str, Any]], turns: Turns
) -> pd.DataFrame:
    asked, prompts, rows = comparison.asked, comparison.prompts, []
    # Held-out pictures may share a caption, from which the same picture is drawn: each counts once.
    distinct = [place for place, text in enumerate(prompts) if prompts.index(text) == place]

    def scores_of(quality: dict[str, Any]) -> list[float]:
        return [quality["clip"][place] for place in distinct] if quality["clip"] else []

    for one, quality in zip(found, drawn, strict=True):
        latency, scores = turns.latency(one.name), scores_of(quality)
        extra = one.steps == asked.many and one.steps not in asked.steps
        rows.append(
            {
                **{field.name: getattr(one, field.name) for field in dataclasses.fields(one)},
                "configuration": one.name,
                "role": "many" if extra else "",
                "guidance": guidance_of(comparison.pipelines[one.model], asked.guidance),
                "pictures": len(distinct),
                "rounds": latency.runs,
                "clip": float(np.mean(scores)) if scores else math.nan,
                **{name: getattr(latency, name) for name in ("median_ms", "p10_ms", "p90_ms")},
                **{name: quality[name] for name in ("passes", "whole", "psnr_teacher", "psnr_own")},
            }
        )
    table = pd.DataFrame(rows)
    baseline = baseline_of(table)
    table["lever"] = [lever_of(row, baseline) for _, row in table.iterrows()]
    others = turns.of(str(baseline["configuration"]))
    table["latency_change"] = [change_of(turns.of(one.name), others).change for one in found]
    base = next(scores_of(one) for one in drawn if one["configuration"] == baseline["configuration"])
    changes = [paired_difference(scores_of(one), base) if base else None for one in drawn]
    for column, part in (("clip_change", "mean"), ("clip_low", "low"), ("clip_high", "high")):
        table[column] = [math.nan if one is None else getattr(one, part) for one in changes]
    table["best"] = table.index.isin(frontier(table).index)
    return table[list(FEW_STEPS_COLUMNS)]


def _begun(
    sources: Sequence[ModelSource], asked: StepsAsked, out: Path, device: torch.device, dtype: torch.dtype
) -> tuple[_Comparison, list[Configuration], list[str]]:
    """The models, loaded; all configurations; and lines on what is left out, which are shown."""
    comparison = _Comparison(sources, asked, out, device, dtype)
    for name, pipeline in comparison.pipelines.items():
        if drawing_of(pipeline).as_text_to_image:
            raise RunError(
                f"asked to compare few steps of {name}, which draws from pictures; give one that draws from texts"
            )
    found, lines = configurations(
        comparison.pipelines, asked.schedulers, asked.steps, asked.reuse, asked.many
    )
    if comparison.scorer is None:
        lines.append(f"CLIP score: not measured: {comparison.no_scorer}")
    for line in lines:
        note(line)
    return comparison, found, lines


def steps_work(
    sources: Sequence[ModelSource], asked: StepsAsked, out: Path, device: torch.device, dtype: torch.dtype
) -> StepsWork:
    """What ``compare_steps`` would draw and time; loads the models and writes nothing. Raises as that does."""
    comparison, found, _ = _begun(sources, asked, out, device, dtype)
    return comparison.work(found)


def compare_steps(
    sources: Sequence[ModelSource], asked: StepsAsked, out: Path, device: torch.device, dtype: torch.dtype
) -> StepsFound:
    """Quality and time of one picture for every model, scheduler, number of steps and reuse; written to ``out``.

    The first of ``sources`` is the teacher, whose pictures in many steps all are compared with. The same call again
    goes on where it was stopped. Says first how much there is to draw, and about how long that takes. Writes steps.csv,
    rounds.csv, environment.json and pictures/. Raises RunError for a model without its pipeline, DataError for one that
    reads no text, ConfigError for a number out of range.
    """
    comparison, found, lines = _begun(sources, asked, out, device, dtype)
    comparison.expected = comparison.work(found)
    for line in comparison.expected.lines:
        note(line)
    drawn = [comparison.quality(one) for one in track(found, "drawing few steps")]
    turns = comparison.times(found)
    table = _table(comparison, found, drawn, turns)
    conditions = {
        "environment": dataclasses.asdict(comparison.environment),
        "asked": dataclasses.asdict(asked),
        "models": comparison.digests,
        "prompts": list(comparison.prompts),
        "scorer": comparison.scorer_text and Path(comparison.scorer_text).name,
        "left_out": lines,
    }
    write_frame(out / "steps.csv", table)
    write_json(out / "environment.json", conditions)
    return StepsFound(table, tuple(lines), conditions)
