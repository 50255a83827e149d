"""A run folder with made-up numbers, for tests of what only reads run folders. Nothing here was measured."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path

import pandas as pd
from PIL import Image, ImageDraw

from prune_lab.plans import PruningPlan

STAGES = {
    "Dn1": "R1 A1 R2 A2",
    "Dn2": "R1 A1 R2 A2",
    "Dn3": "R1 A1 R2 A2",
    "Dn4": "R1 R2",
    "Md": "R1 A1 R2",
    "Up1": "R1 R2 R3",
    "Up2": "R1 A1 R2 A2 R3 A3",
    "Up3": "R1 A1 R2 A2 R3 A3",
    "Up4": "R1 A1 R2 A2 R3 A3",
}
STARRED = ("Dn2.R1", "Dn3.R1", "Up3.R1", "Up4.R1")
WIDTHS = {
    "Dn1": 32,
    "Dn2": 64,
    "Dn3": 128,
    "Dn4": 128,
    "Md": 128,
    "Up1": 128,
    "Up2": 128,
    "Up3": 64,
    "Up4": 32,
}
DEPTHS = {"Dn1": 0, "Dn2": 1, "Dn3": 2, "Dn4": 3, "Md": 4, "Up1": 3, "Up2": 2, "Up3": 1, "Up4": 0}
NAMES = tuple(f"{stage}.{block}" for stage, blocks in STAGES.items() for block in blocks.split())
SECONDS = tuple(name for name in NAMES if name.endswith("2") and not name.startswith("Md"))
MIDDLE = ("Md.R1", "Md.A1", "Md.R2")
PLANS = {
    "bk-base": SECONDS,
    "bk-small": (*SECONDS, *MIDDLE),
    "bk-tiny": (*SECONDS, *MIDDLE, "Dn4.R1", "Up1.R1", "Up1.R3"),
    "search-params-bk-base-1": (*MIDDLE, "Dn4.R1", "Dn4.R2", "Up1.R1", "Up1.R2", "Up1.R3", "Dn3.A2"),
    "search-params-bk-small-1": (
        *MIDDLE,
        "Dn4.R1",
        "Dn4.R2",
        "Up1.R1",
        "Up1.R2",
        "Up1.R3",
        "Dn3.R2",
        "Dn3.A2",
        "Up2.A2",
    ),
}
TOKENS = 77  # of a caption
LEFT_OUT_REASON = "distillation stopped at step 40: the loss is not a number"
DROPPED_REASON = "at rung 1 of 2, 100 steps: worse than the last survivor by 0.0581 [0.0560, 0.0602]"


def plan_id(name: str) -> str:
    return PruningPlan(PLANS[name], "made-up").id


def write_blocks(folder: Path) -> None:
    rows = []
    for name in NAMES:
        stage, short = name.split(".")
        width = WIDTHS[stage]
        kind = "attention" if short.startswith("A") else "resnet"
        params = width * width * (18 if kind == "resnet" else 14)
        side = 16 >> min(DEPTHS[stage], 3)
        macs = params * side * side
        rows.append(
            {
                "name": name,
                "path": f"made.up.{name}",
                "stage": stage,
                "kind": kind,
                "in_channels": width * (2 if stage.startswith("Up") and kind == "resnet" else 1),
                "out_channels": width,
                "skip_channels": width if stage.startswith("Up") and kind == "resnet" else 0,
                "transformer_layers": 1 if kind == "attention" else 0,
                "params": params,
                "macs": macs,
                "attention_macs": macs // 5 if kind == "attention" else 0,
                "removable": name not in STARRED,
                "reason": "changes the width" if name in STARRED else "",
                "tokens": TOKENS,
                "lane": {"Dn": "left", "Up": "right"}.get(stage[:2], "middle"),
                "row": DEPTHS[stage],
            }
        )
    pd.DataFrame(rows).to_csv(folder / "blocks.csv", index=False)


def write_importance(folder: Path) -> None:
    draw = random.Random(7)
    rows = []

    def add(group: str, kind: str, blocks: list[str], impact: float) -> None:
        spread = math.exp(draw.uniform(0.1, 0.6))
        rows.append(
            {
                "group": group,
                "kind": kind,
                "blocks": " ".join(blocks),
                "starred": any(block in STARRED for block in blocks),
                "impact": impact,
                "low": impact / spread if group != "Md.A1" else -impact,
                "high": impact * spread,
                "samples": 64,
                "criterion": "output-mse",
                "probe": "0123456789abcdef",
                "model": "reference",
            }
        )

    impacts = {
        name: 10 ** (-0.2 - 0.75 * DEPTHS[name.split(".")[0]] - draw.uniform(0, 0.9)) for name in NAMES
    }
    for name in NAMES:
        add(name, "block", [name], impacts[name])
    for stage, blocks in STAGES.items():
        short = blocks.split()
        for left, right in pairwise(short):
            if left[0] == "R" and right[0] == "A" and f"{stage}.{left}" not in STARRED:
                members = [f"{stage}.{left}", f"{stage}.{right}"]
                add(f"{stage}.{left}+{right}", "pair", members, 1.2 * sum(impacts[one] for one in members))
        members = [f"{stage}.{one}" for one in short if f"{stage}.{one}" not in STARRED]
        add(stage, "stage", members, 1.5 * sum(impacts[one] for one in members))
    pd.DataFrame(rows).to_csv(folder / "importance.csv", index=False)


def write_costs(folder: Path) -> None:
    blocks = pd.read_csv(folder / "blocks.csv")
    rows = blocks[["name", "params", "macs", "attention_macs"]].assign(kind="block")
    extra = pd.DataFrame(
        [
            {"name": "Dn1.down", "kind": "sampler", "params": 9248, "macs": 600_000, "attention_macs": 0},
            {"name": "Up1.up", "kind": "sampler", "params": 147_584, "macs": 2_400_000, "attention_macs": 0},
            {"name": "rest", "kind": "rest", "params": 90_000, "macs": 900_000, "attention_macs": 0},
        ]
    )
    costs = pd.concat([rows, extra], ignore_index=True)
    costs["paper_macs"] = costs["macs"] - costs["attention_macs"]
    costs["weight_bytes"], costs["tokens"] = 4 * costs["params"], TOKENS
    columns = ["name", "kind", "params", "macs", "attention_macs", "paper_macs", "weight_bytes", "tokens"]
    costs[columns].to_csv(folder / "costs.csv", index=False)
    write_reductions(folder, costs)
    pd.DataFrame(
        [
            ("text_encoder", 2, 830_000, 10_000_000, 3.1, 0.02),
            ("unet", 50, 8_770_000, 9_500_000_000, 1312.0, 0.88),
            ("vae_decoder", 1, 1_200_000, 700_000_000, 148.0, 0.1),
        ],
        columns=["part", "calls", "params", "macs", "median_ms", "share"],
    ).assign(tokens=TOKENS).to_csv(folder / "pipeline.csv", index=False)


def plan_cost(costs: pd.DataFrame, removed: tuple[str, ...], column: str) -> int:
    return int(costs.loc[~costs["name"].isin(removed), column].sum())


def write_reductions(folder: Path, costs: pd.DataFrame) -> None:
    rows = []
    for model, factor in (("reference", 1), ("sd-v1.4", 97)):
        teacher = {
            column: factor * plan_cost(costs, (), column) for column in ("params", "macs", "paper_macs")
        }
        for name, removed in {
            "teacher": (),
            **{k: v for k, v in PLANS.items() if k.startswith("bk")},
        }.items():
            row: dict[str, object] = {"model": model, "plan": name}
            for column, whole in teacher.items():
                own = factor * plan_cost(costs, removed, column)
                row |= {column: own, f"{column}_change": own / whole - 1}
            row |= {"blocks_removed": len(removed), "tokens": TOKENS, "native": True}
            row |= {"uncounted": "add:108 silu:68"}
            if model == "reference":
                row |= {"median_ms": 40.0 - len(removed), "latency_change": -len(removed) / 40.0}
                row |= {"p10_ms": 38.12 - len(removed), "p90_ms": 43.91 - len(removed), "runs": 20}
                row |= {"latency_low": -len(removed) / 40 - 0.06, "latency_high": -len(removed) / 40 + 0.06}
                row |= {"timed": "in turns, one process", "service": "cpu float32, 64 x 64, batch 1"}
            rows.append(row)
    pd.DataFrame(rows).to_csv(folder / "reductions.csv", index=False)


def write_plans(folder: Path) -> None:
    (folder / "plans").mkdir()
    for name, removed in PLANS.items():
        value = {"id": plan_id(name), "names": [name], "architecture": "made-up", "removed": list(removed)}
        value["origin"] = "control" if name.startswith("bk-") else "search"
        (folder / "plans" / f"{plan_id(name)}.json").write_text(json.dumps(value))


def write_candidates(folder: Path) -> None:
    for index, name in enumerate(PLANS):
        home = folder / "candidates" / plan_id(name)
        home.mkdir(parents=True)
        draw = random.Random(index)
        rows = []
        for step in range(0, 301, 10):
            if name == "search-params-bk-small-1" and step > 40:
                break
            fade = math.exp(-step / 90) * (1 + 0.4 * index)
            task, output, feature = (
                base * (0.3 + fade) * draw.uniform(0.8, 1.25) for base in (0.12, 0.04, 2.5)
            )
            validation = 0.09 + 0.3 * fade if step % 100 == 0 else None
            rows.append((step, task, output, feature, task + output + feature, validation, 5e-5, step * 0.4))
        columns = ["step", "task", "output", "feature", "total", "validation", "learning_rate", "seconds"]
        pd.DataFrame(rows, columns=columns).to_csv(home / "recovery.csv", index=False)


def write_ranking(folder: Path) -> None:
    costs = pd.read_csv(folder / "costs.csv")

    def row(rank: int | None, name: str, origin: str, **rest: object) -> dict[str, object]:
        removed = PLANS.get(name, ())
        own = {column: plan_cost(costs, removed, column) for column in ("params", "macs", "paper_macs")}
        start = {
            "rank": rank,
            "plan": name,
            "plan_id": "f" * 12 if name == "teacher" else plan_id(name),
            "origin": origin,
        }
        start |= {"median_ms": 40.0 - len(removed), "latency_change": -len(removed) / 40}
        if removed:  # of the smallest cut the interval contains no change
            start |= {"latency_low": -len(removed) / 40 - 0.06, "latency_high": -len(removed) / 40 + 0.06}
        return start | {"blocks_removed": len(removed)} | own | rest

    def measured(shot: float, before: float, after: float, clip: float, pareto: bool) -> dict[str, object]:
        losses = {
            "impact_one_shot": shot,
            "loss_before": before,
            "loss_after": after,
            "steps": 300,
            "rung": 2,
        }
        return losses | {"clip_before": clip - 0.1, "clip_after": clip, "pareto": pareto, "status": "ranked"}

    rows = [
        row(0, "teacher", "teacher", pareto=True, loss_before=0.081, loss_after=0.081, clip_before=0.36,
            clip_after=0.36, impact_one_shot=0.0, status="teacher", steps=0),
        row(1, "search-params-bk-base-1", "search", tie_group=1, **measured(0.004, 0.092, 0.0858, 0.352, True)),
        row(2, "bk-base", "control", tie_group=2, **measured(0.31, 0.34, 0.0991, 0.331, True)),
        row(3, "bk-small", "control", tie_group=2, **measured(0.35, 0.39, 0.1012, 0.322, True)),
        row(4, "bk-tiny", "control", tie_group=3, **measured(0.41, 0.52, 0.2105, 0.309, False))
        | {"steps": 100, "rung": 1, "status": "dropped", "pareto": None, "reason": DROPPED_REASON},
        row(None, "search-params-bk-small-1", "search", impact_one_shot=0.03, loss_before=0.12, status="failed",
            reason=LEFT_OUT_REASON, steps=40, rung=1),
    ]  # fmt: skip
    columns = [
        *("rank", "tie_group", "plan", "plan_id", "origin", "blocks_removed", "params", "macs", "paper_macs"),
        *("median_ms", "latency_change", "latency_low", "latency_high", "impact_one_shot", "loss_before"),
        *("loss_after", "clip_before", "clip_after", "steps"),
        *("rung", "pareto", "status", "reason"),
    ]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "ranking.csv", index=False)
    write_tournament(folder)


def write_tournament(folder: Path) -> None:
    """Two rungs: at 100 steps one is dropped and one has failed, three come to the end."""
    first = plan_id("search-params-bk-base-1")
    base, small, tiny = (plan_id(name) for name in ("bk-base", "bk-small", "bk-tiny"))
    against = {"against": base, "tied": True}
    rows: list[dict[str, object]] = [
        {"rung": 1, "name": first, "loss": 0.0893, "place": 1, "fate": "kept"}
        | {"against": base, "tied": False, "difference": -0.0631, "low": -0.0642, "high": -0.062},
        {"rung": 1, "name": base, "loss": 0.1524, "place": 2, "fate": "kept", "clip": 0.33},
        {"rung": 1, "name": small, "loss": 0.153, "place": 3, "fate": "kept", "clip": 0.32}
        | against | {"difference": 0.0006, "low": -0.0011, "high": 0.0023, "reason": "goes on because it is tied"},
        {"rung": 1, "name": tiny, "loss": 0.2105, "place": 4, "fate": "dropped", "reason": DROPPED_REASON}
        | {"against": base, "tied": False, "difference": 0.0581, "low": 0.056, "high": 0.0602},
        {"rung": 1, "name": plan_id("search-params-bk-small-1"), "fate": "failed", "reason": LEFT_OUT_REASON},
        {"rung": 2, "name": first, "loss": 0.0858, "place": 1, "fate": "kept"},
        {"rung": 2, "name": base, "loss": 0.0991, "place": 2, "fate": "kept"}
        | {"against": first, "tied": False, "difference": 0.0133, "low": 0.0121, "high": 0.0145},
        {"rung": 2, "name": small, "loss": 0.1012, "place": 3, "fate": "kept"}
        | {"against": first, "tied": False, "difference": 0.0154, "low": 0.014, "high": 0.0168},
    ]  # fmt: skip
    columns = [
        *("rung", "steps", "name", "loss", "clip", "place", "fate", "tied", "against", "difference", "low"),
        *("high", "reason"),
    ]
    frame = pd.DataFrame(rows, columns=columns)
    frame["steps"] = frame["rung"].map({1: 100, 2: 300})
    frame.to_csv(folder / "tournament.csv", index=False)


def write_pictures(folder: Path) -> None:
    """Pictures of 4 prompts x 2 seeds, 64 px each: a disc whose colour tells prompt, seed and model."""
    (folder / "steps.csv").write_text("step,seconds\nscores,31.25\ndistillation,1204.5\n")
    pairs = [(prompt, seed) for prompt in PROMPTS for seed in (0, 1)]
    rows = [(f"{number}.png", prompt, seed) for number, (prompt, seed) in enumerate(pairs)]
    targets = [(folder / "pictures" / "teacher", 0)]
    for index, name in enumerate(PLANS):
        home = folder / "candidates" / plan_id(name) / "pictures"
        targets.append((home / "pruned", 40 + 40 * index))
        if name != "search-params-bk-small-1":
            targets.append((home / "distilled", 20 + 40 * index))
    for path, shade in targets:
        path.mkdir(parents=True)
        for number, (file, _, seed) in enumerate(rows):
            picture = Image.new("RGB", (64, 64), "white")
            fill = (60 * (number // 2), 120 * seed, shade)
            ImageDraw.Draw(picture).ellipse((8, 8, 56, 56), fill=fill)
            picture.save(path / file)
    pd.DataFrame(rows, columns=["file", "prompt", "seed"]).to_csv(
        folder / "pictures" / "prompts.csv", index=False
    )


PROMPTS = ("noto emoji, red apple", "twemoji, snail", 'noto emoji, <flag> & "co"', "fluent emoji, rocket")
CONFIG = """\
model = "reference"
device = "cpu"
dtype = "float32"
seed = 0

