"""The version of the package, for whatever writes a file that says what made it."""

from __future__ import annotations

__version__ = "0.1.0"
