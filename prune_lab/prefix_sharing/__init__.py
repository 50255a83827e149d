"""What a model answers without each of many sets of blocks, at the cost of what those answers do not share."""

from __future__ import annotations

from prune_lab.prefix_sharing.growing import growth
from prune_lab.prefix_sharing.needs import needed_bytes, stated_peak
from prune_lab.prefix_sharing.replay import replayed
from prune_lab.prefix_sharing.sharing import (
    ComputeCost,
    compiling,
    fitting_batch,
    macs_without,
    predict_without,
    state_bytes,
)

__all__ = [
    "ComputeCost",
    "compiling",
    "fitting_batch",
    "growth",
    "macs_without",
    "needed_bytes",
    "predict_without",
    "replayed",
    "state_bytes",
    "stated_peak",
]