[distill]
steps = 300
batch = 16
learning_rate = 5e-05
task_weight = 1.0
output_weight = 1.0
feature_weight = 1.0
seed = 0

[evaluate]
prompts = ["noto emoji, red apple", "twemoji, snail", "noto emoji, <flag> & \\"co\\"", "fluent emoji, rocket"]
seeds = [0, 1]
steps = 25
guidance = 4.0

[report]
title = "Made-up run <for> tests & typography"
also_presets = ["sd-v1.4"]
"""

ENVIRONMENT = {
    "format": 2,
    "python": "3.11.7",
    "platform": "Linux x86_64",
    "cpu": "An Imaginary CPU",
    "num_threads": 2,
    "device": "cpu",
    "device_name": "An Imaginary CPU",
    "dtype": "float32",
    "torch": "2.13.0",
    "diffusers": "0.42.1",
}


def write_start(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(CONFIG)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))


# In the order of a real run; each entry needs the ones above it.
STEPS = {
    "start": write_start,
    "blocks": write_blocks,
    "score": write_importance,
    "costs": write_costs,
    "plans": write_plans,
    "distill": write_candidates,
    "rank": write_ranking,
    "pictures": write_pictures,
}


def write_run(folder: Path, upto: str = "pictures") -> Path:
    """The run folder ``folder`` as it is after the step ``upto``."""
    for step, write in STEPS.items():
        write(folder)
        if step == upto:
            break
    return folder
