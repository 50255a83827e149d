"""The cost of every block of a U-Net, and of every plan by subtraction.

A bypassed block takes its parameters and its multiply-adds along and changes no other block's, so one count of the
whole U-Net prices each of the 2^n plans exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import pandas as pd
from diffusers import UNet2DConditionModel

from prune_lab.blocks import Architecture, architecture_of
from prune_lab.counting import count_on_meta
from prune_lab.errors import ConfigError, PlanError, UnknownBlockError
from prune_lab.plans import PruningPlan, removed_samplers
from prune_lab.profiling.macs import Macs, count_macs
from prune_lab.schemas import COST_COLUMNS

CostKind = Literal["block", "sampler", "rest"]
ModelLike: TypeAlias = Architecture | UNet2DConditionModel | Mapping[str, Any]

REST = "rest"  # convolutions in and out, time and added embeddings: what no plan removes


@dataclass(frozen=True, slots=True)
class PlanCost:
    """What a U-Net costs: parameters, and multiply-adds of one forward pass."""

    params: int
    macs: int
    attention_macs: int
    uncounted: Mapping[str, int] = field(
        default_factory=dict, compare=False
    )  # operator -> calls without a formula

    @property
    def paper_macs(self) -> int:
        """The paper's convention: attention products left out."""
        return self.macs - self.attention_macs


@dataclass(frozen=True, slots=True)
class Cost:
    """The share of one block, one sampler, or of all the rest."""

    name: str
    kind: CostKind
    params: int
    macs: int
    attention_macs: int
    uncounted: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def paper_macs(self) -> int:
        """The paper's convention: attention products left out."""
        return self.macs - self.attention_macs


@dataclass(frozen=True, slots=True)
class CostTable:
    """The costs of a U-Net, part by part; the parts add up to the whole.

    MACs are of one forward pass over ``batch`` samples of ``latent`` by ``latent`` (None: the config's size) with
    ``tokens`` words of text (None: 77), in the convention of ``counter``.
    """

    architecture: Architecture = field(repr=False)
    costs: tuple[Cost, ...]  # blocks and samplers in order of execution, then the rest
    counter: str
    batch: int = 1
    latent: int | None = None
    tokens: int | None = None

    @property
    def total(self) -> PlanCost:
        """The whole U-Net."""
        return self._sum(frozenset())

    def cost(self, name: str) -> Cost:
        """The part called ``name``: a block, a sampler (``Dn3.down``) or ``rest``. Raises UnknownBlockError."""
        for cost in self.costs:
            if cost.name == name:
                return cost
        self.architecture.block(name)  # names the nearest blocks
        raise UnknownBlockError(f"no cost is called {name!r}; ask for a block, a sampler or {REST!r}")

    def of(self, plan: PruningPlan) -> PlanCost:
        """What is left when ``plan`` is carried out, samplers that leave with it included.

        Raises PlanError when the plan belongs to another architecture.
        """
        if plan.architecture != self.architecture.signature:
            raise PlanError(
                f"asked for the cost of a plan for architecture {plan.architecture}, these costs are of "
                f"{self.architecture.signature}; read the plan again as text for this U-Net"
            )
        return self._sum(frozenset(plan.removed) | frozenset(removed_samplers(self.architecture, plan)))

    def frame(self) -> pd.DataFrame:
        """One row per part, the rest last: name, kind, params, macs, attention_macs, paper_macs."""
        rows = [[getattr(cost, column) for column in COST_COLUMNS] for cost in self.costs]
        return pd.DataFrame(rows, columns=list(COST_COLUMNS))

    def _sum(self, gone: frozenset[str]) -> PlanCost:
        kept = [cost for cost in self.costs if cost.name not in gone]
        uncounted: Counter[str] = Counter()
        for cost in kept:
            uncounted.update(cost.uncounted)
        return PlanCost(
            params=sum(cost.params for cost in kept),
            macs=sum(cost.macs for cost in kept),
            attention_macs=sum(cost.attention_macs for cost in kept),
            uncounted=MappingProxyType(dict(uncounted)),
        )


def _by_torch(config: Mapping[str, Any], **sizes: Any) -> Macs:
    """Torch's count; it says nothing about the operators it passes over."""
    count = count_on_meta(config, **sizes)
    return Macs(count.total, count.attention, {}, by_module=count.by_module)


COUNTERS: Mapping[str, Callable[..., Macs]] = MappingProxyType({"fvcore": count_macs, "meta": _by_torch})


def counter_named(name: str) -> Callable[..., Macs]:
    """The function that counts as ``name`` says. Raises ConfigError."""
    try:
        return COUNTERS[name]
    except KeyError:
        known = ", ".join(COUNTERS)
        raise ConfigError(f"no counter is called {name!r}; choose one of: {known}") from None


def architecture_from(source: ModelLike) -> Architecture:
    """The architecture that ``source`` is, or has."""
    return source if isinstance(source, Architecture) else architecture_of(source)


def cost_table(
    source: ModelLike,
    *,
    counter: str = "fvcore",
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
) -> CostTable:
    """The costs of ``source``, an architecture, a U-Net or a config, from one count of it; no weights are needed.

    ``counter`` is ``fvcore`` (whole convention, norms and upsampling included) or ``meta`` (torch's, without them).
    Raises ConfigError for another counter and UnsupportedModelError as ``architecture_of`` does.
    """
    architecture = architecture_from(source)
    count = counter_named(counter)(architecture.config, batch=batch, latent=latent, tokens=tokens)
    parts: list[Cost] = []
    for kind, members in (("block", architecture.blocks), ("sampler", architecture.samplers)):
        for member in members:
            macs, attention = count.by_module[member.path]
            uncounted = count.uncounted_by_module.get(member.path, {})
            parts.append(Cost(member.name, kind, member.params, macs, attention, uncounted))  # type: ignore[arg-type]
    left = Counter(count.uncounted)
    for part in parts:
        left.subtract(part.uncounted)
    rest = Cost(
        REST,
        "rest",
        architecture.total_params - sum(part.params for part in parts),
        count.total - sum(part.macs for part in parts),
        count.attention - sum(part.attention_macs for part in parts),
        MappingProxyType({operator: calls for operator, calls in left.items() if calls}),
    )
    assert min(rest.params, rest.macs, rest.attention_macs) >= 0, "parts of a U-Net overlap"
    return CostTable(architecture, (*parts, rest), counter, batch, latent, tokens)
