"""What the solver learned-gates has learnt: how often each block stays, and the loss over the steps."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from prune_lab.report.document import Chart, SectionItem, table_of
from prune_lab.report.figures import Theme, log_scale_if_wide, new_figure, style_axes
from prune_lab.report.format import count, percent, short_number, text, yes_or_no

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SMOOTHED = 20  # a point of the line is the mean of one in so many of the steps


def draw_gates(gates: pd.DataFrame, steps: pd.DataFrame, theme: Theme) -> Figure:
    """The share of the masks in which each block stayed, by budget; and the loss of the masks, smoothed, by step."""
    budgets, blocks = list(dict.fromkeys(gates["budget"])), list(dict.fromkeys(gates["block"]))
    figure = new_figure(theme, 11, 1.8 + 0.19 * len(blocks))
    left, right = figure.subplots(1, 2, width_ratios=[0.6 + 0.5 * len(budgets), 3])
    style_axes(left, theme, title="Share of masks in which it stays", grid="")
    table = gates.pivot_table(index="block", columns="budget", values="stays", sort=False).loc[
        blocks, budgets
    ]
    left.imshow(table, vmin=0, vmax=1, cmap="RdBu", aspect="auto", interpolation="nearest")
    for row, shares in enumerate(table.to_numpy()):
        for column, share in enumerate(shares):
            if np.isfinite(share):  # budgets of one run have the same blocks, unless rules differ
                ink = "#ffffff" if abs(share - 0.5) > 0.3 else "#1c2127"
                left.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=6.5, color=ink)
    left.set_yticks(range(len(blocks)), blocks, fontsize=7.5)
    left.set_xticks(range(len(budgets)), budgets, rotation=45, ha="right", fontsize=8)
    style_axes(right, theme, title="Loss of the masks by step", grid="both")
    smooth = []
    for place, (budget, own) in enumerate(steps.groupby("budget", sort=False)):
        color, window = _COLORS[place % len(_COLORS)], max(1, len(own) // _SMOOTHED)
        line = own["loss"].rolling(window, center=True, min_periods=1).mean()
        smooth.append(line.to_numpy(float))
        right.scatter(own["step"], own["loss"], s=4, color=color, alpha=0.25, linewidths=0)
        right.plot(own["step"], line, color=color, lw=1.6, label=budget)
    log_scale_if_wide(right, "y", np.concatenate(smooth))
    right.set_xlabel("step")
    right.set_ylabel("loss by mean square of the prediction")
    right.legend(frameon=False, fontsize=8.5, labelcolor=theme.text)
    return figure


_GATES = (
    ("Budget", "budget", text),
    ("Block", "block", text),
    ("Stays in", "stays", percent),
    ("from", "stays_low", percent),
    ("to", "stays_high", percent),
    ("As the best plan", "sure", percent),
    ("Removed by it", "removed", yes_or_no),
    ("Value", "value", short_number),
    ("Spread of the logit", "logit_spread", short_number),
    ("Masks", "masks", count),
)


def gate_parts(gates: pd.DataFrame | None, steps: pd.DataFrame | None) -> tuple[SectionItem, ...]:
    """The figure and the table of the gates; nothing where none were learnt."""
    if gates is None or steps is None or gates.empty or steps.empty:
        return ()
    return (
        Chart(
            "learned_gates",
            "The share of masks in which each block stays, and the loss of the masks over the steps.",
            "Gates are learnt by gradient, under masks that are drawn with noise and always meet the budget. Shares "
            "are of the masks of the second half of the steps: near 0 % or 100 % the gate is sure, in between other "
            "plans are about as good by it. The loss is against the whole model's own prediction.",
            lambda theme: draw_gates(gates, steps, theme),
        ),
        table_of(gates, _GATES, "Learned gates", "gates.csv", left=2, folded=True),
    )
