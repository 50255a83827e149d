"""The result of a distillation: its losses and its verdict, written to and read from a candidate's folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

import pandas as pd
from torch import Tensor

from prune_lab.errors import RunError
from prune_lab.runs import CandidatePaths, damaged, is_plan_id, read_records, read_typed
from prune_lab.runtime import write_frame, write_json
from prune_lab.schemas import HELDOUT, HELDOUT_COLUMNS, RECOVERY, RECOVERY_COLUMNS

_INFINITE = [math.inf, -math.inf]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Recovery:
    """How far a distillation brought a pruned model back towards its teacher.

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
        the averaged weights after the step, empty where it was not measured or not finite. seconds: since the start.
        """
        frame = pd.DataFrame(list(self.rows), columns=list(RECOVERY_COLUMNS)).replace(_INFINITE, math.nan)
        return frame.astype({"step": "int64"})


def verdict_path(paths: CandidatePaths) -> Path:
    """The path of the JSON that is written last, when the distillation has ended: done or failed."""
    return paths.distilled / "recovery.json"


def write_verdict(paths: CandidatePaths, recovery: Recovery) -> None:
    """Write the verdict, which says that the tables are complete. Raises StorageError."""
    fields = {field.name: getattr(recovery, field.name) for field in dataclasses.fields(recovery)}
    del fields["rows"]
    # JSON has numbers only: unknown and infinite values are null.
    known = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in fields.items()
    }
    write_json(verdict_path(paths), known)


def write_heldout(paths: CandidatePaths, losses: Mapping[int, Tensor]) -> None:
    """Write heldout.csv: the loss of every held-out row, (rows,) by step, empty where it is not finite.

    Raises StorageError.
    """
    tables = [
        pd.DataFrame({"step": step, "row": range(len(rows)), "loss": rows.double().numpy()})
        for step, rows in sorted(losses.items())
    ]
    frame = pd.concat(tables, ignore_index=True)[list(HELDOUT_COLUMNS)]
    write_frame(paths.heldout, frame.replace(_INFINITE, math.nan))


class _VerdictFile(TypedDict):
    plan_id: str
    steps: int
    before: float | None
    after: float | None
    seconds: float
    status: Literal["done", "failed"]
    reason: str
    fingerprint: Mapping[str, Any]


def _verdict(paths: CandidatePaths) -> _VerdictFile:
    found: _VerdictFile = read_typed(verdict_path(paths), _VerdictFile)
    if is_plan_id(paths.folder.name) and found["plan_id"] != paths.folder.name:
        raise damaged(verdict_path(paths), f"the verdict on plan {found['plan_id']}")
    return found


def load_heldout(folder: Path) -> pd.DataFrame:
    """Held-out losses of the candidate in ``folder``, a row of the frame per step, a column per held-out row.

    Rows are the same pictures, noise and timesteps for every candidate of a run, so differences are paired. Raises
    RunError when it was not distilled yet, DataError when the file is damaged. Only of a student that failed a loss may
    be missing (NaN).
    """
    paths = CandidatePaths(Path(folder))
    if not paths.heldout.exists():
        raise RunError(
            f"asked for the held-out losses in {folder}, found none; distil it with prune-lab distill"
        )
    frame = read_records(paths.heldout, HELDOUT)
    missing = frame["loss"].isna().to_numpy()
    failed = verdict_path(paths).exists() and _verdict(paths)["status"] == "failed"
    if missing.any() and not failed:
        raise damaged(paths.heldout, f"nothing in row {1 + int(missing.argmax())} of loss")
    losses = frame.pivot(index="step", columns="row", values="loss")
    if len(frame) != losses.size or set(frame["row"]) != set(range(losses.shape[1])):
        raise damaged(paths.heldout, "losses of some rows only")
    return losses


def load_recovery(folder: Path) -> Recovery | None:
    """The finished or failed distillation of the candidate in ``folder``; None when there is none yet.

    Raises DataError when its files are damaged.
    """
    paths = CandidatePaths(Path(folder))
    if not verdict_path(paths).exists() or not paths.recovery.exists():
        return None
    fields, frame = _verdict(paths), read_records(paths.recovery, RECOVERY)
    if frame["step"].tolist() != list(range(fields["steps"] + 1)):
        raise damaged(paths.recovery, f"other steps than 0 to {fields['steps']}")
    rows = frame[list(RECOVERY_COLUMNS)].astype("float64").to_numpy().tolist()
    before, after = (math.nan if one is None else one for one in (fields["before"], fields["after"]))
    return Recovery(
        plan_id=fields["plan_id"],
        steps=fields["steps"],
        before=before,
        after=after,
        seconds=fields["seconds"],
        status=fields["status"],
        reason=fields["reason"],
        fingerprint=fields["fingerprint"],
        rows=tuple(map(tuple, rows)),
    )
