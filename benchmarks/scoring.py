"""Removal impact of every block by shared prefixes, against running the whole U-Net for every block.

Both ways answer the same rows without each of the 38 blocks and with all of them. Prints the ratio of multiply-adds,
which does not depend on the machine, the ratio of time, and how far the answers lie apart. Latents are noise: only the
work is measured. ``--width`` makes the U-Net that many times as wide.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.models import resolve_model
from prune_lab.plans import gone_with
from prune_lab.prefix_sharing import ComputeCost, predict_without
from prune_lab.probes import Probe, predict, random_probe
from prune_lab.runtime import pick_device, synchronize
from prune_lab.surgery import bypassed


def naive(unet: Any, probe: Probe, blocks: list[str]) -> list[torch.Tensor]:
    """The prediction of the U-Net, then without each block, everything run anew; one batch of all rows."""
    answers = [predict(unet, probe, batch=len(probe))]
    for name in blocks:
        with bypassed(unet, [name], stand_in=True):
            answers.append(predict(unet, probe, batch=len(probe)))
    return answers


def shared(unet: Any, probe: Probe, blocks: list[str], compute: ComputeCost) -> list[torch.Tensor]:
    """The same in one walk."""
    architecture = architecture_of(unet)
    gone = [gone_with(architecture, [name] if name else [], stand_in=True) for name in ["", *blocks]]
    parts = predict_without(unet, probe, gone, batch=len(probe), compute=compute)
    return [torch.cat(answers) for answers in zip(*(found for _, found in parts), strict=True)]


def naive_macs(architecture: Architecture, blocks: list[str]) -> int:
    """Multiply-adds of one row by the naive loop: the model, then without each block, which itself does not run."""
    count = architecture.count().by_module
    total = architecture.total_macs
    return total + sum(total - count[architecture.block(name).path][0] for name in blocks)


def compare(unet: Any, rows: int, runs: int, device: torch.device) -> None:
    """One line: ``rows`` rows, ``runs`` times each way in turn."""
    probe = random_probe(unet.config, samples=rows, seed=0, timesteps=rows)
    blocks = [block.name for block in architecture_of(unet).blocks]
    compute = ComputeCost()
    ways: dict[str, Callable[[], list[torch.Tensor]]] = {
        "naive": lambda: naive(unet, probe, blocks),
        "shared": lambda: shared(unet, probe, blocks, compute),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[torch.Tensor]] = {}
    for _ in range(runs):
        for name, way in ways.items():  # interleaved: a busy moment hits both alike
            synchronize(device)
            start = time.perf_counter()
            answers[name] = way()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    pairwise = [slow / fast for slow, fast in zip(times["naive"], times["shared"], strict=True)]
    fewer = naive_macs(architecture_of(unet), blocks) * rows * runs / compute.macs
    apart = max(
        float((one - other).norm() / other.norm())
        for one, other in zip(answers["shared"], answers["naive"], strict=True)
    )
    print(
        f"  {rows:>3} rows   {fewer:.3f} times fewer multiply-adds   "
        f"{statistics.median(pairwise):.2f} times as fast ({min(pairwise):.2f} to {max(pairwise):.2f})   "
        f"{statistics.median(times['naive']):.2f} s against {statistics.median(times['shared']):.2f} s   "
        f"largest relative difference {apart:.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference", help="reference, a preset, a folder or a config.json")
    parser.add_argument(
        "--width", type=int, action="append", help="times as wide; may be repeated; default 1 and 2"
    )
    parser.add_argument("--rows", type=int, action="append", help="may be repeated; default 1, 8 and 32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    config = dict(resolve_model(arguments.model).config)
    for width in arguments.width or (1, 2):
        torch.manual_seed(0)
        channels = [width * channel for channel in config["block_out_channels"]]
        unet = UNet2DConditionModel.from_config({**config, "block_out_channels": channels})
        unet = unet.eval().to(device)
        print(
            f"{arguments.model}, channels {channels}, random weights, {device} float32, "
            f"{torch.get_num_threads()} threads, median of {arguments.runs} runs each way"
        )
        for rows in arguments.rows or (1, 8, 32):
            compare(unet, rows, arguments.runs, device)


if __name__ == "__main__":
    main()
