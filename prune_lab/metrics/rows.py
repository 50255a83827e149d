"""What every metric asks of the features that it is given."""

from __future__ import annotations

from torch import Tensor

from prune_lab.errors import DataError


def check_finite(features: Tensor, what: str) -> None:
    """Raise DataError, which names the first row, where ``features`` (N, ...) hold what is no number."""
    sound = features.isfinite().flatten(1).all(dim=1)
    if not sound.all():
        bad = int((~sound).sum())
        raise DataError(
            f"asked for {what} of {len(features):,} rows of features, found values that are not finite in {bad:,} of "
            f"them, first in row {int(sound.logical_not().nonzero()[0])}; draw or extract these again, in float32"
        )
