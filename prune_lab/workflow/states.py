"""What of a run is done, and what the next ``prune-lab run`` would do: the answer of ``--dry-run`` and ``doctor``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prune_lab.runs import Part, Verdict
from prune_lab.session import Session
from prune_lab.workflow.searching import left_out, plans_there
from prune_lab.workflow.steps import STEPS, Step, can_be_done


@dataclass(frozen=True, slots=True)
class StepState:
    """What there is of a step: each of its parts, done or not and why."""

    step: Step
    parts: tuple[tuple[Part, Verdict], ...]
    asked_for: bool = True
    possible: bool = True  # with what there is of the model
    follows: str = ""  # what would be made again, and could then be other than what finished parts of it read

    @property
    def done(self) -> bool:
        """Whether nothing of it is left to do."""
        return all(verdict.state == "done" for _, verdict in self.parts)

    @property
    def text(self) -> str:
        """``done``, ``may follow``, ``to do``, ``redo``, ``2 of 3`` candidates, ``not asked for`` or ``left out``."""
        if not self.possible:
            return "left out"
        if not self.asked_for:
            return "not asked for"
        if self.parts and self.done:
            return "may follow" if self.follows else "done"
        verdicts = [verdict for _, verdict in self.parts]
        students: dict[str, bool] = {}
        for part, verdict in self.parts:
            if part.label:
                students[str(part.folder)] = students.get(str(part.folder), True) and verdict.state == "done"
        made = sum(students.values())
        if 0 < made < len(students) and not any(verdict.by == "inputs" for verdict in verdicts):
            return f"{made} of {len(students)}"
        return "redo" if any(verdict.state == "redo" for verdict in verdicts) else "to do"


def state_of(session: Session, step: Step, *, ahead: bool = False) -> StepState:
    """What there is of ``step``; ``ahead``: as it will be when the steps that were asked before have been done."""
    if not can_be_done(session, step):
        return StepState(step, (), possible=False)
    found = []
    native = [plan for plan in plans_there(session) if not left_out(session, plan)]
    for part in step.parts(session, native):
        verdict = session.manifests.verdict(part)
        if ahead and verdict.state != "done":
            session.manifests.expect(part, verdict)
        found.append((part, verdict))
    return StepState(step, tuple(found), step.name != "repaired" or session.config.repair.kind != "none")


def _following(root: Path, state: StepState, again: set[Path]) -> str:
    """What finished parts of ``state`` read of that which is made ``again`` in the run in ``root``; empty for nothing.

    Adds what is, or may be, made again in ``state``. What is made from other inputs has readers that are redone.
    """
    first = ""
    for part, verdict in state.parts:
        if verdict.state == "done":
            around = {folder for path in again for folder in path.parents}
            read = [
                path for path in part.reads if path in around or not again.isdisjoint((path, *path.parents))
            ]
            if not read:
                continue
            first = first or read[0].relative_to(root).as_posix()
        if verdict.state == "done" or verdict.by == "outputs":
            again.update(part.outputs)
    return first


def states(session: Session) -> Iterator[StepState]:
    """What there is of each step, what will be redone because an earlier one is, and what may be."""
    again: set[Path] = set()
    for step in STEPS:
        state = state_of(session, step, ahead=True)
        yield dataclasses.replace(state, follows=_following(session.run.folder, state, again))
