"""The file of a plan: what it holds, read without knowing the model, and whether it is the plan that it is called by."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from prune_lab.errors import PlanError
from prune_lab.runs.paths import is_plan_id
from prune_lab.runs.records import damaged, read_typed
from prune_lab.runtime import path_text, printable, read_json

_PLAN_FILES = (".json", ".txt")
_SHOWN = 8  # plans of a file that an error names


class PlanFile(TypedDict):
    """A plan as it stands in a JSON file; one that a person wrote may lack id, names and origin."""

    id: NotRequired[str]
    names: NotRequired[list[str]]
    origin: NotRequired[str]
    architecture: str
    removed: list[str]
    widths: NotRequired[dict[str, int | list[int]]]


Widths = Mapping[str, int | Sequence[int]]  # by name of a site how many of its units stay, or which


def plan_id_of(architecture: str, removed: Sequence[str], widths: Widths | None = None) -> str:
    """12 hexadecimal digits of the content of a plan: the signature of its architecture, what it removes and, of a plan
    that has some, what stays of the widths.
    """
    content: list[object] = [architecture, list(removed)]
    if widths:
        said = {site: kept if isinstance(kept, int) else list(kept) for site, kept in widths.items()}
        content.append(dict(sorted(said.items())))
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def told_plan_id(plan: Mapping[str, Any]) -> str:
    """The id that belongs to the contents of ``plan``, read from JSON; empty where they are those of no plan."""
    try:
        return plan_id_of(plan["architecture"], plan["removed"], plan.get("widths"))
    except (KeyError, TypeError, ValueError, AttributeError):  # other things than lists and numbers in it
        return ""


def read_plan_file(path: Path) -> PlanFile:
    """The plan in the JSON file ``path``; its id is always there.

    Raises DataError when the file is damaged, or holds another plan than it says, or than its name or folder says.
    """
    value: PlanFile = read_typed(path, PlanFile)
    found = plan_id_of(value["architecture"], value["removed"], value.get("widths"))
    named = path.parent.name if path.stem == "plan" else path.stem
    for said in (value.get("id", found), named if is_plan_id(named) else found):
        if said != found:
            raise damaged(path, f"the id {said} and the blocks of plan {found}")
    return {**value, "id": found}


# Several plans in a file -----------------------------------------------------------------------------------------


def plan_file(text: str) -> tuple[str, str]:
    """(file, which of its plans) of ``plans.json#2`` or ``plans.json#bk-base``; all of ``text`` and nothing else."""
    file, mark, wanted = text.rpartition("#")
    return (file, wanted) if mark and Path(file).suffix in _PLAN_FILES else (text, "")


def listed_plans(path: Path) -> list[dict[str, object]]:
    """The plans in a JSON file of one, or of a list, not read any further. Raises PlanError where it has other things.

    A setting that is there twice is refused: of a width none is the one that was meant.
    """
    value = read_json(path, once=True)
    found: list[dict[str, object]] = []
    for number, plan in enumerate(value if isinstance(value, list) else [value], 1):
        if not isinstance(plan, dict) or not isinstance(plan.get("removed"), list):
            place = f" as number {number}" if isinstance(value, list) else ""
            raise PlanError(
                f"asked to read {path_text(path)}, found no list of removed blocks in it{place}: that is no plan; give "
                "a plan.json, or the file that prune-lab search --out wrote"
            )
        found.append(plan)
    return found


def place_of(wanted: str, plans: Sequence[tuple[Collection[str], str]], file: str) -> int:
    """Which of ``plans``, each what it goes by and its label, is called ``wanted``, or has this number, from 1.

    Counted from 0. Raises PlanError where it is none.
    """
    found = [place for place, (names, _) in enumerate(plans) if wanted in names]
    if not found and re.fullmatch(r"[1-9]\d{0,5}", wanted, re.ASCII) and int(wanted) <= len(plans):
        found = [int(wanted) - 1]
    if not found:
        raise PlanError(
            f"asked for the plan {printable(wanted, 60)!r} of {path_text(file)}, which has none such; "
            f"{those_in([label for _, label in plans])}"
        )
    return found[0]


def those_in(labels: Sequence[str]) -> str:
    """The plans of a file by number and label, as the end of an error; of many the first ones."""
    if not labels:
        return "there is no plan in it"
    shown = [f"#{number} {label}" for number, label in enumerate(labels[:_SHOWN], 1)]
    return f"it has {', '.join(shown)}{f' and {len(labels) - _SHOWN} more' * (len(labels) > _SHOWN)}"


def _goes_by(plan: Mapping[str, object]) -> tuple[Collection[str], str]:
    """What the plan of a file goes by, and its label, as far as they are told without its model."""
    said, own = plan.get("names"), told_plan_id(plan)
    names = [one for one in said if isinstance(one, str)] if isinstance(said, list) else []
    return {*names, own} - {""}, printable(names[0] if names else own, 120)


def check_plan_file(text: str) -> None:
    """Raise PlanError where ``text`` is a JSON file that holds no plans, or not the one that is meant by ``#2``.

    That takes a moment, so a verb asks it before a model is read. What is no such file is left to others.
    """
    file, wanted = plan_file(text)
    path = Path(file)
    if path.suffix != ".json" or path.is_dir():
        return
    plans = listed_plans(path)
    if wanted:
        place_of(wanted, [_goes_by(plan) for plan in plans], file)
