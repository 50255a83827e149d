"""The reference model: a small real Stable Diffusion pipeline and its scorer, rebuilt from public packages.

`train_reference` does the whole job; what it made is shipped and found through `prune_lab.assets`.
"""

from __future__ import annotations

from pathlib import Path

from prune_lab.assets import decode_pictures, load_pictures, reference_folder, scorer_folder

__all__ = ["decode_pictures", "load_pictures", "reference_folder", "scorer_folder", "train_reference"]


def train_reference(
    work: Path,
    *,
    config: Path | None = None,
    sources: Path | None = None,
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Build the reference model under `work`, resuming what is there; see `prune_lab.reference.build`."""
    from prune_lab.reference.build import train_reference as build  # torch is slow to import

    build(work, config=config, sources=sources, device=device, out=out)
