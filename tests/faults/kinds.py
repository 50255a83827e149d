"""The kinds of cases, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.faults.corruptions import corrupted_run
from tests.faults.disks import starved_command
from tests.faults.guided import guided_search
from tests.faults.kills import killed_command
from tests.faults.models import hostile_model
from tests.faults.pictures import hostile_data
from tests.faults.stage import Stage
from tests.faults.texts import fuzzed_parser
from tests.faults.verdicts import Verdict

Case = Callable[[Stage, int, Path], Verdict]

NEED_NO_RUN = frozenset(("data", "guided", "model"))

# Each does the case of a number in an empty folder of its own.
KINDS: dict[str, Case] = {
    "corrupt": corrupted_run,
    "data": hostile_data,
    "disk": starved_command,
    "guided": guided_search,
    "kill": killed_command,
    "model": hostile_model,
    "text": fuzzed_parser,
}
