"""What a search of widths needs of its other settings; loads nothing, so that it is told before a model is read."""

from __future__ import annotations

from prune_lab.config.budget_texts import split_budgets
from prune_lab.config.settings import RunConfig, SearchConfig
from prune_lab.errors import ConfigError

SAME_SCALE = ("output-mse", "gate-fisher")
"""Criteria of blocks and of their parts whose impacts can be added up."""


def searches_widths(settings: SearchConfig) -> bool:
    """Whether plans may make blocks narrower."""
    return "width" in settings.axes


def check_axes_fit(config: RunConfig) -> None:
    """Raise ConfigError for settings of a search of widths that do not fit each other."""
    settings = config.search
    if not settings.budgets or not searches_widths(settings):
        return
    asked = f"asked to search {' and '.join(settings.axes)}"
    if settings.solver != "exact":
        raise ConfigError(
            f"{asked} with the solver {settings.solver}, which removes blocks alone; leave out --solver"
        )
    if settings.count != 1 or settings.diverse != 1:
        raise ConfigError(
            f"{asked} for {settings.count} plans per budget, and one is found; leave out --plans"
        )
    if settings.form not in ("native", "own"):
        raise ConfigError(
            f"{asked} in the form {settings.form}, in which no block is narrower; ask for --form own"
        )
    found = (config.score.criterion, settings.widths)
    if "depth" in settings.axes and found != SAME_SCALE:
        raise ConfigError(
            f"{asked} by {found[0]} of blocks and {found[1]} of their parts, which are not on one scale; "
            f"{' and '.join(SAME_SCALE)} are. For others search --axes width"
        )
    for text in settings.budgets:
        for one in split_budgets(text):
            if one.strip().startswith("memory"):
                raise ConfigError(
                    f"{asked} within {one.strip()}: the peak of memory of a narrower model is no sum of parts, and is "
                    "not known before it is measured; give --params, --macs or --latency"
                )
