"""Plans in files: one as JSON values, several in a list or a text, and which of them is meant."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from prune_lab.blocks import Architecture
from prune_lab.errors import PlanError, PruneLabError
from prune_lab.families import FAMILIES, Form
from prune_lab.plans.plan import PruningPlan, parse_plan, parsed_plan, plan_of
from prune_lab.runs import listed_plans, place_of, plan_file, read_plan_file, those_in
from prune_lab.runtime import path_text, printable, read_text
from prune_lab.width import width_from_json

_LONGEST_TIMED = 300  # characters of what is said of the time of a plan


def _is_called(name: str, plan: PruningPlan, architecture: Architecture) -> bool:
    """Whether ``plan`` may have the name: that of a preset belongs to the preset alone."""
    preset = architecture.family.plans.get(name)
    try:
        return preset is None or (set(preset(architecture.outline)) == set(plan.removed) and not plan.widths)
    except PlanError:  # it has no meaning for this architecture
        return False


def _check_said(plan: PruningPlan, said: object, architecture: Architecture) -> None:
    """Raise PlanError where a file calls ``plan`` by the id ``said`` or by the name of a preset, and it is another."""
    wrong = [f"the id {printable(str(said), 50)}"] if said is not None and said != plan.id else []
    wrong += [f"the name {name}" for name in plan.names if not _is_called(name, plan, architecture)]
    if wrong:
        raise PlanError(
            f"asked to read a plan, found {wrong[0]} and the blocks of another one, {plan.id}; remove its id and "
            "names, or restore its blocks"
        )


def plan_from_json(value: object, architecture: Architecture) -> PruningPlan:
    """The plan that ``to_json`` wrote; one that a person wrote may lack id and names.

    Raises PlanError when it is damaged, was made for another architecture, or has the id or preset's name of another.
    """
    if not isinstance(value, dict) or not isinstance(value.get("removed"), list):
        raise PlanError("asked to read a plan, found no list of removed blocks in it; write the plan again")
    made_for = value.get("architecture")
    if made_for != architecture.signature:
        raise PlanError(
            f"the plan was made for architecture {printable(str(made_for), 50)}, this model is "
            f"{architecture.signature}; write it as text (for example '-{architecture.blocks[-1].name}') to "
            "apply it here"
        )
    names = value.get("names", [])
    if "name" in value or not isinstance(names, list):
        raise PlanError(
            'asked to read a plan, found its name where a list of names belongs; write "names": [...] instead'
        )
    origin, timed = value.get("origin", ""), value.get("timed", "")
    if not all(isinstance(one, str) for one in (*value["removed"], *names, origin, timed)):
        raise PlanError(
            "asked to read a plan, found other things than text in its lists; write the plan again"
        )
    form = value.get("form", "native")
    if form not in get_args(Form):
        raise PlanError(
            f"asked to read a plan, found the form {printable(str(form), 50)!r} in it; the forms are "
            f"{', '.join(get_args(Form))}"
        )
    said = value.get("widths", {})
    if not isinstance(said, dict):
        raise PlanError(
            'asked to read a plan, found no names with its widths; write "widths": {"SITE": [0, 1, ...]}'
        )
    widths = [width_from_json(name, kept, architecture.sites) for name, kept in said.items()]
    plan = plan_of(architecture, value["removed"], widths=widths).named(*names, origin=origin).built(form)
    _check_said(plan, value.get("id"), architecture)
    return dataclasses.replace(plan, timed=printable(timed, _LONGEST_TIMED)) if timed else plan


def _from_file(value: object, architecture: Architecture, path: Path) -> PruningPlan:
    """The plan ``value`` in the file ``path``, which an error names."""
    try:
        return plan_from_json(value, architecture)
    except PruneLabError as error:
        raise PlanError(f"asked to read {path_text(path)}: {error}") from None


def read_plan(path: Path, architecture: Architecture) -> PruningPlan:
    """The plan that ``to_json`` wrote to ``path``.

    Raises DataError when the file is damaged or holds another plan than its name or folder says, PlanError when it was
    made for another architecture.
    """
    return _from_file(read_plan_file(path), architecture, path)


def read_plans(text: str, architecture: Architecture) -> tuple[PruningPlan, ...]:
    """The plans that ``text`` names: a plan as ``parse_plan`` reads it, a ``.json`` file of one plan or a list, or a
    text file with one plan a line (blank lines and ``#`` comments are skipped). After the file ``#2`` is the second of
    them, ``#NAME`` the one that goes by this name or id. The folder of a student, a pipeline or a model, stands for the
    plan.json in it; a folder that is called as a preset does not.
    """
    if (told := _plan_in_folder(text, architecture)) is not None:
        return (read_plan(told, architecture),)
    file, wanted = plan_file(text)
    path = Path(file)
    if path.suffix == ".json":
        plans = tuple(_from_file(item, architecture, path) for item in listed_plans(path))
        return (_chosen(plans, file, wanted),) if wanted else plans
    if path.suffix == ".txt":
        try:
            lines = [line.split("#")[0].strip() for line in read_text(path).splitlines()]
        except PruneLabError as error:
            raise PlanError(f"asked for the plans in {path_text(path)}: {error}") from None
        members: dict[str, set[str]] = {}
        plans = tuple(parsed_plan(line, architecture, members) for line in lines if line)
        return (_chosen(plans, file, wanted),) if wanted else plans
    return (parse_plan(text, architecture),)


def _plan_in_folder(text: str, architecture: Architecture) -> Path | None:
    """The plan.json of the student whose folder is ``text``; None where that is no folder. Raises PlanError for one
    without.
    """
    if text in (*architecture.family.plans, "teacher") or not os.path.isdir(text):  # noqa: PTH112 - may be too long
        return None
    folder = Path(text)
    components = sorted({family.component for family in FAMILIES.values()})
    inside = [folder / name / "plan.json" for name in ("", *components, "pruned")]
    found = next((path for path in inside if path.is_file()), None)
    if found is None:
        raise PlanError(
            f"asked for the plan in the folder {path_text(folder)}, found no plan.json in it or in its model's; "
            "give the folder of a student, a plan.json, or plans.json#1"
        )
    return found


def _chosen(plans: Sequence[PruningPlan], file: str, wanted: str) -> PruningPlan:
    return plans[place_of(wanted, [((plan.id, *plan.names), plan.label) for plan in plans], file)]


def read_one_plan(text: str, architecture: Architecture) -> PruningPlan:
    """The one plan that ``text`` names, as ``read_plans`` reads it. Raises PlanError for a file of several."""
    plans = read_plans(text, architecture)
    if len(plans) == 1:
        return plans[0]
    file = path_text(text)
    if not plans:
        raise PlanError(f"asked for the plan in {file}, found none in it; give a file with a plan")
    raise PlanError(
        f"asked for one plan, found {len(plans)} in {file}; choose by number or name, as in '{file}#1': "
        f"{those_in([plan.label for plan in plans])}"
    )
