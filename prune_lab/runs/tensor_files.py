"""Files of tensors that a run keeps: each says what it is in its metadata, and what is another or damaged is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from prune_lab.errors import DataError
from prune_lab.runs.records import typed
from prune_lab.runtime import parse_json


def read_tensors(path: Path, form: str, asked: str, remedy: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of the safetensors file ``path``, whose metadata give ``form`` as its format.

    Raises DataError, which says what was ``asked`` and its ``remedy``, for a missing, damaged or other file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"asked to {asked} {path}, found a damaged file ({error}); {remedy}") from None
    if metadata.get("format") != form:
        raise DataError(f"asked to {asked} {path}, found another kind of file; {remedy}")
    return metadata, tensors


def read_entry(path: Path, metadata: Mapping[str, str], name: str, hint: Any, asked: str, remedy: str) -> Any:
    """The JSON in the entry ``name`` of the ``metadata`` of ``path``, as the type ``hint`` says.

    Raises DataError, as ``read_tensors`` does, when it is missing or another value.
    """
    try:
        return typed(hint, parse_json(metadata.get(name, "")))
    except ValueError as error:
        raise DataError(
            f"asked to {asked} {path}, found {name} that cannot be read ({error}); {remedy}"
        ) from None
