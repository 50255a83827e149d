"""Commands in forks of a process that has imported everything: their answers, within limits of time and memory."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import io
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import psutil

GIB = 2**30
_POLL = 0.02


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a command may take; None for no limit."""

    seconds: float = 120.0  # of the clock
    still: float = (
        20.0  # seconds without any work of its processes, after which it counts as waiting for ever
    )
    memory: int | None = 3 * GIB  # of address space, over what the imports take
    files: int | None = None  # open at once
    size: int | None = None  # of each file that it writes


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """How a command ended, and what it said."""

    code: int | None
    signal: int
    ended: Literal["exit", "time", "waits"]
    out: str
    err: str
    seconds: float


def import_everything() -> None:
    """Import what commands import, in this process: each fork then has it."""
    os.environ.update(
        OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg"
    )
    os.environ.update(HF_HUB_OFFLINE="1", NO_COLOR="1", TERM="dumb", ARROW_DEFAULT_MEMORY_POOL="system")
    import diffusers
    import pyarrow
    import torch
    import transformers

    import prune_lab.api.results
    import prune_lab.cli
    import prune_lab.export
    import prune_lab.surgery.prover
    import prune_lab.workflow

    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)
    assert diffusers.StableDiffusionPipeline
    assert diffusers.UNet2DConditionModel
    assert transformers.CLIPTextModel
    assert transformers.CLIPModel
    assert prune_lab.api
    # Threads do not survive a fork, so nothing may have started any.


def warm(commands: Sequence[Sequence[str]]) -> None:
    """Answer ``commands`` in this process, so that forks have what they import and count; starts no thread."""
    from typer.testing import CliRunner

    from prune_lab.cli import app

    for command in commands:
        CliRunner().invoke(app, list(command))
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    threads = [name for name in names if "jemalloc" not in name]  # pyarrow's allocator mends itself in a fork
    assert len(threads) == 1, f"threads {threads}, which a fork would not have"
    gc.collect()
    gc.freeze()  # a collection in a fork would else copy every page


# In the fork ---------------------------------------------------------------------------------------------------------


class _ForkedProver:
    """Stands for the ``Popen`` of the process that proves what was written: a fork instead of a new interpreter."""

    def __init__(self, words: IO[bytes]) -> None:
        asked, answered = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                os.dup2(asked[0], 0)
                os.dup2(answered[1], 1)
                os.dup2(words.fileno(), 2)
                for handle in (*asked, *answered):
                    os.close(handle)
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                sys.stdin, sys.stdout = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w", encoding="utf-8")
                import prune_lab.surgery.prover as prover

                prover.main()
            os._exit(0)
        os.close(asked[0])
        os.close(answered[1])
        self.stdin = os.fdopen(asked[1], "w", encoding="utf-8")
        self.stdout = os.fdopen(answered[0], encoding="utf-8")
        self.stderr = None
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self.returncode = -9
            else:
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        while self.poll() is None:
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    terminate = kill


def _fork_the_prover() -> None:
    import subprocess

    started = subprocess.Popen

    class Popen(started):  # type: ignore[type-arg, misc]
        def __new__(cls, command: Any, *others: Any, **named: Any) -> Any:
            if isinstance(command, list) and "prune_lab.surgery.prover" in command:
                return _ForkedProver(named["stderr"])
            return super().__new__(cls)

    subprocess.Popen = Popen  # type: ignore[misc]


def _grey_pixel() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


_SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9pt" height="9pt" viewBox="0 0 9 9"></svg>'


def _draw_nothing() -> None:
    """Figures are not rendered: that takes longer than all the rest of a command, and tests of the report do it."""
    import matplotlib.figure
    import matplotlib.transforms

    png = _grey_pixel()

    def save(figure: Any, target: Any, **named: Any) -> None:
        content = _SVG if named.get("format") == "svg" or str(target).endswith(".svg") else png
        if hasattr(target, "write"):
            try:
                target.write(content)
            except TypeError:
                target.write(content.decode())
        else:
            Path(target).write_bytes(content)

    def extent(figure: Any, *_: Any, **__: Any) -> Any:
        return matplotlib.transforms.Bbox.from_bounds(0, 0, *figure.get_size_inches())

    matplotlib.figure.Figure.savefig = save  # type: ignore[method-assign, assignment]
    matplotlib.figure.Figure.draw_without_rendering = lambda figure: None  # type: ignore[method-assign]
    matplotlib.figure.Figure.get_tightbbox = extent  # type: ignore[method-assign]


