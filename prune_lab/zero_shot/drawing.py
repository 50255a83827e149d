"""Drawing a model's pictures into a folder: by one process, by several, or on a cluster, and going on where it stopped.

A batch of rows is the same whoever draws it, and a row of it has a generator of its own. So pictures are the same, on a
CPU bit for bit with as many threads, whatever was shared out and how often it was stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from prune_lab.cluster import Cluster, connected, in_tasks, slots
from prune_lab.errors import DataError, DeviceError, StorageError
from prune_lab.evaluation import drawn_batches
from prune_lab.models import ModelSource, load_model, load_pipeline, model_digest, pipeline_digest
from prune_lab.runtime import (
    atomic_write,
    note,
    parse_json,
    pick_dtype,
    read_json,
    track,
    write_frame,
    write_json,
)
from prune_lab.schemas import DRAWN_COLUMNS
from prune_lab.version import __version__
from prune_lab.zero_shot.protocol import Protocol, Row

DRAWN = "drawn.json"  # in the folder of a model: what its pictures are of
PICTURES = "pictures.csv"  # beside it: prompt and seed of each
_FORMAT = 1
_TOLD = 4000  # characters of a prompt
_OURS = re.compile(r"\d{6,}-[0-9a-f]{16}-\d+\.(png|jpg)")


@dataclass(frozen=True, slots=True)
class Drawing:
    """The pictures of one model: who draws them, in whose pipeline, how, and where they are kept."""

    source: ModelSource
    base: ModelSource  # the pipeline; the source itself where that is one
    folder: Path
    rows: tuple[Row, ...]
    protocol: Protocol
    device: str
    batch: int
    threads: int

    @property
    def batches(self) -> list[tuple[Row, ...]]:
        """All rows, ``batch`` at a time."""
        return [self.rows[start : start + self.batch] for start in range(0, len(self.rows), self.batch)]

    def missing(self) -> list[int]:
        """The numbers of the batches of which a picture is not there."""
        there = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        return [i for i, rows in enumerate(self.batches) if any(row.file not in there for row in rows)]


# The folder ------------------------------------------------------------------------------------------------------


def _identity(job: Drawing) -> dict[str, Any]:
    own = job.source is job.base
    return {
        "format": _FORMAT,
        "model": model_digest(job.source),
        "pipeline": pipeline_digest(job.base)
        if own
        else f"{model_digest(job.source)} in {pipeline_digest(job.base)}",
        "settings": job.protocol.settings,
    }


def prepare(job: Drawing, *, force: bool) -> dict[str, Any]:
    """What the pictures in the folder of ``job`` are of, after writing it there; pictures of the same model stay.

    Raises StorageError where there are pictures of another model, or drawn with other settings; with ``force`` all
    that were drawn there are removed.
    """
    path, identity = job.folder / DRAWN, _identity(job)
    found = read_json(path) if path.is_file() else None
    before = found if isinstance(found, dict) else {}
    pictures = [one for one in job.folder.glob("*") if _OURS.fullmatch(one.name)]
    if force:
        for one in pictures:
            one.unlink(missing_ok=True)
    elif pictures and before != identity:
        old, new = before.get("settings"), identity["settings"]
        changed = (
            [f"{name} {old[name]} and not {new[name]}" for name in new if old[name] != new[name]]
            if (isinstance(old, dict) and old.keys() == new.keys())
            else []
        )
        why = f"pictures with {', '.join(changed)}" if changed else "pictures of another model"
        raise StorageError(
            f"asked to draw {job.source.name} into {job.folder}, found {why} there; give another folder with --out, or "
            "--force to draw them again"
        )
    write_json(path, identity)
    frame = pd.DataFrame(
        [(row.file, row.prompt, row.kind, row.number, row.seed) for row in job.rows],
        columns=list(DRAWN_COLUMNS),
    )
    write_frame(job.folder / PICTURES, frame)
    return identity


# One batch -------------------------------------------------------------------------------------------------------


def _as_jpeg(picture: Image.Image) -> Image.Image:
    """``picture`` as it is after it was saved as JPEG, with Pillow's quality."""
    written = io.BytesIO()
    picture.save(written, format="JPEG")
    with Image.open(written) as read:
        return read.convert("RGB")


def as_kept(picture: Image.Image, protocol: Protocol) -> Image.Image:
    """``picture`` resized as ``protocol`` keeps it, without regard to its shape, with Pillow's usual filter."""
    if protocol.kept is None:
        return picture
    side = protocol.kept
    return (_as_jpeg(picture) if protocol.jpeg else picture).resize((side, side))


def mark_of(folder: Path) -> str:
    """What all pictures in the ``folder`` of a model carry: the model, its pipeline and the settings, as one digest."""
    text = json.dumps(read_json(folder / DRAWN), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _label(row: Row, mark: str) -> dict[str, str]:
    # the seed follows from the whole prompt, of which a JPEG could not hold more than 64 kB
    return {"model": mark, "seed": str(row.seed), "prompt": row.prompt[:_TOLD]}


def _save(folder: Path, row: Row, pixels: Tensor, protocol: Protocol, mark: str) -> None:
    picture = as_kept(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), protocol)
    label = _label(row, mark)
    with atomic_write(folder / row.file) as temporary:
        if protocol.jpeg:
            picture.save(temporary, format="JPEG", comment=json.dumps(label).encode())
            return
        info = PngInfo()
        info.add_text("Software", f"prune_lab {__version__}")
        for name, text in label.items():
            info.add_itxt(name, text)
        picture.save(temporary, format="PNG", pnginfo=info)


