"""What random conditioning (arXiv:2504.02011) is worth when there are few pictures; shipped reference model.

The same student is distilled on a few pictures, on the same few with other captions, and on many. Prints for each the
held-out loss against the noise, and how far the student's prediction is from the teacher's on held-out rows, both in
mean squared error and as the mean over seeds; a seed draws the pictures, their order and the noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from prune_lab.assets import decode_pictures, load_pictures
from prune_lab.blocks import architecture_of
from prune_lab.config import DistillConfig
from prune_lab.distill import (
    DistillSetup,
    LatentData,
    OtherCaptions,
    Student,
    Subset,
    distill_together,
    encode_data,
    feature_pairs,
    other_captions,
)
from prune_lab.evaluation import heldout_loss
from prune_lab.models import load_pipeline, resolve_model
from prune_lab.plans import parse_plan
from prune_lab.probes import Probe, make_probe, predict
from prune_lab.runs import CandidatePaths
from prune_lab.runtime import pick_device, seeded
from prune_lab.surgery import materialise


def losses_of(unet: Any, probe: Probe, teacher: torch.Tensor) -> tuple[float, float]:
    """(held-out loss against the noise, mean squared distance from the prediction of the teacher)."""
    distance = (predict(unet, probe) - teacher).square().mean()
    return float(heldout_loss(unet, probe).mean()), float(distance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", default="bk-small")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--captions", type=int, default=1000, help="other captions")
    parser.add_argument("--many", type=int, default=256, help="pictures of the last row")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--probability", type=float, default=0.8, help="distill.random_conditioning")
    parser.add_argument("--heldout", type=int, default=128, help="held-out pictures, one row each")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    pipeline = load_pipeline(resolve_model("reference"), device=device)
    teacher: Any = pipeline.unet
    train, heldout = load_pictures("train"), load_pictures("heldout")
    order = torch.randperm(len(heldout), generator=seeded(0))[: arguments.heldout].tolist()
    shown = heldout.iloc[order]
    probe = make_probe(
        pipeline,
        decode_pictures(shown),
        shown["caption"].tolist(),
        shown["group"].tolist(),
        timesteps=16,
        seed=1,
    )
    wanted = predict(teacher, probe)
    architecture = architecture_of(teacher)
    plan = parse_plan(arguments.plan, architecture)
    pairs = feature_pairs(architecture, plan)
    held = set(heldout["caption"])
    captions = [text for text in dict.fromkeys(train["caption"]) if text not in held][: arguments.captions]
    settings = DistillConfig(
        steps=arguments.steps,
        batch=arguments.batch,
        learning_rate=2e-4,  # as in the demo: a small model, and a short time
        warmup=10,
        ema_decay=0.98,
        validate_every=arguments.steps,
        trackers=(),
    )
    conditioned = dataclasses.replace(settings, random_conditioning=arguments.probability)
    found: dict[str, list[tuple[float, float]]] = {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        others = other_captions(pipeline, captions, folder / "captions.safetensors")
        for seed in range(arguments.seeds):
            chosen = torch.randperm(len(train), generator=seeded(seed))[: arguments.many].tolist()
            rows = train.iloc[chosen]
            many = encode_data(pipeline, decode_pictures(rows), rows["caption"].tolist())
            few = Subset.of(many, torch.arange(arguments.pictures))
            own = OtherCaptions(many.embeddings[: arguments.pictures], {}, f"own {seed}")
            count = arguments.pictures
            ways: dict[str, tuple[LatentData | Subset, OtherCaptions | None]] = {
                f"{count} pictures": (few, None),
                f"{count} pictures, their captions shuffled": (few, own),
                f"{count} pictures, {len(captions):,} other captions": (few, others),
                f"{arguments.many} pictures": (many, None),
            }
            for number, (way, (data, extra)) in enumerate(ways.items()):
                used = dataclasses.replace(settings if extra is None else conditioned, seed=seed)
                setup = DistillSetup(teacher, data, pipeline.scheduler, used, probe.rows(range(8)), device)
                setup = dataclasses.replace(setup, others=extra)
                student = Student(partial(materialise, teacher, plan), pairs, folder / f"{seed}-{number}")
                distill_together(setup, [student])
                distilled = CandidatePaths(student.folder).distilled_model
                unet = UNet2DConditionModel.from_pretrained(distilled).to(device)
                found.setdefault(way, []).append(losses_of(unet, probe, wanted))
                print(f"  seed {seed}, {way}: {found[way][-1][1]:.4f} from the teacher", flush=True)
        before = losses_of(materialise(teacher, plan), probe, wanted)
    print(
        f"reference, {arguments.plan}, {arguments.steps} steps of batch {arguments.batch}, {device} float32, "
        f"{torch.get_num_threads()} threads, {arguments.seeds} seeds, p = {arguments.probability:g}, "
        f"{len(probe)} held-out rows; {time.perf_counter() - start:.0f} s"
    )
    print(f"  {'teacher':46}  held-out {float(heldout_loss(teacher, probe).mean()):.4f}  from teacher 0")
    print(f"  {'before training':46}  held-out {before[0]:.4f}  from teacher {before[1]:.4f}")
    for way, values in found.items():
        loss, distance = np.mean(values, axis=0)
        each = ", ".join(f"{value[1]:.4f}" for value in values)
        print(f"  {way:46}  held-out {loss:.4f}  from teacher {distance:.4f} ({each})", flush=True)


if __name__ == "__main__":
    main()
