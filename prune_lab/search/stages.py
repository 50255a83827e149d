"""How many channels each level of a U-Net keeps within budgets: step by step the cheapest saving is taken."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from prune_lab.errors import BudgetError, PlanError
from prune_lab.families.stage_widths import Level
from prune_lab.profiling import PlanCost
from prune_lab.search.budgets import Budget, unreachable

Channels = tuple[int, ...]
PARTS = 8  # of the channels that a level has: about as many leave in one step


def fewer_channels(
    channels: Channels, levels: Sequence[Level], allowed: Callable[[Channels], bool]
) -> Iterator[Channels]:
    """What ``channels`` can become next: about an eighth less of one level, or the next less that is ``allowed``."""
    for level in levels:
        least = math.ceil(level.channels / PARTS / level.step) * level.step
        now = channels[level.places[0]]
        for fewer in range(now - least, 0, -level.step):
            found = tuple(fewer if place in level.places else one for place, one in enumerate(channels))
            if allowed(found):
                yield found
                break


def check_reachable(
    levels: Sequence[Level], budgets: Sequence[Budget], costs: Callable[[Channels], PlanCost]
) -> None:
    """Raise BudgetError, with the least that there is, where no channels are within one of ``budgets``."""
    found = []
    for some in itertools.product(*(level.choices[-2:] for level in levels)):  # the least may not be together
        narrow = [dataclasses.replace(level, channels=one) for level, one in zip(levels, some, strict=True)]
        with contextlib.suppress(PlanError):
            found.append(costs(channels_of(narrow)))
    for budget in budgets if found else ():
        least = min(cost.amount(budget.metric) for cost in found)
        if least > budget.limit:
            whole = costs(channels_of(levels)).amount(budget.metric)
            raise unreachable(budget, "model of narrower stages", "", least, whole)


def channels_within(
    channels: Channels,
    levels: Sequence[Level],
    budgets: Sequence[Budget],
    costs: Callable[[Channels], PlanCost],
    impact: Callable[[Channels], float],
) -> tuple[Channels, float]:
    """(channels within ``budgets``, their impact), by greedy descent from ``channels``.

    In each step the level gets narrower whose impact grows least for what it saves of the first budget that is not met.
    ``costs`` raises PlanError for channels that no plain model has. Raises BudgetError, with the least that was
    reached, where no step is left.
    """

    def allowed(one: Channels) -> bool:
        try:
            costs(one)
        except PlanError:
            return False
        return True

    total, now = costs(channels), 0.0
    while broken := [budget for budget in budgets if not budget.allows(costs(channels))]:
        metric, limit = broken[0].metric, broken[0].limit
        before = costs(channels).amount(metric)
        tried = [
            (found, impact(found), before - costs(found).amount(metric))
            for found in fewer_channels(channels, levels, allowed)
        ]
        tried = [one for one in tried if one[2] > 0]
        if not tried:
            share, came = math.ceil(1000 * before / total.amount(metric)) / 10, ",".join(map(str, channels))
            raise BudgetError(
                f"asked for {broken[0].text}; step by step the stages came to channels {came} with {share}% of the "
                f"{metric}, and none can have fewer; give {metric}<={share}%, or the channels"
            )
        # what is saved beyond the budget does not count
        channels, now, _ = min(tried, key=lambda one: ((one[1] - now) / min(one[2], before - limit), one[0]))
    if tuple(channels) == tuple(channels_of(levels)):
        raise BudgetError(f"asked for {budgets[0].text}, which the whole model meets; ask for less")
    return channels, now


def channels_of(levels: Sequence[Level]) -> Channels:
    """The channels of all stages of a model with ``levels``."""
    found = {place: level.channels for level in levels for place in level.places}
    return tuple(found[place] for place in sorted(found))
