"""The report of a run: figures and pages from its tables. Nothing is measured here, and torch is not loaded.

``write_report`` writes the pages. For a single figure, a frame function returns the numbers and the draw function
of the same name a matplotlib ``Figure`` in a theme.
"""

from __future__ import annotations

from prune_lab.report.charts import draw_costs, draw_curves, draw_importance, draw_quality_plane
from prune_lab.report.criteria import (
    draw_additivity,
    draw_agreement,
    draw_parts,
    draw_stability,
    write_agreement,
)
from prune_lab.report.figures import DARK, LIGHT, plan_styles
from prune_lab.report.maps import draw_block_map, draw_plan_maps
from prune_lab.report.page import write_report
from prune_lab.report.tables import PlanRow, RunTables, block_map_frame, importance_frame, read_run
from prune_lab.report.tournament import draw_tournament

__all__ = [
    "DARK",
    "LIGHT",
    "PlanRow",
    "RunTables",
    "block_map_frame",
    "draw_additivity",
    "draw_agreement",
    "draw_block_map",
    "draw_costs",
    "draw_curves",
    "draw_importance",
    "draw_parts",
    "draw_plan_maps",
    "draw_quality_plane",
    "draw_stability",
    "draw_tournament",
    "importance_frame",
    "plan_styles",
    "read_run",
    "write_agreement",
    "write_report",
]
