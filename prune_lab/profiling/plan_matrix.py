"""Many plans as one NumPy matrix: a row per plan, a column per block or layer as in ``architecture.named``."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from prune_lab.blocks import Architecture
from prune_lab.errors import PlanError, UnremovableBlockError
from prune_lab.plans import PruningPlan, native_choices, plan_of

REST = "rest"  # convolutions in and out, time and added embeddings: what no plan removes

PlanMatrix: TypeAlias = NDArray[np.bool_]  # (plans, blocks and layers), True where one is removed by name

_CHUNK = 8192  # plans at a time: what is computed of them then fits a processor's cache
_TRIES = 100  # draws for each plan asked for, before there are too few different ones


@dataclass(frozen=True, slots=True)
class SamplerGroup:
    """Samplers that leave together, and the blocks that must all be gone for it."""

    samplers: tuple[str, ...]
    blocks: tuple[str, ...]
    places: tuple[int, ...]  # of the blocks in ``architecture.named``

    @property
    def name(self) -> str:
        """The samplers as one name: ``Dn3.down+Up1.up``."""
        return "+".join(self.samplers)


@functools.lru_cache(maxsize=64)
def sampler_groups(architecture: Architecture) -> tuple[SamplerGroup, ...]:
    """The samplers that a plan can make leave, innermost first: those whose ``leaves_with`` can all be removed."""
    places = {block.name: place for place, block in enumerate(architecture.named) if block.removable}
    found: dict[tuple[str, ...], list[str]] = {}
    for sampler in architecture.samplers:
        if sampler.leaves_with and places.keys() >= set(sampler.leaves_with):
            found.setdefault(sampler.leaves_with, []).append(sampler.name)
    return tuple(
        SamplerGroup(tuple(found[blocks]), blocks, tuple(places[block] for block in blocks))
        for blocks in sorted(found, key=len)
    )


def groups_gone(matrix: PlanMatrix, groups: Sequence[SamplerGroup]) -> PlanMatrix:
    """(plans, groups): whether the samplers of each group leave with the plan."""
    gone = np.empty((len(matrix), len(groups)), dtype=np.bool_)
    for number, group in enumerate(groups):
        gone[:, number] = matrix[:, list(group.places)].all(axis=1)
    return gone


def check_matrix(matrix: PlanMatrix, architecture: Architecture) -> None:
    """Raises PlanError when ``matrix`` is not one of plans for ``architecture``, and UnremovableBlockError."""
    wanted = len(architecture.named)
    if not isinstance(matrix, np.ndarray) or matrix.dtype != np.bool_ or matrix.shape[1:] != (wanted,):
        found = (
            f"{matrix.dtype} of shape {matrix.shape}"
            if isinstance(matrix, np.ndarray)
            else type(matrix).__name__
        )
        raise PlanError(
            f"asked for plans as a boolean matrix (plans, {wanted}), found {found}; as_matrix makes one"
        )
    for place, block in enumerate(architecture.named):
        if not block.removable and matrix[:, place].any():
            raise UnremovableBlockError(
                f"asked for plans that remove {block.name}, but it {block.reason}; leave column {place} False"
            )


def outermost(matrix: PlanMatrix, architecture: Architecture) -> PlanMatrix:
    """``matrix`` with False for each layer whose block is removed: the block counts."""
    if not architecture.layers:
        return matrix
    places = {block.name: place for place, block in enumerate(architecture.named)}
    found = matrix.copy()
    for layer in architecture.layers:
        found[:, places[layer.name]] &= ~matrix[:, places[layer.inside]]
    return found


def chunks(matrix: PlanMatrix) -> Iterator[slice]:
    """The rows of ``matrix``, as many at a time as are best worked on together."""
    for start in range(0, len(matrix), _CHUNK):
        yield slice(start, start + _CHUNK)


def as_matrix(plans: Iterable[PruningPlan], architecture: Architecture) -> PlanMatrix:
    """(plans, blocks): True where a plan removes a block. Raises PlanError for a plan of another architecture."""
    listed = list(plans)
    places = {block.name: place for place, block in enumerate(architecture.named)}
    matrix = np.zeros((len(listed), len(places)), dtype=np.bool_)
    for row, plan in zip(matrix, listed, strict=True):
        if plan.architecture != architecture.signature:
            raise PlanError(
                f"asked for the row of a plan for architecture {plan.architecture}, the columns are blocks of "
                f"{architecture.signature}; read the plan again as text for this model"
            )
        row[[places[name] for name in plan.removed]] = True
    return matrix


def as_plans(matrix: PlanMatrix, architecture: Architecture) -> tuple[PruningPlan, ...]:
    """The plan of every row, without names. Raises PlanError and UnremovableBlockError as ``check_matrix`` does."""
    check_matrix(matrix, architecture)
    names = np.array([block.name for block in architecture.named])
    return tuple(plan_of(architecture, names[row].tolist()) for row in matrix)


def random_native_plans(architecture: Architecture, count: int, *, seed: int = 0) -> tuple[PruningPlan, ...]:
    """``count`` different native plans that remove something: at each level an option, all equally likely.

    Raises PlanError when the architecture has too few.
    """
    generator = np.random.default_rng(seed)
    levels = native_choices(architecture)
    found: dict[str, PruningPlan] = {}
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        chosen = (level[generator.integers(len(level))] for level in levels)
        plan = plan_of(architecture, frozenset[str]().union(*chosen))
        if plan.removed:
            found.setdefault(plan.id, plan)
    if len(found) < count:
        raise PlanError(
            f"asked for {count} different native plans, found {len(found)}; this model has few: ask for fewer"
        )
    return tuple(found.values())
