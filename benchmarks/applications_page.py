"""The page of ``benchmarks.applications``, from its tables alone, and its figures, from the pictures that were drawn."""

from __future__ import annotations

from pathlib import Path

TEACHER = "reference"


def write_page(out: Path, work: Path) -> None:
    """Write README.md beside the tables in ``out``, and the figures as far as the pictures in ``work`` are there."""
