"""What a run uses for what: where probe, training rows, held-out rows and scorer come from, in four lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from prune_lab.distill import LatentCache
from prune_lab.families.drawing import takes_guidance_scale
from prune_lab.models import of_shipped_family, usual_drawing
from prune_lab.probes import picture_side
from prune_lab.processes import is_main
from prune_lab.runs import read_typed
from prune_lab.runtime import note, write_json
from prune_lab.session.parts import lacking, record, sources_part
from prune_lab.session.session import Session

ROLES = ("probe", "train", "validate", "scorer")


@dataclass(frozen=True, slots=True)
class Role:
    """One use of data or of a judging model: its source in words, how many pictures, and their size in pixels."""

    name: str  # one of ROLES
    source: str
    count: int | None = None  # of pictures; None where they are not counted
    size: int | None = None  # pixels of a side

    @property
    def line(self) -> str:
        """The role as a line of text."""
        count = "" if self.count is None else f", {self.count:,} pictures"
        return f"{self.name + ':':<10}{self.source}{count}{f' of {self.size} pixels' if self.size else ''}"


@dataclass(frozen=True, slots=True)
class DataRoles:
    """The four roles of a run, in the order of ROLES."""

    roles: tuple[Role, ...]

    def as_list(self) -> list[dict[str, Any]]:
        """The roles as they stand in sources.json."""
        return [asdict(role) for role in self.roles]


def _side(session: Session) -> int:
    """Pixels of the side of the model's own pictures."""
    return picture_side(session.pipeline)


def _own_side(session: Session) -> int:
    """Pixels of the side of the user's own pictures: as the model takes them, or as their cache holds them."""
    rows = session.own.rows
    return int(rows.provenance["side"]) if isinstance(rows, LatentCache) else _side(session)


def _probe(session: Session) -> Role:
    settings, side = session.config.probe, _side(session)
    if settings.prompts:
        words = f"drawn by the model for the prompts in {settings.prompts}"
        return Role("probe", words, len(session.probe_prompts.texts), side)
    match session.data_origin:
        case "shipped":
            return Role("probe", _shipped(session, "held-out"), settings.samples, side)
        case "own":
            count = len(session.own.split.probe)
            return Role("probe", session.config.data.source, count, _own_side(session))
        case _:
            count = len(session.prompt_parts.probe.texts)
            return Role("probe", f"drawn by the model in {settings.steps} steps", count, side)


def _shipped(session: Session, which: str) -> str:
    foreign = "" if of_shipped_family(session.source) else ", emoji of 64 pixels at another size"
    return f"{which} pictures of the package{foreign}"


def _data(session: Session) -> tuple[Role, Role]:
    """The roles of the training rows and of the held-out rows."""
    settings, side, most = session.config.data, _side(session), session.config.probe.samples
    if session.data_origin == "shipped":
        count = session.config.distill.pictures
        learnt, kept = _shipped(session, "training"), _shipped(session, "held-out")
        return Role("train", learnt, count, side), Role("validate", kept, most, side)
    if session.data_origin == "own":
        split, source, own = session.own.split, settings.source, _own_side(session)
        return Role("train", source, len(split.train), own), Role(
            "validate", source, len(split.validate), own
        )
    held = min(most, max(1, settings.count // 4))
    words = f"drawn by the model in {settings.steps} steps"
    if takes_guidance_scale(session.pipeline):
        words += f" at guidance {settings.guidance:g}"
    side = settings.resolution or side
    return Role("train", words, settings.count - held, side), Role("validate", words, held, side)


def _recorded(session: Session) -> tuple[Role, ...]:
    found = read_typed(session.run.sources, list[Role])
    return tuple(role for role in found if role.name != "scorer")


def data_roles(session: Session) -> DataRoles:
    """The four roles of the run; writes sources.json. Raises DataError when its pictures cannot be found.

    Pictures that were read before and are gone by now are named as they were recorded.
    """
    run, choice = session.run, session.scorer_choice
    scorer = Role("scorer", f"{choice.name} ({choice.reason})")
    if session.data_origin == "none":
        rows = session.config.probe.samples
        noise = Role("probe", f"{rows:,} rows of random noise: a model alone has no pictures")
        absent = "nothing: a model alone cannot be trained"
        found: tuple[Role, ...] = (noise, Role("train", absent), Role("validate", absent))
    elif not lacking(session, sources_part(session)) and run.done(run.probe) and run.done(run.validation):
        found = _recorded(session)  # the pictures may be gone
    else:
        found = (_probe(session), *_data(session))
    roles = DataRoles((*found, scorer))
    if lacking(session, sources_part(session)) or read_typed(run.sources, list[Role]) != list(roles.roles):
        write_json(run.sources, roles.as_list())
        record(session, sources_part(session))
    return roles


def _contradictions(session: Session) -> Iterator[str]:
    """Lines on settings with which a model that was distilled for few steps draws wrong pictures."""
    usual, config = usual_drawing(session.source), session.config
    drawn = [(config.evaluate.steps, config.evaluate.guidance)]
    if session.data_origin == "drawn":
        drawn.append((config.data.steps, config.data.guidance))
    for steps, guidance in drawn if session.source.is_pipeline else []:
        if line := usual.complaint(session.source.name, steps, guidance):
            yield line


def tell_roles(session: Session, told: set[str] | None = None) -> None:
    """Show the four lines before the work starts, once in a session; not those that are in ``told`` already, to which
    they are added. Raises DataError, as ``data_roles`` does.
    """
    if session.told or not is_main():
        return
    session.told = True
    told = set() if told is None else told
    for line in dict.fromkeys(
        (*(role.line for role in data_roles(session).roles), *_contradictions(session))
    ):
        if line not in told:
            note(line)
            told.add(line)
