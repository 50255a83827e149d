"""Models compared by many pictures, from Python: ``pl.evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prune_lab.api.model import Model
from prune_lab.api.settings import settings_by_name, settings_of
from prune_lab.cluster import Cluster
from prune_lab.config import EvaluateConfig, RunConfig, check_numbers, with_settings
from prune_lab.errors import ConfigError
from prune_lab.models import ModelSource, resolve_model, shipped_like
from prune_lab.report import draw_comparison
from prune_lab.runtime import pick_device, progress_shown
from prune_lab.tables import Pictures, Table
from prune_lab.zero_shot import (
    METRICS,
    Outcome,
    Task,
    check_gates,
    drawn_by,
    evaluate_models,
    parse_gate,
    prompts_in,
    protocol_of,
    real_pictures,
)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Evaluation:
    """What was found of models that drew many prompts; it shows itself in a notebook.

    ``code`` is 0 where every gate passed, 1 where one failed, 3 where one is undecided and none failed.
    """

    metrics: Table
    kinds: Table
    gates: Table
    pictures: Pictures
    code: int
    out: Path

    @property
    def tables(self) -> tuple[Table, ...]:
        """The tables that hold anything, gates first."""
        return tuple(one for one in (self.gates, self.metrics, self.kinds) if len(one))

    def __repr__(self) -> str:
        return "\n\n".join(map(repr, self.tables))

    def _repr_html_(self) -> str:
        return "".join(one._repr_html_() for one in (*self.tables, self.pictures))


def _evaluation(outcome: Outcome, out: Path) -> Evaluation:
    notes = tuple(filter(None, (outcome.about["protocol"]["note"],)))
    lacking = outcome.metrics.loc[outcome.metrics["verdict"] == "not measured", ["metric", "reason"]]
    needs = tuple(f"{row.metric} {row.reason}" for row in lacking.drop_duplicates().itertuples())
    drawn = outcome.about["prompts"]
    title = f"{drawn['drawn']:,} prompts, {drawn['seeds']} pictures of each"
    grid = outcome.metrics.drop_duplicates("model")[["model"]]
    return Evaluation(
        Table("metrics", outcome.metrics, f"Metrics over {title}", notes=(*notes, *needs)),
        Table("kinds", outcome.kinds, "CLIP score by kind of prompt", notes=notes),
        Table("gates", outcome.gates, "Gates", notes=notes),
        Pictures(
            "grid",
            grid,
            "Some of the pictures",
            partial(draw_comparison, outcome.columns, outcome.labels, {}),
            columns=outcome.columns,
            labels=outcome.labels,
        ),
        outcome.code,
        out,
    )


def _cluster(settings: RunConfig) -> Cluster | None:
    engine = settings.engine
    if engine.kind != "ray":
        return None
    if engine.storage:
        raise ConfigError(
            f"asked to evaluate with engine.storage = {engine.storage!r:.60}; pictures are written where all machines "
            "see them: leave it empty and give --out on a disk that they share"
        )
    if ":" in settings.device:
        raise ConfigError(
            f"asked for device {settings.device!r} with engine.kind = 'ray', which hands out GPUs itself; use cuda"
        )
    gpus = 1.0 if pick_device(settings.device).type == "cuda" else 0.0
    return Cluster(address=engine.address, cpus=engine.cpus, gpus=gpus)


def _first(models: list[ModelSource], teacher: str) -> list[ModelSource]:
    """The ``models`` with the one called ``teacher`` first; without a name as they are."""
    if not teacher:
        return models
    named = [one for one in models if one.text == teacher]
    others = [one for one in models if one.text != teacher]
    return [*(named or [resolve_model(teacher)]), *others]


def evaluate(
    models: Sequence[str | Path | Model],
    *,
    prompts: str | Path,
    out: str | Path,
    images: int | None = None,
    seeds: int | None = None,
    preset: str = "",
    real: str | Path = "",
    inception: str | Path = "",
    clip: str = "",
    gates: Sequence[str] = (),
    teacher: str = "",
    base: str = "",
    resolution: int | None = None,
    batch: int = 8,
    processes: int = 1,
    device: str | None = None,
    seed: int | None = None,
    force: bool = False,
    settings: Mapping[str, object] | None = None,
) -> Evaluation:
    """What ``models``, the first of which is the teacher, draw for many prompts: metrics with intervals, and gates.

    ``prompts`` is a file (.txt, or a table with a column prompt or caption, and kind), a folder of captioned pictures,
    ``default`` or ``shipped``, of which ``images`` are drawn (None: all), ``seeds`` pictures each (None: 2, one with a
    preset). ``real`` is a folder or table of pictures, or ``shipped``, ``inception`` a TorchScript file, which is run,
    ``clip`` a folder or hub id, and a gate is written ``clip>=0.97x teacher`` or ``fid<=20``. Everything is kept in
    ``out``: the same call goes on where it was stopped, and ``force`` draws again. Steps and guidance are
    ``evaluate.steps`` and ``evaluate.guidance`` in ``settings``; the ``preset`` ``coco30k`` sets them itself, and a
    model that was distilled for few steps draws in these. Raises ConfigError for a gate that cannot be read, before
    anything is drawn.
    """
    read = tuple(parse_gate(text, METRICS) for text in gates)
    sources = [one.source if isinstance(one, Model) else resolve_model(str(one)) for one in models]
    sources = _first(sources, teacher)
    if not sources:
        raise ConfigError(
            "asked to evaluate no model; give the teacher first, and then the models that are judged"
        )
    check_gates(read, len(sources))
    check_numbers(resolution=resolution, images=images, count=seeds, batch=batch, processes=processes)
    own = settings_by_name("evaluate", settings or {})
    found = settings_of(sources[0].text, None, None, (), {}, device=device, seed=seed)
    found = with_settings(found, own)
    where = pick_device(found.device)
    how, without = (
        found.evaluate,
        EvaluateConfig(),
    )  # what was not asked for is not that of the teacher for all
    asked = (
        how.steps if "evaluate.steps" in own else None,
        how.guidance if "evaluate.guidance" in own else None,
    )
    if preset and {"evaluate.steps", "evaluate.guidance"} & own.keys():
        raise ConfigError(
            f"asked for the preset {preset} with other steps or guidance, which it sets; leave one out"
        )
    protocol = protocol_of(
        preset,
        steps=without.steps if asked[0] is None else asked[0],
        guidance=without.guidance if asked[1] is None else asked[1],
        resolution=resolution,
        dtype=found.dtype,
        on_gpu=where.type == "cuda",
    )
    bases = [one if one.is_pipeline else resolve_model(base or shipped_like(one)) for one in sources]
    with progress_shown():
        task = Task(
            models=tuple(sources),
            bases=tuple(bases),
            prompts=prompts_in(str(prompts)),
            named=str(prompts),
            out=Path(out),
            protocol=protocol,
            protocols=tuple(drawn_by(protocol, base, *asked) for base in bases),
            images=images,
            seeds=seeds or (1 if preset else 2),
            seed=found.seed,
            real=real_pictures(str(real)) if real else None,
            clip=clip or how.scorer,
            inception=str(inception),
            gates=read,
            device=str(where),
            batch=batch,
            processes=processes,
            cluster=_cluster(found),
            force=force,
        )
        return _evaluation(evaluate_models(task), Path(out))
