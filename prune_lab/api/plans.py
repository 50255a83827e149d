"""Plans that show themselves: beside the model they are for, with their price and their map.

``PruningPlan`` is a decision as data, low in the layers, and knows no figures; a ``Plan`` wraps it with what is needed
to price and draw it.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure

from prune_lab.blocks import Architecture, blocks_frame
from prune_lab.forms import why_not
from prune_lab.plans import PruningPlan
from prune_lab.profiling import reduction_table
from prune_lab.report import (
    PlanRow,
    Theme,
    block_map_frame,
    draw_plan_maps,
    plan_styles,
)
from prune_lab.tables import Plot, Table, cell_text


def plan_rows(plans: Sequence[PruningPlan]) -> tuple[PlanRow, ...]:
    """The ``plans`` as the figures of the report take them."""
    return tuple(
        PlanRow(
            one.id,
            one.name or one.text,
            one.origin or "control",
            one.removed,
            one.form,
            stays=tuple((width.site, width.share) for width in one.widths),
        )
        for one in plans
    )


def plan_maps(
    architecture: Architecture, plans: Sequence[PruningPlan], scores: pd.DataFrame | None
) -> Callable[[Theme], Figure]:
    """The figure with a map of each plan, in the colours of ``scores`` where there are some."""
    rows, frame = plan_rows(plans), block_map_frame(blocks_frame(architecture), scores)
    return lambda theme: draw_plan_maps(frame, rows, plan_styles(rows), theme)


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """A pruning plan beside the model that it is for: what it removes, what it leaves, and its map."""

    plan: PruningPlan
    architecture: Architecture = field(compare=False)
    scores: pd.DataFrame | None = field(default=None, compare=False)

    @property
    def removed(self) -> tuple[str, ...]:
        """The names of the blocks that leave, in order of execution."""
        return self.plan.removed

    @property
    def text(self) -> str:
        """The plan as a person writes it, for any place that takes a plan: ``-Dn1.R2 -Dn1.A2``."""
        return self.plan.text

    @property
    def label(self) -> str:
        """The first name, or what is removed when the plan has no name."""
        return self.plan.name or self.plan.text or "teacher"

    @property
    def id(self) -> str:
        """12 hexadecimal digits of the content, by which a run names the plan."""
        return self.plan.id

    @property
    def reason(self) -> str:
        """Why the plan cannot be built in its form; empty when it can."""
        return why_not(self.architecture, self.plan)

    @property
    def costs(self) -> Table:
        """Parameters and multiply-adds of the model and of what the plan leaves; needs no weights."""
        named = self.plan.named(self.label)
        frame = reduction_table(self.architecture, [named] if self.plan.changes else [], model="")
        return Table("reductions", frame, f"Costs of {self.label}", self.plot().draw)

    def plot(self) -> Plot:
        """The map of the model: removed blocks are dashed outlines, a bar shows what stays of a narrower one."""
        draw = plan_maps(self.architecture, [self.plan], self.scores)
        return Plot(draw, f"The model without the blocks of {self.label}")

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        row = self.costs.records()[-1]
        change = ", ".join(
            f"{cell_text(name, row[name])} {words} ({cell_text(f'{name}_change', row[f'{name}_change'])})"
            for name, words in (("params", "parameters"), ("macs", "multiply-adds"))
        )
        built = self.reason or "can be built"
        return f"{self.label}: {len(self.removed)} blocks removed, {change}; {built}"

    def _repr_html_(self) -> str:
        words = f"<p><b>{html.escape(repr(self))}</b><br><code>{html.escape(self.text)}</code></p>"
        return words + self.plot()._repr_html_()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Plans(Table):
    """Plans with their costs and predicted impacts; ``plans[0]`` is the first, and they can be iterated over."""

    plans: tuple[Plan, ...] = ()

    def __getitem__(self, place: int) -> Plan:
        return self.plans[place]

    def __iter__(self) -> Iterator[Plan]:
        return iter(self.plans)
