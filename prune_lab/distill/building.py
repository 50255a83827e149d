"""The making of a cache of encoded pictures: shard by shard, by all processes, to be stopped at any time.

Every shard says which recipe it was made by and appears under its name only when complete. So a build that was stopped
goes on with the shards that are missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from torch import Tensor

from prune_lab.config import DataConfig
from prune_lab.distill.cache import EMPTY, FORMAT, INDEX, LatentCache, Shard, is_cache, opened, save
from prune_lab.distill.data import TrainingData
from prune_lab.distill.encoding import (
    BROKEN,
    LiveData,
    decoded,
    encode_distributions,
    encode_nothing,
    encode_texts,
    framed,
    key_of,
    picture_side,
    recipe_of,
)
from prune_lab.distill.sources import PictureSource, open_source
from prune_lab.errors import DataError, StorageError
from prune_lab.runtime import pick_dtype, read_json, tensors_digest, track, write_json


@dataclass(frozen=True, slots=True)
class CacheBuild:
    """A finished cache and what this build had to do for it."""

    cache: LatentCache
    encoded: int  # pictures encoded now, by all processes; those of shards that were there are not among them
    seconds: float


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _check_recipe(folder: Path, recipe: Mapping[str, str | int]) -> None:
    """Raise DataError that says what differs when ``folder`` holds a cache, finished or not, by another recipe."""
    found: Mapping[str, Any] = {}
    if is_cache(folder):
        index = read_json(folder / INDEX)
        found = index.get("recipe", {}) if isinstance(index, dict) else {}
    for path in sorted(folder.glob("shard-*.safetensors"))[:1] if not found else []:
        try:
            found = opened(path)[0].get("recipe", {})
        except DataError:
            return  # damaged: it is made again
    changed = [
        f"{name} {found[name]} there, {value} here"
        for name, value in recipe.items()
        if name in found and found[name] != value
    ]
    if changed:
        raise DataError(
            f"asked to build a cache in {folder}, found one that was made otherwise ({'; '.join(changed)}); "
            "give another folder, or --force to make it again"
        )


def _is_kept(path: Path, key: str) -> bool:
    """Whether a shard of an earlier build can stay."""
    if not path.is_file():
        return False
    try:
        return opened(path)[0].get("key") == key
    except DataError:
        return False


def _pictures(
    source: PictureSource, rows: Sequence[int], side: int, settings: DataConfig, pool: Executor
) -> list[Tensor | str]:
    """The variants (V, 3, side, side) of each of ``rows``, or why there are none."""

    def one(row: int) -> Tensor | str:
        try:
            return framed(decoded(source.content(row)), side, settings, row, range(settings.each))
        except BROKEN as error:
            return f"{source.name(row)}: {error}"

    return list(pool.map(one, rows))


def _ahead(
    source: PictureSource, rows: range, side: int, settings: DataConfig, pool: Executor
) -> Iterator[tuple[range, list[Tensor | str]]]:
    """Rows and pictures, ``settings.batch`` at a time; the next are decoded while the last are encoded."""
    chunks = [rows[start : start + settings.batch] for start in range(0, len(rows), settings.batch)]
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(_pictures, source, chunks[0], side, settings, pool)
        for place, chunk in enumerate(chunks):
            pictures = waiting.result()
            if place + 1 < len(chunks):
                waiting = reader.submit(_pictures, source, chunks[place + 1], side, settings, pool)
            yield chunk, pictures


def _build_shard(
    path: Path,
    pipeline: Any,
    source: PictureSource,
    settings: DataConfig,
    rows: range,
    recipe: Mapping[str, str | int],
    pool: Executor,
) -> None:
    """Encode ``rows`` of ``source`` into ``path``; what cannot be read is left out and named in it."""
    means, log_variances, captions, left_out = [], [], [], []
    for chunk, pictures in _ahead(source, rows, picture_side(pipeline), settings, pool):
        pairs = list(zip(chunk, pictures, strict=True))
        good = [(row, picture) for row, picture in pairs if isinstance(picture, Tensor)]
        left_out += [picture for _, picture in pairs if isinstance(picture, str)]
        captions += [source.captions[row] for row, _ in good]
        if good:
            pixels = torch.cat([picture for _, picture in good])
            mean, log_variance = encode_distributions(pipeline, pixels, batch=settings.batch)
            shape = (len(good), settings.each, *mean.shape[1:])
            means.append(mean.reshape(shape))
            log_variances.append(log_variance.reshape(shape))
    if not means:
        raise DataError(
            f"asked to encode {len(rows)} pictures of {source.title}, none of them can be read ({left_out[0]}); "
            "give pictures such as PNG, JPEG or WebP"
        )
    embeddings, added = encode_texts(pipeline, captions, batch=settings.batch)
    named = {"mean": torch.cat(means), "log_variance": torch.cat(log_variances), "embeddings": embeddings}
    named |= {f"added.{name}": tensor for name, tensor in added.items()}
    tensors = {name: tensor.to(pick_dtype(settings.format)).contiguous() for name, tensor in named.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise DataError(
            f"asked to cache {source.title} in {settings.format}, found values beyond its range; "
            "set data.format = float32"
        )
    said = {
        "key": key_of(recipe),
        "recipe": dict(recipe),
        "digest": tensors_digest(tensors),
        "rows": len(captions),
        "captions": captions,
        "left_out": left_out,
    }
    save(path, tensors, said)


def _finish(
    folder: Path, pipeline: Any, source: PictureSource, recipe: Mapping[str, str | int], paths: Sequence[Path]
) -> None:
    """Write what is said once for the whole cache; cache.json last."""
    embedding, added = encode_nothing(pipeline)
    tensors = {"embedding": embedding, **{f"added.{name}": value for name, value in added.items()}}
    save(folder / EMPTY, tensors, {})
    shards, left_out = [], list(source.left_out)
    for path in paths:
        said, _ = opened(path)
        shards.append(Shard(path.name, said["rows"], path.stat().st_size, said["digest"]))
        left_out += said["left_out"]
    digests = [shard.digest for shard in shards]
    index = {
        "format": FORMAT,
        "source": source.title,
        "rows": sum(shard.rows for shard in shards),
        "recipe": dict(recipe),
        "digest": hashlib.sha256(json.dumps([tensors_digest(tensors), digests]).encode()).hexdigest()[:16],
        "channels": int(pipeline.vae.config.latent_channels),
        "left_out": left_out,
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    write_json(folder / INDEX, index)


def build_cache(
    pipeline: Any, source: PictureSource, settings: DataConfig, folder: Path, *, force: bool = False
) -> CacheBuild:
    """The cache of ``source`` by the encoders of ``pipeline`` in ``folder``, which is made, finished or found there.

    All processes of an ``accelerate launch`` build their share of the shards. A shard comes out the same whoever builds
    it, so a build may be stopped at any time and go on with other processes. Raises DataError that names what differs
    when ``folder`` holds another cache; with ``force`` that is removed.
    """
    folder, state, start = Path(folder), PartialState(), time.perf_counter()
    recipe = recipe_of(pipeline, source, settings)
    key = key_of(recipe)
    if folder.is_file():
        raise StorageError(f"asked to build a cache in {folder}, found a file there; give a folder")
    if not force:
        _check_recipe(folder, recipe)
    state.wait_for_everyone()
    if state.is_main_process and folder.is_dir():
        ours = ["*shard-*.safetensors", EMPTY, INDEX] if force else []
        for path in [path for pattern in (*ours, ".shard-*.tmp") for path in folder.glob(pattern)]:
            path.unlink(missing_ok=True)  # a build that was killed leaves its temporary file
    state.wait_for_everyone()
    paths = [_shard_path(folder, number) for number in range(-(-len(source) // settings.shard))]
    missing = [number for number, path in enumerate(paths) if not _is_kept(path, key)]
    finished = is_cache(folder) and not missing
    state.wait_for_everyone()  # all have looked before the first writes
    if state.is_main_process and not finished:
        (folder / INDEX).unlink(missing_ok=True)  # of a cache that lost a shard
    own = missing[state.process_index :: state.num_processes]
    with ThreadPoolExecutor(psutil.cpu_count(logical=False) or 1) as pool:
        for number in track(own, "encoding pictures", unit="pictures", per=settings.shard):
            first = number * settings.shard
            rows = range(first, min(first + settings.shard, len(source)))
            _build_shard(paths[number], pipeline, source, settings, rows, recipe, pool)
    state.wait_for_everyone()
    if state.is_main_process and not finished:
        _finish(folder, pipeline, source, recipe, paths)
    state.wait_for_everyone()
    cache = LatentCache.load(folder)
    encoded = sum(cache.shards[number].rows for number in missing)
    return CacheBuild(cache, encoded, time.perf_counter() - start)


def source_of(settings: DataConfig) -> PictureSource:
    """The pictures that ``settings`` name, opened. Raises DataError."""
    return open_source(
        settings.source,
        image_column=settings.image_column,
        caption_column=settings.caption_column,
        limit=settings.limit,
        seed=settings.seed,
    )


def training_data(pipeline: Any, settings: DataConfig, folder: Path) -> TrainingData:
    """What ``settings.source`` holds: a finished cache as it is, other pictures cached in ``folder`` or encoded live.

    Raises DataError, also for a cache by other encoders than those of ``pipeline``.
    """
    ready = Path(settings.source).expanduser()
    if not is_cache(ready):
        source = source_of(settings)
        if settings.cached:
            return build_cache(pipeline, source, settings, folder).cache
        return LiveData.of(pipeline, source, settings)
    if settings.limit:
        raise DataError(
            f"asked for data.limit = {settings.limit} pictures of the finished cache {ready}; it is used whole: "
            "set data.limit = 0, or build a smaller one with: prune-lab cache ... --limit"
        )
    return LatentCache.load(ready).check(pipeline)
