"""A process that times one part in a runtime when it is its turn; run as a script, it imports neither torch nor us.
ExecuTorch's Python runtime brings torch along; the others bring none.

The protocol is that of ``profiling.own_process``: the first line in says what to time, in JSON; each ``turn`` after it
is answered with ``{"milliseconds": ..., "cpu_milliseconds": ..., "peak_bytes": ...}`` or ``{"error": "..."}``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file


def peak_bytes() -> int | None:
    """The most memory that this process had in use so far; None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    # Not by getrusage: its peak begins with that of the process which started this one.
    lines = (line.split() for line in status.read_text(encoding="utf-8").splitlines())
    return next((1024 * int(words[1]) for words in lines if words and words[0] == "VmHWM:"), None)


def call_times(call: Callable[[], object], count: int) -> tuple[float, float]:
    """Milliseconds of ``call``: (by the clock, of all processors together), medians of ``count`` calls."""
    clock, processor = [], []
    for _ in range(count):
        begun, spent = time.perf_counter(), time.process_time()
        call()
        clock.append(1e3 * (time.perf_counter() - begun))
        processor.append(1e3 * (time.process_time() - spent))
    return statistics.median(clock), statistics.median(processor)


def _loaded(job: Mapping[str, Any]) -> Callable[[], object]:
    spec = importlib.util.spec_from_file_location("engine", job["engine"])
    assert spec is not None
    assert spec.loader is not None
    engine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(engine)
    runner = engine.load(Path(job["file"]), job["threads"], job["precision"])
    inputs = load_file(job["inputs"])
    return lambda: runner(inputs)


def main() -> None:
    """Answer the orders on the standard input until it ends; what libraries print goes to the standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        job = json.loads(sys.stdin.readline())
        call: Callable[[], object] | None = None
        while sys.stdin.readline().strip() == "turn":
            answer: dict[str, Any]
            try:
                if call is None:
                    call = _loaded(job)
                    for _ in range(job["warmup"]):
                        call()
                clock, processor = call_times(call, job["calls"])
                answer = {"milliseconds": clock, "cpu_milliseconds": processor, "peak_bytes": peak_bytes()}
            except Exception as error:  # whatever the runtime raises
                answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            if not job["keep"]:
                call = None
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
