"""The report of a run: figures and pages from its tables. Nothing is measured here, and torch is not loaded.

``write_report`` writes the pages. For a single figure, a frame function (in ``tables``) returns the numbers and the
draw function of the same name (in ``charts``, ``criteria``, ``gates``, ``maps`` and ``tournament``) a matplotlib
``Figure`` in a theme.
"""

from __future__ import annotations

from prune_lab.report.charts import (
    draw_costs,
    draw_curves,
    draw_importance,
    draw_prediction,
    draw_quality_plane,
)
from prune_lab.report.criteria import draw_parts, write_agreement
from prune_lab.report.figures import DARK, LIGHT, Theme, plain_texts, plan_styles
from prune_lab.report.gates import draw_gates
from prune_lab.report.maps import draw_block_map, draw_plan_maps
from prune_lab.report.page import write_report
from prune_lab.report.picture_grids import Column, draw_comparison, picture_labels, read_pictures
from prune_lab.report.tables import PlanRow, RunTables, block_map_frame, curve_frame, read_run
from prune_lab.report.tournament import draw_tournament

__all__ = [
    "DARK",
    "LIGHT",
    "Column",
    "PlanRow",
    "RunTables",
    "Theme",
    "block_map_frame",
    "curve_frame",
    "draw_block_map",
    "draw_comparison",
    "draw_costs",
    "draw_curves",
    "draw_gates",
    "draw_importance",
    "draw_parts",
    "draw_plan_maps",
    "draw_prediction",
    "draw_quality_plane",
    "draw_tournament",
    "picture_labels",
    "plain_texts",
    "plan_styles",
    "read_pictures",
    "read_run",
    "write_agreement",
    "write_report",
]
