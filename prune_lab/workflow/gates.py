"""What the solver learned-gates has learnt, as tables of the run and in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from prune_lab.runs import Run, read_records
from prune_lab.runtime import write_frame
from prune_lab.schemas import (
    GATE_STEPS,
    GATE_STEPS_COLUMNS,
    LEARNED_GATES,
    LEARNED_GATES_COLUMNS,
)
from prune_lab.search import GateResult

_SURE = 0.95  # share of the masks that decide as the best plan does
_FEWEST = 20  # masks: a share of fewer is in steps of more than a twentieth
_NAMED = 3  # gates that a line names
_ENDS = 10  # the first and the last one in so many steps are compared


def gates_frame(found: GateResult, budget: str) -> pd.DataFrame:
    """A row per gate in order of execution, columns LEARNED_GATES_COLUMNS; ``budget`` is the text of all of them.

    ``sure`` is the share of the masks that decide on the block as the best plan does, ``value`` its loss up to a
    factor.
    """
    removed = found.plans[0].removed
    rows = [
        (
            *(budget, gate.block, gate.stays, gate.low, gate.high, gate.sure(gate.block in removed)),
            *(gate.block in removed, found.values[gate.block], gate.logit, gate.spread, gate.masks),
        )
        for gate in found.gates
    ]
    return pd.DataFrame(rows, columns=list(LEARNED_GATES_COLUMNS))


def gate_steps_frame(found: GateResult, budget: str) -> pd.DataFrame:
    """A row per step, counted from 1, columns GATE_STEPS_COLUMNS: ``left`` is the share of ``metric`` that the mask
    leaves.
    """
    rows = [
        (budget, number, step.loss, step.removed, found.metric, step.left)
        for number, step in enumerate(found.steps, 1)
    ]
    return pd.DataFrame(rows, columns=list(GATE_STEPS_COLUMNS))


def write_gates(run: Run, learnt: Sequence[tuple[pd.DataFrame, pd.DataFrame]]) -> tuple[Path, ...]:
    """The files of what was ``learnt``, tables of gates and of steps for each budget; none where nothing was."""
    files = run.gates, run.gate_steps
    if not learnt:
        for path in files:  # of a search that was stopped, by this solver
            path.unlink(missing_ok=True)
        return ()
    for path, frames in zip(files, zip(*learnt, strict=True), strict=True):
        write_frame(path, pd.concat(frames, ignore_index=True))
    return files


def _line(gates: pd.DataFrame, steps: pd.DataFrame) -> str:
    """What one search has learnt, in a sentence."""
    losses = steps.sort_values("step")["loss"].to_numpy()
    few = max(1, len(losses) // _ENDS)
    first, last = np.mean(losses[:few]), np.mean(losses[-few:])
    masks = int(gates["masks"].iloc[0])
    words = f"{len(losses)} steps, in which the loss went from {first:.3g} to {last:.3g} (means of {few})"
    if masks < _FEWEST:
        return f"{words}; {masks} masks are too few to tell how sure gates are: more with search.gate_steps"
    sure = int((gates["sure"] >= _SURE).sum())
    words = (
        f"{words}; of {len(gates)} gates {sure} decide as the best plan does in {_SURE:.0%} of the last {masks} masks "
        "or more"
    )
    open_ones = gates[gates["sure"] < _SURE].sort_values("sure", kind="stable").head(_NAMED)
    named = [
        f"{row.block}, which it {'removes' if row.removed else 'keeps'}, stays in {row.stays:.0%} "
        f"[{row.stays_low:.0%}, {row.stays_high:.0%}]"
        for row in open_ones.itertuples()
    ]
    return f"{words}; least sure: {'; '.join(named)}" if named else words


def gate_notes(run: Run) -> tuple[str, ...]:
    """A line for each budget whose plans came from gates; none for another solver."""
    if not (run.done(run.gates) and run.done(run.gate_steps)):
        return ()
    gates, steps = read_records(run.gates, LEARNED_GATES), read_records(run.gate_steps, GATE_STEPS)
    return tuple(
        f"learned gates, {budget}: {_line(own, steps[steps['budget'] == budget])} (plans/gates.csv, with --run)"
        for budget, own in gates.groupby("budget", sort=False)
    )
