"""How much of the width of a block stays: amounts as a person writes them, and the units they stand for."""

from __future__ import annotations

from prune_lab.width.amounts import (
    UNITS_NOTE,
    Width,
    all_kept,
    keeping_largest,
    parse_width,
    site_named,
    width_from_json,
    width_of,
    widths_text,
)

__all__ = [
    "UNITS_NOTE",
    "Width",
    "all_kept",
    "keeping_largest",
    "parse_width",
    "site_named",
    "width_from_json",
    "width_of",
    "widths_text",
]
