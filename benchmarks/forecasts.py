"""What can be known of the candidates of a run before they are distilled, as the forecasts that `ranking.py` judges.

    python -m benchmarks.forecasts RUN --out forecasts.csv

A row per candidate: the impact of the whole plan by the run's criterion, the sum of its blocks' scores, and the
held-out loss after the repair of its cuts (`repair.kind` of the run). Repairs and scores that are there are read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from prune_lab.candidates import State, load_student
from prune_lab.evaluation import heldout_loss
from prune_lab.runs import open_run
from prune_lab.runtime import write_frame
from prune_lab.search import predicted_impact
from prune_lab.session import Session, training_and_validation
from prune_lab.workflow import ensure_candidates, ensure_repaired, ensure_scores
from prune_lab.workflow.ranking import one_shot_impacts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    run = open_run(arguments.run, must_exist=True)
    session = Session(run)
    importance = ensure_scores(session)
    repaired: State = "pruned" if session.config.repair.kind == "none" else "repaired"
    ensure_repaired(session)
    candidates = ensure_candidates(session)
    impacts = one_shot_impacts(session, [one.plan for one in candidates])
    _, validation = training_and_validation(session)
    rows = []
    for one in candidates:
        student = load_student(one, repaired, device=session.device, dtype=session.dtype)
        rows.append(
            {
                "plan_id": one.plan.id,
                "name": one.plan.label,
                "origin": one.plan.origin,
                "one_shot": impacts.get(one.plan.id, 0.0),
                "added_up": predicted_impact(one.plan, importance),
                "repaired": float(heldout_loss(student, validation).double().mean()),
            }
        )
    write_frame(arguments.out, pd.DataFrame(rows))


if __name__ == "__main__":
    main()
