"""Pictures of a class that a model draws itself: kept in the user's cache, and found again by whatever is learnt next.

They lie in a folder that is named by what decides them, a file for each seed, which says what it is a picture of. Each
batch has a lock while it is drawn, so several trainings may want the same class at once: they share the work.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_lab.applications.pictures import label_of, save_picture
from prune_lab.distill.shard_locks import claimed, make_all
from prune_lab.errors import DataError, StorageError
from prune_lab.evaluation import generate
from prune_lab.families import model_of
from prune_lab.runs import read_picture
from prune_lab.runtime import Environment, cache_folder, device_of, note, track, write_json
from prune_lab.runtime.holders import Holder, remove_leftovers

_FORMAT = 1
_MADE_FROM = "made_from.json"  # in a folder of pictures: what decides them, for a person


@dataclass(frozen=True, slots=True, eq=False)
class ClassPictures:
    """Pictures of a class (N, 3, H, W) uint8, the folder that they lie in, and how many of them were drawn just now."""

    pictures: Tensor
    folder: Path
    drawn: int


def kept_classes(out: Path) -> Path:
    """The folder in the user's cache that holds pictures of classes; where that cannot be written, one beside ``out``,
    and a line says so.
    """
    folder = cache_folder("class_pictures")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        beside = out.with_name(f"{out.name}.class")
        note(
            f"the cache {folder} cannot be written ({error.strerror or error}); pictures of the class are kept in "
            f"{beside}"
        )
        return beside


def _decided_by(pipeline: Any, model: str, prompt: str, steps: int, guidance: float) -> dict[str, Any]:
    """All that decides the picture of a seed, as JSON values; ``model`` is a digest of all parts that draw."""
    own = model_of(pipeline)
    there = Environment.capture()  # another version of the libraries may draw another picture
    return {
        "format": _FORMAT,
        "model": model,
        "prompt": prompt,
        "steps": steps,
        "guidance": guidance,
        "device": device_of(own).type,
        "dtype": str(own.dtype).removeprefix("torch."),
        "torch": there.torch,
        "diffusers": there.diffusers,
    }


def _label(folder: Path, seed: int) -> str:
    return f"{folder.name} seed {seed}"


def _path(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}.png"


def _read(folder: Path, seed: int) -> Tensor:
    """The kept picture of ``seed``, (3, H, W) uint8. Raises DataError or StorageError for one that is of no use."""
    path = _path(folder, seed)
    picture = read_picture(path)
    if label_of(path) != _label(folder, seed):
        raise DataError(f"asked for the picture {path}, found one that was not drawn there for this seed")
    return torch.from_numpy(picture).permute(2, 0, 1)


def _kept(folder: Path, seeds: Sequence[int]) -> dict[int, Tensor]:
    """The pictures of ``seeds`` that are there and whole; a line says how many are there and are not."""
    found, useless = {}, []
    for seed in seeds:
        if not os.path.lexists(_path(folder, seed)):
            continue
        try:
            found[seed] = _read(folder, seed)
        except (DataError, StorageError):
            useless.append(_path(folder, seed))
    if useless:
        note(
            f"{len(useless)} of the pictures of the class that are kept are damaged or others, and are drawn again; "
            f"the first: {useless[0]}"
        )
    return found


def _is_whole(folder: Path, seed: int) -> bool:
    try:
        _read(folder, seed)
    except (DataError, StorageError):
        return False
    return True


def _begin(folder: Path, decided: Mapping[str, Any]) -> None:
    """Free ``folder`` of what killed processes left, and say in it what its pictures are made from."""
    remove_leftovers(folder)
    if not (folder / _MADE_FROM).is_file():
        write_json(folder / _MADE_FROM, dict(decided))


def class_pictures(
    pipeline: Any,
    model: str,
    prompt: str,
    count: int,
    folder: Path,
    *,
    seed: int,
    steps: int,
    guidance: float,
    batch: int,
) -> ClassPictures:
    """``count`` pictures that ``pipeline`` draws for ``prompt``, from ``seed`` on; those that are kept are not drawn.

    ``model`` is a digest of all parts that draw. Each picture is a file in a folder in ``folder`` that is named by what
    decides it, so a call that was stopped goes on, and other pictures are never taken for these. Raises StorageError
    where they cannot be kept, or where only processes of other hosts are drawing what is missing.
    """
    decided = _decided_by(pipeline, model, prompt, steps, guidance)
    place = folder / sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]
    seeds = range(seed, seed + count)
    found = _kept(place, seeds)
    groups = {_path(place, seeds[start]): seeds[start : start + batch] for start in range(0, count, batch)}
    missing = [first for first, group in groups.items() if not found.keys() >= set(group)]
    made: list[int] = []

    def left_of(first: Path) -> list[int]:
        return [one for one in groups[first] if one not in found and not _is_whole(place, one)]

    def make(first: Path) -> Holder | None:
        """Who else is drawing the group of the picture ``first``; None where it is drawn now."""
        with claimed(first, {}) as other:
            left = left_of(first) if other is None else []
            if left:
                drawn = generate(pipeline, [prompt], left, steps=steps, guidance=guidance, batch=batch)
                for one, picture in zip(left, drawn, strict=True):
                    save_picture(_path(place, one), picture, _label(place, one))
                made.extend(left)
            return other

    if missing:
        _begin(place, decided)
        for first in track(missing, "drawing the class", unit="pictures", per=min(batch, count)):
            make(first)
        make_all(missing, lambda first: not left_of(first), make, what="pictures of the class")
    every = [found[one] if one in found else _read(place, one) for one in seeds]
    return ClassPictures(torch.stack(every), place, len(made))
