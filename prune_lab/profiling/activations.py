"""Bytes of activations that a model holds at once while it runs, for every plan, without weights or a real run.

One forward pass on ``meta`` tensors is watched: which storages exist when each block starts, and how many more while
it runs. What a plan leaves is then walked with those numbers, all plans at once.

What is predicted is the highest number of bytes alive at one moment, of one sample, weights left out. Alive are

- what the whole pass keeps: latents, timestep, text, and the embeddings made of them;
- the skips that wait for a residual block which the plan keeps, each tensor once however often it is handed on;
  diffusers lets those that a stage reads go when the stage is done, not one by one;
- what went into the running stage, which diffusers keeps until the stage is done, and the hidden tensor;
- what the running block makes: the concatenation with its skip, everything inside it, and its result.

Fused attention is assumed, as torch has it on CPU and CUDA: no matrix of attention weights. Workspaces of convolution
kernels and what an allocator rounds up or keeps back are unknown and left out.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from prune_lab.blocks import Architecture
from prune_lab.errors import UnsupportedModelError
from prune_lab.families import example_inputs, latent_shape, meta_model, plain_config, runs_on_meta
from prune_lab.live_bytes import HEAD, LiveSpan, spans
from prune_lab.profiling.plan_matrix import (
    PlanMatrix,
    SamplerGroup,
    check_matrix,
    chunks,
    groups_gone,
    sampler_groups,
)
from prune_lab.runtime import pick_dtype
from prune_lab.schemas import ACTIVATION_COLUMNS

UnitKind = Literal["block", "sampler"]
Bytes = NDArray[np.int64]  # one per plan


# The table -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UnitMemory:
    """Bytes of one block or sampler for one sample."""

    name: str
    kind: UnitKind
    stage: str
    input_bytes: int  # in an up stage a residual block reads concat(hidden, skip), made for it
    output_bytes: int
    workspace_bytes: int  # the most that the unit adds at one moment, its result included
    takes_skip: bool
    gives_skip: bool  # what it hands on also waits for an up stage
    live_bytes: int  # the most alive while it runs in the whole model


@dataclass(frozen=True, slots=True)
class ActivationTable:
    """What the units of a model hold, and from it the peak of every plan; see the module for what counts as alive.

    Reads as: many plans have nearly the teacher's peak. One moment decides it: in SD-v1.4 the attention blocks of the
    outermost up stage, in SDXL those of the stage within. Only what runs or waits then can lower it; removing blocks of
    the inner stages changes nothing, and Base, Small and Tiny all save the same 4 %. Misleads when: gradients are
    wanted, which keep nearly everything alive.
    """

    architecture: Architecture = field(repr=False)
    units: tuple[UnitMemory, ...]  # in order of execution
    kept_bytes: int  # latents, timestep, text and embeddings
    first_bytes: int  # what goes into the first unit, and is the first skip
    head_bytes: int  # the most that what follows the last unit adds
    latent: tuple[int, int]
    tokens: int
    dtype: str

    @property
    def total(self) -> int:
        """The peak of the whole model."""
        return self.peak(())

    def peak(self, removed: Collection[str]) -> int:
        """Bytes at the peak of one sample's forward pass without the blocks ``removed``."""
        row = np.array([[block.name in removed for block in self.architecture.named]])
        return int(self.of_many(row)[0])

    def of_many(self, matrix: PlanMatrix) -> Bytes:
        """(plans,) int64: bytes at the peak of one sample's forward pass through what each row leaves.

        Equal to watching the materialised model where the plan is native, and never more for a plan that removes more.
        Raises as ``check_matrix`` does.
        """
        check_matrix(matrix, self.architecture)
        groups = sampler_groups(self.architecture)
        peaks = np.empty(len(matrix), dtype=np.int64)
        for part in chunks(matrix):
            peaks[part] = _peaks(self, _gone(self, matrix[part], groups))
        return peaks

    def frame(self) -> pd.DataFrame:
        """One row per unit: name, kind, input_bytes, output_bytes, workspace_bytes, live_bytes (while it runs)."""
        rows = [[getattr(unit, column) for column in ACTIVATION_COLUMNS] for unit in self.units]
        return pd.DataFrame(rows, columns=list(ACTIVATION_COLUMNS))


def _gone(table: ActivationTable, matrix: PlanMatrix, groups: tuple[SamplerGroup, ...]) -> list[PlanMatrix]:
    """For each unit (plans,): whether it is gone."""
    columns = np.ascontiguousarray(matrix.T)
    gone: dict[str, PlanMatrix] = {
        block.name: column for block, column in zip(table.architecture.named, columns, strict=True)
    }
    for group, column in zip(groups, groups_gone(matrix, groups).T, strict=True):
        gone |= dict.fromkeys(group.samplers, column)
    nowhere = np.zeros(len(matrix), dtype=np.bool_)
    return [gone.get(unit.name, nowhere) for unit in table.units]


def _wanted_skips(units: tuple[UnitMemory, ...], gone: list[PlanMatrix]) -> list[PlanMatrix]:
    """For each skip in the order they are made (plans,): whether a residual block that is kept reads that tensor.

    Where nothing is kept between two skips they are one tensor, and whoever reads either reads it.
    """
    readers = [~removed for unit, removed in zip(units, gone, strict=True) if unit.takes_skip][::-1]
    changed: list[PlanMatrix] = []  # by skip: whether it is another tensor than the one before
    new = np.ones_like(gone[0])
    for unit, removed in [(None, gone[0]), *zip(units, gone, strict=True)]:
        if unit is not None:
            new = new | ~removed
        if unit is None or unit.gives_skip:
            changed.append(new)
            new = np.zeros_like(new)
    assert len(readers) == len(changed), "a skip is made that no up stage reads"
    wanted = [readers[-1]]
    for reader, other in zip(readers[-2::-1], changed[:0:-1], strict=True):
        wanted.append(reader | (wanted[-1] & ~other))
    return wanted[::-1]


