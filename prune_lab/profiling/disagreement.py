"""Where multiply-adds and latency disagree about the share of a part."""

from __future__ import annotations

import pandas as pd

from prune_lab.profiling.cost_table import CostTable, check_conditions
from prune_lab.profiling.latency import LatencyTable
from prune_lab.schemas import DISAGREEMENT_COLUMNS


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
