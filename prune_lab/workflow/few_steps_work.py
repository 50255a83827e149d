"""What a comparison of few steps has to draw and to time, and about how long that takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from prune_lab.errors import PruneLabError
from prune_lab.few_steps.measuring import Configuration
from prune_lab.models import ModelSource
from prune_lab.runtime import duration_text
from prune_lab.schemas import FEW_STEPS_WORK_COLUMNS
from prune_lab.workflow.estimating import macs_per_second


@dataclass(frozen=True, slots=True)
class Work:
    """One configuration: how many pictures are to be drawn and to be timed, and what one of them takes in multiply-adds
    of the model's passes, in which a pass that reuses counts as a whole one; in passes where MACs are not known.
    """

    configuration: Configuration
    drawn: int
    timed: int
    amount: float

    @property
    def pictures(self) -> int:
        """The pictures to draw and to time."""
        return self.drawn + self.timed


def _several(parts: Sequence[Work]) -> str:
    return f"{len(parts)} configuration{'' if len(parts) == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class StepsWork:
    """The work on all configurations, those that are drawn already too; ``speed`` is in multiply-adds a second, None
    where it is not known. ``images`` are pictures of each configuration.
    """

    parts: tuple[Work, ...]
    images: int
    speed: float | None

    @property
    def lines(self) -> tuple[str, ...]:
        """What there is to do, counted, and what it is expected to take, with what that is based on; for a person."""
        to_draw = [part for part in self.parts if part.drawn]
        drawing = f"to draw: nothing, all there is ({_several(self.parts)}) is drawn already"
        if to_draw:
            there = len(self.parts) - len(to_draw)
            known = f"; {there} more drawn already" if there else ""
            drawing = f"to draw: {self._counted(to_draw, self.images)}{known}"
        to_time = [part for part in self.parts if part.timed]
        timing = f"to time: {self._counted(to_time, to_time[0].timed)}, in turns" if to_time else ""
        return tuple(filter(None, (drawing, timing, self._estimate)))

    @staticmethod
    def _counted(parts: Sequence[Work], each: int) -> str:
        steps = sum(each * part.configuration.steps for part in parts)
        pictures = f"{each * len(parts):,} pictures in {steps:,} steps"
        return f"{_several(parts)}, {each} pictures of each: {pictures}"

    def seconds(self, part: Work) -> float | None:
        """What ``part`` is expected to take, in seconds; None where the speed is not known."""
        return None if self.speed is None else part.pictures * part.amount / self.speed

    @property
    def _estimate(self) -> str:
        seconds = [self.seconds(part) for part in self.parts]
        known = [one for one in seconds if one is not None]
        if not any(part.pictures for part in self.parts):
            return ""
        if not known:
            return "estimate: time unknown before the first pictures"
        reuse = any(part.configuration.reuse > 1 for part in self.parts)
        more = "; passes that reuse are counted as whole ones" if reuse else ""
        return (
            f"estimate: {duration_text(math.fsum(known))}, by the multiply-adds of all passes of the models and a "
            f"speed that was measured now; encoding of texts, decoding of pictures and scores come on top{more}"
        )

    def after(self, first: Configuration, seconds: float) -> str:
        """What is left once the pictures of ``first`` were drawn in ``seconds``; empty where nothing is."""
        own = next(part for part in self.parts if part.configuration == first)
        whole = math.fsum(part.pictures * part.amount for part in self.parts)
        done = own.drawn * own.amount
        if whole <= done:
            return ""
        left = seconds * (whole - done) / done
        return (
            f"about {duration_text(left)} left at the pace of the first {own.drawn} pictures ({first.name}, "
            f"{duration_text(seconds)}); encoding and decoding, which each picture takes once, make up "
            "more of few steps than of many"
        )

    def frame(self) -> pd.DataFrame:
        """A row per configuration, columns FEW_STEPS_WORK_COLUMNS; ``estimate_seconds`` is missing where there is
        nothing to do or the speed is not known.
        """
        rows = [
            {
                **dataclasses.asdict(part.configuration),
                "pictures": part.drawn,
                "timed": part.timed,
                "state": "to do" if part.pictures else "done",
                "estimate_seconds": self.seconds(part) if part.pictures else None,
            }
            for part in self.parts
        ]
        return pd.DataFrame(rows, columns=list(FEW_STEPS_WORK_COLUMNS))


def pass_macs(sources: Mapping[str, ModelSource]) -> dict[str, int]:
    """Multiply-adds of a pass of one sample of each model; empty where one of them cannot be counted."""
    try:
        return {name: source.architecture.total_macs for name, source in sources.items()}
    except PruneLabError:  # it draws all the same
        return {}


def speed_of(source: ModelSource, device: torch.device, dtype: torch.dtype) -> float | None:
    """Multiply-adds a second of ``source`` here (``macs_per_second``); None for a model that cannot be counted."""
    try:
        return macs_per_second(source.architecture, device, dtype)
    except PruneLabError:
        return None
