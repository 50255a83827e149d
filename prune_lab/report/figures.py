"""The style of all figures of the report: themes, styles of plans, the colour scale of impact, writing to files.

Figures are explicit ``Figure`` objects, without pyplot and global state, so a report can be written from any thread.
"""

from __future__ import annotations

import base64
import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.text import Text as MplText
from matplotlib.ticker import FuncFormatter, LogFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from prune_lab.report.format import short_number
from prune_lab.report.tables import PlanRow
from prune_lab.runtime import atomic_write


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a light or dark page; ``impact_map`` is the colour map, whose strong end means a large impact."""

    name: str
    text: str
    muted: str
    grid: str
    surface: str
    impact_map: str


# Viridis keeps its order with every kind of colour vision. It is reversed on white, so that darker means more impact.
LIGHT = Theme("light", "#1c2127", "#59636e", "#dfe3e8", "#ffffff", "viridis_r")
DARK = Theme("dark", "#e6e8eb", "#9aa4ae", "#343b43", "#15181c", "viridis")


@dataclass(frozen=True, slots=True)
class PlanStyle:
    """Colour, marker and dash of a plan, the same in every figure; each of them identifies the plan."""

    color: str
    marker: str
    dash: str


# Okabe and Ito's colours, distinguishable with every kind of colour vision, without the yellow, invisible on white;
# then four more.
_COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"),
    *("#8F7BD6", "#A08060", "#882255", "#8C8C2F"),
)
_SEARCH_MARKERS = ("D", "^", "v", "P", "X", "p", "h", "*")
_SEARCH_DASHES = ("--", "-.", ":")


def plan_styles(plans: Sequence[PlanRow]) -> dict[str, PlanStyle]:
    """A style for each plan id: controls have discs and solid lines, searched plans other markers and dashes."""
    styles: dict[str, PlanStyle] = {}
    searched = 0
    for index, plan in enumerate(plans):
        marker, dash = "o", "-"
        if plan.origin != "control":
            marker = _SEARCH_MARKERS[searched % len(_SEARCH_MARKERS)]
            dash = _SEARCH_DASHES[searched % len(_SEARCH_DASHES)]
            searched += 1
        styles[plan.id] = PlanStyle(_COLORS[index % len(_COLORS)], marker, dash)
    return styles


def impact_scale(impacts: pd.Series[float]) -> LogNorm:
    """The logarithmic colour scale of impact; it ends at round numbers below and above the positive impacts."""
    positive = impacts[impacts > 0]
    if positive.empty:
        return LogNorm(1e-4, 1.0, clip=True)
    low, high = _round_number(positive.min(), np.floor), _round_number(positive.max(), np.ceil)
    return LogNorm(low, max(high, 10 * low), clip=True)


def _round_number(value: float, nearest: Callable[[float], float]) -> float:
    """``value`` rounded down (``floor``) or up (``ceil``) to one digit: 0.0037 gives 0.003 or 0.004."""
    decade = 10.0 ** np.floor(np.log10(value))
    return float(nearest(value / decade) * decade)


def impact_colors(theme: Theme) -> Colormap:
    """The colour map of impact in ``theme``."""
    return mpl.colormaps[theme.impact_map]


def impact_bar(figure: Figure, norm: LogNorm, theme: Theme, label: str, layout: Mapping[str, Any]) -> None:
    """Add the colour bar of impact to ``figure``; ``layout`` holds arguments of matplotlib's ``colorbar``."""
    bar = figure.colorbar(ScalarMappable(norm, impact_colors(theme)), **layout)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.muted, labelsize=8, length=0, which="both")
    bar.set_label(label, color=theme.text, fontsize=9)


def new_figure(theme: Theme, width: float, height: float) -> Figure:
    """An empty figure of ``width`` x ``height`` inches with a transparent background."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    figure.set_edgecolor(theme.surface)
    return figure


def style_axes(
    axes: Axes, theme: Theme, *, title: str = "", grid: Literal["", "x", "y", "both"] = "x"
) -> None:
    """Give ``axes`` the style of the report: no box, a thin grid along ``grid`` (x, y or both), small grey labels."""
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.tick_params(axis="both", colors=theme.muted, labelsize=8, length=0, which="both")
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=theme.text, fontsize=9)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(True, axis=grid, color=theme.grid, linewidth=0.8)
    if title:
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=theme.text, pad=8)


def log_axis(axes: Axes, side: Literal["x", "y"], low: float, high: float) -> None:
    """Make the axis ``side`` logarithmic, with a few short numbers from ``low`` to ``high``."""
    axes.set(**{f"{side}scale": "log"})
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def log_scale_if_wide(axes: Axes, side: Literal["x", "y"], values: NDArray[np.float64]) -> bool:
    """Whether the axis ``side`` was made logarithmic: for positive values that span more than a factor of three."""
    known = values[np.isfinite(values)]
    if not len(known) or known.min() <= 0 or known.max() <= 3 * known.min():
        return False
    log_axis(axes, side, float(known.min()), float(known.max()))
    return True


@contextlib.contextmanager
def plain_texts(figure: Figure) -> Iterator[None]:
    """While it lasts ``figure`` can be drawn with texts as they are, whoever wrote them.

    A dollar sign begins no formula, and of a letter that no font here has a box is drawn without a word.
    """
    axes = [axis for one in figure.axes for axis in (one.xaxis, one.yaxis)]
    powers = [
        axis for axis in axes if isinstance(axis.get_major_formatter(), LogFormatter)
    ]  # of ten, as formulas
    ours = {text for axis in powers for text in axis.findobj(MplText)}
    for text in figure.findobj(MplText):
        text.set_parse_math(text in ours)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def freeze_layout(figure: Figure) -> Bbox:
    """The area of ``figure`` that is drawn on, in inches; afterwards the layout no longer changes."""
    with plain_texts(figure):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        return figure.get_tightbbox().padded(0.05)


def save_png(figure: Figure, path: Path, area: Bbox) -> None:
    """Write the ``area`` of ``figure`` to ``path`` on a white background, for the Markdown page."""
    with atomic_write(path) as temporary, plain_texts(figure):
        look: dict[str, Any] = {"dpi": 130, "facecolor": LIGHT.surface, "bbox_inches": area}
        figure.savefig(temporary, format="png", metadata={"Software": None}, **look)


def svg_uri(figure: Figure, area: Bbox) -> str:
    """The ``area`` of ``figure`` as a data URI; equal figures give equal bytes."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "prune_lab", "svg.fonttype": "path"}), plain_texts(figure):
        figure.savefig(buffer, format="svg", bbox_inches=area, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
