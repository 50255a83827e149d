"""A width as data: how many units of a site stay, and which; as a person writes it: ``~Dn3.R1.hidden=12/16``.

Before the equals sign stands the site, behind it what stays, in what a person counts there: groups of a norm, heads, or
channels of a feed-forward (a multiple of 8). ``/16``, the number there is now, may be left out; where it is given it
must be right. ``@0-9,12,15`` says which units stay, counted from 0; without it that is still to be chosen by weights or
scores.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from prune_lab.errors import PlanError
from prune_lab.families import Site
from prune_lab.runtime import printable

_UNITS: dict[str, str] = {
    "hidden": "groups of its norm",
    "heads": "heads",
    "cross": "heads",
    "ff": "channels",
}
UNITS_NOTE = (
    "widths: what a plan counts before the @, as in ~BLOCK.ff=96/512; the units behind it, as in @0-11, are counted "
    "from 0: groups of hidden, heads of heads and cross, eights of channels of ff"
)
_WRITTEN = re.compile(
    r"~(?P<site>[^=@/~]+)=(?P<count>\d{1,6})(/(?P<of>\d{1,6}))?(@(?P<kept>[\d,-]{1,9999}))?",
    re.ASCII,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Width:
    """What stays of one site: ``count`` of ``of`` units, and ``kept``, which; empty while that is not chosen yet."""

    site: str
    count: int
    of: int
    kept: tuple[int, ...] = ()
    step: int = dataclasses.field(default=1, compare=False)
    """What a person counts in one unit."""

    @property
    def chosen(self) -> bool:
        """Whether it says which units stay."""
        return bool(self.kept)

    @property
    def share(self) -> float:
        """What stays, as a share of all."""
        return self.count / self.of

    @property
    def short(self) -> str:
        """How a person writes how much stays: ``~Dn3.A1.ff=384/512``."""
        return f"~{self.site}={self.count * self.step}/{self.of * self.step}"

    @property
    def text(self) -> str:
        """The same, and which units these are: ``~Dn3.R1.hidden=12/16@0-9,12,15``."""
        return f"{self.short}@{_ranges(self.kept)}" if self.chosen else self.short

    def to_json(self) -> int | list[int]:
        """The units that stay; their number while they are not chosen."""
        return list(self.kept) if self.chosen else self.count


def _ranges(units: Sequence[int]) -> str:
    """``0-9,12,15`` of rising numbers."""
    runs = itertools.groupby(enumerate(units), key=lambda one: one[1] - one[0])
    ends = [[unit for _, unit in run] for _, run in runs]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ends)


def _units(text: str) -> list[int]:
    """The numbers of ``0-9,12,15``. Raises ValueError for other text, and for a range that would be absurdly long."""
    units: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        low, high = int(first), int(last) if dash else int(first)
        if not low <= high < 10**6:
            raise ValueError(text)
        units += range(low, high + 1)
    return units


def site_named(name: str, sites: Sequence[Site]) -> Site:
    """The site called ``name``. Raises PlanError with those of its block, or the nearest names."""
    for site in sites:
        if site.name == name:
            return site
    near = difflib.get_close_matches(name[:60], [site.name for site in sites], n=3, cutoff=0.5)
    hint = f"nearest: {', '.join(near)}" if near else "see prune-lab blocks --wide for what it has"
    block = name.rpartition(".")[0]
    if inside := widths_text(sites, block):
        hint = f"{block} has {inside}"
    nothing = "this model has none of whose width we know how to cut it" if not sites else hint
    raise PlanError(
        f"no width is called {printable(name, 60)!r} among the {len(sites)} of this model; {nothing}"
    )


def widths_text(sites: Sequence[Site], block: str) -> str:
    """What can leave of the inside of ``block``, and how many of each there are: ``heads=4 ff=512``; empty for none."""
    return " ".join(
        f"{site.name.removeprefix(f'{block}.')}={site.count * site.step}"
        for site in sites
        if site.block == block
    )


def _of_channels(step: int) -> str:
    """What a unit behind the @ is, where a person counts something else before it; empty where it is the same."""
    return "" if step == 1 else f" (a unit is {step} channels)"


def width_of(site: Site, kept: Iterable[int] | int) -> Width:
    """The checked width that keeps these units of ``site``; of a number of units, so many that are still to be chosen.

    All of them is a width, too. Raises PlanError for units that are not there, or none.
    """
    whole = isinstance(kept, int)
    units = () if isinstance(kept, int) else tuple(kept)
    count = kept if isinstance(kept, int) else len(units)
    what = f"{site.count * site.step} {_UNITS[site.kind]}"
    if not 1 <= count <= site.count:
        raise PlanError(
            f"asked to keep {count * site.step} of the {what} of {site.name}; keep {site.step} to "
            f"{site.count * site.step} of them"
        )
    if not whole and (list(units) != sorted(set(units)) or units[0] < 0 or units[-1] >= site.count):
        raise PlanError(
            f"asked to keep certain units of {site.name}, found some twice, out of order or out of bounds; give "
            f"rising numbers from 0 to {site.count - 1}{_of_channels(site.step)}"
        )
    return Width(site.name, count, site.count, units, site.step)


def all_kept(width: Width) -> bool:
    """Whether nothing leaves by ``width``."""
    return width.count == width.of


def keeping_largest(width: Width, impacts: Sequence[float] | Any) -> Width:
    """``width`` with the units of the largest ``impacts`` (units,), where they are not chosen yet; of equal ones the
    first.
    """
    if width.chosen:
        return width
    order = sorted(range(width.of), key=lambda unit: (-float(impacts[unit]), unit))
    return dataclasses.replace(width, kept=tuple(sorted(order[: width.count])))


def parse_width(text: str, sites: Sequence[Site]) -> Width:
    """The width that ``text`` describes, such as ``~Dn3.A1.heads=2/4``; see the module.

    Raises PlanError where it cannot be read, or does not fit the site.
    """
    found = _WRITTEN.fullmatch(text)
    if found is None:
        raise PlanError(
            f"cannot read the width {printable(text, 80)!r}; write ~SITE=COUNT/OF for a site that "
            "prune-lab blocks --wide lists"
        )
    site = site_named(found["site"], sites)
    what = _UNITS[site.kind]
    asked = {"count": int(found["count"]), "of": int(found["of"] or site.count * site.step)}
    if asked["of"] != site.count * site.step:
        raise PlanError(
            f"asked for {printable(text, 80)}, but {site.name} has {site.count * site.step} {what}, not {asked['of']}; "
            f"write ~{site.name}={min(asked['count'], site.count * site.step)}/{site.count * site.step}"
        )
    if asked["count"] % site.step:
        raise PlanError(
            f"asked for {asked['count']} {what} of {site.name}, which come in {site.step}s; ask for "
            f"{max(1, round(asked['count'] / site.step)) * site.step}"
        )
    count = asked["count"] // site.step
    whole = width_of(site, count)
    if found["kept"] is None:
        return whole
    try:
        units = _units(found["kept"])
    except ValueError:
        units = []
    if len(units) != count:
        raise PlanError(
            f"asked for {printable(text, 80)}: behind @ must stand which {count} units stay, counted "
            f"from 0{_of_channels(site.step)}, such as @{_ranges(range(count))}"
        )
    return width_of(site, units)


def width_from_json(name: str, value: Any, sites: Sequence[Site]) -> Width:
    """The width that ``Width.to_json`` wrote for the site ``name``. Raises PlanError when it is damaged."""
    site = site_named(name, sites)
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(type(one) is int for one in numbers):
        raise PlanError(
            f"asked to read a plan, found {printable(str(value), 50)} as the width {name}; write how many units stay, "
            "or a list of them"
        )
    if isinstance(value, int) and site.step > 1 and not 1 <= value <= site.count:
        raise PlanError(
            f"asked to read a plan, found {printable(str(value), 50)} as the width {name}, which a file counts in "
            f"units of {site.step} channels; give 1 to {site.count}"
        )
    return width_of(site, value)
