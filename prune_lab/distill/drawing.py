"""Training data without any picture: the model draws them itself, by its own sampler and guidance.

Every picture starts from noise that its number and the seed decide. So it is the same in whatever batch it is drawn,
by whichever process, and after a stop.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_lab.config import DataConfig
from prune_lab.distill.cache import LatentCache
from prune_lab.distill.encoding import encode_texts, encoders_digest
from prune_lab.distill.shard_locks import PREVIEW
from prune_lab.distill.sharding import CacheBuild, ShardContent, ShardPlan, build_shards
from prune_lab.errors import UnsupportedModelError
from prune_lab.evaluation import check_steps, draw_once, save_pictures
from prune_lab.families import model_of
from prune_lab.families.drawing import call_inputs, class_texts, reads_text
from prune_lab.models.parts import why_no_text_to_image
from prune_lab.models.silence import quiet
from prune_lab.probes import (
    check_side,
    class_count,
    cut_texts,
    decode_latents,
    note_cut,
    picture_side,
    pixels_per_latent,
)
from prune_lab.prompts import Prompts
from prune_lab.runtime import generator_for, output_folder, tensors_digest, track

_LEAST_SHARD = 16  # pictures per file at least; a stop loses no more, or no more than 1/256 of all
_LATENT_PIXELS = 64 * 64  # drawn at a time on a CPU, which gains nothing from more at once
_NEEDED = (
    "image",
    "mask_image",
    "control_image",
    "example_image",
)  # what a pipeline draws from besides a prompt


def check_draws_from_text(pipeline_class: Any) -> None:
    """Raise UnsupportedModelError when pipelines of this class draw from more than a prompt, or a class, or nothing."""
    inputs = call_inputs(pipeline_class)
    needed = [name for name in _NEEDED if name in inputs]
    if needed:
        raise UnsupportedModelError(
            f"asked {pipeline_class.__name__} to draw its own training pictures, but it draws from "
            f"{' and '.join(needed)}; give pictures of your own with --data"
        )
    if why := why_no_text_to_image(pipeline_class):
        raise UnsupportedModelError(
            f"asked {pipeline_class.__name__} to draw its own training pictures, which {why}; give pictures of your "
            "own with --data"
        )


def drawn_prompts(prompts: Prompts, count: int, seed: int) -> Prompts:
    """The prompt of each of ``count`` pictures: all prompts in an order drawn with ``seed``, then again."""
    order = torch.randperm(len(prompts.texts), generator=generator_for(seed, "prompts", 0)).tolist()
    rows = [order[place % len(order)] for place in range(count)]
    return Prompts(tuple(prompts.texts[row] for row in rows), tuple(prompts.kinds[row] for row in rows))


@contextlib.contextmanager
def _fresh_scheduler(pipeline: Any) -> Iterator[None]:
    original = pipeline.scheduler
    try:
        pipeline.scheduler = type(original).from_config(original.config)
        yield
    finally:
        pipeline.scheduler = original


def _draw(pipeline: Any, texts: tuple[str, ...], rows: range, side: int, settings: DataConfig) -> Tensor:
    """Final latents (n, C, h, w), float32 on the CPU, of the pictures ``rows`` of ``texts``."""
    generators = [generator_for(settings.seed, "drawn picture", row) for row in rows]
    with _fresh_scheduler(pipeline), quiet():  # of a prompt that is too long we speak once, in draw_cache
        return draw_once(
            pipeline,
            cut_texts([texts[row] for row in rows]),
            generators,
            steps=settings.steps,
            guidance=settings.guidance,
            latents=True,
            side=side,
        ).cpu()


def _side_of(pipeline: Any, settings: DataConfig) -> int:
    """Pixels per side of what is drawn. Raises DataError for a size that the model does not draw."""
    if settings.resolution:
        check_side(pipeline, settings.resolution)
    return settings.resolution or picture_side(pipeline)


def _provenance(pipeline: Any, prompts: Prompts, settings: DataConfig, shard: int) -> dict[str, str | int]:
    scheduler, model = pipeline.scheduler, model_of(pipeline)
    own = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    sampler = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode())
    rounded = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    return {
        "encoders": encoders_digest(pipeline),
        "model": tensors_digest(rounded),
        "precision": str(model.dtype).removeprefix("torch."),
        "side": _side_of(pipeline, settings),
        "resolution": settings.resolution,
        "prompts": prompts.digest,
        "count": settings.count,
        "sampler": f"{type(scheduler).__name__} {sampler.hexdigest()[:8]}",
        "steps": settings.steps,
        "guidance": f"{settings.guidance:g}",
        "seed": settings.seed,
        "variants": 1,
        "format": settings.format,
        "shard": shard,
    }


def untexted_prompts(pipeline: Any, count: int) -> Prompts:
    """What a model that reads no text draws ``count`` training pictures of: its classes in turn, or nothing."""
    classes = class_count(pipeline)
    texts = class_texts(classes, count) if classes else ("",)
    return Prompts(texts, ("",) * len(texts))


def _title(pipeline: Any, prompts: Prompts) -> str:
    if reads_text(pipeline):
        return f"pictures that the model draws for {len(prompts.texts):,} prompts"
    classes = class_count(pipeline)
    return f"pictures that the model draws{f' of {classes:,} classes' if classes else ''}"


def draw_cache(
    pipeline: Any, prompts: Prompts, settings: DataConfig, folder: Path, *, force: bool = False
) -> CacheBuild:
    """The cache in ``folder`` of ``settings.count`` pictures of ``prompts``, drawn by ``pipeline`` as latents; of a
    model that reads no text, of classes or of nothing (see ``evaluation.generate``).

    By the pipeline's own sampler, with ``settings.steps`` and ``settings.guidance``; the text embeddings are those of
    the prompts. As ``sharding.build_shards`` says: by all processes of an ``accelerate launch``, resumable, and a cache
    of other provenance is refused unless ``force``. Raises UnsupportedModelError for a pipeline that draws from more
    than a prompt.
    """
    check_draws_from_text(type(pipeline))
    check_steps(pipeline, settings.steps, "data.steps")
    if not reads_text(pipeline):
        prompts = untexted_prompts(pipeline, settings.count)
    side, count = _side_of(pipeline, settings), settings.count
    shard = min(settings.shard, max(_LEAST_SHARD, count // 256))
    shown = drawn_prompts(prompts, count, settings.seed)
    most = settings.batch
    if pipeline.device.type == "cpu":
        most = min(most, max(1, _LATENT_PIXELS * pixels_per_latent(pipeline) ** 2 // side**2))

    def fill(rows: range) -> ShardContent:
        starts = range(rows.start, rows.stop, most)
        chunks = [range(start, min(start + most, rows.stop)) for start in starts]
        shown_chunks = track(chunks, "pictures", unit="pictures", per=min(most, len(rows)))
        latents = torch.cat([_draw(pipeline, shown.texts, chunk, side, settings) for chunk in shown_chunks])
        texts, kinds = shown.texts[rows.start : rows.stop], shown.kinds[rows.start : rows.stop]
        embeddings, added = encode_texts(pipeline, texts, (side, side), batch=settings.batch)
        tensors = {"mean": latents[:, None], "embeddings": embeddings}
        tensors |= {f"added.{name}": tensor for name, tensor in added.items()}
        return ShardContent(tensors, {"captions": texts, "kinds": kinds})

    note_cut(pipeline, shown.texts, "prompts")
    plan = ShardPlan(
        _title(pipeline, prompts),
        _provenance(pipeline, prompts, settings, shard),
        count,
        shard,
        settings.format,
        "pictures",
    )
    return build_shards(pipeline, plan, fill, folder, work="drawing", force=force)


def preview(pipeline: Any, cache: LatentCache, count: int) -> Path:
    """The folder ``pictures`` in that of ``cache``, with its first ``count`` rows decoded as PNG, for a look."""
    rows = torch.arange(min(count, len(cache)))
    latents = cache.rows(rows, torch.zeros_like(rows)).mean
    pictures = decode_latents(pipeline, latents, batch=1)
    folder = cache.folder / PREVIEW
    with output_folder(folder, force=True) as temporary:
        save_pictures(temporary, pictures, [f"{row:05d}.png" for row in rows.tolist()])
    return folder
