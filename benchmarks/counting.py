"""How long counting takes without weights, and what pricing plans by subtraction saves over counting each student.

Prints the seconds of the count, and the ratio of the two ways of pricing the BK-SDM plans.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from prune_lab import counting
from prune_lab.blocks import architecture_of
from prune_lab.models import preset_config
from prune_lab.plans import native_layout, parse_plan
from prune_lab.profiling import cost_table


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of ``call``, with nothing remembered from earlier calls."""
    counting._count_config.cache_clear()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="sd-v1.4")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    config = preset_config(arguments.preset)
    architecture = architecture_of(config)
    plans = [parse_plan(text, architecture) for text in architecture.family.plans]
    students = [native_layout(architecture, plan).config for plan in plans]

    ways: dict[str, Callable[[], object]] = {
        "the count": lambda: counting.count_macs(config),
        "plans by subtraction": lambda: [cost_table(architecture).of(plan) for plan in plans],
        "plans one by one": lambda: [counting.count_macs(student) for student in students],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call()  # imports and torch's own first-use work
    for _ in range(arguments.runs):
        for name, call in ways.items():  # interleaved: a busy moment hits all alike
            times[name].append(seconds(call))
    medians = {name: statistics.median(found) for name, found in times.items()}

    print(f"{arguments.preset}, no weights, median of {arguments.runs} runs")
    for name, median in medians.items():
        print(f"  {name:<22}{median:8.3f} s")
    print(f"  {counting.count_macs(config).total:,} MACs")
    ratio = medians["plans one by one"] / medians["plans by subtraction"]
    print(f"  subtraction prices {len(plans)} plans {ratio:.1f} times as fast as counting each")


if __name__ == "__main__":
    main()
