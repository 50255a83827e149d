"""Distils two tiny students in FOLDER; with KILL_AT=n in the environment the process dies by SIGKILL before step n."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import TINY_UNET, build_unet
from distilling import SCHEDULER, SETTINGS, setup_for, students_of, validation_probe

import prune_lab.distill.loop as loop
from prune_lab.distill import distill_together, draw_batch

PLANS = ("bk-small", "bk-tiny")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    unet = build_unet(TINY_UNET)
    kill_at = int(os.environ.get("KILL_AT", "0"))

    def dying(data: Any, scheduler: Any, settings: Any, step: int, device: Any, **part: Any) -> Any:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw_batch(data, scheduler, settings, step, device, **part)

    loop.draw_batch = dying  # type: ignore[attr-defined]
    setup = setup_for(unet, validation_probe(), SETTINGS)
    assert setup.scheduler is SCHEDULER
    distill_together(setup, students_of(unet, folder, PLANS))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
