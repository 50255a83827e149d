"""How many plans are priced in a second from one boolean matrix, against a loop over ``CostTable.of``.

    python -m benchmarks.pricing

Random plans, every removable block gone with the same chance. Prints plans per second of one core's time (of the
process, so another process on the machine changes little) for parameters and MACs alone, and with predicted latency
and activation memory; both ways must agree to the last bit. The latencies are made up: only the pricing is timed.

    python -m benchmarks.pricing --latency --model reference --batch 8

measures a real latency table instead: the error of predictions on plans that were not calibrated with, and where MACs
and latency disagree. It takes minutes and wants a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.models import load_model, resolve_model
from prune_lab.plans import parse_plan
from prune_lab.profiling import (
    CostTable,
    Latency,
    LatencyTable,
    PlanMatrix,
    Saving,
    activation_table,
    as_plans,
    cost_table,
    latency_disagreement,
    measure_latency_table,
    random_model,
    random_native_plans,
)
from prune_lab.profiling.latency import saving_names
from prune_lab.runtime import Environment, pick_device, pick_dtype, progress_shown, write_frame, write_json

MODELS = ("sd-v1.4", "sdxl-base")


def made_up_latency(architecture: Architecture, seed: int = 0) -> LatencyTable:
    """A latency table of random numbers."""
    generator = np.random.default_rng(seed)
    names = saving_names(architecture)
    blocks = {block.name for block in architecture.blocks}
    savings = tuple(
        Saving(name, "block" if name in blocks else "samplers", saved, saved, saved)
        for name, saved in zip(names, generator.uniform(1, 2, len(names)).tolist(), strict=True)
    )
    side = int(architecture.config["sample_size"])
    whole = Latency(100.0, 100.0, 100.0, 2, 0)
    return LatencyTable(architecture, whole, savings, 1.0, (), 1, (side, side), 77, 0, Environment.capture())


def random_plans(architecture: Architecture, count: int, seed: int = 0) -> PlanMatrix:
    """(count, blocks): every removable block is gone with a chance of 0.4."""
    removable = np.array([block.removable for block in architecture.blocks])
    chosen: PlanMatrix = (np.random.default_rng(seed).random((count, len(removable))) < 0.4) & removable
    return chosen


def seconds(call: Callable[[], object]) -> float:
    """Time that this process spent in ``call``."""
    start = time.process_time()
    call()
    return time.process_time() - start


def compare(model: str, count: int, looped: int, runs: int) -> None:
    """The lines of one model."""
    architecture = resolve_model(model).architecture
    latency, activations = made_up_latency(architecture), activation_table(architecture)
    matrix = random_plans(architecture, count)
    plans = as_plans(matrix[:looped], architecture)
    tables: dict[str, CostTable] = {
        "params, MACs": cost_table(architecture),
        "and latency": cost_table(architecture, latency=latency),
        "and memory": cost_table(architecture, latency=latency, activations=activations),
    }
    plain, costs = tables["params, MACs"], tables["and memory"]
    one_by_one, found = [costs.of(plan) for plan in plans], costs.of_many(matrix[:looped])
    for column in ("params", "macs", "paper_macs", "latency_ms", "memory"):
        assert [getattr(cost, column) for cost in one_by_one] == getattr(found, column).tolist()

    loop: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in tables}
    for _ in range(runs):  # interleaved: a busy moment hits all alike
        loop.append(seconds(lambda: [plain.of(plan) for plan in plans]) / looped)
        for name, table in tables.items():
            times[name].append(seconds(lambda table=table: table.of_many(matrix)) / count)  # type: ignore[misc]
    baseline = statistics.median(loop)
    print(f"{model}, {len(architecture.blocks)} blocks, {count:,} plans at once, median of {runs} runs")
    print(f"  {'loop over of(plan)':<20}{1 / baseline:14,.0f} plans/s")
    for name, spent in times.items():
        each = statistics.median(spent)
        print(f"  {name:<20}{1 / each:14,.0f} plans/s   {baseline / each:8,.0f} times as many")


def measure(arguments: argparse.Namespace) -> None:
    """A latency table, its errors and disagreements."""
    source = resolve_model(arguments.model)
    device, dtype = pick_device(arguments.device), pick_dtype(arguments.dtype)
    unet = (
        load_model(source, device=device, dtype=dtype)
        if source.has_weights
        else random_model(source.config, device=device, dtype=dtype)
    )
    architecture = architecture_of(unet)
    plans = random_native_plans(architecture, arguments.calibrate + arguments.held_out, seed=arguments.seed)
    held_out = list(plans[arguments.calibrate :])
    depth = len(architecture.config["down_block_types"])
    if depth == 4:  # BK-SDM's plans are defined for four stages
        held_out += [parse_plan(text, architecture) for text in architecture.family.plans]
    with progress_shown():
        table = measure_latency_table(
            unet,
            calibrate=plans[: arguments.calibrate],
            held_out=held_out,
            rounds=arguments.rounds,
            batch=arguments.batch,
            seed=arguments.seed,
        )
    whole = table.whole
    print(
        f"{arguments.model}, batch {table.batch}, {device} {arguments.dtype}, "
        f"{table.environment.num_threads} threads, {table.whole.runs} passes: "
        f"{whole.median_ms:.1f} ms ({whole.p10_ms:.1f} to {whole.p90_ms:.1f}), scale {table.scale:.3f}"
    )
    print(table.checks_frame().drop(columns="removed").to_string(index=False, float_format="{:.2f}".format))
    print(
        f"error on {len(held_out)} plans that were not calibrated with: median "
        f"{table.median_error_percent:.2f} %, worst {table.worst_error_percent:.2f} %"
    )
    disagreement = latency_disagreement(cost_table(architecture), table)
    print(disagreement.to_string(index=False, float_format="{:.4f}".format))
    if arguments.out:
        write_json(arguments.out / "latency.json", table.as_dict())
        write_frame(arguments.out / "latency.csv", table.frame())
        write_frame(arguments.out / "latency_checks.csv", table.checks_frame())
        write_frame(arguments.out / "latency_disagreement.csv", disagreement)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plans", type=int, default=1_000_000)
    parser.add_argument("--looped", type=int, default=1_000, help="plans for the loop")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--latency", action="store_true", help="measure a latency table instead")
    parser.add_argument("--model", default="reference", help="with --latency, as the next ones")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100, help="passes by parts, at most")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--calibrate", type=int, default=5, help="random native plans to calibrate with")
    parser.add_argument("--held-out", type=int, default=7, help="and others to measure the error on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the table")
    arguments = parser.parse_args()
    if arguments.latency:
        measure(arguments)
        return
    for model in MODELS:
        compare(model, arguments.plans, arguments.looped, arguments.runs)


if __name__ == "__main__":
    main()
