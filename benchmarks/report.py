"""How long a report takes, how large it is, and where the time goes: of a run that is grown to many candidates.

    python -m benchmarks.report RUN --count 500 [--profile]

RUN is the folder of a finished run; it is copied and its candidates multiplied, with made-up numbers around theirs.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from prune_lab.report import write_report
from prune_lab.runs import Run
from prune_lab.runs.plan_files import plan_id_of


def _spread(frame: pd.DataFrame, factor: float) -> pd.DataFrame:
    losses = [name for name in ("loss_before", "loss_after", "impact_one_shot", "loss") if name in frame]
    return frame.assign(**{name: frame[name] * factor for name in losses})


def grow(run: Run, count: int, *, seed: int = 0) -> None:
    """Give ``run`` further candidates until it has ``count``: each has the files of one that was there."""
    draw = random.Random(seed)
    removable = pd.read_csv(run.blocks).query("removable")["name"].tolist()
    costs = pd.read_csv(run.costs).set_index("name")
    text = dict.fromkeys(("plan_id", "name", "against"), "str")
    ranking, tournament = (pd.read_csv(path, dtype=text) for path in (run.ranking, run.tournament))
    known = list(run.plan_ids())
    rows, verdicts = [ranking], [tournament]
    for number in range(len(known), count):
        model = known[number % len(known)]
        removed = [name for name in removable if draw.random() < 0.4] or removable[:1]
        plan = json.loads(run.plan(model).read_text())
        new = plan_id_of(plan["architecture"], removed)
        plan |= {"id": new, "names": [f"searched-{number}"], "origin": "search", "removed": removed}
        run.plan(new).write_text(json.dumps(plan))
        shutil.copytree(run.candidate(model).folder, run.candidate(new).folder)
        factor = draw.uniform(0.8, 1.6)
        left = costs.loc[~costs.index.isin(removed)]
        own: dict[str, Any] = {
            "plan": f"searched-{number}",
            "plan_id": new,
            "origin": "search",
            "blocks_removed": len(removed),
        }
        own |= {name: int(left[name].sum()) for name in ("params", "macs", "paper_macs")}
        rows.append(_spread(ranking[ranking["plan_id"] == model], factor).assign(**own))
        verdicts.append(_spread(tournament[tournament["name"] == model], factor).assign(name=new))
    whole = pd.concat(rows, ignore_index=True)
    ranked = whole["rank"].notna() & (whole["origin"] != "teacher")
    whole.loc[ranked, "rank"] = whole.loc[ranked, "loss_after"].rank(method="first")
    whole.sort_values("rank").to_csv(run.ranking, index=False)
    pd.concat(verdicts, ignore_index=True).to_csv(run.tournament, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=500, help="candidates")
    parser.add_argument("--profile", action="store_true", help="say where the time goes")
    parser.add_argument("--keep", type=Path, help="folder to leave the grown run in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = Run(arguments.keep or Path(temporary) / "run")
        shutil.copytree(arguments.run, run.folder, ignore=shutil.ignore_patterns("report", "*.safetensors"))
        grow(run, arguments.count)
        profiler, started, used = cProfile.Profile(), time.perf_counter(), time.process_time()
        if arguments.profile:
            profiler.enable()
        page = write_report(run)
        profiler.disable()
        seconds, processor = time.perf_counter() - started, time.process_time() - used
        size = sum(path.stat().st_size for path in run.report_dir.iterdir())
        print(
            f"{arguments.count} candidates: {seconds:.1f} s ({processor:.1f} s of processor time), "
            f"index.html {page.stat().st_size / 1e6:.1f} MB, all files {size / 1e6:.1f} MB"
        )
        if arguments.profile:
            pstats.Stats(profiler).sort_stats("cumulative").print_stats(40)


if __name__ == "__main__":
    main()
