"""How reliable scores are: agreement of criteria, prediction of outcomes, additivity, stability over samples."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from prune_lab.blocks import Architecture, BlockGroup
from prune_lab.importance.intervals import INTERVAL, Floats, impacts_of, resampled_impacts
from prune_lab.importance.tables import ImportanceTable
from prune_lab.orders import rank_agreement
from prune_lab.schemas import AGREEMENT_COLUMNS, STABILITY_COLUMNS

WEAK = 0.5  # a rank correlation whose interval reaches below this is called unreliable
FEW = 8  # with fewer plans a correlation says almost nothing


Pair = tuple[Floats, Floats]  # two lists of scores


def _correlations(pair: Pair, draws: Iterable[Pair]) -> tuple[float, ...]:
    """Spearman's correlation of ``pair`` and the ends of its 95 % interval from resamples; the same of Kendall's."""
    drawn = [rank_agreement(*draw) for draw in draws]
    ends = np.nanpercentile(drawn, INTERVAL, axis=0) if drawn else np.full((2, 2), np.nan)
    return tuple(np.stack([rank_agreement(*pair), *ends]).T.ravel().tolist())


def _resampled(table: ImportanceTable, draws: int, seed: int) -> Floats | None:
    """(draws, groups) impacts on bootstrap resamples of the pictures; None for a criterion without samples."""
    if table.values is None or table.scales is None or table.samples is None or len(table.samples) < 2:
        return None
    return resampled_impacts(table.values, table.scales, table.samples.pictures, draws=draws, seed=seed)


def agreement(tables: Sequence[ImportanceTable], *, draws: int = 200, seed: int = 0) -> pd.DataFrame:
    """Rank correlations of all pairs of criteria in ``tables``, which hold the same groups in the same order.

    A row for each ordered pair, columns AGREEMENT_COLUMNS. The 95 % intervals resample the samples; both criteria of a
    pair get the same resamples. The groups are not resampled, because they are all groups there are.
    """
    resamples = [_resampled(table, draws, seed) for table in tables]
    rows = []
    pairs = itertools.product(zip(tables, resamples, strict=True), repeat=2)
    for (one, first), (other, second) in pairs:
        left = [one.impacts] * draws if first is None else first
        right = [other.impacts] * draws if second is None else second
        drawn = () if first is None and second is None else zip(left, right, strict=True)
        correlations = _correlations((one.impacts, other.impacts), drawn)
        rows.append((one.criterion, other.criterion, *correlations, "blocks", len(one.entries)))
    return pd.DataFrame(rows, columns=list(AGREEMENT_COLUMNS))


def summed_impacts(table: ImportanceTable, plans: Sequence[BlockGroup]) -> Floats:
    """(plans,) for each plan the sum of its blocks' impacts, which predicts the impact of the plan."""
    impacts = table.block_impacts()
    return np.array([sum(impacts[name] for name in plan.blocks) for plan in plans])


