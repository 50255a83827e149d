"""The result of a distillation: its losses and its verdict, written to and read from a candidate's folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import pandas as pd
from torch import Tensor

from prune_lab.errors import DataError, RunError
from prune_lab.runs import CandidatePaths
from prune_lab.runtime import read_json, write_frame, write_json
from prune_lab.schemas import HELDOUT_COLUMNS, RECOVERY_COLUMNS


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Recovery:
    """How far a distillation brought a pruned U-Net back towards its teacher.

    ``before`` and ``after`` are held-out denoising losses (mean squared error on the validation probe), of the student
    as it was pruned and of its averaged weights at the end; ``after`` is nan for a failed one. ``steps`` counts the
    steps that were taken, ``seconds`` their wall-clock time with validation and checkpoints.
    """

    plan_id: str
    steps: int
    before: float
    after: float
    seconds: float
    status: Literal["done", "failed"]
    reason: str  # empty when done
    fingerprint: Mapping[str, Any]  # the settings, data and weights that it was made with
    rows: tuple[tuple[float, ...], ...]

    def frame(self) -> pd.DataFrame:
        """One row per step, columns RECOVERY_COLUMNS; step 0 is the pruned student.

        task, output, feature, total: losses of the batch before the step, total weighted. validation: held-out loss of
        the averaged weights after the step, empty where it was not measured. seconds: since the start.
        """
        frame = pd.DataFrame(list(self.rows), columns=list(RECOVERY_COLUMNS))
        return frame.astype({"step": "int64"})


def verdict_path(paths: CandidatePaths) -> Path:
    """The path of the JSON that is written last, when the distillation has ended: done or failed."""
    return paths.distilled / "recovery.json"


def write_verdict(paths: CandidatePaths, recovery: Recovery) -> None:
    """Write the verdict, which says that the tables are complete. Raises StorageError."""
    fields = {field.name: getattr(recovery, field.name) for field in dataclasses.fields(recovery)}
    del fields["rows"]
    # JSON has no nan: unknown values are null.
    known = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in fields.items()
    }
    write_json(verdict_path(paths), known)


def write_heldout(paths: CandidatePaths, losses: Mapping[int, Tensor]) -> None:
    """Write heldout.csv: the loss of every held-out row, (rows,) by step. Raises StorageError."""
    tables = [
        pd.DataFrame({"step": step, "row": range(len(rows)), "loss": rows.double().numpy()})
        for step, rows in sorted(losses.items())
    ]
    write_frame(paths.heldout, pd.concat(tables, ignore_index=True)[list(HELDOUT_COLUMNS)])


def load_heldout(folder: Path) -> pd.DataFrame:
    """Held-out losses of the candidate in ``folder``, a row of the frame per step, a column per held-out row.

    Rows are the same pictures, noise and timesteps for every candidate of a run, so differences are paired. Raises
    RunError when it was not distilled yet, DataError when the file is damaged.
    """
    path = CandidatePaths(Path(folder)).heldout
    if not path.is_file():
        raise RunError(
            f"asked for the held-out losses in {folder}, found none; distil it with prune-lab distill"
        )
    try:
        # As text first: not every version of pandas reads a float back to the last bit.
        frame = pd.read_csv(path, dtype=str).astype({"step": "int64", "row": "int64", "loss": "float64"})
        return frame.pivot(index="step", columns="row", values="loss")
    except (KeyError, ValueError) as error:
        raise DataError(
            f"asked to read {path}, found a damaged file ({error}); remove it and run the distillation again"
        ) from None


def load_recovery(folder: Path) -> Recovery | None:
    """The finished or failed distillation of the candidate in ``folder``; None when there is none yet.

    Raises DataError when its files are damaged.
    """
    paths = CandidatePaths(Path(folder))
    if not verdict_path(paths).is_file() or not paths.recovery.is_file():
        return None
    try:
        fields = cast("dict[str, Any]", read_json(verdict_path(paths)))
        fields |= {name: _number(fields[name]) for name in ("before", "after")}
        # As text first: not every version of pandas reads a float back to the last bit.
        rows = pd.read_csv(paths.recovery, dtype=str)[list(RECOVERY_COLUMNS)].astype("float64")
        return Recovery(**fields, rows=tuple(map(tuple, rows.to_numpy().tolist())))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"asked to read the distillation in {folder}, found damaged files ({error!r}); remove {paths.distilled}"
        ) from None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
