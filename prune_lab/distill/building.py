"""Training data out of the user's images: encoded once into a cache, or whenever they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from prune_lab.config import DataConfig
from prune_lab.distill.cache import INDEX, OF_VARIANT, LatentCache, is_cache
from prune_lab.distill.data import TrainingData
from prune_lab.distill.decoding import UNREADABLE, decode_image
from prune_lab.distill.drawing import draw_cache
from prune_lab.distill.encoding import (
    LiveData,
    crop_variants,
    encode_conditions,
    encode_texts,
    provenance_of,
)
from prune_lab.distill.image_source import ImageSource, note_left_out
from prune_lab.distill.sharding import CacheBuild, ShardContent, ShardPlan, build_shards
from prune_lab.distill.sources import source_of
from prune_lab.errors import DataError
from prune_lab.families.drawing import reads_text
from prune_lab.probes import class_count, encode_distributions, note_cut, picture_side
from prune_lab.prompts import read_prompts
from prune_lab.text_tables import one_line


def _decoded_chunks(
    source: ImageSource, rows: range, side: int, settings: DataConfig, pool: Executor
) -> Iterator[tuple[range, list[tuple[Tensor, str] | str]]]:
    """Rows, ``settings.batch`` at a time; of each the variants (V, 3, side, side) and the digest, or why none.

    The next are decoded while the caller encodes the last.
    """

    def decode_row(row: int) -> tuple[Tensor, str] | str:
        try:
            content = source.content(row)
            variants = crop_variants(decode_image(content), side, settings, row, range(settings.num_variants))
            return variants, hashlib.sha256(content).hexdigest()[:16]
        except UNREADABLE as error:
            return f"{source.name(row)}: {one_line(str(error))}"

    chunks = [rows[start : start + settings.batch] for start in range(0, len(rows), settings.batch)]
    waiting = pool.map(decode_row, chunks[0])
    for chunk, after in zip_longest(chunks, chunks[1:], fillvalue=range(0)):
        images = list(waiting)
        waiting = pool.map(decode_row, after)  # begins at once
        yield chunk, images


def _encode_shard(
    pipeline: Any, source: ImageSource, settings: DataConfig, rows: range, pool: Executor
) -> ShardContent:
    """The ``rows`` of ``source`` encoded; images that cannot be read are left out and named. It may be empty then."""
    encoded, conditions, captions, digests, left_out = [], [], [], [], []
    side = picture_side(pipeline)
    for chunk, images in _decoded_chunks(source, rows, side, settings, pool):
        good, places = [], []
        for row, image in zip(chunk, images, strict=True):
            if isinstance(image, str):
                left_out.append(image)
                continue
            good.append(image[0])
            places += [(row, variant) for variant in range(settings.num_variants)]
            digests.append(image[1])
            captions.append(source.captions[row])
        if good:
            pixels = torch.cat(good)
            encoded.append(encode_distributions(pipeline, pixels, batch=settings.batch))
            conditions.append(
                encode_conditions(pipeline, pixels, places, settings.seed, batch=settings.batch)
            )
    if not encoded:
        return ShardContent({}, {"captions": (), "pictures": ()}, left_out)
    embeddings, added = encode_texts(pipeline, captions, (side, side), batch=settings.batch)
    mean = torch.cat([part for part, _ in encoded])
    shape = (len(captions), settings.num_variants, *mean.shape[1:])
    named = {"mean": mean.reshape(shape)}
    spread = [part for _, part in encoded if part is not None]
    if spread:  # what has none, such as pixels, is as it is
        named["log_variance"] = torch.cat(spread).reshape(shape)
    named["embeddings"] = embeddings
    named |= {f"added.{name}": tensor for name, tensor in added.items()}
    for name in conditions[0]:
        of_pictures = torch.cat([part[name] for part in conditions])
        named[f"{OF_VARIANT}{name}"] = of_pictures.reshape(*shape[:2], *of_pictures.shape[1:])
    return ShardContent(named, {"captions": captions, "pictures": digests}, left_out)


def build_cache(
    pipeline: Any, source: ImageSource, settings: DataConfig, folder: Path, *, force: bool = False
) -> CacheBuild:
    """The cache in ``folder`` of the images of ``source``, encoded by ``pipeline``; missing shards are built.

    As ``sharding.build_shards`` says: by all processes of an ``accelerate launch``, resumable, and a cache of other
    provenance is refused unless ``force``.
    """
    note_cut(pipeline, source.captions, "captions")
    plan = ShardPlan(
        source.title,
        provenance_of(pipeline, source, settings),
        len(source),
        settings.shard,
        settings.format,
        "images",
        source.left_out,
    )
    with ThreadPoolExecutor(psutil.cpu_count(logical=False) or 1) as pool:

        def fill(rows: range) -> ShardContent:
            return _encode_shard(pipeline, source, settings, rows, pool)

        return build_shards(pipeline, plan, fill, folder, work="encoding images", force=force)


def encoded_now(pipeline: Any, source: ImageSource, settings: DataConfig, folder: Path) -> LatentCache:
    """The cache that ``build_cache`` makes, or finds; a note counts the images that are not in it, see its index."""
    cache = build_cache(pipeline, source, settings, folder).cache
    note_left_out(source.title, cache.left_out, folder / INDEX)
    return cache


def training_data(pipeline: Any, settings: DataConfig, folder: Path) -> TrainingData:
    """The training data of ``settings``: a finished cache, images encoded now or on demand, or drawn by the model.

    ``settings.source`` names a cache or images. With ``settings.cached`` images are encoded now, into ``folder``.
    Without a source ``pipeline`` draws ``settings.count`` pictures of ``settings.prompts`` into ``folder``. Raises
    DataError, also for a cache by other encoders than those of ``pipeline``.
    """
    if not settings.source:
        return draw_cache(pipeline, read_prompts(settings.prompts), settings, folder).cache
    ready = Path(settings.source).expanduser()
    if not is_cache(ready):
        source = source_of(settings, captioned=reads_text(pipeline) or class_count(pipeline) > 0)
        if settings.cached:
            return encoded_now(pipeline, source, settings, folder)
        return LiveData.of(pipeline, source, settings)
    if settings.limit:
        raise DataError(
            f"asked for data.limit = {settings.limit} images of the finished cache {ready}; it is used whole: "
            "set data.limit = 0, or build a smaller one with: prune-lab data ... --limit"
        )
    return LatentCache.load(ready).check(pipeline)
