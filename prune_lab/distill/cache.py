"""Training pictures that were encoded once into a folder of safetensors files, read by memory map.

::

    DIR/
        shard-00000.safetensors ...   mean, log_variance (n, V, C, h, w); embeddings (n, L, D); added.*; captions
        empty.safetensors             embedding of the empty caption
        cache.json                    what the numbers were made from, and the list of the shards; written last

``building.build_cache`` makes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prune_lab.distill.data import EncodedBatch
from prune_lab.distill.encoding import encoders_digest, key_of, picture_side
from prune_lab.errors import DataError
from prune_lab.runtime import atomic_write, read_json

FORMAT = "prune_lab latent cache 1"
_SAID = "prune_lab"  # the entry of the metadata
EMPTY = "empty.safetensors"
INDEX = "cache.json"  # its presence says that the cache is complete
_REMEDY = "build it again with: prune-lab cache ... --force"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a cache."""

    file: str
    rows: int
    bytes: int
    digest: str  # of its tensors


def is_cache(folder: Path) -> bool:
    """Whether ``folder`` holds a finished cache."""
    return (folder / INDEX).is_file()


def save(path: Path, tensors: dict[str, Tensor], said: Mapping[str, Any]) -> None:
    """Write a file of a cache, whole or not at all: the same tensors and words give the same bytes.

    Raises StorageError.
    """
    # in one entry, because safetensors writes several in an order that changes from run to run
    metadata = {_SAID: json.dumps({"format": FORMAT, **said}, ensure_ascii=False)}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata)


def opened(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file of a cache says, and its tensors: they are memory-mapped, and nothing of them is read yet."""
    try:
        with safe_open(path, framework="pt") as file:
            said: dict[str, Any] = json.loads((file.metadata() or {}).get(_SAID, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"asked to read the cached data {path}, found {error}; {_REMEDY}") from None
    if said.get("format") != FORMAT:
        raise DataError(f"asked to read the cached data {path}, found another kind of file; {_REMEDY}")
    return said, tensors


def _added(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix("added."): value for name, value in tensors.items() if name.startswith("added.")
    }


@dataclass(frozen=True, slots=True, eq=False)
class LatentCache:
    """Training data in a folder; only the rows that are asked for are read."""

    folder: Path
    recipe: Mapping[str, str | int]
    shards: tuple[Shard, ...]
    left_out: tuple[str, ...]  # pictures that could not be used, with the reason
    channels: int  # of the latents
    empty_embedding: Tensor  # (L, D)
    empty_added: Mapping[str, Tensor]
    digest: str  # 16 hexadecimal digits that change with any bit of any tensor
    _starts: Tensor  # (shards,) the first row of each
    _mapped: dict[int, dict[str, Tensor]] = field(
        default_factory=dict, repr=False
    )  # filled as shards are used

    @classmethod
    def load(cls, folder: Path) -> LatentCache:
        """The finished cache in ``folder``; DataError when it is unfinished, damaged or something else."""
        folder = Path(folder)
        if not is_cache(folder):
            found = "an unfinished one" if any(folder.glob("shard-*")) else f"no {INDEX}"
            raise DataError(
                f"asked for the cache in {folder}, found {found} there; run the same prune-lab cache command to the end"
            )
        index = cast("dict[str, Any]", read_json(folder / INDEX))
        try:
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']!r}")
            shards = tuple(Shard(**one) for one in index["shards"])
            recipe, left_out = dict(index["recipe"]), tuple(index["left_out"])
            channels, digest = int(index["channels"]), str(index["digest"])
        except (LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"asked to read the cache {folder}, found another {INDEX} ({error}); {_REMEDY}"
            ) from None
        for one in shards:
            path = folder / one.file
            size = path.stat().st_size if path.is_file() else 0
            if size != one.bytes:
                raise DataError(
                    f"asked to read the cache {folder}, found {size:,} of the {one.bytes:,} bytes of {one.file}; "
                    "run the prune-lab cache command that made it again, which makes what is missing"
                )
        _, empty = opened(folder / EMPTY)
        ends = torch.tensor([one.rows for one in shards]).cumsum(0)
        starts = ends - torch.tensor([one.rows for one in shards])
        return cls(
            folder,
            recipe,
            shards,
            left_out,
            channels,
            empty["embedding"].float(),
            _added(empty),
            digest,
            starts,
        )

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def variants(self) -> int:
        """Different crops and flips of each picture."""
        return int(self.recipe["variants"])

    @property
    def width(self) -> int:
        """Width of the text embeddings."""
        return self.empty_embedding.shape[-1]

    @property
    def key(self) -> str:
        """16 hexadecimal digits of the recipe."""
        return key_of(self.recipe)

    @property
    def bytes(self) -> int:
        """Size of the shards on disk."""
        return sum(shard.bytes for shard in self.shards)

    def check(self, pipeline: Any) -> LatentCache:
        """The cache itself; DataError when it was made by other encoders than those of ``pipeline``."""
        found, side = encoders_digest(pipeline), picture_side(pipeline)
        if (self.recipe["encoders"], self.recipe["side"]) != (found, side):
            raise DataError(
                f"asked to train on the cache {self.folder}, which was made by other encoders or for another size "
                f"({self.recipe['encoders']} at {self.recipe['side']} pixels, the model has {found} at {side}); "
                "build one with: prune-lab cache MODEL --data SOURCE --out DIR"
            )
        return self

    def _tensors(self, shard: int) -> dict[str, Tensor]:
        if shard not in self._mapped:
            said, tensors = opened(self.folder / self.shards[shard].file)
            if said["digest"] != self.shards[shard].digest:
                file = self.shards[shard].file
                raise DataError(
                    f"asked to read {file} of the cache {self.folder}, found it was replaced; {_REMEDY}"
                )
            self._mapped[shard] = tensors
        return self._mapped[shard]

    def captions(self) -> tuple[str, ...]:
        """The captions of all rows, read from all shards."""
        found: list[str] = []
        for shard in self.shards:
            found += opened(self.folder / shard.file)[0]["captions"]
        return tuple(found)

    def rows(self, chosen: Tensor, variants: Tensor) -> EncodedBatch:
        """These pictures in these variants, read shard by shard."""
        shards = torch.searchsorted(self._starts, chosen, right=True) - 1
        inside = chosen - self._starts[shards]
        parts: list[dict[str, Tensor]] = []
        places = []
        for shard in torch.unique(shards).tolist():
            place = (shards == shard).nonzero()[:, 0]
            row, variant = inside[place], variants[place]
            tensors = self._tensors(shard)
            parts.append(
                {
                    name: (tensor[row, variant] if name in ("mean", "log_variance") else tensor[row]).float()
                    for name, tensor in tensors.items()
                }
            )
            places.append(place)
        order = torch.cat(places).argsort()
        whole = {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}
        return EncodedBatch(whole["mean"], whole["log_variance"], whole["embeddings"], _added(whole))
