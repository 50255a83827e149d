"""How far a score can be trusted: do criteria agree, do scores add up, how many samples does an order need?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

from prune_lab.blocks import Architecture, BlockGroup
from prune_lab.importance.intervals import INTERVAL, impacts_of, resampled_impacts
from prune_lab.importance.tables import ImportanceTable
from prune_lab.schemas import AGREEMENT_COLUMNS, STABILITY_COLUMNS

WEAK = 0.5  # a rank correlation whose interval reaches below this is not to be relied on
FEW = 8  # plans or blocks below which a correlation says next to nothing


def rank_agreement(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float]:
    """(Spearman, Kendall) of two lists of scores; NaN where one of them is constant or shorter than three."""
    if len(one) < 3 or len(np.unique(one)) < 2 or len(np.unique(other)) < 2:
        return float("nan"), float("nan")
    return float(spearmanr(one, other).statistic), float(kendalltau(one, other).statistic)


def _interval(draws: Sequence[tuple[float, float]]) -> tuple[float, float, float, float]:
    """(Spearman low, high, Kendall low, high) of resampled agreements."""
    if not draws:
        return (float("nan"),) * 4
    spearman, kendall = np.nanpercentile(np.array(draws), INTERVAL, axis=0).T
    return float(spearman[0]), float(spearman[1]), float(kendall[0]), float(kendall[1])


def _resampled(table: ImportanceTable, draws: int, seed: int) -> NDArray[np.float64] | None:
    """(draws, groups) impacts on resampled pictures; None for a criterion without samples."""
    if table.values is None or table.scales is None or table.samples is None or len(table.samples) < 2:
        return None
    return resampled_impacts(table.values, table.scales, table.samples.pictures, draws=draws, seed=seed)


def agreement(tables: Sequence[ImportanceTable], *, draws: int = 200, seed: int = 0) -> pd.DataFrame:
    """Rank correlations between all criteria in ``tables``, of the same groups in the same order.

    A row for each ordered pair: AGREEMENT_COLUMNS. Intervals resample the samples of both (95 %); those of one probe
    are resampled together. The groups themselves are not resampled: they are all there are.
    """
    again = [_resampled(table, draws, seed) for table in tables]
    rows = []
    for one, first in zip(tables, again, strict=True):
        for other, second in zip(tables, again, strict=True):
            spearman, kendall = rank_agreement(one.impacts, other.impacts)
            left = [one.impacts] * draws if first is None else first
            right = [other.impacts] * draws if second is None else second
            known = first is not None or second is not None
            drawn = [rank_agreement(a, b) for a, b in zip(left, right, strict=True)] if known else []
            low, high, kendall_low, kendall_high = _interval(drawn)
            names = (one.criterion, other.criterion)
            rows.append(
                (*names, spearman, low, high, kendall, kendall_low, kendall_high, "blocks", len(one.entries))
            )
    return pd.DataFrame(rows, columns=list(AGREEMENT_COLUMNS))


def added_up(table: ImportanceTable, plans: Sequence[BlockGroup]) -> NDArray[np.float64]:
    """(plans,) what the scores of single blocks predict for each plan: their sum."""
    impacts = table.block_impacts()
    return np.array([sum(impacts[name] for name in plan.blocks) for plan in plans])


def predictive_correlation(
    tables: Sequence[ImportanceTable],
    plans: Sequence[BlockGroup],
    outcomes: NDArray[np.float64],
    over: str,
    *,
    draws: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """How well each criterion, added up over blocks, orders ``plans`` by a measured outcome; ``over`` says which.

    AGREEMENT_COLUMNS with ``other`` "measured"; intervals resample the plans (95 %).
    """
    generator = np.random.default_rng(seed)
    index = generator.integers(len(plans), size=(draws, len(plans)))
    rows = []
    for table in tables:
        wanted = added_up(table, plans)
        spearman, kendall = rank_agreement(wanted, outcomes)
        drawn = [rank_agreement(wanted[one], outcomes[one]) for one in index] if len(plans) > 2 else []
        low, high, kendall_low, kendall_high = _interval(drawn)
        rows.append(
            (
                table.criterion,
                "measured",
                spearman,
                low,
                high,
                kendall,
                kendall_low,
                kendall_high,
                over,
                len(plans),
            )
        )
    return pd.DataFrame(rows, columns=list(AGREEMENT_COLUMNS))


def additivity(table: ImportanceTable, plans: ImportanceTable) -> pd.DataFrame:
    """Are scores additive? Per plan: blocks removed, the measured impact, the sum of its blocks', and their ratio.

    Columns plan, blocks, count, measured, added, ratio; a ratio above 1 means that the whole is worse than its parts.
    """
    groups = [entry.group for entry in plans.entries]
    frame = pd.DataFrame(
        {
            "plan": [group.name for group in groups],
            "blocks": [" ".join(group.blocks) for group in groups],
            "count": [len(group.blocks) for group in groups],
            "measured": plans.impacts,
            "added": added_up(table, groups),
        }
    )
    return frame.assign(ratio=frame["measured"] / frame["added"])


def random_plans(
    architecture: Architecture, count: int, *, most: int = 12, seed: int = 0
) -> tuple[BlockGroup, ...]:
    """``count`` sets of 2 to ``most`` removable blocks, sizes equally often, drawn with ``seed``."""
    names = [block.name for block in architecture.blocks if block.removable]
    generator = np.random.default_rng(seed)
    groups = []
    for number in range(count):
        size = 2 + number % (min(most, len(names)) - 1)
        chosen = sorted(generator.choice(len(names), size=size, replace=False))
        groups.append(BlockGroup(f"random-{number + 1}", "plan", tuple(names[place] for place in chosen)))
    return tuple(groups)


def _overlap(one: NDArray[np.float64], other: NDArray[np.float64], top: int) -> float:
    """Share of the ``top`` least important of one order that are among the ``top`` least of the other."""
    return len(set(np.argsort(one)[:top]) & set(np.argsort(other)[:top])) / top


def stability(
    table: ImportanceTable,
    again: Mapping[str, ImportanceTable] | None = None,
    *,
    tops: Sequence[int] = (5, 10, 15),
    draws: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """How much of the least important groups is found again with fewer samples, other timesteps, prompts or noise.

    STABILITY_COLUMNS. For ``samples`` the pictures are drawn without replacement, 4, 8, 16 ... of them (mean and 95 %
    of ``draws``); for ``timesteps`` and ``prompts`` each part alone is compared with all. ``again`` holds the same
    groups measured on the same pictures with other draws of the noise, by name. Empty without samples.
    """
    if table.values is None or table.scales is None or table.samples is None:
        return pd.DataFrame(columns=list(STABILITY_COLUMNS))
    values, scales = table.values, table.scales
    whole = impacts_of(values, scales)
    tops = [top for top in tops if top < len(whole)]
    _, picture = np.unique(table.samples.pictures, return_inverse=True)
    pictures = int(picture.max()) + 1
    generator = np.random.default_rng(seed)
    rows: list[tuple[object, ...]] = []
    size = 4
    while size < pictures:
        orders = []
        for _ in range(draws):
            inside = np.isin(picture, generator.choice(pictures, size=size, replace=False))
            orders.append(impacts_of(values[:, inside], scales[inside]))
        for top in tops:
            found = [_overlap(order, whole, top) for order in orders]
            low, high = np.percentile(found, INTERVAL)
            rows.append(("samples", str(size), size, top, float(np.mean(found)), float(low), float(high)))
        size *= 2
    for part, parts in table.parts().groupby("part", sort=False):
        for name, inside_part in parts.groupby("of", sort=False):
            order = inside_part["impact"].to_numpy()
            count = int(inside_part["samples"].iloc[0])
            rows += [
                (part, name, count, top, _overlap(order, whole, top), float("nan"), float("nan"))
                for top in tops
            ]
    for name, other in (again or {}).items():
        count = other.entries[0].samples
        rows += [
            ("noise", name, count, top, _overlap(other.impacts, whole, top), float("nan"), float("nan"))
            for top in tops
        ]
    return pd.DataFrame(rows, columns=list(STABILITY_COLUMNS))


def describe_stability(found: pd.DataFrame) -> tuple[str, ...]:
    """A sentence for each thing that ``stability`` varied, of the middle one of its numbers of groups."""
    lines = []
    for part, what in (
        ("noise", "with other noise"),
        ("timesteps", "from a tenth of the schedule alone"),
        ("prompts", "from one kind of prompt alone"),
    ):
        rows = found[found["part"] == part]
        if len(rows):
            tops = sorted(set(rows["top"]))
            top = tops[len(tops) // 2]
            shares = rows.loc[rows["top"] == top, "overlap"]
            least, most = f"{shares.min():.0%}", f"{shares.max():.0%}"
            found_again = most if least == most else f"{least} to {most}"
            lines.append(
                f"Of the {top} least important blocks {found_again} are found again {what} "
                f"({len(shares)} tried, {shares.mean():.0%} in the mean)."
            )
    return tuple(lines)


Row = Mapping[Hashable, Any]


def describe_agreement(
    found: pd.DataFrame, sums: pd.DataFrame, efforts: Mapping[str, float]
) -> tuple[str, ...]:
    """What may be concluded, a sentence each, from ``agreement``, ``predictive_correlation`` and ``additivity``.

    ``efforts`` holds the forward-equivalents that each criterion took. The first criterion leads.
    """
    rows: Sequence[Row] = found.to_dict("records")
    leader = str(rows[0]["criterion"])
    measured = [row for row in rows if row["other"] == "measured"]
    lines = [*_cheap_follower(rows, leader, efforts)]
    for over in dict.fromkeys(row["over"] for row in measured):
        lines += _foresight([row for row in measured if row["over"] == over], leader)
    if len(sums):
        ratio = sums["ratio"]
        lines.append(
            f"Over {len(sums)} plans the measured impact is {ratio.median():.2f} times the sum of its blocks' in the "
            f"median, and between {ratio.quantile(0.05):.2f} and {ratio.quantile(0.95):.2f} times for nine in ten."
        )
    return tuple(lines)


def _cheap_follower(rows: Sequence[Row], leader: str, efforts: Mapping[str, float]) -> list[str]:
    most = efforts.get(leader, 0.0) / 3
    cheap = [
        row
        for row in rows
        if row["over"] == "blocks"
        and row["other"] == leader != row["criterion"]
        and efforts.get(row["criterion"], np.inf) < most
    ]
    if not cheap:
        return []
    best = max(cheap, key=lambda row: np.nan_to_num(row["spearman"], nan=-2))
    spent = efforts[best["criterion"]]
    price = f"{efforts[leader] / spent:.0f} times cheaper" if spent else "at no forward pass at all"
    return [
        f"Of the criteria at a third of the cost of {leader} or less, {best['criterion']} orders the blocks most like "
        f"it: Spearman {_with_interval(best)}, {price}."
    ]


def _foresight(rows: Sequence[Row], leader: str) -> list[str]:
    own = next(row for row in rows if row["criterion"] == leader)
    best = max(rows, key=lambda row: np.nan_to_num(row["spearman"], nan=-2))
    over, count = own["over"], own["count"]
    other = "the best of all" if best is own else f"{best['criterion']} does best, {_with_interval(best)}"
    lines = [
        f"Added up over blocks, {leader} orders {count} plans by {over} with Spearman {_with_interval(own)}; {other}."
    ]
    luck = next((row for row in rows if row["criterion"] == "random"), None)
    if luck is not None:
        lines.append(
            f"Of that, the number of blocks removed explains much: random scores, added up, get {_with_interval(luck)}."
        )
    if count < FEW:
        lines.append(f"Warning: {count} plans are too few to tell criteria apart by {over}.")
    elif not own["spearman_low"] >= WEAK:
        lines.append(
            f"Warning: by {over} the interval of {leader} reaches below {WEAK}: do not choose plans by it alone."
        )
    return lines


def _with_interval(row: Row) -> str:
    return f"{row['spearman']:.2f} [{row['spearman_low']:.2f}, {row['spearman_high']:.2f}]"
