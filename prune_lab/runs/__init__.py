"""The folder of a run: where its files lie, and how it is opened."""

from __future__ import annotations

from prune_lab.runs.lock import writing
from prune_lab.runs.opening import FORMAT, load_run_config, open_run
from prune_lab.runs.paths import CandidatePaths, PathIn, Run

__all__ = ["FORMAT", "CandidatePaths", "PathIn", "Run", "load_run_config", "open_run", "writing"]
