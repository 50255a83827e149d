"""A forward pass of each BK-SDM student of the reference architecture against the teacher's, in the same run.

Prints milliseconds, the ratio to the teacher, and the ratio of multiply-adds beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from prune_lab.models import resolve_model
from prune_lab.plans import native_layout, parse_plan
from prune_lab.profiling import cost_table, random_unet
from prune_lab.profiling.latency import random_inputs
from prune_lab.runtime import pick_device, pick_dtype, synchronize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    device, dtype = pick_device(arguments.device), pick_dtype(arguments.dtype)
    architecture = resolve_model(arguments.model).architecture
    costs = cost_table(architecture)
    plans = {text: parse_plan(text, architecture) for text in ("teacher", *architecture.family.plans)}
    unets = {
        text: random_unet(native_layout(architecture, plan).config, device=device, dtype=dtype)
        for text, plan in plans.items()
    }
    inputs = random_inputs(architecture.config, batch=arguments.batch, device=device, dtype=dtype)

    times: dict[str, list[float]] = {text: [] for text in plans}
    with torch.inference_mode():
        for unet in unets.values():
            unet(**inputs)
        for _ in range(arguments.runs):
            for text, unet in unets.items():  # interleaved: a busy moment hits all alike
                synchronize(device)
                start = time.perf_counter()
                unet(**inputs)
                synchronize(device)
                times[text].append(1e3 * (time.perf_counter() - start))

    print(
        f"{arguments.model}, batch {arguments.batch}, {device} {arguments.dtype}, {torch.get_num_threads()} threads, "
        f"median of {arguments.runs} runs"
    )
    baseline = statistics.median(times["teacher"])
    for text, found in times.items():
        median = statistics.median(found)
        macs = costs.of(plans[text]).macs / costs.total.macs
        print(
            f"  {text:<10}{median:9.1f} ms   time {median / baseline:6.3f} of the teacher's   MACs {macs:6.3f}"
        )


if __name__ == "__main__":
    main()
