"""The file of a plan: what it holds, read without knowing the model, and whether it is the plan that it is called by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from prune_lab.runs.paths import is_plan_id
from prune_lab.runs.records import damaged, read_typed


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
