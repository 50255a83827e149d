"""Models compared by many pictures: zero-shot evaluation after BK-SDM, with intervals, noise floors and gates."""

from __future__ import annotations

from prune_lab.zero_shot.features import real_pictures
from prune_lab.zero_shot.gates import Gate, Verdict, check_gates, decide, exit_code, parse_gate
from prune_lab.zero_shot.judging import Outcome, Task, evaluate_models
from prune_lab.zero_shot.measuring import METRICS
from prune_lab.zero_shot.protocol import NOT_COMPARABLE, PRESETS, Protocol, drawn_by, prompts_in, protocol_of

__all__ = [
    "METRICS",
    "NOT_COMPARABLE",
    "PRESETS",
    "Gate",
    "Outcome",
    "Protocol",
    "Task",
    "Verdict",
    "check_gates",
    "decide",
    "drawn_by",
    "evaluate_models",
    "exit_code",
    "parse_gate",
    "prompts_in",
    "protocol_of",
    "real_pictures",
]
