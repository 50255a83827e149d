"""The reference model: a small real Stable Diffusion pipeline and its scorer, rebuilt from public packages.

`train_reference` does the whole job; what it made is shipped and found through `prune_lab.assets`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prune_lab.assets import decode_pictures, load_pictures, reference_folder, scorer_folder

__all__ = [
    "decode_pictures",
    "evaluate_reference",
    "load_pictures",
    "reference_folder",
    "scorer_folder",
    "train_reference",
]


def train_reference(
    work: Path,
    *,
    config: Path | None = None,
    sources: Path | None = None,
    device: str = "cpu",
    out: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Build the reference model under `work`, resuming what is there; see `prune_lab.reference.build`.

    `say` gets a line every 50 steps: loss, seconds a step and minutes left.
    """
    from prune_lab.reference.build import train_reference as build  # torch is slow to import

    build(work, config=config, sources=sources, device=device, out=out, say=say)


def evaluate_reference(
    out: Path, *, assets: Path | None = None, curves: Path | None = None
) -> dict[str, Any]:
    """Every measured number of the reference model, with its report in `out`; see `prune_lab.reference.evaluate`."""
    from prune_lab.reference.evaluate import evaluate_reference as evaluate

    return evaluate(out, assets=assets, curves=curves)
