"""Many plans as one NumPy matrix: a row per plan, a column per block in the order of ``architecture.blocks``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from prune_lab.blocks import Architecture
from prune_lab.errors import PlanError, UnremovableBlockError
from prune_lab.plans import PruningPlan, native_choices, plan_of

PlanMatrix: TypeAlias = NDArray[np.bool_]  # (plans, blocks), True where the block is removed

_CHUNK = 8192  # plans at a time: what is computed of them then fits a processor's cache
_TRIES = 100  # draws for each plan asked for, before there are too few different ones


@dataclass(frozen=True, slots=True)
class SamplerLevel:
    """Samplers that leave together, and the blocks that must all be gone for it: everything further in."""

    samplers: tuple[str, ...]
    blocks: tuple[int, ...]  # places in ``architecture.blocks``


def sampler_levels(architecture: Architecture) -> tuple[SamplerLevel, ...]:
    """The levels whose samplers can leave, innermost first; ``plans.removed_samplers`` is the rule for one plan.

    A level with a block that cannot be removed ends the list. SD-v1.4 has one level: Dn3.down and Up1.up.
    """
    depth = len(architecture.config["down_block_types"])
    present = {sampler.name for sampler in architecture.samplers}
    stages, levels = {"Md"}, []
    for level in range(depth, 1, -1):
        up = depth + 1 - level
        stages |= {f"Dn{level}", f"Up{up}"}
        inner = [place for place, block in enumerate(architecture.blocks) if block.stage in stages]
        if not all(architecture.blocks[place].removable for place in inner):
            break
        leaving = tuple(name for name in (f"Dn{level - 1}.down", f"Up{up}.up") if name in present)
        levels.append(SamplerLevel(leaving, tuple(inner)))
    return tuple(levels)


def levels_gone(matrix: PlanMatrix, levels: Sequence[SamplerLevel]) -> PlanMatrix:
    """(plans, levels): whether the samplers of each level leave with the plan."""
    gone = np.empty((len(matrix), len(levels)), dtype=np.bool_)
    for number, level in enumerate(levels):
        gone[:, number] = matrix[:, list(level.blocks)].all(axis=1)
    return gone


def check_matrix(matrix: PlanMatrix, architecture: Architecture) -> None:
    """Raises PlanError when ``matrix`` is not one of plans for ``architecture``, and UnremovableBlockError."""
    wanted = len(architecture.blocks)
    if not isinstance(matrix, np.ndarray) or matrix.dtype != np.bool_ or matrix.shape[1:] != (wanted,):
        found = (
            f"{matrix.dtype} of shape {matrix.shape}"
            if isinstance(matrix, np.ndarray)
            else type(matrix).__name__
        )
        raise PlanError(
            f"asked for plans as a boolean matrix (plans, {wanted}), found {found}; as_matrix makes one"
        )
    for place, block in enumerate(architecture.blocks):
        if block.starred and matrix[:, place].any():
            raise UnremovableBlockError(
                f"asked for plans that remove {block.name}, but it {block.reason}; leave column {place} False"
            )


def chunks(matrix: PlanMatrix) -> Iterator[slice]:
    """The rows of ``matrix``, as many at a time as are best worked on together."""
    for start in range(0, len(matrix), _CHUNK):
        yield slice(start, start + _CHUNK)


def as_matrix(plans: Iterable[PruningPlan], architecture: Architecture) -> PlanMatrix:
    """(plans, blocks): True where a plan removes a block. Raises PlanError for a plan of another architecture."""
    listed = list(plans)
    places = {block.name: place for place, block in enumerate(architecture.blocks)}
    matrix = np.zeros((len(listed), len(places)), dtype=np.bool_)
    for row, plan in zip(matrix, listed, strict=True):
        if plan.architecture != architecture.signature:
            raise PlanError(
                f"asked for the row of a plan for architecture {plan.architecture}, the columns are blocks of "
                f"{architecture.signature}; read the plan again as text for this U-Net"
            )
        row[[places[name] for name in plan.removed]] = True
    return matrix


def as_plans(matrix: PlanMatrix, architecture: Architecture) -> tuple[PruningPlan, ...]:
    """The plan of every row, without names. Raises PlanError and UnremovableBlockError as ``check_matrix`` does."""
    check_matrix(matrix, architecture)
    names = np.array([block.name for block in architecture.blocks])
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
            f"asked for {count} different native plans, found {len(found)}; this U-Net has few: ask for fewer"
        )
    return tuple(found.values())
