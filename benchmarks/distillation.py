"""Distillation steps on cached latents and text embeddings against encoding pictures and captions in every step.

BK-SDM's own script encodes in the loop. Prints samples per second of both, their ratio, and where the time goes. Both
take the same optimiser step on the same student; random weights and pictures, which changes no shape.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers.training_utils import EMAModel

from prune_lab.blocks import architecture_of
from prune_lab.config import DistillConfig
from prune_lab.distill import LatentData, batch_losses, draw_batch, encode_data, feature_pairs
from prune_lab.distill.checkpoint import TrainingState
from prune_lab.distill.data import batch_rows
from prune_lab.distill.loop import take_step
from prune_lab.models import load_pipeline, resolve_model
from prune_lab.plans import parse_plan
from prune_lab.probes import encode_captions, encode_pictures
from prune_lab.runtime import pick_device, seeded, synchronize
from prune_lab.surgery import materialise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference", help="a pipeline: reference or a folder")
    parser.add_argument("--plan", default="bk-small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    pipeline = load_pipeline(resolve_model(arguments.model), device=device)
    teacher = pipeline.unet
    architecture = architecture_of(teacher)
    plan = parse_plan(arguments.plan, architecture)
    pairs = feature_pairs(architecture, plan)
    settings = DistillConfig(steps=arguments.runs, batch=arguments.batch)

    count = 2 * arguments.batch
    side = teacher.config.sample_size * pipeline.vae_scale_factor
    pictures = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=seeded(0))
    captions = [f"noto emoji, picture number {number}" for number in range(count)]
    cached = encode_data(pipeline, pictures, captions)

    def started() -> TrainingState:
        student = materialise(teacher, plan).train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, fused=True)
        ema = EMAModel(student.parameters(), decay=settings.ema_decay)
        return TrainingState(student, optimizer, ema, step=0, seconds=0.0, history=[])

    def from_cache(step: int) -> LatentData:
        return cached

    def in_the_loop(step: int) -> LatentData:
        rows = batch_rows(count, arguments.batch, settings.seed, step)
        chosen = [captions[row] for row in rows]
        latents = encode_pictures(pipeline, pictures[rows], batch=arguments.batch)
        embeddings, added = encode_captions(pipeline, chosen, batch=arguments.batch)
        return LatentData(latents, embeddings, cached.empty_embedding, tuple(chosen), added)

    ways: dict[str, Callable[[int], LatentData]] = {"encode in the loop": in_the_loop, "cached": from_cache}
    states = {name: started() for name in ways}
    encoding: dict[str, list[float]] = {name: [] for name in ways}
    whole: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(arguments.runs + 1):  # the first warms up
        for name, data_for in ways.items():  # interleaved: a busy moment hits both alike
            synchronize(device)
            start = time.perf_counter()
            data = data_for(run + 1)
            synchronize(device)
            encoded = time.perf_counter()
            batch = draw_batch(data, pipeline.scheduler, settings, run + 1, device)
            losses = batch_losses(teacher, states[name].student, pairs, batch)
            take_step(states[name], losses, settings)
            synchronize(device)
            if run:
                encoding[name].append(encoded - start)
                whole[name].append(time.perf_counter() - start)

    print(
        f"{arguments.model}, {arguments.plan}, batch {arguments.batch}, {device} float32, "
        f"{torch.get_num_threads()} threads, median of {arguments.runs} steps"
    )
    for name in ways:
        seconds, spent = statistics.median(whole[name]), statistics.median(encoding[name])
        print(
            f"  {name:<20}{arguments.batch / seconds:8.1f} samples/s   {1e3 * seconds:8.0f} ms a step, "
            f"{1e3 * spent:.0f} of them encoding"
        )
    # of neighbouring steps, so that a slow minute of the machine cancels out
    pairwise = [slow / fast for slow, fast in zip(whole["encode in the loop"], whole["cached"], strict=True)]
    print(
        f"  cached is {statistics.median(pairwise):.2f} times as fast ({min(pairwise):.2f} to {max(pairwise):.2f})"
    )


if __name__ == "__main__":
    main()