def _limit(limits: Limits) -> None:
    used = psutil.Process().memory_info().vms
    for kind, most in (
        (resource.RLIMIT_AS, limits.memory and used + limits.memory),
        (resource.RLIMIT_NOFILE, limits.files),
        (resource.RLIMIT_FSIZE, limits.size),
    ):
        if most is not None:
            resource.setrlimit(kind, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _exit_code(body: Callable[[], object]) -> int:
    """What the interpreter would exit with after ``body``; a traceback is printed as it would be."""
    try:
        body()
    except SystemExit as error:
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
            return 1
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@dataclasses.dataclass(slots=True)
class Started:
    """A process that was forked to do something, and where its words go."""

    pid: int
    began: float
    words: Path
    limits: Limits


def start(
    body: Callable[[], object],
    words: Path,
    *,
    limits: Limits = Limits(),
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    figures: bool = False,
) -> Started:
    """Begin ``body`` in a fork of its own session; what it prints goes to ``words``.out and ``words``.err."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for number, ending in ((1, "out"), (2, "err")):
                handle = os.open(f"{words}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.dup2(handle, number)
                os.close(handle)
            quiet = os.open(os.devnull, os.O_RDONLY)
            os.dup2(quiet, 0)
            sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
            sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            sys.stderr = open(  # noqa: SIM115
                2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1
            )
            if folder is not None:
                os.chdir(folder)
            os.environ.update(environment or {})
            atexit._clear()  # type: ignore[attr-defined] # what the imports registered belongs to the first process
            _fork_the_prover()
            if not figures:
                _draw_nothing()
            _limit(limits)
            code = _exit_code(body)
            atexit._run_exitfuncs()  # type: ignore[attr-defined]
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return Started(pid, time.monotonic(), words, limits)


# Beside it -----------------------------------------------------------------------------------------------------------


def _session_of(pid: int) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.Error):
        leader = psutil.Process(pid)
        found = [leader, *leader.children(recursive=True)]
    return found


def _work_done(pid: int) -> tuple[float, bool]:
    """Processor seconds of a command so far, and whether any of its processes runs now."""
    seconds, runs = 0.0, False
    for process in _session_of(pid):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            seconds += times.user + times.system
            runs |= process.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
    return seconds, runs


def end_session(pid: int) -> None:
    """Kill whatever is left of the session that the process ``pid`` led."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _said(words: Path, ending: str) -> str:
    path = Path(f"{words}.{ending}")
    with contextlib.suppress(OSError):
        return path.read_bytes()[-200_000:].decode("utf-8", "backslashreplace")
    return ""


def finish(started: Started) -> Answer:
    """Wait for a process, within its limits, and end all that it started."""
    ended: Literal["exit", "time", "waits"] = "exit"
    still_since, before, looked = time.monotonic(), -1.0, 0.0
    status, delay = None, 0.001
    while status is None:
        pid, found = os.waitpid(started.pid, os.WNOHANG)
        if pid:
            status = found
            break
        now = time.monotonic()
        if now - looked > 1.0:
            looked = now
            work, runs = _work_done(started.pid)
            if runs or work - before > 0.005:
                still_since, before = now, work
        if now - started.began > started.limits.seconds or now - still_since > started.limits.still:
            ended = "time" if now - started.began > started.limits.seconds else "waits"
            end_session(started.pid)
            _, status = os.waitpid(started.pid, 0)
            break
        time.sleep(delay)
        delay = min(2 * delay, _POLL)
    end_session(started.pid)
    code = os.waitstatus_to_exitcode(status)
    return Answer(
        code=code if code >= 0 else None,
        signal=-code if code < 0 else 0,
        ended=ended,
        out=_said(started.words, "out"),
        err=_said(started.words, "err"),
        seconds=time.monotonic() - started.began,
    )


def verb(arguments: Sequence[object]) -> Callable[[], object]:
    """The command line with these arguments, to be done in a fork."""

    def body() -> object:
        from prune_lab.cli import main

        sys.argv = ["prune-lab", *(str(one) for one in arguments)]
        return main()

    return body


_count = iter(range(1, 10**9))


def answer(arguments: Sequence[object], place: Path, **named: Any) -> Answer:
    """What the command line answers to ``arguments``; ``place`` is a folder for what it prints."""
    return finish(start(verb(arguments), place / f"words-{next(_count)}", **named))
