"""What millions of plans cost: parameters, multiply-adds, latency and activation memory from one boolean matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prune_lab.blocks import Architecture
from prune_lab.errors import ConfigError, PlanError
from prune_lab.families import CLIP_TOKENS, latent_shape
from prune_lab.profiling.activations import ActivationTable
from prune_lab.profiling.costs import CostTable
from prune_lab.profiling.latency_table import LatencyTable
from prune_lab.profiling.matrices import (
    PlanMatrix,
    SamplerLevel,
    check_matrix,
    chunks,
    levels_gone,
    sampler_levels,
)
from prune_lab.schemas import DISAGREEMENT_COLUMNS, PRICE_COLUMNS

_COUNTED = ("params", "macs", "attention_macs")


@dataclass(frozen=True, slots=True, eq=False)
class Prices:
    """What is left of a U-Net by each of many plans, in the order of the matrix's rows."""

    params: NDArray[np.int64]
    macs: NDArray[np.int64]
    attention_macs: NDArray[np.int64]
    latency_ms: NDArray[np.float64] | None  # predicted; None without a latency table
    activation_bytes: NDArray[np.int64] | None  # at the peak, of one sample; None without an activation table

    @property
    def paper_macs(self) -> NDArray[np.int64]:
        """The paper's convention: attention products left out."""
        return self.macs - self.attention_macs

    def __len__(self) -> int:
        return len(self.params)

    def frame(self) -> pd.DataFrame:
        """One row per plan: params, macs, attention_macs, paper_macs, latency_ms, activation_bytes.

        The last two are empty where they are not known.
        """
        return pd.DataFrame({column: getattr(self, column) for column in PRICE_COLUMNS}).astype(
            {column: object for column in PRICE_COLUMNS[-2:] if getattr(self, column) is None}
        )


@dataclass(frozen=True, slots=True, eq=False)
class PriceList:
    """What each block and each level of samplers takes along; ``price_list`` makes it."""

    architecture: Architecture = field(repr=False)
    costs: CostTable
    latency: LatencyTable | None
    activations: ActivationTable | None
    whole: NDArray[np.int64] = field(repr=False)
    """(3,) params, macs and attention_macs of the whole U-Net."""
    block_savings: NDArray[np.int64] = field(repr=False)
    """(blocks, 3) the same of each block."""
    sampler_savings: NDArray[np.int64] = field(repr=False)
    """(levels, 3) the same of the samplers that leave together, for each of ``sampler_levels``."""
    levels: tuple[SamplerLevel, ...]

    def of(self, matrix: PlanMatrix) -> Prices:
        """The prices of plans (plans, blocks), True where a block is removed; samplers that leave are taken off too.

        Parameters and MACs are integers all along and equal ``CostTable.of``. Raises PlanError for another kind or
        shape of matrix, UnremovableBlockError when it removes a block that must stay.
        """
        check_matrix(matrix, self.architecture)
        left = np.empty((len(matrix), len(_COUNTED)), dtype=np.int64)
        for part in chunks(matrix):
            gone = levels_gone(matrix[part], self.levels)
            left[part] = self.whole - matrix[part] @ self.block_savings - gone @ self.sampler_savings
        params, macs, attention_macs = np.ascontiguousarray(left.T)
        return Prices(
            params,
            macs,
            attention_macs,
            None if self.latency is None else self.latency.of(matrix),
            None if self.activations is None else self.activations.of(matrix),
        )


def _check_conditions(costs: CostTable, other: LatencyTable | ActivationTable, what: str) -> None:
    """Both must be of one architecture at one size; the batch may differ, as what is counted only grows with it."""
    if other.architecture.signature != costs.architecture.signature:
        raise PlanError(
            f"asked for prices of architecture {costs.architecture.signature}, found {what} of "
            f"{other.architecture.signature}; measure this U-Net's own"
        )
    wanted = (
        latent_shape(costs.architecture.config, costs.latent),
        CLIP_TOKENS if costs.tokens is None else costs.tokens,
    )
    if (other.latent, other.tokens) != wanted:
        (height, width), tokens = wanted
        raise ConfigError(
            f"asked for prices at a {height} x {width} latent with {tokens} tokens, found {what} at "
            f"{other.latent[0]} x {other.latent[1]} with {other.tokens}; make both at one size"
        )


def price_list(
    costs: CostTable, *, latency: LatencyTable | None = None, activations: ActivationTable | None = None
) -> PriceList:
    """The price list of ``costs``, with predicted latency and activation memory where their tables are given.

    Raises PlanError when the tables are of different architectures, ConfigError when they are of different sizes.
    """
    architecture = costs.architecture
    if latency is not None:
        _check_conditions(costs, latency, "a latency table")
    if activations is not None:
        _check_conditions(costs, activations, "an activation table")
    counted = {cost.name: [getattr(cost, name) for name in _COUNTED] for cost in costs.costs}
    levels = sampler_levels(architecture)
    by_level = [np.array([counted[name] for name in level.samplers]).sum(axis=0) for level in levels]
    return PriceList(
        architecture,
        costs,
        latency,
        activations,
        whole=np.array(list(counted.values()), dtype=np.int64).sum(axis=0),
        block_savings=np.array([counted[block.name] for block in architecture.blocks], dtype=np.int64),
        sampler_savings=np.array(by_level, dtype=np.int64).reshape(len(levels), len(_COUNTED)),
        levels=levels,
    )


def latency_disagreement(costs: CostTable, latency: LatencyTable) -> pd.DataFrame:
    """Where MACs and latency disagree: one row per block that can be removed, samplers that can leave, and the rest.

    Columns name, kind, macs, macs_share, saved_ms (as predictions take it off), latency_share, ratio (latency_share in
    macs_share) and gap (their difference), the largest gap in either direction first. A ratio above 1 is a block that
    takes longer than its MACs say; it can be large where both shares are next to nothing, so the gap decides the order.
    Shares are in the whole U-Net and add up to 1. Raises PlanError and ConfigError as ``price_list`` does.
    """
    _check_conditions(costs, latency, "a latency table")
    frame = latency.frame()[["name", "kind", "saved_ms", "share"]].rename(columns={"share": "latency_share"})
    by_name = {cost.name: cost.macs for cost in costs.costs}
    # The first row of each name is what leaves; all else, starred blocks among it, is the rest.
    macs = [sum(by_name[part] for part in name.split("+")) for name in frame["name"][:-1]]
    total = costs.total.macs
    frame["macs"] = [*macs, total - sum(macs)]
    frame["macs_share"] = frame["macs"] / total
    frame["ratio"] = frame["latency_share"] / frame["macs_share"]
    frame["gap"] = frame["latency_share"] - frame["macs_share"]
    order = frame["gap"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order, list(DISAGREEMENT_COLUMNS)].reset_index(drop=True)
