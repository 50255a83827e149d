"""Latency: the time of a call, and a table of what each block's removal saves, which predicts every plan."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from prune_lab.blocks import Architecture
from prune_lab.errors import ConfigError, DataError, PlanError
from prune_lab.families import example_inputs, filled_with_noise
from prune_lab.plans import PruningPlan, removed_samplers
from prune_lab.profiling.plan_matrix import REST, sampler_groups
from prune_lab.profiling.width_savings import WidthSavings, unit_ms
from prune_lab.runs import typed
from prune_lab.runtime import Environment, seeded, synchronize
from prune_lab.schemas import LATENCY_CHECK_COLUMNS, LATENCY_TABLE_COLUMNS

SavingKind = Literal["block", "samplers"]
Use = Literal["calibrate", "held-out"]

# The time of a call ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Latency:
    """Wall-clock time of one call in milliseconds: the median and the range of the middle four fifths."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    runs: int  # recorded calls
    warmup: int  # calls before them that were not recorded


def latency_of(milliseconds: Sequence[float], warmup: int) -> Latency:
    """The latency of calls that took ``milliseconds`` each, two or more."""
    # "inclusive" keeps both deciles within what was seen, however few the runs.
    deciles = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return Latency(statistics.median(milliseconds), deciles[0], deciles[-1], len(milliseconds), warmup)


def check_runs(runs: int, warmup: int) -> None:
    """Raises ConfigError when a median with a spread cannot come of it."""
    if runs < 2 or warmup < 0:
        raise ConfigError(
            f"asked for {runs} timed runs after {warmup} of warm-up; a median with a spread needs at least 2 runs "
            "and a warm-up of at least 0"
        )


def call_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of ``call``, ``device`` idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|size overflow", re.IGNORECASE)


