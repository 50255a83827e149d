"""What a plan leaves: the costs of one model, of the parts of a model, and of many plans; None is "not known"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from prune_lab.config.budget_texts import METRICS, Counted, Metric
from prune_lab.errors import BudgetError
from prune_lab.schemas import PRICE_COLUMNS

PartKind = Literal["block", "sampler", "rest"]

PICOSECONDS = 10**9  # in a millisecond: times are added up as integers, so their order cannot matter
_NOT_MEASURED = {
    "latency_ms": "latency of the blocks; measure a latency table of this model first",
    "memory": "activation memory of the plans; make the cost table with an activation table",
}


@dataclass(frozen=True, slots=True)
class PartCost:
    """The share of one block, one sampler, or of all the rest."""

    name: str
    kind: PartKind
    params: int
    macs: int
    attention_macs: int
    weight_bytes: int
    latency_ms: float | None = None  # what a prediction takes off when the part leaves
    uncounted: Mapping[str, int] = field(
        default_factory=dict, compare=False
    )  # operator -> calls without a formula

    @property
    def paper_macs(self) -> int:
        """The paper's convention: attention products left out."""
        return self.macs - self.attention_macs

    @property
    def picoseconds(self) -> int:
        """The latency as an integer; 0 where none was measured."""
        return 0 if self.latency_ms is None else round(self.latency_ms * PICOSECONDS)

    def amount(self, metric: Counted | Literal["latency_ms"]) -> int | float:
        """The share in ``metric``; of a time that was not measured 0."""
        found: int | float | None = getattr(self, metric)
        return 0 if found is None else found


@dataclass(frozen=True, slots=True)
class PlanCost:
    """What a model costs; None is "not known", never zero."""

    params: int
    macs: int  # of one forward pass, attention products included
    attention_macs: int
    weight_bytes: int | None = None
    latency_ms: float | None = None  # predicted, of one forward pass
    activation_bytes: int | None = None  # at the peak of one sample's forward pass

    @property
    def paper_macs(self) -> int:
        """The paper's convention: attention products left out."""
        return self.macs - self.attention_macs

    @property
    def memory(self) -> int | None:
        """Bytes of the weights and of the activations at their peak."""
        if self.weight_bytes is None or self.activation_bytes is None:
            return None
        return self.weight_bytes + self.activation_bytes

    def amount(self, metric: Metric) -> int | float:
        """The cost in ``metric``: a number, milliseconds or bytes. Raises BudgetError when it is not known."""
        found: int | float | None = getattr(self, metric)
        if found is None:
            name = metric.removesuffix("_ms")
            raise BudgetError(
                f"asked for a budget on {name}, found no {_NOT_MEASURED[metric]}, or give params or macs"
            )
        return found

    def amounts(self) -> Mapping[Metric, int | float]:
        """The cost in every metric that is known."""
        known = {metric: getattr(self, metric) for metric in METRICS}
        return MappingProxyType({metric: value for metric, value in known.items() if value is not None})


@dataclass(frozen=True, slots=True, eq=False)
class PlanCosts:
    """The costs of many plans, in the order of the matrix's rows; None is "not known"."""

    params: NDArray[np.int64]
    macs: NDArray[np.int64]
    attention_macs: NDArray[np.int64]
    weight_bytes: NDArray[np.int64]
    latency_ms: NDArray[np.float64] | None
    activation_bytes: NDArray[np.int64] | None

    @property
    def paper_macs(self) -> NDArray[np.int64]:
        """The paper's convention: attention products left out."""
        return self.macs - self.attention_macs

    @property
    def memory(self) -> NDArray[np.int64] | None:
        """Bytes of the weights and of the activations at their peak."""
        return None if self.activation_bytes is None else self.weight_bytes + self.activation_bytes

    def __len__(self) -> int:
        return len(self.params)

    def frame(self) -> pd.DataFrame:
        """One row per plan, columns PRICE_COLUMNS; those that are not known are empty."""
        columns = {column: getattr(self, column) for column in PRICE_COLUMNS}
        unknown = {column: object for column, values in columns.items() if values is None}
        return pd.DataFrame(columns).astype(unknown)
