"""The order of all blocks by a race, against measuring every block on every sample; shipped reference model.

Prints the share of the naive loop's multiply-adds that a race spends, the ratio of time, and Kendall's tau between its
order and that of the whole probe, over races that differ in the order of their samples. A plain score on as many
samples as the budget buys for every block stands beside it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import kendalltau

from prune_lab.blocks import block_groups
from prune_lab.config import ProbeConfig, RunConfig
from prune_lab.importance import ImportanceTable, Race, Samples, ScoreCache, ScoringContext, score
from prune_lab.importance.intervals import impacts_of
from prune_lab.importance.racing import sample_order
from prune_lab.plans import gone_with
from prune_lab.prefix_sharing import macs_without
from prune_lab.session import Session, ensure_probe
from prune_lab.workflow import start_run


def agreement(table: ImportanceTable, whole: ImportanceTable) -> float:
    """Kendall's tau of the two orders."""
    return float(kendalltau(table.impacts, whole.impacts).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--timesteps", type=int, default=32)
    parser.add_argument(
        "--races", type=int, default=20, help="races that differ in the order of their samples"
    )
    parser.add_argument("--budget", type=float, action="append", help="may be repeated; default 0.15")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = RunConfig(
            model=arguments.model,
            device=arguments.device,
            probe=ProbeConfig(samples=arguments.samples, timesteps=arguments.timesteps),
        )
        run = start_run(settings, Path(folder))
        session = Session(run)
        probe = ensure_probe(session)
        groups, cache = block_groups(session.architecture, "block"), ScoreCache()
        start = time.perf_counter()
        whole = score(ScoringContext(session.model, probe, cache=cache), groups, bootstrap=0)
        whole_seconds = time.perf_counter() - start
        assert whole.compute is not None
        print(
            f"{arguments.model}, {len(groups)} blocks, {len(probe)} samples at {arguments.timesteps} timesteps, "
            f"{session.device} float32, {torch.get_num_threads()} threads; all of it: "
            f"{whole.compute.macs / whole.compute.naive_macs:.3f} of the naive loop's multiply-adds, "
            f"{whole_seconds:.1f} s"
        )
        architecture = session.architecture
        after = sum(
            macs_without(architecture, gone_with(architecture, group.blocks, stand_in=True))
            for group in groups
        )
        for budget in arguments.budget or [0.15]:
            start = time.perf_counter()
            first = score(ScoringContext(session.model, probe), groups, bootstrap=0, race=Race(budget))
            seconds = time.perf_counter() - start
            assert first.compute is not None
            races = [first] + [
                score(
                    ScoringContext(session.model, probe, cache=cache, seed=seed),
                    groups,
                    bootstrap=0,
                    race=Race(budget),
                )
                for seed in range(1, arguments.races)
            ]
            taus = np.array([agreement(race, whole) for race in races])
            spent = [entry.samples for entry in first.entries]
            # A plain score on the samples that the same budget buys for all blocks alike.
            rows = int(
                budget
                * len(groups)
                * len(probe)
                * architecture.total_macs
                / (architecture.total_macs + after)
            )
            assert whole.values is not None
            assert whole.scales is not None
            plain = []
            for seed in range(arguments.races):
                some = sample_order(Samples.of(probe), seed)[:rows]
                impacts = impacts_of(whole.values[:, some], whole.scales[some])
                plain.append(float(kendalltau(impacts, whole.impacts).statistic))
            print(
                f"  budget {budget:.2f}: spent {first.compute.macs / first.compute.naive_macs:.3f}, "
                f"{whole_seconds / seconds:.2f} times as fast as all of it; samples per block {min(spent)} to "
                f"{max(spent)}, median {np.median(spent):.0f}; Kendall's tau over {len(taus)} races: mean "
                f"{taus.mean():.4f}, least {taus.min():.4f}, {np.mean(taus >= 0.98):.0%} at 0.98 or more; "
                f"{rows} samples for every block: mean {np.mean(plain):.4f}, least {min(plain):.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