@contextlib.contextmanager
def fitting() -> Iterator[None]:
    """Turns what torch raises in the block when memory does not suffice into a ConfigError with the cure."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # of a CPU torch raises a plain RuntimeError
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        raise ConfigError(
            "asked for passes of the model that do not fit the memory of this machine; give a smaller batch, smaller "
            "pictures or fewer tokens, as in 0.7x@512,batch=1"
        ) from None


def measure_latency(
    call: Callable[[], object], *, warmup: int = 3, runs: int = 20, device: torch.device | str = "cpu"
) -> Latency:
    """The time of ``call`` over ``runs`` recorded calls, without gradients, ``device`` idle before and after each.

    Raises ConfigError for fewer than two runs.
    """
    check_runs(runs, warmup)
    device = torch.device(device)
    with fitting(), torch.inference_mode():
        for _ in range(warmup):
            call()
        times = [call_ms(call, device) for _ in range(runs)]
    return latency_of(times, warmup)


def random_inputs(
    config: Mapping[str, Any],
    *,
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    frames: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """``example_inputs`` filled with normal noise: a GPU runs faster on zeros than on pictures.

    Raises ConfigError when they do not fit memory.
    """
    generator = seeded(seed)
    with fitting():
        sizes = {"batch": batch, "latent": latent, "tokens": tokens, "frames": frames}
        inputs = example_inputs(config, **sizes, device=device, dtype=dtype)  # type: ignore[arg-type]
        filled: dict[str, Any] = filled_with_noise(inputs, generator)
    return filled


# What each block's removal saves ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Saving:
    """Milliseconds of a pass that one block takes, or samplers that leave together: what is saved without them."""

    name: str  # Dn1.R2, or Dn3.down+Up1.up
    kind: SavingKind
    measured_ms: float
    p10_ms: float
    p90_ms: float


@dataclass(frozen=True, slots=True)
class MeasuredPlan:
    """A plan that was materialised and timed: milliseconds of a forward pass of the student."""

    plan: PruningPlan
    use: Use
    measured_ms: float


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """The latency of a model, what each block saves of it, and what that predicts for a plan.

    predicted = whole - scale * sum of max(0, measured saving) over what the plan removes, so no plan is predicted to be
    slower than one that removes less. ``scale`` makes up for what parts in place do not show: a student does not make
    what only a block that is gone would read, and its stages do less around their blocks. Blocks that cannot be
    removed, and samplers that never leave, are in the rest.

    Misleads when: a plan's students run with another batch, size, format or number of threads than in here.
    """

    architecture: Architecture = field(repr=False)
    whole: Latency
    savings: tuple[Saving, ...]  # removable blocks in order of execution, then samplers, innermost first
    scale: float  # 1 where no plan was measured to calibrate with
    checks: tuple[MeasuredPlan, ...]
    batch: int
    latent: tuple[int, int]  # height and width
    tokens: int
    seed: int
    environment: Environment
    backend: str = "eager"
    measured: str = ""  # when, in UTC
    widths: WidthSavings | None = None  # what units inside of blocks save; None where that was not measured

    def predict(self, plan: PruningPlan) -> float:
        """Predicted median milliseconds of one plan. Raises PlanError for a plan of another architecture, or with
        widths where their savings were not measured.
        """
        if plan.architecture != self.architecture.signature:
            raise PlanError(
                f"asked for the latency of a plan for architecture {plan.architecture}, this table is of "
                f"{self.architecture.signature}; read the plan again as text for this model"
            )
        parts = self.part_ms()
        gone = (*plan.removed, *removed_samplers(self.architecture, plan))
        units = {unit.name: unit for unit in self.architecture.named}
        for layer in (
            self.architecture.layers
        ):  # what its multiply-adds are of its block's: layers are not timed alone
            parts[layer.name] = parts[layer.inside] * layer.macs / max(1, units[layer.inside].macs)
        return self.whole.median_ms - math.fsum(parts[name] for name in gone) - self._narrower(plan)

    def _narrower(self, plan: PruningPlan) -> float:
        """Milliseconds that the widths of ``plan`` save."""
        if not plan.widths or plan.form == "padded":  # as wide as the original
            return 0.0
        saves = self.unit_ms()
        if saves is None:
            raise PlanError(
                "asked for the latency of a plan that makes blocks narrower, and this table was measured without what "
                "that saves; time the plan with profile --plan"
            )
        return math.fsum((width.of - width.count) * saves[width.site] for width in plan.widths)

    def unit_ms(self) -> dict[str, float] | None:
        """Milliseconds that one unit of each site saves, by the name of the site; None where it was not measured."""
        if self.widths is None:
            return None
        return unit_ms(self.architecture, self.widths, self.whole.median_ms, self.part_ms())

    def part_ms(self) -> dict[str, float]:
        """Milliseconds of every block, every sampler and the rest, which add up to the whole.

        Of samplers that leave together the first has all; blocks and samplers that never leave have 0: they are in the
        rest.
        """
        parts = {block.name: 0.0 for block in self.architecture.blocks}
        parts |= {sampler.name: 0.0 for sampler in self.architecture.samplers}
        for saving in self.savings:
            parts[saving.name.split("+")[0]] = self._predicted(saving)
        return {**parts, REST: self.whole.median_ms - math.fsum(parts.values())}

    def errors_percent(self, use: Use = "held-out") -> NDArray[np.float64]:
        """(plans,) predicted over measured, minus one, in percent, of the plans measured for ``use``."""
        return np.array(
            [
                100 * (self.predict(check.plan) / check.measured_ms - 1)
                for check in self.checks
                if check.use == use
            ]
        )

    @property
    def median_error_percent(self) -> float | None:
        """The median absolute error on plans that were not used to calibrate; None when there are none."""
        found = np.abs(self.errors_percent())
        return float(np.median(found)) if len(found) else None

    @property
    def worst_error_percent(self) -> float | None:
        """The largest absolute error on plans that were not used to calibrate; None when there are none."""
        found = np.abs(self.errors_percent())
        return float(found.max()) if len(found) else None

    def frame(self) -> pd.DataFrame:
        """One row per block that can be removed, per samplers that can leave, and the rest.

        Columns name, kind, measured_ms, p10_ms, p90_ms (over the passes), saved_ms (what predictions take off),
        share (saved_ms in the whole). The rest is what is left of the whole, not measured by itself.
        """
        rows = [
            (
                saving.name,
                saving.kind,
                saving.measured_ms,
                saving.p10_ms,
                saving.p90_ms,
                self._predicted(saving),
            )
            for saving in self.savings
        ]
        rest = self.whole.median_ms - sum(row[-1] for row in rows)
        rows.append((REST, REST, float("nan"), float("nan"), float("nan"), rest))  # type: ignore[arg-type]
        frame = pd.DataFrame(rows, columns=list(LATENCY_TABLE_COLUMNS[:-1]))
        frame["share"] = frame["saved_ms"] / self.whole.median_ms
        return frame

    def checks_frame(self) -> pd.DataFrame:
        """One row per measured plan: plan, removed, use, measured_ms, predicted_ms, error_percent."""
        rows = []
        for check in self.checks:
            predicted = self.predict(check.plan)
            error = 100 * (predicted / check.measured_ms - 1)
            rows.append((check.plan.label, check.plan.text, check.use, check.measured_ms, predicted, error))
        return pd.DataFrame(rows, columns=list(LATENCY_CHECK_COLUMNS))

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values, the architecture as its signature; ``latency_table_from_dict`` reads them back."""
        return {
            "architecture": self.architecture.signature,
            "whole": dataclasses.asdict(self.whole),
            "savings": [dataclasses.asdict(saving) for saving in self.savings],
            "scale": self.scale,
            "checks": [
                {
                    "removed": list(check.plan.removed),
                    "name": check.plan.name,
                    "use": check.use,
                    "measured_ms": check.measured_ms,
                }
                for check in self.checks
            ],
            "batch": self.batch,
            "latent": list(self.latent),
            "tokens": self.tokens,
            "seed": self.seed,
            "environment": self.environment.as_dict(),
            "backend": self.backend,
            "measured": self.measured,
            "widths": None if self.widths is None else dataclasses.asdict(self.widths),
        }

    def _predicted(self, saving: Saving) -> float:
        return self.scale * max(0.0, saving.measured_ms)


