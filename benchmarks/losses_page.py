"""The page and figure of ``benchmarks.losses``, from the tables of its folder alone."""
from __future__ import annotations
from pathlib import Path
def write_page(out: Path) -> None:
    raise SystemExit(f"the page of {out} is not written yet")
