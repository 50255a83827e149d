"""What a plan is predicted to cost the model: effects of single blocks, and of pairs that matter together."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from prune_lab.errors import DataError
from prune_lab.importance import ImportanceTable
from prune_lab.plans import PruningPlan

Pair: TypeAlias = frozenset[str]


@dataclass(frozen=True, slots=True)
class Effects:
    """A prediction of impact: ``offset`` + the impacts of the removed blocks + those of the removed pairs.

    A pair counts when both of its blocks are gone. Without pairs this is the additive assumption of BK-SDM's block
    ranking and LAPTOP-Diff (arXiv:2404.11098). Impacts may be negative. Raises DataError for a number that is not
    finite or a pair that is not of two blocks.
    """

    impacts: Mapping[str, float]
    interactions: Mapping[Pair, float] = field(default_factory=dict)
    offset: float = 0.0

    def __post_init__(self) -> None:
        for pair in self.interactions:
            if len(pair) != 2:
                raise DataError(
                    f"asked for interactions of pairs, found {sorted(pair)}; name two blocks each"
                )
        named = [(name, value) for name, value in self.impacts.items()]
        named += [("+".join(sorted(pair)), value) for pair, value in self.interactions.items()]
        wrong = [name for name, value in (*named, ("offset", self.offset)) if not math.isfinite(value)]
        if wrong:
            raise DataError(f"asked for finite effects, found none of {', '.join(wrong)}; measure them again")

    def of(self, removed: Collection[str]) -> float:
        """The predicted impact of removing these blocks. Raises DataError when one of them has no score."""
        missing = [block for block in removed if block not in self.impacts]
        if missing:
            raise DataError(
                f"asked for the impact of removing {', '.join(removed)}, found no score of {', '.join(missing)}; "
                "score all single blocks of this model first"
            )
        gone = frozenset(removed)
        pairs = [effect for pair, effect in self.interactions.items() if pair <= gone]
        # Correctly rounded, so that the order of the blocks cannot break a tie between plans.
        return math.fsum([self.offset, *pairs, *(self.impacts[block] for block in removed)])


Scores: TypeAlias = ImportanceTable | Effects


def effects_from(scores: Scores) -> Effects:
    """The effects that ``scores`` are, or the additive ones of a table of importance."""
    return scores if isinstance(scores, Effects) else Effects(scores.block_impacts())


def predicted_impact(plan: PruningPlan, scores: Scores) -> float:
    """The prediction of a plan's impact: the sum of the impacts of its blocks, each measured alone, and of its pairs.

    Raises DataError when a block of the plan has no score.
    """
    return effects_from(scores).of(plan.removed)