def predictive_correlation(
    tables: Sequence[ImportanceTable],
    plans: Sequence[BlockGroup],
    outcomes: Floats,
    over: str,
    *,
    draws: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank correlation of each criterion, summed over blocks, with the measured ``outcomes`` (plans,) of ``plans``.

    A row per criterion, columns AGREEMENT_COLUMNS with ``other`` "measured"; ``over`` names the outcome, such as "the
    loss". The 95 % intervals resample the plans.
    """
    generator = np.random.default_rng(seed)
    index = generator.integers(len(plans), size=(draws, len(plans)))
    rows = []
    for table in tables:
        sums = summed_impacts(table, plans)
        drawn = [(sums[one], outcomes[one]) for one in index] if len(plans) > 2 else []
        correlations = _correlations((sums, outcomes), drawn)
        rows.append((table.criterion, "measured", *correlations, over, len(plans)))
    return pd.DataFrame(rows, columns=list(AGREEMENT_COLUMNS))


def additivity(table: ImportanceTable, plans: ImportanceTable) -> pd.DataFrame:
    """The measured impact of each plan, the sum of its blocks' impacts, and the ratio of the two.

    Columns plan, blocks, count (of blocks), measured, added, ratio. At a ratio above 1, removing the blocks together
    does more damage than the sum of removing each alone.
    """
    groups = [entry.group for entry in plans.entries]
    frame = pd.DataFrame(
        {
            "plan": [group.name for group in groups],
            "blocks": [" ".join(group.blocks) for group in groups],
            "count": [len(group.blocks) for group in groups],
            "measured": plans.impacts,
            "added": summed_impacts(table, groups),
        }
    )
    return frame.assign(ratio=frame["measured"] / frame["added"])


def random_plans(
    architecture: Architecture, count: int, *, most: int = 12, seed: int = 0
) -> tuple[BlockGroup, ...]:
    """``count`` random sets of 2 to ``most`` removable blocks, all sizes equally often."""
    names = [block.name for block in architecture.blocks if block.removable]
    generator = np.random.default_rng(seed)
    groups = []
    for number in range(count):
        size = 2 + number % (min(most, len(names)) - 1)
        chosen = sorted(generator.choice(len(names), size=size, replace=False))
        groups.append(BlockGroup(f"random-{number + 1}", "plan", tuple(names[index] for index in chosen)))
    return tuple(groups)


def stability(
    table: ImportanceTable,
    other_noise: Mapping[str, ImportanceTable] | None = None,
    *,
    tops: Sequence[int] = (5, 10, 15),
    draws: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Share of the least important groups that are the same with fewer samples, or other timesteps, prompts or noise.

    Columns STABILITY_COLUMNS; ``tops`` are the numbers of least important groups to compare. For the part ``samples``,
    4, 8, 16 ... pictures are drawn without replacement (mean and 95 % interval over ``draws``); for ``timesteps`` and
    ``prompts``, each part alone is compared with the whole. ``other_noise`` holds tables of the same groups and
    pictures measured with other noise, by name. Empty for a table without samples.
    """
    if table.values is None or table.scales is None or table.samples is None:
        return pd.DataFrame(columns=list(STABILITY_COLUMNS))
    values, scales = table.values, table.scales
    impacts = impacts_of(values, scales)
    tops = [top for top in tops if top < len(impacts)]
    _, picture = np.unique(table.samples.pictures, return_inverse=True)
    pictures = int(picture.max()) + 1
    generator = np.random.default_rng(seed)
    tried: list[tuple[object, object, int, list[Floats]]] = []  # part, of, samples, and impacts of each draw
    size = 4
    while size < pictures:
        drawn = [np.isin(picture, generator.choice(pictures, size=size, replace=False)) for _ in range(draws)]
        tried.append(("samples", str(size), size, [impacts_of(values[:, one], scales[one]) for one in drawn]))
        size *= 2
    for (part, name), inside in table.parts().groupby(["part", "of"], sort=False):
        tried.append((part, name, int(inside["samples"].iloc[0]), [inside["impact"].to_numpy()]))
    for name, other in (other_noise or {}).items():
        tried.append(("noise", name, other.entries[0].samples, [other.impacts]))
    rows = []
    for (part, name, count, draws_of_part), top in itertools.product(tried, tops):
        least = set(np.argsort(impacts)[:top])
        overlaps = [len(least & set(np.argsort(one)[:top])) / top for one in draws_of_part]
        low, high = np.percentile(overlaps, INTERVAL) if part == "samples" else (np.nan, np.nan)
        rows.append((part, name, count, top, float(np.mean(overlaps)), float(low), float(high)))
    return pd.DataFrame(rows, columns=list(STABILITY_COLUMNS))


# Sentences -------------------------------------------------------------------------------------------------------

Record = Mapping[Hashable, Any]  # a row of a table, by column


def describe_stability(table: pd.DataFrame) -> tuple[str, ...]:
    """A sentence each on other noise, timesteps and prompts in a ``table`` from ``stability``.

    Of the numbers of groups that were compared, the sentences take the middle one.
    """
    lines = []
    for part, condition in (
        ("noise", "with other noise"),
        ("timesteps", "from a tenth of the schedule alone"),
        ("prompts", "from one kind of prompt alone"),
    ):
        rows = table[table["part"] == part]
        if len(rows):
            tops = sorted(set(rows["top"]))
            top = tops[len(tops) // 2]
            overlaps = rows.loc[rows["top"] == top, "overlap"]
            least, most = f"{overlaps.min():.0%}", f"{overlaps.max():.0%}"
            share = most if least == most else f"{least} to {most}"
            lines.append(
                f"Of the {top} least important blocks {share} are the same {condition} "
                f"({len(overlaps)} tried, mean {overlaps.mean():.0%})."
            )
    return tuple(lines)


def _with_interval(row: Record) -> str:
    return f"{row['spearman']:.2f} [{row['spearman_low']:.2f}, {row['spearman_high']:.2f}]"


def _cheap_criterion_lines(rows: Sequence[Record], leader: str, costs: Mapping[str, float]) -> list[str]:
    most = costs.get(leader, 0.0) / 3
    cheap = [
        row
        for row in rows
        if row["over"] == "blocks"
        and row["other"] == leader != row["criterion"]
        and costs.get(row["criterion"], np.inf) < most
    ]
    if not cheap:
        return []
    best = max(cheap, key=lambda row: np.nan_to_num(row["spearman"], nan=-2))
    cost = costs[best["criterion"]]
    price = f"{costs[leader] / cost:.0f} times cheaper" if cost else "without any forward pass"
    return [
        f"Of the criteria that cost at most a third of {leader}, {best['criterion']} orders the blocks most like it: "
        f"Spearman {_with_interval(best)}, {price}."
    ]


def _prediction_lines(rows: Sequence[Record], leader: str) -> list[str]:
    own = next(row for row in rows if row["criterion"] == leader)
    best = max(rows, key=lambda row: np.nan_to_num(row["spearman"], nan=-2))
    over, count = own["over"], own["count"]
    other = "the best of all" if best is own else f"{best['criterion']} does best, {_with_interval(best)}"
    lines = [
        f"Summed over blocks, {leader} orders {count} plans by {over} with Spearman {_with_interval(own)}; {other}."
    ]
    control = next((row for row in rows if row["criterion"] == "random"), None)
    if control is not None:
        lines.append(
            "Much of that comes from the number of removed blocks: random scores, summed, reach "
            f"{_with_interval(control)}."
        )
    if count < FEW:
        lines.append(f"Warning: {count} plans are too few to tell criteria apart by {over}.")
    elif not own["spearman_low"] >= WEAK:
        lines.append(
            f"Warning: by {over} the interval of {leader} reaches below {WEAK}: do not choose plans by it alone."
        )
    return lines


def describe_agreement(
    correlations: pd.DataFrame, sums: pd.DataFrame, costs: Mapping[str, float]
) -> tuple[str, ...]:
    """The conclusions, a sentence each, from ``correlations`` and ``sums``.

    ``correlations`` holds the rows of ``agreement`` and ``predictive_correlation``, ``sums`` those of ``additivity``,
    ``costs`` the forward-equivalents of each criterion. The first criterion is the one to compare the others with.
    """
    rows: Sequence[Record] = correlations.to_dict("records")
    leader = str(rows[0]["criterion"])
    measured = [row for row in rows if row["other"] == "measured"]
    lines = [*_cheap_criterion_lines(rows, leader, costs)]
    for over in dict.fromkeys(row["over"] for row in measured):
        lines += _prediction_lines([row for row in measured if row["over"] == over], leader)
    if len(sums):
        ratio = sums["ratio"]
        lines.append(
            f"Over {len(sums)} plans the measured impact is {ratio.median():.2f} times the sum of the blocks' impacts "
            f"(median; nine in ten lie between {ratio.quantile(0.05):.2f} and {ratio.quantile(0.95):.2f})."
        )
    return tuple(lines)
