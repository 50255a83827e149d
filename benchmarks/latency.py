"""A forward pass of each BK-SDM student of the reference architecture against the teacher's, timed in turns.

Prints milliseconds, the change against the teacher with its interval, and that of multiply-adds beside it.
"""

from __future__ import annotations

import argparse

import torch

from prune_lab.models import resolve_model
from prune_lab.plans import parse_plan
from prune_lab.profiling import TEACHER, Service, cost_table, time_plans
from prune_lab.runtime import pick_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--own-processes", action="store_true", help="each U-Net in a process of its own")
    arguments = parser.parse_args()
    architecture = resolve_model(arguments.model).architecture
    costs = cost_table(architecture)
    service = Service(
        str(pick_device(arguments.device)), arguments.dtype, arguments.batch, tokens=architecture.tokens
    )
    plans = {text: parse_plan(text, architecture) for text in architecture.family.plans}
    turns = time_plans(
        architecture, plans, service, rounds=arguments.rounds, own_processes=arguments.own_processes or None
    )
    print(
        f"{arguments.model}, {service.text(architecture.config)}, {torch.get_num_threads()} threads, "
        f"{arguments.rounds} rounds in turns, {turns.processes}"
    )
    for text, found in turns.compared().items():
        change = found.change
        line = f"  {text:<10}{found.latency.median_ms:9.1f} ms"
        if text != TEACHER:
            ends = "" if change.low is None else f" ({change.low:+.1%} to {change.high:+.1%})"
            macs = costs.of(plans[text]).macs / costs.total.macs - 1
            line += f"   time {change.change:+.1%}{ends}, {change.verdict}   MACs {macs:+.1%}"
        print(line)


if __name__ == "__main__":
    main()