def check_drawn_for(row: Row, mark: str, content: bytes) -> None:
    """Raise DataError where the file ``content`` does not say that it is the picture of ``row`` by the model ``mark``:
    of another prompt, seed or model, or put there by somebody else.
    """
    with Image.open(io.BytesIO(content)) as picture:
        found: object = {name: picture.info.get(name) for name in _label(row, mark)}
        if picture.format == "JPEG":
            with contextlib.suppress(ValueError):
                found = parse_json(picture.info.get("comment", b""))
    if found != _label(row, mark):
        raise DataError("a picture that was not drawn there for this prompt, seed and model")


def _opened(job: Drawing, device: str) -> tuple[Any, Any]:
    """The pipeline, and the model that takes the place of its own, if any."""
    torch.set_num_threads(job.threads)
    place: dict[str, Any] = {"device": torch.device(device), "dtype": pick_dtype(job.protocol.dtype)}
    pipeline = load_pipeline(job.base, **place)
    return pipeline, None if job.source is job.base or job.source == job.base else load_model(
        job.source, **place
    )


def _draw(job: Drawing, opened: tuple[Any, Any], numbers: Sequence[int]) -> Iterator[int]:
    """Draw the batches of these ``numbers``, and yield each when its pictures are kept."""
    pipeline, model = opened
    how, mark = job.protocol, mark_of(job.folder)
    for number in numbers:
        rows = job.batches[number]
        drawn = drawn_batches(
            pipeline,
            [(row.prompt, row.seed) for row in rows],
            steps=how.steps,
            guidance=how.guidance,
            model=model,
            batch=len(rows),
            resolution=how.resolution,
        )
        for pictures in drawn:
            for row, pixels in zip(rows, pictures, strict=True):
                _save(job.folder, row, pixels, how, mark)
        yield number


# Who draws -------------------------------------------------------------------------------------------------------

_worker: list[Any] = []  # in a process of several: its pipeline, and who started it


def _begin(job: Drawing, devices: Any, parent: int) -> None:
    _worker[:] = [_opened(job, devices.get()), parent]


def _one(job: Drawing, number: int) -> int:
    opened, parent = _worker
    if os.getppid() != parent:  # killed: the next one to draw shall not meet this one
        os._exit(1)
    return next(_draw(job, opened, [number]))


def _devices(device: str, processes: int) -> list[str]:
    """The device of each process: cards in turn, where no certain one was asked for."""
    cards = torch.cuda.device_count() if device == "cuda" else 0
    return [f"cuda:{i % cards}" if cards else device for i in range(processes)]


def _in_processes(job: Drawing, numbers: Sequence[int], processes: int) -> None:
    spawned = multiprocessing.get_context("spawn")
    devices = spawned.Queue()
    for device in _devices(job.device, processes):
        devices.put(device)
    begin = (job, devices, os.getpid())
    with ProcessPoolExecutor(processes, mp_context=spawned, initializer=_begin, initargs=begin) as pool:
        try:
            waiting = [pool.submit(_one, job, number) for number in numbers]
            for done in track(as_completed(waiting), f"drawing with {job.source.name}", len(waiting)):
                done.result()
        except BrokenProcessPool:
            raise DeviceError(
                f"asked {processes} processes to draw with {job.source.name}, found that one ended, perhaps for want "
                "of memory; the same command goes on, with fewer --processes or a smaller --batch"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def draw_share(job: Drawing, numbers: Sequence[int]) -> int:
    """Draw these batches in this process; how many they were."""
    return sum(1 for _ in _draw(job, _opened(job, job.device), numbers))


def _on_cluster(job: Drawing, numbers: Sequence[int], cluster: Cluster) -> None:
    with connected(cluster) as ray:
        room = slots(ray, cluster)
        shares = [share for start in range(room) if (share := tuple(numbers[start::room]))]
        note(f"drawing with {job.source.name} on Ray, {len(shares)} shares")
        in_tasks(ray, cluster, partial(draw_share, replace(job, threads=cluster.cpus)), shares)


def draw_missing(job: Drawing, *, processes: int = 1, cluster: Cluster | None = None) -> int:
    """Draw the pictures of ``job`` that are not there, and say how many batches were drawn.

    By this process, by so many ``processes`` of this machine (a GPU each where there are several), or by a Ray
    ``cluster`` whose machines all see the folder. Raises DataError where pictures are missing afterwards.
    """
    numbers = job.missing()
    if not numbers:
        return 0
    if len(numbers) < len(job.batches):
        kept = len(job.batches) - len(numbers)
        note(
            f"{job.source.name}: {kept} of {len(job.batches)} batches are there already, {len(numbers)} are drawn"
        )
    if cluster is not None:
        _on_cluster(job, numbers, cluster)
    elif processes > 1:
        _in_processes(job, numbers, min(processes, len(numbers)))
    else:
        drawn = _draw(job, _opened(job, job.device), numbers)
        for _ in track(drawn, f"drawing with {job.source.name}", len(numbers)):
            pass
    if left := job.missing():
        raise DataError(
            f"asked for the pictures of {job.source.name} in {job.folder}, found {len(left)} batches missing after "
            "they were drawn; every machine must see that folder"
        )
    return len(numbers)
