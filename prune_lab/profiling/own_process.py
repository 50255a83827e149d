"""A process that times one model when it is its turn, and holds no weights while it waits, unless it may keep them.

The protocol is lines of text. The first one in says what to time, in JSON. Each ``turn`` after it is answered with
``{"milliseconds": 12.3}``, perhaps with ``cpu_milliseconds`` and ``peak_bytes``, or with ``{"error": "..."}``; an empty
line or the end of the input ends the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import IO, Any

from prune_lab.errors import DeviceError
from prune_lab.families import plain_config
from prune_lab.profiling.service import Service

_CALLS = 3  # of one turn; their median is its time
_START = "from prune_lab.profiling.own_process import serve; serve()"


@dataclasses.dataclass(slots=True)
class Usage:
    """What the turns of a process took beside the time on the clock."""

    cpu_ms: list[float] = dataclasses.field(default_factory=list)  # of all processors together, turn by turn
    peak_bytes: int | None = None  # the most memory that the process had in use; None where nobody says

    def note(self, answer: Mapping[str, Any]) -> None:
        """Add what a turn was answered with."""
        if (spent := answer.get("cpu_milliseconds")) is not None:
            self.cpu_ms.append(float(spent))
        self.peak_bytes = answer.get("peak_bytes") or self.peak_bytes


class TimingProcess:
    """A child process with one model of random weights; inside ``with`` it waits for its turns."""

    command: Sequence[str] = ("-c", _START)  # what Python is started with

    def __init__(
        self,
        config: Mapping[str, Any],
        service: Service,
        *,
        warmup: int,
        seed: int,
        calls: int = _CALLS,
        keep: bool = False,
    ) -> None:
        import torch

        self._job = {
            "config": plain_config(config),
            "service": dataclasses.asdict(service),
            "warmup": warmup,
            "seed": seed,
            "calls": calls,
            "keep": keep,
            "threads": torch.get_num_threads(),
        }
        self._child: subprocess.Popen[str] | None = None
        self.usage = Usage()

    def __enter__(self) -> TimingProcess:
        self._child = subprocess.Popen(
            [sys.executable, *self.command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._tell(json.dumps(self._job))  # no answer is waited for: all processes start at the same time
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        child, self._child = self._child, None
        assert child is not None
        try:
            child.communicate("\n", timeout=10)
        except (subprocess.TimeoutExpired, OSError, ValueError):
            child.kill()
            child.communicate()

    def turn(self) -> float:
        """Milliseconds of one forward pass: the median of a few, after the warm-up.

        Raises DeviceError when it fails there.
        """
        child = self._child
        assert child is not None, "a process is asked outside of its with statement"
        assert child.stdout is not None
        self._tell("turn")
        answer = child.stdout.readline()
        found: dict[str, Any] = json.loads(answer) if answer else {"error": "the process ended"}
        if "error" in found:
            raise DeviceError(
                f"asked to time a model in a process of its own, where it failed: {found['error']}; "
                "give a smaller batch or size"
            )
        self.usage.note(found)
        return float(found["milliseconds"])

    def _tell(self, line: str) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):  # it ended; the answer that does not come says so
            self._child.stdin.write(line + "\n")
            self._child.stdin.flush()


def _ready(job: Mapping[str, Any]) -> Callable[[], None]:
    """One pass of the model of ``job``, after its warm-up."""
    import torch

    from prune_lab.profiling.latency import random_inputs
    from prune_lab.profiling.random_weights import compile_blocks, random_model
    from prune_lab.runtime import pick_dtype, synchronize

    service, seed = Service(**job["service"]), job["seed"]
    place: dict[str, Any] = {"device": torch.device(service.device), "dtype": pick_dtype(service.dtype)}

    def one_pass() -> None:
        synchronize(place["device"])
        with torch.inference_mode():
            model(**inputs)
        synchronize(place["device"])

    with torch.inference_mode():
        model: Any = random_model(job["config"], **place, seed=seed)
        if service.backend == "compiled":
            compile_blocks(model)
        inputs = random_inputs(job["config"], **service.sizes, **place, seed=seed)
    for _ in range(job["warmup"]):
        one_pass()
    return one_pass


def _let_go() -> None:
    """Give the memory of what is gone back, so that another process can have it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def serve() -> None:
    """Answer the orders on the standard input until it ends; what libraries print goes to the standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        _serve(sys.stdin, answers)


def _serve(orders: IO[str], answers: IO[str]) -> None:
    import torch

    from prune_lab.prefix_sharing import compiling

    job = json.loads(orders.readline())
    torch.set_num_threads(job["threads"])
    with compiling(job["service"]["backend"] == "compiled"):
        _answer_turns(job, orders, answers)


def _answer_turns(job: Mapping[str, Any], orders: IO[str], answers: IO[str]) -> None:
    from prune_lab.runtimes.serving import call_times, peak_bytes

    one_pass: Callable[[], None] | None = None
    while orders.readline().strip() == "turn":
        answer: dict[str, Any]
        try:
            one_pass = one_pass or _ready(job)
            clock, processor = call_times(one_pass, job["calls"])
            answer = {"milliseconds": clock, "cpu_milliseconds": processor, "peak_bytes": peak_bytes()}
        except (RuntimeError, MemoryError, ValueError, TypeError) as error:  # torch's own are RuntimeErrors
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        if not job["keep"]:
            one_pass = None
            _let_go()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
