"""Do students stack with fewer steps, other schedulers, reuse, and consistency distillation?

    python -m benchmarks.few_steps --work DIR --out reports/steps

The shipped U-Net, BK-Small distilled from it for 150 steps of 8 pictures as in the demo, and that student after 400
steps of 16 pictures of consistency distillation; each draws the same prompts in 4 to 25 steps. What is done lies in
``--work``, and the same command again goes on. Writes steps.csv, rounds.csv, environment.json, figures and README.md;
``--page`` draws figures and page anew from the CSV, with the sentences of FINDINGS.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

import prune_lab as pl
from prune_lab.report.few_steps import write_steps_page
from prune_lab.runtime import read_text

ASKED: dict[str, Any] = {
    "steps": (4, 8, 25),
    "schedulers": ("own", "dpmsolver++"),
    "reuse": (2,),
    "images": 16,
    "rounds": 6,
}
TABLES = ("steps.csv", "rounds.csv", "environment.json")


def students(work: Path) -> tuple[Path, Path]:
    """Pipeline folders of BK-Small, and of the same after consistency distillation; made where they are not there."""
    small, few = work / "bk-small", work / "bk-small-lcm"
    if not small.exists():
        teacher = pl.load("reference", run=work / "bk-small.run")
        teacher.distill("bk-small", out=small, steps=150, batch=8)
    if not few.exists():
        teacher = pl.load("reference", run=work / "bk-small-lcm.run")
        teacher.distill_steps(small, few, steps=400, batch=16, learning_rate=2e-4)
    return small, few


def draw_page(out: Path, pictures: Path | None = None) -> Path:
    """README.md and the figures of ``out`` from its tables and FINDINGS.md."""
    findings = out / "FINDINGS.md"
    lines = read_text(findings).splitlines() if findings.is_file() else []
    conditions = json.loads(read_text(out / "environment.json"))
    return write_steps_page(out, pd.read_csv(out / "steps.csv"), conditions, lines, pictures)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/few_steps"))
    parser.add_argument("--out", type=Path, default=Path("reports/steps"))
    parser.add_argument("--page", action="store_true", help="draw the page from the tables that are in --out")
    asked = parser.parse_args()
    if asked.page:
        print(draw_page(asked.out))
        return
    asked.work.mkdir(parents=True, exist_ok=True)
    small, few = students(asked.work)
    measured = asked.work / "measured"
    pl.load("reference").few_steps(small, few, out=measured, **ASKED)
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        shutil.copyfile(measured / name, asked.out / name)
    print(draw_page(asked.out, measured / "pictures"))


if __name__ == "__main__":
    main()
