"""A cache of training data made shard by shard, by all processes; it may be stopped at any time.

Every shard holds its provenance and gets its name only when it is complete. So a build that was stopped goes on with
the shards that are missing. What fills a shard is for ``building`` (the user's images) and ``drawing`` (the model's).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from prune_lab.distill.cache import (
    EMPTY,
    FORMAT,
    INDEX,
    PROVENANCE,
    IndexFile,
    LatentCache,
    Shard,
    is_cache,
    read_cache_file,
    write_cache_file,
)
from prune_lab.distill.encoding import encode_empty_caption, key_of
from prune_lab.distill.shard_locks import begin, being_built, check_cache_folder, claimed, clear, make_all
from prune_lab.errors import DataError
from prune_lab.probes import channels_of
from prune_lab.runs import read_typed
from prune_lab.runtime import pick_dtype, tensors_digest, track, write_json
from prune_lab.runtime.holders import Holder

_VERSIONS = ("prune_lab", "torch", "diffusers", "transformers")


@dataclass(frozen=True, slots=True)
class ShardContent:
    """What one shard holds: n rows of tensors in float32, and of each row what its name says."""

    tensors: Mapping[
        str, Tensor
    ]  # mean, log_variance (n, V, C, h, w); embeddings (n, L, D); added.* (n, ...); none where n is 0
    per_row: Mapping[str, Sequence[str]]  # captions, and where they are known pictures and kinds
    left_out: Sequence[str] = ()  # images that could not be used, with the reason


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """How a cache is divided into files, and where its rows come from."""

    title: str  # of the source
    provenance: Mapping[str, str | int]  # everything that decides the numbers and their division
    rows: int
    shard: int  # rows per file
    format: str  # number format of the files
    unit: str  # what a row is, for progress
    left_out: Sequence[str] = ()  # before anything was encoded


@dataclass(frozen=True, slots=True)
class CacheBuild:
    """A finished cache and the work of this build."""

    cache: LatentCache
    # Images encoded or drawn by all processes of this build, without those of shards that were there before.
    encoded: int
    seconds: float


def _made_of(provenance: Mapping[str, Any]) -> str:
    return "pictures that a model drew" if "prompts" in provenance else "given pictures"


def _check_provenance(folder: Path, provenance: Mapping[str, str | int]) -> None:
    """Raise DataError naming the differences when ``folder`` holds a cache, finished or not, of another provenance."""
    found: Mapping[str, Any] = {}
    if is_cache(folder):
        found = read_typed(folder / INDEX, IndexFile)["recipe"]
    for path in sorted(folder.glob("shard-*.safetensors"))[:1] if not found else []:
        try:
            found = read_cache_file(path)[0].get(PROVENANCE, {})
        except DataError:
            return  # damaged: it is built again
    found = found or being_built(folder)
    changed = [
        f"{name} {found.get(name, 'none')} there, {provenance.get(name, 'none')} here"
        for name in [*provenance, *(found.keys() - provenance.keys())]
        if found and found.get(name) != provenance.get(name)
    ]
    if found and _made_of(found) != _made_of(provenance):  # the one is drawn by the model, the other is not
        changed = [f"of {_made_of(found)} there, of {_made_of(provenance)} here"]
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


def _write_shard(path: Path, plan: ShardPlan, content: ShardContent) -> None:
    form = pick_dtype(plan.format)
    tensors = {  # whole numbers, such as classes and masks, stay what they are
        name: (tensor.to(form) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in content.tensors.items()
    }
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise DataError(
            f"asked to cache {plan.title} in {plan.format}, found values beyond its range; set data.format = float32"
        )
    metadata = {
        "key": key_of(plan.provenance),
        PROVENANCE: dict(plan.provenance),
        "digest": tensors_digest(tensors),
        "rows": len(content.per_row["captions"]),
        **content.per_row,
        "left_out": list(content.left_out),
    }
    write_cache_file(path, tensors, metadata)


def _reason_of_nothing(paths: Sequence[Path]) -> str:
    """Where no shard holds a row: the first reason why not; else empty."""
    found = [read_cache_file(path)[0] for path in paths if path.is_file()]
    if len(found) < len(paths) or any(metadata["rows"] for metadata in found):
        return ""
    return next((text for metadata in found for text in metadata["left_out"]), "none was given")


def _write_index(folder: Path, pipeline: Any, plan: ShardPlan, paths: Sequence[Path]) -> None:
    """Write the embedding of the empty caption, then cache.json, which ends the build."""
    embedding, added = encode_empty_caption(pipeline)
    tensors = {"embedding": embedding, **{f"added.{name}": value for name, value in added.items()}}
    write_cache_file(folder / EMPTY, tensors, {})
    shards, left_out = [], list(plan.left_out)
    for path in paths:
        metadata, _ = read_cache_file(path)
        shards.append(Shard(path.name, metadata["rows"], path.stat().st_size, metadata["digest"]))
        left_out += metadata["left_out"]
    digests = [shard.digest for shard in shards]
    index = {
        "format": FORMAT,
        "source": plan.title,
        "rows": sum(shard.rows for shard in shards),
        PROVENANCE: dict(plan.provenance),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
        "digest": hashlib.sha256(json.dumps([tensors_digest(tensors), digests]).encode()).hexdigest()[:16],
        "channels": channels_of(pipeline),
        "left_out": left_out,
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    write_json(folder / INDEX, index)


def build_shards(
    pipeline: Any,
    plan: ShardPlan,
    fill: Callable[[range], ShardContent],
    folder: Path,
    *,
    work: str,
    force: bool = False,
) -> CacheBuild:
    """The cache in ``folder`` of the rows of ``plan``; ``fill`` makes those of each shard that is missing.

    All processes of an ``accelerate launch`` build their share of the shards. A shard is the same whichever process
    builds it, so a build may be stopped at any time and go on with another number of processes, and several commands
    may build one cache at the same time. ``work`` is what progress calls it. Raises DataError that names the
    differences when ``folder`` holds another cache; with ``force`` that one is removed. Raises StorageError where
    ``folder`` holds something else, or where only builders of other hosts hold what is missing.
    """
    folder, state, start = Path(folder), PartialState(), time.perf_counter()
    key = key_of(plan.provenance)
    paths = [folder / f"shard-{number:05d}.safetensors" for number in range(-(-plan.rows // plan.shard))]
    check_cache_folder(folder, force=False)  # what is not ours stays where it is
    if not force:
        _check_provenance(folder, plan.provenance)
    state.wait_for_everyone()
    if state.is_main_process:
        if force and folder.is_dir():
            clear(folder)
        begin(folder, [path.name for path in paths], plan.provenance)
    state.wait_for_everyone()
    listed = is_cache(folder)  # before the look at the shards: another builder may finish in between
    missing = [path for path in paths if not _is_complete(path, key)]
    state.wait_for_everyone()  # all processes know what is missing before the first one writes
    if state.is_main_process and listed and missing:
        (folder / INDEX).unlink(missing_ok=True)  # of a cache that lost a shard
    made: list[Path] = []

    def make(path: Path) -> Holder | None:
        """Who else is making the shard ``path``; None where it is made now."""
        with claimed(path, plan.provenance) as other:
            if other is None and not _is_complete(path, key):
                first = paths.index(path) * plan.shard
                _write_shard(path, plan, fill(range(first, min(first + plan.shard, plan.rows))))
                made.append(path)
            return other

    own = missing[state.process_index :: state.num_processes]
    for path in track(own, work, unit=plan.unit, per=min(plan.shard, plan.rows)):
        make(path)
    state.wait_for_everyone()
    if state.is_main_process and missing:
        make_all(missing, lambda path: _is_complete(path, key), make)
    state.wait_for_everyone()
    reason = _reason_of_nothing(paths) if missing or not listed else ""
    state.wait_for_everyone()  # all processes have looked before the first one changes anything
    if reason:
        for path in paths if state.is_main_process else ():
            path.unlink(missing_ok=True)
        raise DataError(
            f"asked to encode {plan.rows} images of {plan.title}, none of them can be read ({reason}); "
            "give images such as PNG, JPEG or WebP"
        )
    if state.is_main_process and (missing or not listed):
        _write_index(folder, pipeline, plan, paths)
    state.wait_for_everyone()
    cache = LatentCache.load(folder)
    by_all = {path.name for path in gather_object(made)}
    encoded = sum(shard.rows for shard in cache.shards if shard.file in by_all)
    return CacheBuild(cache, encoded, time.perf_counter() - start)
