"""Sets of pictures: the jobs that draw them, the names of their files, and their CLIP scores."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from prune_lab.candidates import Candidate, State, load_student
from prune_lab.evaluation import clip_scores, generate
from prune_lab.schemas import PROMPTS_COLUMNS
from prune_lab.session import Session

_LONGEST_NAME = 40  # characters of a prompt in the name of a file


@dataclass(frozen=True, slots=True)
class PictureJob:
    """One set of pictures to be drawn: its folder, and the model, a candidate in some state or the teacher."""

    folder: Path
    candidate: Candidate | None = None  # None: the teacher
    state: State = "pruned"


def draw_prompts(session: Session, model: Any) -> Tensor:
    """The pictures that ``model`` draws for the run's prompts and seeds, uint8 (prompts x seeds, 3, H, W)."""
    how = session.config.evaluate
    drawn = session.pipeline, session.prompts, how.seeds
    return generate(*drawn, steps=how.steps, guidance=how.guidance, model=model)


def draw_set(session: Session, candidate: Candidate | None, state: State) -> Tensor:
    """The pictures of a candidate in ``state`` (None: of the teacher), uint8 (prompts x seeds, 3, H, W)."""
    if candidate is None:
        return draw_prompts(session, session.model)
    return draw_prompts(session, load_student(candidate, state, device=session.device, dtype=session.dtype))


def picture_frame(session: Session) -> pd.DataFrame:
    """One row per picture of a set, in the order in which they are drawn: file, prompt, seed; columns PROMPTS_COLUMNS.

    Names of files, such as 01-a-red-cat-seed-0.png, sort in that order too.
    """
    pairs = [(prompt, seed) for prompt in session.prompts for seed in session.config.evaluate.seeds]
    digits, rows = len(str(len(pairs))), []
    for number, (prompt, seed) in enumerate(pairs, start=1):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:_LONGEST_NAME].strip("-")
        name = "-".join(filter(None, (f"{number:0{digits}d}", slug, f"seed-{seed}.png")))
        rows.append((name, prompt, seed))
    return pd.DataFrame(rows, columns=list(PROMPTS_COLUMNS))


def clip_of(session: Session, pictures: Tensor) -> Tensor:
    """CLIP score of each of the ``pictures`` of a set against its prompt, (prompts x seeds,); NaN without a scorer."""
    if session.scorer is None:
        return torch.full((len(pictures),), math.nan)
    return clip_scores(session.scorer, pictures, picture_frame(session)["prompt"].tolist())
