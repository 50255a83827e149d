"""A forward pass of Base, Small, Tiny and any other plan against the teacher's, in every runtime, timed in turns.

Writes one CSV, runtime by runtime, and a page beside it: the same command again goes on with those that are not in it.
Each model has a process of its own and random weights; a preset such as sd-v1.4 takes its shapes alone. Figures count
where nothing else runs: the load of the machine before and after is in the last columns. Exports of full size take
minutes and gigabytes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pandas as pd

from benchmarks.runtimes_page import write_page
from prune_lab.api.making import read_backends
from prune_lab.blocks import Architecture
from prune_lab.models import resolve_model
from prune_lab.plans import PruningPlan, named_plans, plan_of, read_plans
from prune_lab.profiling import (
    Service,
    cost_table,
    pixels_per_latent,
    plan_disagreements,
    runtime_table,
    services_of,
)
from prune_lab.runtime import write_frame
from prune_lab.width import width_of


def narrowed(architecture: Architecture, percent: float) -> PruningPlan:
    """Every part of every block made narrower alike, so that ``percent`` of the multiply-adds stay.

    The first units of each stay: which ones decides nothing about the time of a pass.
    """
    costs = cost_table(architecture)
    low, high, found = 0.0, 1.0, plan_of(architecture, ())
    for _ in range(12):
        share = (low + high) / 2
        widths = [width_of(site, range(max(1, round(share * site.count)))) for site in architecture.sites]
        plan = plan_of(architecture, (), widths=widths).built("own").named(f"widths-{percent:g}")
        if costs.of(plan).macs <= percent / 100 * costs.total.macs:
            low, found = share, plan
        else:
            high = share
    return found


_KEYS = ["model", "service", "plan"]  # of a row; the service names its backend
_SHOWN = ["plan", "median_ms", "cpu_ms", "latency_change", "latency_low", "latency_high", "macs_change"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference", help="a model, or a preset such as sd-v1.4")
    parser.add_argument(
        "--plan",
        action="append",
        default=[],
        help="beside the plans of the paper: a plan or a file of plans; any number of times",
    )
    parser.add_argument(
        "--widths",
        type=float,
        default=65,
        help="percent of the multiply-adds of the plan that is narrower alone",
    )
    parser.add_argument("--backends", default="eager,compile,onnx,openvino")
    parser.add_argument("--latent", type=int, help="side of the latent; default: the model's own")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/runtimes.csv"))
    arguments = parser.parse_args()
    source = resolve_model(arguments.model)
    architecture, pixels = source.architecture, pixels_per_latent(source)
    plans = [
        plan
        for text in (*named_plans(architecture), *arguments.plan)
        for plan in read_plans(text, architecture)
    ]
    plans.append(narrowed(architecture, arguments.widths))
    service = Service(latent=arguments.latent, tokens=architecture.tokens)
    done = pd.read_csv(arguments.out) if arguments.out.is_file() else pd.DataFrame(columns=_KEYS)
    for one in services_of(service, read_backends(arguments.backends)):
        words = one.text(architecture.config, pixels)
        here = (done["model"] == arguments.model) & (done["service"] == words)
        found = done[here]
        timed = set(found["plan"])
        if any(plan.label not in timed for plan in plans):  # then all are timed again, in turns
            before = os.getloadavg()[0]
            found = runtime_table(
                architecture, plans, [one], model=arguments.model, rounds=arguments.rounds, pixels=pixels
            )
            found = found.assign(load_before=before, load_after=os.getloadavg()[0], processors=os.cpu_count())
            done = pd.concat([rows for rows in (done[~here], found) if len(rows)], ignore_index=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            write_frame(arguments.out, done)
            write_page(arguments.out)
        print(f"{arguments.model}, {words}, {found['threads'].iloc[0]} threads")
        print(found[_SHOWN].to_string(index=False, float_format="{:.3f}".format))
        for line in plan_disagreements(found):
            print(line)


if __name__ == "__main__":
    main()
