"""The table of few steps, with its files and what it says of a latency."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_lab.errors import ConfigError
from prune_lab.few_steps.frontier import latency_limit, read_limit
from prune_lab.models import ModelSource
from prune_lab.models.protection import check_apart
from prune_lab.report.few_steps import draw_steps, lever_lines, write_steps_page
from prune_lab.runtime.holders import alone_in, check_ours
from prune_lab.tables import Table
from prune_lab.workflow import StepsAsked, compare_steps, is_of_steps, steps_work

_UNSTEADY = 0.15  # of the median: how far rounds may differ before it is said


def _asked(given: Mapping[str, Any]) -> StepsAsked:
    known = [field.name for field in dataclasses.fields(StepsAsked)]
    if unknown := sorted(given.keys() - set(known)):
        raise ConfigError(f"asked for {unknown[0]!r} of few steps; known are {', '.join(known)}")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in given.items()
    }
    return StepsAsked(**values)


def steps_table(
    sources: Sequence[ModelSource],
    out: Path,
    latency: str,
    place: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    dry_run: bool = False,
) -> Table:
    """What ``compare_steps`` finds, with its figure and page written to ``out``, and the levers of a ``latency``; with
    ``dry_run`` what it would draw and time, and nothing is written.
    """
    asked = _asked(given)
    if latency:
        read_limit(latency)  # before an hour of drawing
    places = tuple(path for source in sources for path in source.places)
    out = check_apart(out, {"the models": places, "the prompts": (asked.prompts,) if asked.prompts else ()})
    wanted = f"asked to compare few steps in {out}"
    check_ours(out, "steps", wanted, ours=is_of_steps(out))
    if dry_run:
        work = steps_work(sources, asked, out, **place)
        return Table("few steps work", work.frame(), "What would be drawn and timed", notes=work.lines)
    with alone_in(out, "steps", wanted):
        found = compare_steps(sources, asked, out, **place)
        write_steps_page(out, found.table, found.conditions, pictures=out / "pictures")
    notes = [f"page: {out / 'README.md'}"]
    spread = float(((found.table["p90_ms"] - found.table["p10_ms"]) / found.table["median_ms"]).median())
    if spread > _UNSTEADY:
        notes.append(
            f"times of one configuration differ by {spread:.0%} from round to round (10 to 90 %): levers near a limit "
            "are not certain; more --rounds, on a quiet machine, tell"
        )
    if latency:
        limit = latency_limit(latency, found.table)
        notes += [f"within {latency} ({limit:.0f} ms) {line}" for line in lever_lines(found.table, latency)]
    return Table(
        "few steps", found.table, "Few steps", lambda theme: draw_steps(found.table, theme), tuple(notes)
    )
