"""Where multiply-adds and latency disagree about the share of a part."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from prune_lab.blocks import Architecture
from prune_lab.profiling.cost_table import CostTable, check_conditions
from prune_lab.profiling.latency import LatencyTable
from prune_lab.schemas import DISAGREEMENT_COLUMNS

TENTH = 0.1  # of the whole: how far MACs and latency may lie apart before somebody is told


def latency_disagreement(costs: CostTable, latency: LatencyTable) -> pd.DataFrame:
    """Where MACs and latency disagree: one row per block that can be removed, samplers that can leave, and the rest.

    Columns name, kind, macs, macs_share, saved_ms (as predictions take it off), latency_share, ratio (latency_share in
    macs_share) and gap (their difference), the largest gap in either direction first. A ratio above 1 is a block that
    takes longer than its MACs say; it can be large where both shares are next to nothing, so the gap decides the order.
    Shares are in the whole model and add up to 1. Raises PlanError and ConfigError as ``cost_table`` does.
    """
    check_conditions(costs.architecture, costs.latent, costs.tokens, latency)
    frame = latency.frame()[["name", "kind", "saved_ms", "share"]].rename(columns={"share": "latency_share"})
    by_name = {cost.name: cost.macs for cost in costs.parts}
    # The first row of each name is what leaves; all else, starred blocks among it, is the rest.
    macs = [sum(by_name[part] for part in name.split("+")) for name in frame["name"][:-1]]
    total = costs.total.macs
    frame["macs"] = [*macs, total - sum(macs)]
    frame["macs_share"] = frame["macs"] / total
    frame["ratio"] = frame["latency_share"] / frame["macs_share"]
    frame["gap"] = frame["latency_share"] - frame["macs_share"]
    order = frame["gap"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order, list(DISAGREEMENT_COLUMNS)].reset_index(drop=True)


def plan_disagreements(frame: pd.DataFrame) -> tuple[str, ...]:
    """A line for each plan of a table whose latency changed otherwise than its MACs, by more than a tenth of the whole.

    Columns plan, macs_change and latency_change, and backend where there are several.
    """
    lines = []
    for row in frame.to_dict(orient="records"):
        macs, latency = row["macs_change"], row["latency_change"]
        if pd.isna(latency) or abs(latency - macs) <= TENTH:
            continue
        where = f" in {row['backend']}" if "backend" in row else ""
        lines.append(
            f"MACs foretell {row['plan']} badly{where}: {macs:+.0%} MACs, {latency:+.0%} time; plan by --latency"
        )
    return tuple(lines)


def part_disagreements(
    architecture: Architecture, shares: Mapping[str, tuple[float, float]]
) -> tuple[str, ...]:
    """A line for each part whose share of the time is more than a tenth of the whole from its share of the MACs.

    ``shares`` holds (share of MACs, share of time) by the name of the part. All blocks of a kind are a part, too.
    """
    kinds = {unit.name: unit.kind for unit in architecture.units}
    parts = dict(shares)
    for name, (macs, took) in shares.items():
        if name in kinds:
            together = f"all {kinds[name]} blocks"
            before = parts.get(together, (0.0, 0.0))
            parts[together] = before[0] + macs, before[1] + took
    return tuple(
        f"MACs foretell the time of {name} badly: {macs:.0%} of the MACs, {took:.0%} of the time"
        for name, (macs, took) in parts.items()
        if abs(took - macs) > TENTH
    )


def latency_warnings(costs: CostTable, latency: LatencyTable) -> tuple[str, ...]:
    """``part_disagreements`` of what a latency table was measured of. Raises as ``latency_disagreement`` does."""
    frame = latency_disagreement(costs, latency)
    pairs = zip(frame["macs_share"], frame["latency_share"], strict=True)
    return part_disagreements(costs.architecture, dict(zip(frame["name"], pairs, strict=True)))
