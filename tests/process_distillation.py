"""Distils two tiny students in FOLDER as one of several processes; SETTINGS is a JSON object of distill settings.

Started by ``accelerate launch``. Every process but the main one dies when it writes anything below FOLDER. In the
environment, KILL_AT=n lets all processes die by SIGKILL before step n, APART=1 gives each process a folder of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import TINY_UNET, build_unet
from distilling import SETTINGS, setup_for, students_of

import prune_lab.distill.loop as loop
from prune_lab.distill import distill_together, draw_batch
from prune_lab.errors import PruneLabError
from prune_lab.probes import random_probe
from prune_lab.processes import end_processes

PLANS = ("bk-small", "bk-tiny")
RANK = int(os.environ.get("RANK", "0"))


def forbid_writing(folder: Path) -> None:
    """From now on this process dies when it makes, writes, renames or removes a file below ``folder``."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in (
            "os.mkdir",
            "os.rename",
            "os.remove",
            "os.rmdir",
            "tempfile.mkstemp",
            "tempfile.mkdtemp",
        )
        if event == "open":
            _, mode, flags = arguments
            writes = bool(set(mode or "") & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
        if writes and str(arguments[0]).startswith(str(folder)):
            sys.stderr.write(f"process {RANK} wrote: {event} {arguments}\n")
            sys.stderr.flush()
            os._exit(17)

    sys.addaudithook(watch)


def main(folder: Path, given: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    kill_at = int(os.environ.get("KILL_AT", "0"))
    if os.environ.get("APART"):
        folder = folder / str(RANK)
    elif RANK:
        forbid_writing(folder)

    def dying(data: Any, scheduler: Any, settings: Any, step: int, device: Any, **part: Any) -> Any:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw_batch(data, scheduler, settings, step, device, **part)

    loop.draw_batch = dying  # type: ignore[attr-defined]
    unet = build_unet(TINY_UNET)
    validation = random_probe(TINY_UNET, samples=3, seed=5)  # which two processes cannot share evenly
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    settings = dataclasses.replace(SETTINGS, batch=int(os.environ.get("BATCH", "4")), **given)
    try:
        distill_together(setup_for(unet, validation, settings), students_of(unet, folder, PLANS))
    except PruneLabError as error:
        sys.stderr.write(f"error: {error}\n")  # at once, as the other process writes too
        sys.exit(1)
    end_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
