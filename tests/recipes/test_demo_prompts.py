"""Which held-out captions the demo may show: the best of each large group, and no other."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from prune_lab.assets import load_pictures
from recipes.reference_model.demo_prompts import GROUPS, drawn_well

SCORES = Path(__file__).parents[2] / "reports" / "reference" / "demo_prompts.csv"


def test_the_best_of_each_large_group_is_taken() -> None:
    rows = [("a", "big", 0.1), ("b", "big", 0.9), ("c", "big", 0.9), ("d", "small", 1.0), ("e", "other", 0.2)]
    rows += [("f", "other", 0.3)]
    frame = pd.DataFrame(rows, columns=["caption", "group", "score"])
    assert drawn_well(frame, 2) == ["b", "f"]
    assert drawn_well(frame.iloc[::-1], 3) == ["b", "f", "d"]


def test_every_held_out_caption_was_scored_and_none_of_training() -> None:
    scores = pd.read_csv(SCORES)
    heldout = load_pictures("heldout")
    assert sorted(scores["caption"]) == sorted(set(heldout["caption"]))
    picked = drawn_well(scores)
    assert len(set(picked)) == GROUPS
    assert not set(picked) & set(load_pictures("train")["caption"])
