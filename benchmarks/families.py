"""What pruning saves and what scoring takes, family by family.

The first table is arithmetic: parameters and multiply-adds of real models of their published sizes, without weights,
with a quarter and with half of their blocks gone. The second is measured: the same families with their real depth, made
narrow, with random weights; the whole model and the two students in turns, and all single removals by shared prefixes
against the naive loop. ``--out`` keeps both as CSV and Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.scoring import naive, naive_macs, shared
from prune_lab.blocks import Architecture, architecture_of
from prune_lab.forms import in_form
from prune_lab.models import resolve_model
from prune_lab.plans import PruningPlan, plan_of
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.probes import random_probe
from prune_lab.profiling import TEACHER, Service, cost_table, random_model, time_plans
from prune_lab.search import named_plans

_HEADS = {"num_attention_heads": 4, "attention_head_dim": 48}


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A real model's published sizes, and what makes it narrow enough to be timed: the depth stays."""

    config: Mapping[str, Any] | None  # None: the preset of its name
    narrow: Mapping[str, Any]
    latent: int | None = None  # side of the latent at its real size; None: as in its config
    narrow_latent: int | None = None


SHAPES: Mapping[str, Shape] = {
    "sd-v1.4": Shape(
        None, {"block_out_channels": [64, 128, 256, 256], "cross_attention_dim": 128, "sample_size": 32}
    ),
    "sdxl-base": Shape(
        None,
        {
            "block_out_channels": [64, 128, 256],
            "attention_head_dim": [1, 2, 4],
            "cross_attention_dim": 128,
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 320,
            "sample_size": 32,
        },
    ),
    "ddpm-cifar10-32": Shape(
        {
            "_class_name": "UNet2DModel",
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 2,
            "block_out_channels": [128, 256, 256, 256],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": None,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
        },
        {"block_out_channels": [64, 128, 128, 128]},
    ),
    "dit-xl-2-256": Shape(None, _HEADS),
    "pixart-alpha": Shape(
        None, {**_HEADS, "cross_attention_dim": 192, "caption_channels": 128, "sample_size": 32}
    ),
    "sd3-medium": Shape(
        None,
        {
            **_HEADS,
            "caption_projection_dim": 192,
            "joint_attention_dim": 128,
            "pooled_projection_dim": 64,
            "sample_size": 32,
        },
    ),
    "flux-dev": Shape(
        None,
        {
            **_HEADS,
            "axes_dims_rope": [8, 20, 20],
            "joint_attention_dim": 128,
            "pooled_projection_dim": 64,
        },
        narrow_latent=32,
    ),
    "wan-2.1-t2v-1.3b": Shape(
        {
            "_class_name": "WanTransformer3DModel",
            "patch_size": [1, 2, 2],
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": 8960,
            "num_layers": 30,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
            "rope_max_seq_len": 1024,
        },
        {**_HEADS, "text_dim": 128, "ffn_dim": 1120},
        latent=60,
        narrow_latent=32,
    ),
}


def architecture_named(name: str) -> Architecture:
    """The model of this name at its published size, on ``meta``."""
    config = SHAPES[name].config
    return resolve_model(name).architecture if config is None else architecture_of(config)


def students(architecture: Architecture) -> dict[str, PruningPlan]:
    """A plan of about a quarter of the blocks and one of half: BK-SDM's two of a U-Net that has them, else every fourth
    and every second of all that can be removed, each in the first form that it exists in.
    """
    plans = {
        plan.names[0]: plan
        for plan in named_plans(architecture)[0]
        if plan.names[0] in ("bk-base", "bk-small")
    }
    if not plans:
        blocks = [block.name for block in architecture.blocks if block.removable and not block.inside]
        plans = {
            "every fourth": plan_of(architecture, blocks[1::4]),
            "every second": plan_of(architecture, blocks[1::2]),
        }
    return {name: in_form(architecture, plan) for name, plan in plans.items()}


def savings(name: str) -> list[dict[str, Any]]:
    """A row for each student of a model of its published size, which needs no weights."""
    architecture = architecture_named(name)
    costs = cost_table(architecture, latent=SHAPES[name].latent, tokens=architecture.tokens)
    rows = []
    for text, plan in students(architecture).items():
        left = costs.of(plan)
        rows.append(
            {
                "model": name,
                "class": architecture.config["_class_name"],
                "plan": text,
                "blocks_removed": len(plan.removed),
                "form": plan.form,
                "params_before": costs.total.params,
                "params_after": left.params,
                "params_change": left.params / costs.total.params - 1,
                "gmacs_before": costs.total.macs / 1e9,
                "gmacs_after": left.macs / 1e9,
                "macs_change": left.macs / costs.total.macs - 1,
            }
        )
    return rows


def times(name: str, rounds: int, rows: int, runs: int) -> list[dict[str, Any]]:
    """A row for each student of a narrow model of the same depth: its time against the whole one's, in turns, and once
    for all what scoring every block takes against the naive loop.
    """
    config = {**architecture_named(name).config, **SHAPES[name].narrow}
    architecture, latent = architecture_of(config), SHAPES[name].narrow_latent
    model = random_model(config, seed=0)
    plans = students(architecture)
    service = Service(latent=latent, tokens=architecture.tokens)
    costs = cost_table(architecture, latent=latent, tokens=architecture.tokens)
    turns = time_plans(architecture, plans, service, rounds=rounds, model=model)
    probe = random_probe(config, samples=rows, seed=0, timesteps=rows, latent=latent)
    blocks = [block.name for block in architecture.blocks if not block.inside]
    pairs, apart, compute = [], 0.0, ComputeCost()
    for _ in range(runs):
        started = time.perf_counter()
        slow = naive(model, probe, blocks)
        between = time.perf_counter()
        fast = shared(model, probe, blocks, compute)
        pairs.append((between - started) / (time.perf_counter() - between))
        apart = max(apart, *(float((a - b).norm() / b.norm()) for a, b in zip(fast, slow, strict=True)))
    found = []
    compared = turns.compared()
    for text, plan in plans.items():
        change = compared[text].change
        found.append(
            {
                "model": f"{name}, narrow",
                "plan": text,
                "form": plan.form,
                "macs_change": costs.of(plan).macs / costs.total.macs - 1,
                "teacher_ms": compared[TEACHER].latency.median_ms,
                "student_ms": compared[text].latency.median_ms,
                "time_change": change.change,
                "time_low": change.low,
                "time_high": change.high,
                "scored_blocks": len(blocks),
                "scoring_macs_ratio": naive_macs(architecture, blocks) * rows * runs / compute.macs,
                "scoring_time_ratio": statistics.median(pairs),
                "largest_difference": apart,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=SHAPES, help="may be repeated; default all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for families_savings.csv, families_times.csv")
    arguments = parser.parse_args()
    models = arguments.model or SHAPES
    tables = {
        "families_savings": [row for name in models for row in savings(name)],
        "families_times": [
            row for name in models for row in times(name, arguments.rounds, arguments.rows, arguments.runs)
        ],
    }
    print(
        f"float32, cpu, {torch.get_num_threads()} threads, {arguments.rounds} rounds, torch {torch.__version__}"
    )
    for name, rows in tables.items():
        frame = pd.DataFrame(rows)
        print(frame.to_string(index=False))
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            frame.to_csv(arguments.out / f"{name}.csv", index=False)


if __name__ == "__main__":
    main()
