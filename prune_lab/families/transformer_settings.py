"""What the settings of a transformer may be: of the kind that its class has there, and of a size that can be built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from prune_lab.errors import UnsupportedModelError
from prune_lab.runtime import printable

MOST_BLOCKS = 256  # of one list; the deepest that are published have 60
LARGEST = 1_048_576  # of any number of channels, places or words
LARGEST_SIDE = 1024  # of a grid for which the place of every patch is computed when a model is built
_GRIDS = ("sample_size", "sample_height", "sample_width", "pos_embed_max_size")
_LONGEST_LIST = 256


def _refuse(name: str, value: Any, wanted: str) -> NoReturn:
    raise UnsupportedModelError(
        f"asked to build a transformer from its config, found {name} {printable(repr(value), 60)}; use {wanted}"
    )


def _is_whole(value: Any, most: int) -> bool:
    # `type`, not `isinstance`: true is an int to Python, and no count to a reader
    return type(value) is int and 0 <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) <= _LONGEST_LIST


def check_settings(counts: Sequence[str], config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for a setting that is not of the kind that the class has there.

    ``counts`` are the settings that say how many blocks there are. What this lets through, diffusers may still refuse.
    """
    for name, value in config.items():
        default = defaults.get(name)
        if name in counts:
            if not _is_whole(value, MOST_BLOCKS):
                _refuse(name, value, f"a whole number from 0 to {MOST_BLOCKS}")
        elif value is None:
            continue
        elif name in _GRIDS:
            sides = value if _is_list(value) else [value]
            if not all(_is_whole(side, LARGEST_SIDE) for side in sides):
                _refuse(name, value, f"a whole number from 1 to {LARGEST_SIDE:,}")
        elif isinstance(default, bool):
            if type(value) is not bool:
                _refuse(name, value, "true or false")
        elif isinstance(default, (int, float)):
            if not (_is_number(value) and abs(value) <= LARGEST):
                _refuse(name, value, f"a number up to {LARGEST:,}")
            if isinstance(default, int) and value != int(value):
                _refuse(name, value, "a whole number")
        elif isinstance(default, str):
            if not isinstance(value, str) or len(value) > 100:
                _refuse(name, value, "a name")
        elif isinstance(default, (list, tuple)):
            if not (_is_list(value) and all(_is_whole(one, LARGEST) for one in value)):
                _refuse(name, value, f"a list of up to {_LONGEST_LIST} whole numbers")
        elif _is_number(value) and abs(value) > LARGEST:
            _refuse(name, value, f"a number up to {LARGEST:,}")
