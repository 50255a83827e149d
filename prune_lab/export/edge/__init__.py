"""A pipeline written for runtimes without torch, with all that draws with it."""

from __future__ import annotations

from prune_lab.export.edge.writing import export_for

__all__ = ["export_for"]
