"""Files that are read with suspicion."""

from __future__ import annotations

import json
from pathlib import Path

from prune_lab.errors import DataError, StorageError


def read_json(path: Path) -> object:
    """The value that the JSON file ``path`` holds.

    Raises StorageError when it is missing, DataError when it is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())  # bytes: a byte-order mark is skipped
    except OSError as error:
        raise StorageError(f"asked to read {path}: {error.strerror}; check the path") from None
    except ValueError as error:
        raise DataError(f"asked to read {path} as JSON, found {error}; write the file again") from None
