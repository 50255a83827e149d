"""The report of a run: figures and pages from its tables. Nothing is measured here, and torch is not loaded.

``write_report`` writes the pages. For a single figure, a frame function (in ``tables``) returns the numbers and the
draw function of the same name (in ``charts``, ``criteria``, ``maps`` and ``tournament``) a matplotlib ``Figure`` in a
theme.
"""

from __future__ import annotations

from prune_lab.report.criteria import draw_parts, write_agreement
from prune_lab.report.figures import LIGHT, plan_styles
from prune_lab.report.maps import draw_block_map, draw_plan_maps
from prune_lab.report.page import write_report
from prune_lab.report.tables import PlanRow, block_map_frame

__all__ = [
    "LIGHT",
    "PlanRow",
    "block_map_frame",
    "draw_block_map",
    "draw_parts",
    "draw_plan_maps",
    "plan_styles",
    "write_agreement",
    "write_report",
]
