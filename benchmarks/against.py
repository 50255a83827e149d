"""Removal impact of every block by this commit against another: each in a process of its own, in turns.

``--other`` is a checkout of the other commit (``git worktree add --detach DIR COMMIT``), run with the same interpreter.
Prints the processor time of each, the ratio of the rounds, and how far both lie from the naive loop.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

# Runs in both checkouts, so it asks for nothing that only one of them has.
SERVER = """
import json, sys, time, torch
from diffusers import UNet2DConditionModel
from prune_lab.blocks import architecture_of
from prune_lab.models import resolve_model
from prune_lab.plans import gone_with
from prune_lab.prefix_sharing import predict_without
from prune_lab.probes import predict, random_probe
from prune_lab.surgery import bypassed
from safetensors.torch import save_file

torch.manual_seed(0)
model = UNet2DConditionModel.from_config(dict(resolve_model("reference").config)).eval()
architecture = architecture_of(model)
names = ["", *(block.name for block in architecture.blocks)]
sets = [gone_with(architecture, [name] if name else [], stand_in=True) for name in names]
print("ready", flush=True)
for line in sys.stdin:
    rows, way, path = json.loads(line)
    probe = random_probe(model.config, samples=rows, seed=0, timesteps=rows)
    answers, start = [], time.process_time()
    if way == "naive":
        for name in names:
            with bypassed(model, [name] if name else [], stand_in=True):
                answers.append(predict(model, probe, batch=rows))
    else:
        parts = predict_without(model, probe, sets, batch=rows)
        answers = [torch.cat(found) for found in zip(*(found for _, found in parts))]
    spent = time.process_time() - start
    save_file({str(number): answer.contiguous() for number, answer in enumerate(answers)}, path)
    print(spent, flush=True)
"""


class Server:
    """A process that scores by the code in ``folder``."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=folder,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"the process that scores ended ({self._process.wait()})")
        return line

    def score(self, rows: int, way: str, path: Path) -> float:
        """Seconds of processor time; the answers are in ``path``."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([rows, way, str(path)]) + "\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest relative difference between the answers of two ways, by number of the set."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - other).norm() / other.norm()) for name, other in wanted.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", type=Path, required=True, help="checkout of another commit")
    parser.add_argument("--rows", type=int, action="append", help="may be repeated; default 1 and 8")
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    here = Server(Path(__file__).resolve().parents[1])
    other = Server(arguments.other.resolve())
    ways = {"this": here, "other": other}
    print(f"reference, random weights, cpu float32, {torch.get_num_threads()} threads, processor time")
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.safetensors" for name in ("naive", *ways)}
        for rows in arguments.rows or (1, 8):
            here.score(rows, "naive", paths["naive"])
            for name, server in ways.items():
                server.score(rows, "shared", paths[name])  # warms up
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(arguments.runs):
                for name, server in ways.items():
                    times[name].append(server.score(rows, "shared", paths[name]))
            ratios = sorted(one / own for one, own in zip(times["other"], times["this"], strict=True))
            answers = {name: load_file(path) for name, path in paths.items()}
            differences = [apart(answers[name], answers["naive"]) for name in ways]
            print(
                f"  {rows:>3} rows   this commit {statistics.median(ratios):.3f} times as fast "
                f"({ratios[0]:.3f} to {ratios[-1]:.3f}), median of {arguments.runs}: "
                f"{statistics.median(times['this']):.2f} s against {statistics.median(times['other']):.2f} s; "
                f"from the naive loop {differences[0]:.1e} and {differences[1]:.1e}",
                flush=True,
            )
    here.close()
    other.close()


if __name__ == "__main__":
    main()
