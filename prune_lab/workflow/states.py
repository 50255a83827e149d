"""What of a run is done, and what the next ``prune-lab run`` would do: the answer of ``--dry-run`` and ``doctor``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prune_lab.runs import Part, Verdict
from prune_lab.session import Session
from prune_lab.workflow.searching import left_out, plans_there
from prune_lab.workflow.steps import STEPS, Step


@dataclass(frozen=True, slots=True)
class StepState:
    """What there is of a step: each of its parts, done or not and why."""

    step: Step
    parts: tuple[tuple[Part, Verdict], ...]
    asked_for: bool = True

    @property
    def done(self) -> bool:
        """Whether nothing of it is left to do."""
        return all(verdict.state == "done" for _, verdict in self.parts)

    @property
    def text(self) -> str:
        """``done``, ``to do``, ``redo``, ``2 of 3`` candidates, or ``not asked for``."""
        if not self.asked_for:
            return "not asked for"
        if self.parts and self.done:
            return "done"
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
    found = []
    native = [plan for plan in plans_there(session) if not left_out(session, plan)]
    for part in step.parts(session, native):
        verdict = session.manifests.verdict(part)
        if ahead and verdict.state != "done":
            session.manifests.expect(part, verdict)
        found.append((part, verdict))
    return StepState(step, tuple(found), step.name != "repaired" or session.config.repair.kind != "none")


def states(session: Session) -> Iterator[StepState]:
    """What there is of each step, and what will be redone because an earlier one is."""
    return (state_of(session, step, ahead=True) for step in STEPS)
