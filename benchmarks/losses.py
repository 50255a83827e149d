"""Which feature loss should be the default: its variants, repair of the cuts and random conditioning, on two models.

    python -m benchmarks.losses --out reports/losses --jobs jobs.json --models reference
    python -m benchmarks.outcomes jobs.json --work DIR --out outcomes.jsonl --workers 1
    python -m benchmarks.losses --out reports/losses --lines outcomes.jsonl

The first command writes what is missing as jobs, a variant and seed each with all plans of a model, so that any first
part of them can be compared; the last puts what they found into outcomes.csv (a row per model, variant, plan, seed and
look) and rows.parquet (the losses of all held-out rows at the last look), and draws the page from them.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.losses_page import write_page
from benchmarks.outcome_tables import append_tables, frames_of_study, read_tables
from benchmarks.outcomes import Job, read_lines
from prune_lab.runtime import write_json

REPORTS = Path(__file__).parent.parent / "reports"
PLANS = {  # by model: the table of plans, the column of what they remove, and which ones: a good, a middling, a bad one
    "reference": ("ranking", "plan", ("search-1", "random-median", "bk-small")),
    "transformer": ("evidence", "removed", ("search-1", "lowest-of-64-masks", "random-5")),
}
BUDGET = "small"
UNIT = ["model", "variant", "plan", "plan_id", "seed"]
SAID = ("teacher", "seconds", "device", "torch", "diffusers")
CUT, MENDED = {"repair.kind": "none"}, {"repair.kind": "best"}  # best: what a run does by itself
FEATURES: Mapping[str, Mapping[str, Any]] = {
    **{
        name: {"distill.loss_variant": name}
        for name in ("raw", "normalised", "outlier-masked", "self-attention", "inverse-sensitivity")
    },
    "no-feature": {"distill.feature_weight": 0.0},  # the control
}
FIRST: Mapping[str, Mapping[str, Any]] = {
    **{name: {**settings, **CUT} for name, settings in FEATURES.items()},
    "raw+repair": {**FEATURES["raw"], **MENDED},
    "raw+conditioning": {**FEATURES["raw"], **CUT, "distill.random_conditioning": 0.5},
}
# The same as raw. Rows of the transformer by other names are older than that its features are compared with what the
# next block reads, and that a repair goes into its embedding of patches.
NEXT_BLOCK = {
    f"raw@next-block{end}": {**FEATURES["raw"], **cut} for end, cut in (("", CUT), ("+repair", MENDED))
}
THEN = NEXT_BLOCK | {
    f"{name}+repair": {**settings, **MENDED} for name, settings in FEATURES.items() if name != "raw"
}
VARIANTS = {**FIRST, **THEN}


def plans_of(model: str) -> dict[str, str]:
    """The plans of ``model`` by name, as text, from the committed tables."""
    study, column, names = PLANS[model]
    table = pd.read_csv(REPORTS / study / "plans.csv")
    if "model" in table:
        table = table[(table["model"] == model) & (table["budget"] == BUDGET)]
    named = table.set_index("name" if "name" in table else "plan")[column]
    return {name: str(named[name]) for name in names}


def jobs_of(
    model: str, done: pd.DataFrame, variants: Sequence[str], seeds: Sequence[int], steps: int
) -> list[Job]:
    """What is not in ``done``: all variants with one seed, then with the next; those of THEN after all others."""
    plans, found = plans_of(model), []
    for some in (FIRST, THEN):
        for seed in seeds:
            for variant in (name for name in some if name in variants):
                if variant in NEXT_BLOCK and model == "reference":
                    continue  # a U-Net's features stand at the ends of its stages
                unit = {"model": model, "variant": variant, "seed": seed}
                same = (done[list(unit)] == pd.Series(unit)).all(axis=1) & (done["step"] >= steps)
                missing = {name: text for name, text in plans.items() if name not in set(done["plan"][same])}
                if missing:
                    study, looks = f"losses {model} {variant}", max(1, steps // 3)
                    found.append(Job(study, model, missing, seed, steps, looks, some[variant]))
    return found


def _unit_of(line: Mapping[str, Any]) -> dict[str, Any]:
    _, model, variant = line["study"].split()
    return dict(zip(UNIT, (model, variant, line["plan"], line["plan_id"], line["seed"]), strict=True))


def frames_of(lines: Sequence[Mapping[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(a row per unit and look, a row per unit and held-out row at the last look) of ``lines`` that are done."""
    return frames_of_study(lines, "losses", _unit_of, SAID)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=Path, help="write what is missing as jobs of benchmarks.outcomes")
    parser.add_argument("--lines", type=Path, help="read what benchmarks.outcomes wrote")
    parser.add_argument("--models", nargs="+", default=list(PLANS), choices=PLANS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    if arguments.jobs:
        done, _ = read_tables(arguments.out, UNIT)
        jobs = [
            job
            for model in arguments.models
            for job in jobs_of(model, done, arguments.variants, arguments.seeds, arguments.steps)
        ]
        write_json(arguments.jobs, [dataclasses.asdict(job) for job in jobs])
        return
    if arguments.lines:
        arguments.out.mkdir(parents=True, exist_ok=True)
        append_tables(arguments.out, UNIT, *frames_of(read_lines(arguments.lines)))
    write_page(arguments.out)


if __name__ == "__main__":
    main()
