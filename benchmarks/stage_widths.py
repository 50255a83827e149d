"""Whole stages with fewer channels, distilled as the plans of the study of widths were: what is that worth?

    python -m benchmarks.stage_widths --work DIR --out reports/width

A row per budget and criterion is appended to ``stages.csv`` when it is done; those that are there are left out. The
channels within a budget are found by Taylor; by magnitude and by chance the same number of channels is cut. Each model
is timed in turns with the whole one. ``STAGES.md`` is drawn from ``stages.csv`` and from the ``outcomes.csv`` of the
study beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.width import settings
from prune_lab.families import example_inputs, plain_config
from prune_lab.models import load_model, resolve_model
from prune_lab.profiling.turns import TimedCall, time_in_turns
from prune_lab.runtime import write_frame, write_text
from prune_lab.session import Session
from prune_lab.workflow import Narrowing, narrow, start_run

MODEL = "reference"
ASKED = ((65, "taylor"), (80, "taylor"), (65, "magnitude"), (65, "random"))  # percent of the multiply-adds
WAYS = {"both": "blocks and widths inside", "depth": "whole blocks", "width": "widths inside of blocks"}
COLUMNS = (
    *("model", "budget", "by", "channels", "macs", "params", "time", "time_low", "time_high", "rounds"),
    *(
        "impact",
        "teacher_loss",
        "loss_before",
        "loss_after",
        "steps",
        "batch",
        "seed",
        "torch",
        "diffusers",
        "device",
    ),
)


def _pass_of(model: Any) -> TimedCall:
    """One forward pass of one sample of ``model``, in milliseconds."""
    inputs = example_inputs(plain_config(model))

    @torch.inference_mode()
    def once() -> float:
        start = time.perf_counter()
        model(**inputs)
        return 1e3 * (time.perf_counter() - start)

    return once


def _measured(
    budget: int, by: str, channels: tuple[int, ...], work: Path, steps: int, rounds: int
) -> dict[str, Any]:
    """The row of one model: made, distilled and timed."""
    folder = work / f"{budget}-{by}"
    session = Session(start_run(settings(MODEL, 0, steps, 8, ()), folder / "run"))
    budgets = () if channels else (f"macs<={budget}%",)
    out = folder / "narrow"
    (row,) = narrow(session, out, Narrowing(channels, budgets, by, trained=True), force=True).to_dict(
        "records"
    )
    models = {"whole": session.model, "narrow": load_model(resolve_model(str(out)), device="cpu")}
    turns = time_in_turns({name: _pass_of(model) for name, model in models.items()}, rounds=rounds)
    change = turns.change("narrow")
    assert change.low is not None
    assert change.high is not None
    return {
        "model": MODEL,
        "budget": budget,
        "by": by,
        "channels": row["channels"],
        "macs": 1 + row["macs_change"],
        "params": 1 + row["params_change"],
        "time": 1 + change.change,
        "time_low": 1 + change.low,
        "time_high": 1 + change.high,
        "rounds": rounds,
        **{name: row[name] for name in ("impact", "teacher_loss", "loss_before", "loss_after")},
        "steps": steps,
        "batch": 8,
        "seed": 0,
        "torch": torch.__version__,
        "diffusers": importlib.metadata.version("diffusers"),
        "device": "cpu",
    }


def _lost(row: Mapping[Any, Any]) -> tuple[float, float]:
    """(after, before) distillation: the held-out loss over the teacher's."""
    return row["loss_after"] - row["teacher_loss"], row["loss_before"] - row["teacher_loss"]


def write_page(out: Path) -> None:
    """STAGES.md of the tables in ``out``."""
    rows, study = pd.read_csv(out / "stages.csv"), pd.read_csv(out / "outcomes.csv")
    plans = pd.read_csv(out / "plans.csv")
    lines = [
        "# Whole stages with fewer channels",
        "",
        f"Made by `python -m benchmarks.stage_widths`: {rows['steps'][0]} steps of distillation with "
        f"{rows['batch'][0]} samples each, seed {rows['seed'][0]}, float32, torch {rows['torch'][0]}, diffusers "
        f"{rows['diffusers'][0]}, {rows['device'][0]}; one pass of one sample timed in turns with the whole model in "
        f"{rows['rounds'][0]} rounds. What is lost is the held-out loss after distillation over the teacher's. Rows of "
        "the study of widths with seed 0 stand beside them.",
        "",
        "| budget | what leaves | form | MACs | params | time (95 %) | lost before | lost after |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    found = []
    for one in rows.to_dict("records"):
        took = f"{one['time']:.3f} ({one['time_low']:.3f} to {one['time_high']:.3f})"
        by = "chance" if one["by"] == "random" else one["by"]
        what = f"stages, by {by}: {one['channels'].replace(',', ' ')}"
        found.append((-one["budget"], *_lost(one), what, "plain", one["macs"], one["params"], took))
    same = study[(study["model"] == MODEL) & (study["equal"] == "macs") & (study["seed"] == 0)]
    beside = same[same["budget"].isin(rows["budget"])].merge(plans, on=["model", "plan", "equal", "budget"])
    for one in beside.to_dict("records"):
        what, _, how = str(one["way"]).partition("-")
        words = WAYS[what] + (f", by {'chance' if how == 'random' else how}" if how else "")
        form = "plain" if what == "depth" else "own code"
        found.append(
            (-one["budget"], *_lost(one), words, form, one["macs"], one["params"], f"{one['time']:.3f}")
        )
    for budget, after, before, what, form, macs, params, took in sorted(found):
        lines.append(
            f"| {-budget} % | {what} | {form} | {macs:.3f} | {params:.3f} | {took} | {before:.4f} | {after:.4f} |"
        )
    write_text(out / "STAGES.md", "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, help="for what a unit that was stopped goes on from; none: the page alone"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    path = arguments.out / "stages.csv"
    torch.set_num_threads(1)
    for budget, by in ASKED if arguments.work else ():
        rows = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=list(COLUMNS))
        if len(rows[(rows["budget"] == budget) & (rows["by"] == by)]):
            continue
        known = rows[(rows["budget"] == budget) & (rows["by"] == "taylor")]["channels"]
        channels = () if known.empty else tuple(map(int, known.iloc[0].split(",")))
        row = _measured(budget, by, channels, arguments.work, arguments.steps, arguments.rounds)
        write_frame(path, pd.concat([rows, pd.DataFrame([row])[list(COLUMNS)]], ignore_index=True))
    write_page(arguments.out)


if __name__ == "__main__":
    main()
