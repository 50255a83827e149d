"""The page and figures of ``benchmarks.evidence``."""

from __future__ import annotations

from pathlib import Path


def write_page(out: Path) -> None:
    """README.md."""
    (out / "README.md").write_text("")
