"""Building a cache of encoded images: shard by shard, by all processes; it may be stopped at any time.

Every shard holds its provenance and gets its name only when it is complete. So a build that was stopped goes on with
the shards that are missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from torch import Tensor

from prune_lab.config import DataConfig
from prune_lab.distill.cache import (
    EMPTY,
    FORMAT,
    INDEX,
    PROVENANCE,
    LatentCache,
    Shard,
    is_cache,
    read_cache_file,
    write_cache_file,
)
from prune_lab.distill.data import TrainingData
from prune_lab.distill.encoding import (
    UNREADABLE,
    LiveData,
    crop_variants,
    decode_image,
    encode_distributions,
    encode_empty_caption,
    encode_texts,
    image_side,
    key_of,
    provenance_of,
)
from prune_lab.distill.sources import ImageSource, source_of
from prune_lab.errors import DataError, StorageError
from prune_lab.runtime import pick_dtype, read_json, tensors_digest, track, write_json


@dataclass(frozen=True, slots=True)
class CacheBuild:
    """A finished cache and the work of this build."""

    cache: LatentCache
    # Images encoded by all processes of this build, without those of shards that were there before.
    encoded: int
    seconds: float


def _check_provenance(folder: Path, provenance: Mapping[str, str | int]) -> None:
    """Raise DataError naming the differences when ``folder`` holds a cache, finished or not, of another provenance."""
    found: Mapping[str, Any] = {}
    if is_cache(folder):
        index = read_json(folder / INDEX)
        found = index.get(PROVENANCE, {}) if isinstance(index, dict) else {}
    for path in sorted(folder.glob("shard-*.safetensors"))[:1] if not found else []:
        try:
            found = read_cache_file(path)[0].get(PROVENANCE, {})
        except DataError:
            return  # damaged: it is built again
    changed = [
        f"{name} {found[name]} there, {value} here"
        for name, value in provenance.items()
        if name in found and found[name] != value
    ]
    if changed:
        raise DataError(
            f"asked to build a cache in {folder}, found one that was made otherwise ({'; '.join(changed)}); "
            "give another folder, or --force to make it again"
        )


def _is_complete(path: Path, key: str) -> bool:
    """Whether an earlier build has left this shard, readable and with this key."""
    if not path.is_file():
        return False
    try:
        return read_cache_file(path)[0].get("key") == key
    except DataError:
        return False


def _decoded_chunks(
    source: ImageSource, rows: range, side: int, settings: DataConfig, pool: Executor
) -> Iterator[tuple[range, list[Tensor | str]]]:
    """Rows, ``settings.batch`` at a time, and the variants (V, 3, side, side) of the image of each, or why none.

    The next are decoded while the caller encodes the last.
    """

    def decode_row(row: int) -> Tensor | str:
        try:
            image = decode_image(source.content(row))
            return crop_variants(image, side, settings, row, range(settings.num_variants))
        except UNREADABLE as error:
            return f"{source.name(row)}: {error}"

    chunks = [rows[start : start + settings.batch] for start in range(0, len(rows), settings.batch)]
    waiting = pool.map(decode_row, chunks[0])
    for chunk, after in zip_longest(chunks, chunks[1:], fillvalue=range(0)):
        images = list(waiting)
        waiting = pool.map(decode_row, after)  # begins at once
        yield chunk, images


def _build_shard(
    path: Path,
    pipeline: Any,
    source: ImageSource,
    settings: DataConfig,
    rows: range,
    provenance: Mapping[str, str | int],
    pool: Executor,
) -> None:
    """Encode ``rows`` of ``source`` into ``path``; images that cannot be read are left out and named in the file."""
    encoded, captions, left_out = [], [], []
    side = image_side(pipeline)
    for chunk, images in _decoded_chunks(source, rows, side, settings, pool):
        pairs = list(zip(chunk, images, strict=True))
        good = [(row, image) for row, image in pairs if isinstance(image, Tensor)]
        left_out += [reason for _, reason in pairs if isinstance(reason, str)]
        captions += [source.captions[row] for row, _ in good]
        if good:
            pixels = torch.cat([image for _, image in good])
            encoded.append(encode_distributions(pipeline, pixels, batch=settings.batch))
    if not encoded:
        raise DataError(
            f"asked to encode {len(rows)} images of {source.title}, none of them can be read ({left_out[0]}); "
            "give images such as PNG, JPEG or WebP"
        )
    embeddings, added = encode_texts(pipeline, captions, (side, side), batch=settings.batch)
    mean, log_variance = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    shape = (len(captions), settings.num_variants, *mean.shape[1:])
    named = {"mean": mean.reshape(shape), "log_variance": log_variance.reshape(shape)}
    named["embeddings"] = embeddings
    named |= {f"added.{name}": tensor for name, tensor in added.items()}
    tensors = {name: tensor.to(pick_dtype(settings.format)).contiguous() for name, tensor in named.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise DataError(
            f"asked to cache {source.title} in {settings.format}, found values beyond its range; "
            "set data.format = float32"
        )
    metadata = {
        "key": key_of(provenance),
        PROVENANCE: dict(provenance),
        "digest": tensors_digest(tensors),
        "rows": len(captions),
        "captions": captions,
        "left_out": left_out,
    }
    write_cache_file(path, tensors, metadata)


def _write_index(
    folder: Path,
    pipeline: Any,
    source: ImageSource,
    provenance: Mapping[str, str | int],
    paths: Sequence[Path],
) -> None:
    """Write the embedding of the empty caption, then cache.json, which ends the build."""
    embedding, added = encode_empty_caption(pipeline)
    tensors = {"embedding": embedding, **{f"added.{name}": value for name, value in added.items()}}
    write_cache_file(folder / EMPTY, tensors, {})
    shards, left_out = [], list(source.left_out)
    for path in paths:
        metadata, _ = read_cache_file(path)
        shards.append(Shard(path.name, metadata["rows"], path.stat().st_size, metadata["digest"]))
        left_out += metadata["left_out"]
    digests = [shard.digest for shard in shards]
    index = {
        "format": FORMAT,
        "source": source.title,
        "rows": sum(shard.rows for shard in shards),
        PROVENANCE: dict(provenance),
        "digest": hashlib.sha256(json.dumps([tensors_digest(tensors), digests]).encode()).hexdigest()[:16],
        "channels": int(pipeline.vae.config.latent_channels),
        "left_out": left_out,
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    write_json(folder / INDEX, index)


def build_cache(
    pipeline: Any, source: ImageSource, settings: DataConfig, folder: Path, *, force: bool = False
) -> CacheBuild:
    """The cache in ``folder`` of the images of ``source``, encoded by ``pipeline``; missing shards are built.

    All processes of an ``accelerate launch`` build their share of the shards. A shard is the same whichever process
    builds it, so a build may be stopped at any time and go on with another number of processes. Raises DataError that
    names the differences when ``folder`` holds another cache; with ``force`` that one is removed.
    """
    folder, state, start = Path(folder), PartialState(), time.perf_counter()
    provenance = provenance_of(pipeline, source, settings)
    key = key_of(provenance)
    if folder.is_file():
        raise StorageError(f"asked to build a cache in {folder}, found a file there; give a folder")
    if not force:
        _check_provenance(folder, provenance)
    state.wait_for_everyone()
    if state.is_main_process and folder.is_dir():
        patterns = [".shard-*.tmp"]  # which a build that was killed leaves
        if force:
            patterns += ["*shard-*.safetensors", EMPTY, INDEX]
        for path in [path for pattern in patterns for path in folder.glob(pattern)]:
            path.unlink(missing_ok=True)
    state.wait_for_everyone()
    shards = range(-(-len(source) // settings.shard))
    paths = [folder / f"shard-{number:05d}.safetensors" for number in shards]
    missing = [number for number, path in enumerate(paths) if not _is_complete(path, key)]
    finished = is_cache(folder) and not missing
    state.wait_for_everyone()  # all processes know what is missing before the first one writes
    if state.is_main_process and not finished:
        (folder / INDEX).unlink(missing_ok=True)  # of a cache that lost a shard
    own = missing[state.process_index :: state.num_processes]
    with ThreadPoolExecutor(psutil.cpu_count(logical=False) or 1) as pool:
        for number in track(own, "encoding images", unit="images", per=settings.shard):
            first = number * settings.shard
            rows = range(first, min(first + settings.shard, len(source)))
            _build_shard(paths[number], pipeline, source, settings, rows, provenance, pool)
    state.wait_for_everyone()
    if state.is_main_process and not finished:
        _write_index(folder, pipeline, source, provenance, paths)
    state.wait_for_everyone()
    cache = LatentCache.load(folder)
    encoded = sum(cache.shards[number].rows for number in missing)
    return CacheBuild(cache, encoded, time.perf_counter() - start)


def training_data(pipeline: Any, settings: DataConfig, folder: Path) -> TrainingData:
    """The training data that ``settings.source`` names: a finished cache, or images that are encoded now or on demand.

    With ``settings.cached`` images are encoded now, into ``folder``. Raises DataError, also for a cache by other
    encoders than those of ``pipeline``.
    """
    ready = Path(settings.source).expanduser()
    if not is_cache(ready):
        source = source_of(settings)
        if settings.cached:
            return build_cache(pipeline, source, settings, folder).cache
        return LiveData.of(pipeline, source, settings)
    if settings.limit:
        raise DataError(
            f"asked for data.limit = {settings.limit} images of the finished cache {ready}; it is used whole: "
            "set data.limit = 0, or build a smaller one with: prune-lab cache ... --limit"
        )
    return LatentCache.load(ready).check(pipeline)