class _CheckFile(TypedDict):
    removed: tuple[str, ...]
    name: str
    use: Use
    measured_ms: float


class _LatencyFile(TypedDict):
    architecture: str
    whole: Latency
    savings: tuple[Saving, ...]
    scale: float
    checks: tuple[_CheckFile, ...]
    batch: int
    latent: tuple[int, int]
    tokens: int
    seed: int
    environment: Environment
    backend: str
    measured: str
    widths: NotRequired[WidthSavings | None]


def latency_table_from_dict(values: Mapping[str, Any], architecture: Architecture) -> LatencyTable:
    """The table that ``as_dict`` wrote.

    Raises PlanError when it is of another architecture, DataError when a field is missing or unknown.
    """
    found = values.get("architecture") if isinstance(values, Mapping) else None
    if found is not None and found != architecture.signature:
        raise PlanError(
            f"asked to read a latency table for architecture {architecture.signature}, found one of {found}; "
            "measure this model's own"
        )
    try:
        fields = cast("_LatencyFile", typed(_LatencyFile, values))
        if unknown := sorted(values.keys() - _LatencyFile.__annotations__.keys()):
            raise ValueError(f"the unknown entry {unknown[0]!r}")
    except ValueError as error:
        raise DataError(f"asked to read a latency table, found {error}; measure the model again") from None
    checks = tuple(
        MeasuredPlan(
            PruningPlan(check["removed"], architecture.signature).named(check["name"]),
            check["use"],
            check["measured_ms"],
        )
        for check in fields["checks"]
    )
    read = {name: value for name, value in fields.items() if name not in ("architecture", "checks")}
    table = LatencyTable(architecture, checks=checks, **read)  # type: ignore[arg-type]
    if [saving.name for saving in table.savings] != saving_names(architecture):
        raise DataError(
            "asked to read a latency table, found that savings are missing; measure the model again"
        )
    sites = [site.name for site in architecture.sites]
    if table.widths is not None and [unit.site for unit in table.widths.units] != sites:
        raise DataError(
            "asked to read a latency table, found that savings of narrower blocks are missing; measure the model again"
        )
    return table


def saving_names(architecture: Architecture) -> list[str]:
    """What can be removed, in table order: blocks as ``Dn1.R2``, then samplers as ``Dn3.down+Up1.up``."""
    return [
        *(block.name for block in architecture.blocks if block.removable),
        *(group.name for group in sampler_groups(architecture)),
    ]


def calibrated(table: LatencyTable, checks: Sequence[MeasuredPlan]) -> LatencyTable:
    """The table with ``checks``, and the scale that those of them meant for calibration ask for.

    The scale makes the sum of absolute errors on them least, which one plan that was measured badly does not upset: it
    is the median of measured over added-up savings, weighted by the latter. Zero where no saving was measured at all;
    1 without a plan to calibrate with.
    """
    plain = dataclasses.replace(table, scale=1.0, checks=tuple(checks))
    pairs = []
    for check in checks:
        added_up = plain.whole.median_ms - plain.predict(check.plan)
        if check.use == "calibrate" and added_up > 0:
            pairs.append(((plain.whole.median_ms - check.measured_ms) / added_up, added_up))
    scale = max(0.0, _weighted_median(pairs)) if pairs else 1.0
    return dataclasses.replace(plain, scale=scale)


def _weighted_median(pairs: Sequence[tuple[float, float]]) -> float:
    """Of (value, weight): the value with half of the weight on either side; between two that share it, their middle."""
    ordered = sorted(pairs)
    half, below = sum(weight for _, weight in ordered) / 2, 0.0
    for number, (value, weight) in enumerate(ordered):
        below += weight
        if math.isclose(below, half) and number + 1 < len(ordered):
            return (value + ordered[number + 1][0]) / 2
        if below > half:
            return value
    return ordered[-1][0]
