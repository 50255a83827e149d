"""Held-out captions that the reference model draws well: what the demo shows of every student.

The rule: the untouched model draws every held-out caption as the demo does, from two seeds; the shipped scorer scores
each picture with its caption; of each of the eight groups with the most captions the best mean score is taken. No
student takes part, and nothing but the demo's pictures uses the prompts: no metric, gate or ranking.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from prune_lab.assets import load_pictures
from prune_lab.config import EvaluateConfig
from prune_lab.evaluation import clip_scores, generate
from prune_lab.models import load_pipeline, load_scorer, resolve_model
from prune_lab.runtime import write_frame

SEEDS = (0, 1)
GROUPS = 8


def drawn_well(scores: pd.DataFrame, groups: int = GROUPS) -> list[str]:
    """A caption of each of the ``groups`` with the most rows, in that order: the one with the highest score.

    ``scores`` has the columns caption, group and score; of equal counts and scores the first by name is taken.
    """
    counts = scores.groupby("group").size()
    largest = sorted(counts.index, key=lambda group: (-counts[group], group))[:groups]
    order = scores.sort_values(["score", "caption"], ascending=[False, True])
    best = order.drop_duplicates("group").set_index("group")["caption"]
    return [str(best[group]) for group in largest]


def score_captions(out: Path, *, steps: int) -> pd.DataFrame:
    """A row per held-out caption, after writing them to ``out``: caption, group, score (mean cosine over SEEDS)."""
    frame = load_pictures("heldout").drop_duplicates("caption")
    captions = [str(text) for text in frame["caption"]]
    pipeline, scorer = load_pipeline(resolve_model("reference")), load_scorer("reference")
    pictures = generate(pipeline, captions, SEEDS, steps=steps, guidance=EvaluateConfig().guidance, batch=32)
    each = clip_scores(scorer, pictures, [text for text in captions for _ in SEEDS])
    scores = frame[["caption", "group"]].assign(score=each.reshape(-1, len(SEEDS)).mean(dim=1).tolist())
    scores = scores.sort_values(["group", "score"], ascending=[True, False], ignore_index=True)
    write_frame(out, scores.round({"score": 4}))
    return scores