def _peaks(table: ActivationTable, gone: list[PlanMatrix], seen: list[int] | None = None) -> Bytes:
    """(plans,) from (plans,) for each unit; ``seen`` is given what is alive while each unit runs, of the first plan."""
    wanted = iter(_wanted_skips(table.units, gone))
    zero = np.zeros(len(gone[0]), dtype=np.int64)
    pushed = [table.first_bytes * next(wanted)]  # by skip: bytes that it added to what waits
    waiting = pushed[0]
    entered = (
        table.first_bytes - waiting
    )  # what went into the running stage, unless it waits as a skip anyway
    alone = zero  # the hidden tensor, unless it waits as a skip or is what went into the stage
    moved = np.zeros_like(gone[0])  # whether the stage has changed the hidden tensor
    peaks = zero
    stage, own = table.units[0].stage, 0
    for unit, removed in zip(table.units, gone, strict=True):
        kept = ~removed
        if unit.stage != stage:
            stage = unit.stage
            entered, alone, moved = np.where(moved, alone, entered), zero, np.zeros_like(moved)
            waiting = waiting - sum(pushed[len(pushed) - own :])
            pushed = pushed[: len(pushed) - own]
            own = sum(other.takes_skip for other in table.units if other.stage == stage)
        reads = unit.input_bytes if unit.takes_skip else alone
        live = waiting + entered + reads + unit.workspace_bytes
        peaks = np.maximum(peaks, live * kept)
        if seen is not None:
            seen.append(table.kept_bytes + int(live[0]))
        alone = np.where(kept, unit.output_bytes, alone)
        moved = moved | kept
        if unit.gives_skip:
            pushed.append(alone * next(wanted))
            waiting = waiting + pushed[-1]
            alone = alone - pushed[-1]
    hidden = np.where(moved, alone, entered)
    head = waiting + hidden + table.head_bytes
    found: Bytes = np.maximum(peaks, head) + table.kept_bytes
    return found


# Making it -------------------------------------------------------------------------------------------------


def activation_table(
    architecture: Architecture,
    *,
    latent: int | None = None,
    tokens: int | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> ActivationTable:
    """The activation memory of ``architecture``; no weights are needed.

    Of one sample of ``latent`` by ``latent`` (None: the config's size) with ``tokens`` words of text (None: the
    architecture's), all in ``dtype``. Raises UnsupportedModelError when diffusers keeps other tensors alive than the
    walk says.
    """
    if not any(unit.gives_skip for unit in architecture.units):
        raise UnsupportedModelError(
            "asked for the activation memory of plans, found a model without skip connections: a pass of it needs as "
            "much without some of its blocks; leave memory out"
        )
    tokens = architecture.tokens if tokens is None else tokens
    form = pick_dtype(dtype) if isinstance(dtype, str) else dtype
    paths = tuple((unit.name, unit.path) for unit in architecture.units)
    # Missing settings of the config take the class's defaults, which the architecture's own has.
    settings = json.dumps(plain_config(architecture.config), sort_keys=True)
    found, most = _watched(settings, paths, latent, tokens, form)
    table = _table(architecture, found, latent, tokens, str(form).removeprefix("torch."))
    seen: list[int] = []
    nowhere = np.zeros(1, dtype=np.bool_)
    (total,) = _peaks(table, [nowhere] * len(table.units), seen)
    if total != most or seen != [unit.live_bytes for unit in table.units]:
        raise UnsupportedModelError(
            "asked for the activation memory of plans, found that this model keeps other tensors alive than the walk "
            f"over its blocks says (at most {most:,} bytes, the walk says {total:,}); leave memory out"
        )
    return table


@functools.lru_cache(maxsize=16)
def _watched(
    config: str, paths: tuple[tuple[str, str], ...], latent: int | None, tokens: int, dtype: torch.dtype
) -> tuple[dict[str, LiveSpan], int]:
    """The span of every unit by name, and the most of the whole pass; ``paths`` holds (name, module path)."""
    model = meta_model(json.loads(config), dtype)
    inputs = example_inputs(model.config, latent=latent, tokens=tokens, device="meta", dtype=dtype)
    with runs_on_meta():
        return spans(model, dict(paths), inputs)


def _table(
    architecture: Architecture,
    found: Mapping[str, LiveSpan],
    latent: int | None,
    tokens: int,
    dtype: str,
) -> ActivationTable:
    units = [
        UnitMemory(
            name=unit.name,
            kind="sampler" if unit.kind == "sampler" else "block",
            stage=unit.stage,
            input_bytes=found[unit.name].given,
            output_bytes=found[unit.name].made,
            workspace_bytes=found[unit.name].peak - found[unit.name].before,
            takes_skip=unit.takes_skip,
            gives_skip=unit.gives_skip,
            live_bytes=found[unit.name].peak,
        )
        for unit in architecture.units
    ]
    first = units[0].input_bytes
    return ActivationTable(
        architecture=architecture,
        units=tuple(units),
        kept_bytes=found[units[0].name].before - first,
        first_bytes=first,
        head_bytes=found[HEAD].peak - found[HEAD].before,
        latent=latent_shape(architecture.config, latent),
        tokens=tokens,
        dtype=dtype,
    )
