"""The cost table: what every part of a model costs, and from it what every plan leaves.

A bypassed block takes its parameters, its multiply-adds and its time along and changes no other block's, so one table
of the parts prices each of the 2^n plans. Parameters and multiply-adds are exact. Time is measured, and additive by
assumption: a plan within a budget of milliseconds is one to measure. Activation memory is no sum of parts; it is the
plan's own peak.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch

from prune_lab.blocks import Architecture, CountedUnit
from prune_lab.counting import Macs, count_macs
from prune_lab.errors import ConfigError, PlanError, UnknownBlockError
from prune_lab.families import Form, latent_shape
from prune_lab.forms import why_not
from prune_lab.plans import PruningPlan, is_native, plan_of, removed_samplers
from prune_lab.profiling.activations import ActivationTable
from prune_lab.profiling.form_costs import counted_cost, parts_in_form
from prune_lab.profiling.latency import LatencyTable
from prune_lab.profiling.plan_costs import PICOSECONDS, PartCost, PartKind, PlanCost, PlanCosts
from prune_lab.profiling.plan_matrix import (
    REST,
    PlanMatrix,
    check_matrix,
    chunks,
    groups_gone,
    outermost,
    sampler_groups,
)
from prune_lab.profiling.width_costs import narrowed_cost
from prune_lab.schemas import COST_COLUMNS


@dataclass(frozen=True, slots=True)
class CostTable:
    """The costs of a model, part by part; the parts add up to the whole.

    MACs and latency are of one forward pass over ``batch`` samples of ``latent`` (height and width) with ``tokens``
    words of text. ``activations`` adds each plan's own peak of memory. In another ``form`` than native a part costs
    what leaves with it in that form, and the rest is all that stays whatever a plan removes; ``together`` adds what
    leaves only when several blocks are all gone.
    """

    architecture: Architecture = field(repr=False)
    parts: tuple[PartCost, ...]  # blocks and samplers in order of execution, then the rest
    batch: int
    latent: tuple[int, int]
    tokens: int
    activations: ActivationTable | None = field(default=None, repr=False)
    layers: tuple[PartCost, ...] = ()  # inside blocks, whose costs they are a part of
    form: Form = "native"
    together: tuple[tuple[frozenset[str], PartCost], ...] = ()  # parts of the rest
    native: CostTable | None = field(default=None, repr=False, compare=False)  # what it was made of
    count: Macs | None = field(default=None, repr=False, compare=False)  # of the whole model
    sizes: Mapping[str, Any] = field(
        default_factory=dict, repr=False, compare=False
    )  # that it was counted at
    unit_ms: Mapping[str, float] | None = field(default=None, repr=False, compare=False)
    """Milliseconds that one unit of each site saves; None where it was not measured."""

    @property
    def timed(self) -> bool:
        """Whether latency is known."""
        return all(part.latency_ms is not None for part in self.parts)

    @property
    def total(self) -> PlanCost:
        """The whole model."""
        return self.of(PruningPlan((), self.architecture.signature))

    def part(self, name: str) -> PartCost:
        """The part called ``name``: a block, a sampler (``Dn3.down``) or ``rest``. Raises UnknownBlockError."""
        for part in (*self.parts, *self.layers):
            if part.name == name:
                return part
        self.architecture.block(name)  # names the nearest blocks
        raise UnknownBlockError(f"no cost is called {name!r}; ask for a block, a sampler or {REST!r}")

    def of(self, plan: PruningPlan) -> PlanCost:
        """What is left when ``plan`` is carried out in its form, samplers that leave with it gone; with code of its own
        where it has no form yet and is not native.

        Raises PlanError when the plan belongs to another architecture, FormError when it cannot be built in its form.
        """
        plan = self._as_built(plan)
        table = self.in_form(plan.form)
        kept, without = table._kept(plan)

        def left(column: str) -> int:
            whole, inside = (sum(int(getattr(part, column)) for part in parts) for parts in (kept, without))
            return whole - inside

        found = PlanCost(
            params=left("params"),
            macs=left("macs"),
            attention_macs=left("attention_macs"),
            weight_bytes=left("weight_bytes"),
            latency_ms=left("picoseconds") / PICOSECONDS if table.timed else None,
            activation_bytes=None if table.activations is None else table.activations.peak(plan.removed),
        )
        assert table.count is not None, "a cost table is made by cost_table"
        if table.form != "native" or plan.form == "own":
            depth = plan.without_widths()
            found = counted_cost(self.architecture, table.count, table.sizes, table.total, depth, found)
        if not plan.widths or plan.form == "padded":
            return found
        return narrowed_cost(self.architecture, table.count, plan.widths, found, self.unit_ms)

    def of_many(self, matrix: PlanMatrix) -> PlanCosts:
        """What each plan of ``matrix`` (plans, blocks) leaves, True where a block is removed; equal to ``of``.

        Raises PlanError for another kind or shape of matrix, UnremovableBlockError when it removes a block that must
        stay.
        """
        check_matrix(matrix, self.architecture)
        groups = sampler_groups(self.architecture)
        by_name = {
            part.name: (part.params, part.macs, part.attention_macs, part.weight_bytes, part.picoseconds)
            for part in (*self.parts, *self.layers)
        }
        counted = 5 if self.timed else 4
        whole = np.array([by_name[part.name] for part in self.parts], dtype=np.int64).sum(axis=0)[:counted]
        leaving = [
            *((block.name,) for block in self.architecture.named),
            *(group.samplers for group in groups),
        ]
        amounts = [np.sum([by_name[name] for name in names], axis=0) for names in leaving]
        amounts += [
            np.array([one.params, one.macs, one.attention_macs, one.weight_bytes, one.picoseconds])
            for _, one in self.together
        ]
        places = {block.name: place for place, block in enumerate(self.architecture.named)}
        joint = [[places[name] for name in blocks] for blocks, _ in self.together]
        saved = np.array(amounts, np.int64)
        # Sums of integers below 2^53 are exact in floats too, and a product of floats is faster.
        number = np.float64 if whole.max() < 2**53 else np.int64
        saved = saved[:, :counted].astype(number)
        left = np.empty((len(matrix), counted), dtype=np.int64)
        for rows in chunks(matrix):
            removed = outermost(matrix[rows], self.architecture)
            both = [removed[:, columns].all(axis=1, keepdims=True) for columns in joint]
            gone = np.hstack([removed, groups_gone(removed, groups), *both])
            left[rows] = whole - gone.astype(number) @ saved
        params, macs, attention_macs, weight_bytes, *picoseconds = np.ascontiguousarray(left.T)
        return PlanCosts(
            params,
            macs,
            attention_macs,
            weight_bytes,
            picoseconds[0] / PICOSECONDS if picoseconds else None,
            None if self.activations is None else self.activations.of_many(matrix),
        )

    @property
    def _same(self) -> bool:
        """Whether plans with code of their own cost what native ones do."""
        return not any(unit.keeps or unit.changes_others for unit in self.architecture.units)

    def _as_built(self, plan: PruningPlan) -> PruningPlan:
        """``plan`` with code of its own where it has no form yet, is not native, and costs otherwise then."""
        otherwise = not self._same or len(plan.removed) >= len(self.architecture.blocks)
        undecided = plan.form == "native" and otherwise
        return plan.built("own") if undecided and not is_native(self.architecture, plan) else plan

    def in_form(self, form: Form) -> CostTable:
        """The costs of the same model's plans in ``form``; this table where they cost the same in it.

        In the neutral form the peak of memory is not known.
        """
        native = self.native or self
        if form == "padded":  # as wide as the original
            return native
        same = self._same
        if form == self.form or (same and "neutral" not in (form, self.form)):
            return self
        return native if form == "native" or (same and form == "own") else _table_in(native, form)

    def uncounted(self, plan: PruningPlan) -> Mapping[str, int]:
        """The operators without a formula that are left by ``plan``, and how often they run."""
        calls: Counter[str] = Counter()
        kept, without = self._kept(plan)
        for part in kept:
            calls.update(part.uncounted)
        for part in without:
            calls.subtract(part.uncounted)
        return MappingProxyType({operator: number for operator, number in calls.items() if number})

    def frame(self) -> pd.DataFrame:
        """One row per part, the rest last: columns COST_COLUMNS, and latency_ms where it is known."""
        columns = [name for name in COST_COLUMNS if name != "tokens"] + ["latency_ms"] * self.timed
        rows = [{column: getattr(part, column) for column in columns} for part in self.parts]
        return pd.DataFrame(rows).assign(tokens=self.tokens)[[*COST_COLUMNS, *["latency_ms"] * self.timed]]

    def _kept(self, plan: PruningPlan) -> tuple[list[PartCost], list[PartCost]]:
        """The parts that stay, and the layers that leave from inside of them."""
        if plan.architecture != self.architecture.signature:
            raise PlanError(
                f"asked for the cost of a plan for architecture {plan.architecture}, these costs are of "
                f"{self.architecture.signature}; read the plan again as text for this model"
            )
        gone = {*plan.removed, *removed_samplers(self.architecture, plan)}
        return (
            [part for part in self.parts if part.name not in gone],
            [layer for layer in self.layers if layer.name in gone],
        )


@functools.lru_cache(maxsize=16)
def _table_in(costs: CostTable, form: Form) -> CostTable:
    """``costs``, which are of native students, of those in ``form``."""
    assert costs.count is not None, "a cost table is made by cost_table"
    parts, layers, together = parts_in_form(
        costs.architecture, costs.parts, costs.layers, costs.count, costs.sizes, form
    )
    return dataclasses.replace(
        costs,
        parts=parts,
        layers=layers,
        activations=costs.activations if form == "own" else None,
        form=form,
        together=together,
        native=costs,
    )


def savings_in(costs: CostTable, form: Form) -> dict[str, Any]:
    """What leaves in ``form`` with each block, layer and sampler, and what only when several blocks are all gone, as
    JSON values: parameters, multiply-adds, and those of them in attention products. Blocks that cannot be removed in it
    are left out.
    """
    architecture, table = costs.architecture, costs.in_form(form)

    def amounts(one: PartCost) -> list[int]:
        return [one.params, one.macs, one.attention_macs]

    def leaves(part: PartCost) -> bool:
        if part.kind == "sampler":
            return True
        block = part.kind == "block" and architecture.block(part.name).removable
        return block and not why_not(architecture, plan_of(architecture, [part.name]).built(form))

    parts = {part.name: amounts(part) for part in (*table.parts, *table.layers) if leaves(part)}
    together = [{"blocks": sorted(names), "saves": amounts(part)} for names, part in table.together]
    return {"parts": parts, "together": together}


# Made of a model ---------------------------------------------------------------------------------------------


def check_conditions(
    architecture: Architecture, latent: tuple[int, int], tokens: int, table: LatencyTable | ActivationTable
) -> None:
    """Both must be of one architecture at one size; the batch may differ, as what is counted only grows with it."""
    kind = "a latency table" if isinstance(table, LatencyTable) else "an activation table"
    if table.architecture.signature != architecture.signature:
        raise PlanError(
            f"asked for costs of architecture {architecture.signature}, found {kind} of "
            f"{table.architecture.signature}; measure this model's own"
        )
    if (table.latent, table.tokens) != (latent, tokens):
        raise ConfigError(
            f"asked for costs at a {latent[0]} x {latent[1]} latent with {tokens} tokens, found {kind} at "
            f"{table.latent[0]} x {table.latent[1]} with {table.tokens}; make both at one size"
        )


def cost_table(
    architecture: Architecture,
    *,
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    frames: int | None = None,
    dtype: torch.dtype = torch.float32,
    latency: LatencyTable | None = None,
    latency_elsewhere: bool = False,
    activations: ActivationTable | None = None,
) -> CostTable:
    """The costs of ``architecture`` from one count of it; no weights are needed.

    ``latent`` is the side of the square latent (None: the config's size), ``tokens`` the length of the text (None: the
    architecture's), ``frames`` those of the latent of a film (None: what the model is meant for), ``dtype`` the number
    format of the weights. Raises PlanError when ``latency`` or ``activations`` are of another architecture, ConfigError
    when they are of another size; with ``latency_elsewhere`` the latency may be of another size than what is counted:
    that of a service.
    """
    tokens, shape = (
        architecture.tokens if tokens is None else tokens,
        latent_shape(architecture.config, latent),
    )
    for table in (latency, activations):
        if table is not None:
            elsewhere = latency_elsewhere and table is latency
            size = (table.latent, table.tokens) if elsewhere else (shape, tokens)
            check_conditions(architecture, *size, table)
    sizes: dict[str, Any] = {"batch": batch, "latent": latent, "tokens": tokens, "frames": frames}
    count = count_macs(architecture.config, **sizes)
    times = {} if latency is None else latency.part_ms()

    def part(
        name: str, kind: PartKind, params: int, macs: tuple[int, int], uncounted: Mapping[str, int]
    ) -> PartCost:
        return PartCost(name, kind, params, *macs, params * dtype.itemsize, times.get(name), uncounted)

    def counted(unit: CountedUnit, kind: PartKind) -> PartCost:
        macs, uncounted = count.by_module[unit.path], count.uncounted_by_module[unit.path]
        if unit.changes_others:  # what a model without it lacks, at the size of this table
            family, outline = architecture.family, architecture.outline
            without = family.layout(outline, frozenset({unit.name})).config
            left = count_macs(without, **sizes)
            macs = count.total - left.total, count.attention - left.attention
        return part(unit.name, kind, unit.params, macs, uncounted)

    parts = [
        *(counted(block, "block") for block in architecture.blocks),
        *(counted(sampler, "sampler") for sampler in architecture.samplers),
    ]
    blocks = {block.name: block for block in parts}
    layers = []
    for layer in architecture.layers:
        found, around = counted(layer, "block"), blocks[layer.inside]
        if (
            around.latency_ms is not None
        ):  # what its multiply-adds are of the block's: layers are not timed alone
            share = found.macs / around.macs if around.macs else 0.0
            found = dataclasses.replace(found, latency_ms=around.latency_ms * share)
        layers.append(found)
    left = Counter(count.uncounted)
    for one in parts:
        left.subtract(one.uncounted)
    params = architecture.total_params - sum(one.params for one in parts)
    macs = count.total - sum(one.macs for one in parts)
    attention = count.attention - sum(one.attention_macs for one in parts)
    # where a block takes something of others with it, the rest of a tiny model may be less than that
    shared = any(unit.changes_others for unit in architecture.units)
    assert shared or min(params, macs, attention) >= 0, "parts of a model overlap"
    calls = {operator: number for operator, number in left.items() if number}
    parts.append(part(REST, "rest", params, (macs, attention), MappingProxyType(calls)))
    return CostTable(
        architecture,
        tuple(parts),
        batch,
        shape,
        tokens,
        activations,
        tuple(layers),
        count=count,
        sizes=MappingProxyType(sizes),
        unit_ms=None if latency is None else latency.unit_ms(),
    )
