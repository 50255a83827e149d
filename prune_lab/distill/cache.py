"""Training images that were encoded once into a folder of safetensors files, which are read by memory map.

::

    DIR/
        shard-00000.safetensors ...   mean, log_variance (n, V, C, h, w); embeddings (n, L, D); added.*; captions
                                      (drawn by the model, or pixels: no log_variance); of_variant.* (n, V, C, h, w)
                                      where the model is shown something of the picture
        empty.safetensors             embedding of the empty caption
        cache.json                    the provenance of the numbers and the list of shards; written last

``building.build_cache`` and ``drawing.draw_cache`` write it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prune_lab.distill.data import EncodedBatch, with_prefix
from prune_lab.distill.encoding import conditions_text, encoders_digest
from prune_lab.errors import DataError
from prune_lab.probes import picture_side
from prune_lab.runs import read_typed
from prune_lab.runs.records import typed
from prune_lab.runtime import atomic_write, parse_json

FORMAT = "prune_lab latent cache 1"
PROVENANCE = "recipe"  # its name in the files, since version 0.1
EMPTY = "empty.safetensors"
OF_VARIANT = "of_variant."  # begins the names of what each crop or flip has its own of
INDEX = "cache.json"  # a folder with it holds a complete cache
_ENTRY = "prune_lab"  # of the metadata of a safetensors file
_REMEDY = "build it again with: prune-lab data ... --force"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a cache."""

    file: str
    rows: int
    bytes: int
    digest: str  # of its tensors


class IndexFile(TypedDict):
    """What cache.json holds."""

    format: str
    recipe: Mapping[str, Any]  # the provenance
    shards: tuple[Shard, ...]
    left_out: tuple[str, ...]
    channels: int
    digest: str


def is_cache(folder: Path) -> bool:
    """Whether ``folder`` holds a finished cache."""
    return (folder / INDEX).is_file()


