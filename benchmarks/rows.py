"""The rows of a table, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd


def rows_of(table: pd.DataFrame) -> Iterator[Any]:
    """Each row of ``table``, its cells by the name of their column; which types they have no checker knows."""
    return iter(table.itertuples())
