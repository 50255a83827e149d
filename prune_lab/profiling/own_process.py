"""A process that times one model when it is its turn, and holds no weights while it waits.

The protocol is lines of text. The first one in says what to time, in JSON. Each ``turn`` after it is answered with
``{"milliseconds": 12.3}``, or with ``{"error": "..."}``; an empty line or the end of the input ends the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any

from prune_lab.errors import DeviceError
from prune_lab.families import plain_config
from prune_lab.profiling.service import Service

_CALLS = 3  # of one turn; their median is its time
_START = "from prune_lab.profiling.own_process import serve; serve()"


class TimingProcess:
    """A child process with one model of random weights; inside ``with`` it waits for its turns."""

    def __init__(
        self, config: Mapping[str, Any], service: Service, *, warmup: int, seed: int, calls: int = _CALLS
    ) -> None:
        import torch

        self._job = {
            "config": plain_config(config),
            "service": dataclasses.asdict(service),
            "warmup": warmup,
            "seed": seed,
            "calls": calls,
            "threads": torch.get_num_threads(),
        }
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> TimingProcess:
        self._child = subprocess.Popen(
            [sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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
        return float(found["milliseconds"])

    def _tell(self, line: str) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):  # it ended; the answer that does not come says so
            self._child.stdin.write(line + "\n")
            self._child.stdin.flush()


def _timed(job: Mapping[str, Any]) -> float:
    """Milliseconds of one pass of the model of ``job``."""
    import torch

    from prune_lab.profiling.latency import call_ms, random_inputs
    from prune_lab.profiling.random_weights import compile_blocks, random_model
    from prune_lab.runtime import pick_dtype

    service, seed = Service(**job["service"]), job["seed"]
    place: dict[str, Any] = {"device": torch.device(service.device), "dtype": pick_dtype(service.dtype)}
    with torch.inference_mode():
        model: Any = random_model(job["config"], **place, seed=seed)
        if service.backend == "compiled":
            compile_blocks(model)
        inputs = random_inputs(job["config"], **service.sizes, **place, seed=seed)
        for _ in range(job["warmup"]):
            model(**inputs)
        return statistics.median(
            call_ms(lambda: model(**inputs), place["device"]) for _ in range(job["calls"])
        )


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

    job = json.loads(orders.readline())
    torch.set_num_threads(job["threads"])
    while orders.readline().strip() == "turn":
        answer: dict[str, Any]
        try:
            answer = {"milliseconds": _timed(job)}
        except (RuntimeError, MemoryError, ValueError, TypeError) as error:  # torch's own are RuntimeErrors
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        _let_go()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