def write_cache_file(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a file of a cache, whole or not at all: the same tensors and metadata give the same bytes.

    Raises StorageError.
    """
    # in one entry, because safetensors writes several in an order that changes from run to run
    entry = {_ENTRY: json.dumps({"format": FORMAT, **metadata}, ensure_ascii=False)}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, entry)


def read_cache_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file of a cache. The tensors are memory-mapped: none of their numbers is read yet.

    Raises DataError for a missing, damaged or other file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_ENTRY, "{}")
            metadata: dict[str, Any] = typed(dict[str, Any], parse_json(text))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"asked to read the cached data {path}, found {error}; {_REMEDY}") from None
    if metadata.get("format") != FORMAT:
        raise DataError(f"asked to read the cached data {path}, found another kind of file; {_REMEDY}")
    return metadata, tensors


@dataclass(frozen=True, slots=True, eq=False)
class LatentCache:
    """Training data in a folder of shards; only the rows that are asked for are read."""

    folder: Path
    provenance: Mapping[str, str | int]
    shards: tuple[Shard, ...]
    left_out: tuple[str, ...]  # images that could not be used, with the reason
    channels: int  # of the latents
    empty_embedding: Tensor  # (L, D)
    empty_added: Mapping[str, Tensor]
    digest: str  # 16 hexadecimal digits that change with any bit of any tensor
    _starts: Tensor  # (shards,) the first row of each
    # Tensors by shard, filled as shards are used.
    _mapped: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, folder: Path) -> LatentCache:
        """The finished cache in ``folder``. Raises DataError when it is unfinished, damaged or something else."""
        folder = Path(folder)
        if not is_cache(folder):
            found = "an unfinished one" if any(folder.glob("shard-*")) else f"no {INDEX}"
            raise DataError(
                f"asked for the cache in {folder}, found {found} there; run the same prune-lab data command to the end"
            )
        index: IndexFile = read_typed(folder / INDEX, IndexFile)
        if index["format"] != FORMAT:
            raise DataError(
                f"asked to read the cache {folder}, found another {INDEX} (format {index['format']!r}); {_REMEDY}"
            )
        for shard in index["shards"]:
            path = folder / shard.file
            size = path.stat().st_size if path.is_file() else 0
            if size != shard.bytes:
                raise DataError(
                    f"asked to read the cache {folder}, found {size:,} of the {shard.bytes:,} bytes of {shard.file}; "
                    "run the prune-lab data command that made it again, which makes what is missing"
                )
        _, empty = read_cache_file(folder / EMPTY)
        counts = torch.tensor([shard.rows for shard in index["shards"]])
        return cls(
            folder,
            index["recipe"],
            index["shards"],
            index["left_out"],
            index["channels"],
            empty["embedding"].float(),
            with_prefix("added.", empty),
            index["digest"],
            counts.cumsum(0) - counts,
        )

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def _per_row(self, name: str) -> tuple[str, ...]:
        """What the metadata of the shards say of each row, read from all of them."""
        read = (read_cache_file(self.folder / shard.file)[0].get(name) for shard in self.shards)
        found = (values or [""] * shard.rows for values, shard in zip(read, self.shards, strict=True))
        return tuple(value for values in found for value in values)

    @property
    def captions(self) -> tuple[str, ...]:
        """Caption of each row, read from the shards."""
        return self._per_row("captions")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of the prompt of each row, where the model drew to prompts with kinds; else empty texts."""
        return self._per_row("kinds")

    @property
    def pictures(self) -> tuple[str, ...]:
        """Digest of the file of the image of each row; empty texts in caches of version 0.1 and of drawn images."""
        return self._per_row("pictures")

    @property
    def variants(self) -> int:
        """Number of crops and flips of each image."""
        return int(self.provenance["variants"])

    @property
    def bytes(self) -> int:
        """Size of the shards on disk."""
        return sum(shard.bytes for shard in self.shards)

    def check(self, pipeline: Any) -> LatentCache:
        """The cache itself. Raises DataError when it was made by other encoders than those of ``pipeline``."""
        made_by, made_for = self.provenance["encoders"], self.provenance["side"]
        asked_for = self.provenance.get(
            "resolution", 0
        )  # of drawn images; training at another size is meant then
        encoders, side = encoders_digest(pipeline), asked_for or picture_side(pipeline)
        shown, wanted = self.provenance.get("conditions", ""), conditions_text(pipeline)
        if shown != wanted:
            raise DataError(
                f"asked to train on the cache {self.folder}, which holds {shown or 'nothing'} of each picture beside "
                f"its latents, and the model takes {wanted or 'nothing'}; "
                "build one with: prune-lab data MODEL ... --out DIR"
            )
        if (made_by, made_for) != (encoders, side):
            raise DataError(
                f"asked to train on the cache {self.folder}, which was made by other encoders or for another size "
                f"({made_by} at {made_for} pixels, the model has {encoders} at {side}); "
                "build one with: prune-lab data MODEL ... --out DIR"
            )
        return self

    def _tensors(self, shard: int) -> dict[str, Tensor]:
        if shard not in self._mapped:
            file = self.shards[shard].file
            metadata, tensors = read_cache_file(self.folder / file)
            if metadata["digest"] != self.shards[shard].digest:
                raise DataError(
                    f"asked to read {file} of the cache {self.folder}, found it was replaced; {_REMEDY}"
                )
            self._mapped[shard] = tensors
        return self._mapped[shard]

    def rows(self, indices: Tensor, variants: Tensor) -> EncodedBatch:
        """The rows ``indices`` (B,) in ``variants`` (B,), read shard by shard. Raises DataError for a damaged file."""
        shards = torch.searchsorted(self._starts, indices, right=True) - 1
        rows = indices - self._starts[shards]  # of the shard
        found: dict[str, Tensor] = {}
        for shard in torch.unique(shards).tolist():
            here = shards == shard
            row, variant = rows[here], variants[here]
            for name, tensor in self._tensors(shard).items():
                varies = name in ("mean", "log_variance") or name.startswith(OF_VARIANT)
                part = tensor[row, variant] if varies else tensor[row]
                part = part.float() if part.is_floating_point() else part
                found.setdefault(name, part.new_empty(len(indices), *part.shape[1:]))[here] = part
        added = with_prefix("added.", found) | with_prefix(OF_VARIANT, found)
        return EncodedBatch(found["mean"], found.get("log_variance"), found["embeddings"], added)
