"""Progress: bars on a terminal and in a notebook; elsewhere lines at the start, at the end and every thirty seconds."""

from __future__ import annotations

import contextlib
import html
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # rich takes a while to import; a log file does not need it
    from rich.progress import Progress, TaskID

Item = TypeVar("Item")


# Words -----------------------------------------------------------------------------------------------------------


def duration_text(seconds: float) -> str:
    """``seconds`` for a person: 4.2 s, 41 s, 3 min 20 s or 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def bytes_text(count: float) -> str:
    """``count`` bytes for a person: 512 bytes, 3 KiB, 840 MiB or 2.4 GiB."""
    if count < 1024:
        return f"{count:.0f} bytes"
    for unit, size in (("KiB", 2**10), ("MiB", 2**20)):
        if count < 1024 * size:
            return f"{count / size:.0f} {unit}"
    return f"{count / 2**30:.1f} GiB"


# Reporters -------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Task:
    """Something that is counted while it is done."""

    description: str
    total: int | None
    unit: str  # what is done each time; empty: items
    per: float  # how many of them with each item
    named: bool  # whether each item is a step with a name of its own
    start: float = 0.0
    done: int = 0
    item: str = ""  # the name of the item that is being done
    item_start: float = 0.0
    bar: TaskID = field(init=False)  # on a terminal


# A reporter shows how far tasks are; those that began inside another one end before it. The name of an item may be
# empty, and a task that ends may have stopped on the way.


@dataclass(slots=True, eq=False)
class Bars:
    """Bars that vanish when they are full, for a terminal."""

    progress: Progress

    def begin(self, task: Task) -> None:
        task.bar = self.progress.add_task(task.description, total=task.total, unit=task.unit, per=task.per)

    def begin_item(self, task: Task, name: str) -> None:
        if name:
            self.progress.update(task.bar, description=f"{task.description}: {name}")

    def end_item(self, task: Task) -> None:
        self.progress.advance(task.bar)

    def end(self, task: Task) -> None:
        self.progress.remove_task(task.bar)

    def note(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)


_said: set[str] = set()


def note_once(text: str) -> None:
    """``note`` of a text that this process has not shown before."""
    if text not in _said and _reporter.get() is not None:
        _said.add(text)
        note(text)


def warn_once(text: str) -> None:
    """Write one line that this process has not shown before on stderr, also where no progress is shown."""
    if text not in _said:
        _said.add(text)
        (_to_stderr if _reporter.get() is None else note)(text)


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


@dataclass(slots=True, eq=False)
class Cell:
    """Bars in the output of a notebook's cell, which change in place and are empty at the end.

    ``show`` displays HTML and the same as plain text, for a program that shows no HTML. Nothing is shown of what takes
    less than ``every`` seconds.
    """

    show: Callable[[str, str], None]
    clock: Callable[[], float] = time.monotonic
    every: float = 0.3
    tasks: list[Task] = field(default_factory=list)  # outermost first
    last: float = -float("inf")  # when something was shown last

    def begin(self, task: Task) -> None:
        if not self.tasks:
            self.last = self.clock()
        task.start = task.item_start = self.clock()
        self.tasks.append(task)

    def begin_item(self, task: Task, name: str) -> None:
        task.item, task.item_start = name, self.clock()
        if name:
            self._show(now=True)

    def end_item(self, task: Task) -> None:
        task.done += 1
        self._show()

    def end(self, task: Task) -> None:
        self.tasks.remove(task)
        if not self.tasks:
            self.show("", "")

    def note(self, text: str) -> None:
        _to_stderr(text)

    def _show(self, *, now: bool = False) -> None:
        if not now and self.clock() - self.last < self.every:
            return
        self.last = self.clock()
        lines = [", ".join(filter(None, self._words(task))) for task in self.tasks]
        totals = ("" if task.total is None else f' max="{task.total}"' for task in self.tasks)
        bars = (
            f'<progress value="{task.done}"{total}></progress> {html.escape(line)}'
            for task, total, line in zip(self.tasks, totals, lines, strict=True)
        )
        self.show("<br>".join(bars), " > ".join(lines))

    def _words(self, task: Task) -> tuple[str, str, str]:
        """What is done, how fast, and the time left."""
        took = self.clock() - task.start
        left = None if task.named else _left(task, took)
        place = _step(task) if task.item else f"{task.description} {_count(task)}"
        return place, _speed(task, took), "" if left is None else f"{duration_text(left)} left"


@dataclass(slots=True, eq=False)
class Lines:
    """Plain lines, for a log file or a build server.

    An outermost task, and each of its items that has a name, gets a line at its start and at its end. What goes on
    inside is seen in the line that ``tick`` writes when none was written for ``every`` seconds.
    """

    write: Callable[[str], None] = _to_stderr
    clock: Callable[[], float] = time.monotonic
    every: float = 30.0
    tasks: list[Task] = field(default_factory=list)  # outermost first
    last: float = -float("inf")  # when the last line was written
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, task: Task) -> None:
        task.start = task.item_start = self.clock()
        self.tasks.append(task)
        if len(self.tasks) == 1 and not task.named:
            to_do = "" if task.total is None else f", {task.total} to do"
            self.note(f"{task.description}: started{to_do}")

    def begin_item(self, task: Task, name: str) -> None:
        task.item, task.item_start = name, self.clock()
        if name and task is self.tasks[0]:
            self.note(_step(task))

    def end_item(self, task: Task) -> None:
        took = self.clock() - task.item_start
        if task.item and task is self.tasks[0] and took >= 1:
            self.note(f"{_step(task)}: done in {duration_text(took)}")
        task.item = ""
        task.done += 1

    def end(self, task: Task) -> None:
        outermost = task is self.tasks[0]
        self.tasks.remove(task)
        if not outermost:
            return
        took = self.clock() - task.start
        whole = task.total is None or task.done >= task.total
        line = (
            f"{task.description}: {'done' if whole else 'stopped'}, {_count(task)} in {duration_text(took)}"
        )
        self.note(", ".join(filter(None, (line, _speed(task, took)))))

    def note(self, text: str) -> None:
        with self.lock:
            self.last = self.clock()
            self.write(text)

    def tick(self) -> None:
        """Write how far the tasks are, with throughput and time left, unless another line is younger than ``every``."""
        tasks, now = tuple(self.tasks), self.clock()
        if not tasks or now - self.last < self.every:
            return
        places = [_step(task) if task.item else f"{task.description} {_count(task)}" for task in tasks]
        # The outermost task tells best when all is over; named steps are too unlike one another to tell.
        lefts = (_left(task, now - task.start) for task in tasks if not task.named)
        left = next((one for one in lefts if one is not None), None)
        inner = tasks[-1]
        so_far = f"{duration_text(now - inner.item_start)} so far"
        time_left = so_far if left is None else f"{duration_text(left)} left"
        words = (" > ".join(places), _speed(inner, now - inner.start), time_left)
        self.note(", ".join(filter(None, words)))


def _count(task: Task) -> str:
    return f"{task.done}" if task.total is None else f"{task.done} of {task.total}"


def _step(task: Task) -> str:
    of = "" if task.total is None else f" of {task.total}"
    return f"{task.description} {task.done + 1}{of}, {task.item}"


def _rate(rate: float, unit: str = "") -> str:
    """So many a second: as a whole number where the first digit behind the point would be the fourth or more; how long
    each takes where that is more than ten seconds, which would be 0.0 a second.
    """
    if 0 < rate < 0.1:
        return f"{duration_text(1 / rate)} each"
    number = f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
    return f"{number}{unit and f' {unit}'}/s"


def _speed(task: Task, took: float) -> str:
    """Items, or units, per second; how long each takes where that is more than a second, of units more than ten. Empty
    for named steps.
    """
    if task.named or not task.done or took <= 0:
        return ""
    rate = task.done * task.per / took
    if task.unit:
        return _rate(rate, task.unit)
    return _rate(rate) if rate >= 1 else f"{duration_text(1 / rate)} each"


def _left(task: Task, took: float) -> float | None:
    """Seconds until ``task`` is over if it goes on as fast; None while that is not known."""
    if not task.done or task.total is None:
        return None
    return took / task.done * (task.total - task.done)


# Showing ---------------------------------------------------------------------------------------------------------

_reporter: ContextVar[Bars | Cell | Lines | None] = ContextVar("prune_lab_progress", default=None)


@contextlib.contextmanager
def progress_shown() -> Iterator[None]:
    """Inside this context every ``track`` is seen: bars on a terminal and in a notebook, elsewhere lines on stderr.

    A context inside another one changes nothing.
    """
    if _reporter.get() is not None:
        yield
        return
    with _cell() if _in_notebook() else _bars() if sys.stderr.isatty() else _lines() as reporter:
        token = _reporter.set(reporter)
        try:
            yield
        finally:
            _reporter.reset(token)


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process; it has imported IPython then."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


@contextlib.contextmanager
def _cell() -> Iterator[Cell]:
    from IPython.display import display

    shown: list[Any] = []  # the display to update, once there is one

    def show(bars: str, words: str) -> None:
        content = {"text/html": bars, "text/plain": words}
        if shown:
            shown[0].update(content, raw=True)
        elif words:
            shown.append(display(content, raw=True, display_id=True))  # type: ignore[no-untyped-call]

    yield Cell(show)


@contextlib.contextmanager
def _bars() -> Iterator[Bars]:
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.text import Text

    class Throughput(rich_progress.ProgressColumn):
        """Units per second, of bars that count in units."""

        def render(self, task: rich_progress.Task) -> Text:
            unit, per = task.fields.get("unit", ""), task.fields.get("per", 1)
            return Text(_rate(task.speed * per, unit) if unit and task.speed else "")

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        Throughput(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bars(progress)


@contextlib.contextmanager
def _lines() -> Iterator[Lines]:
    lines, over = Lines(), threading.Event()

    def look() -> None:
        while not over.wait(1):
            lines.tick()

    # A thread, as a single item may take longer than thirty seconds.
    thread = threading.Thread(target=look, name="progress", daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        over.set()
        thread.join()


def note(text: str) -> None:
    """Show one line of ``text`` where progress is shown (see ``progress_shown``), above the bars."""
    reporter = _reporter.get()
    if reporter is not None:
        reporter.note(text)


def track(
    items: Iterable[Item],
    description: str,
    total: int | None = None,
    *,
    unit: str = "",
    per: float = 1,
    name: Callable[[Item], str] | None = None,
) -> Iterator[Item]:
    """The same ``items``, counted where progress is shown (see ``progress_shown``).

    With ``unit`` the throughput is told in it, ``per`` of them for each item. ``name`` gives each item a name, where
    items are steps worth a line of their own.
    """
    reporter = _reporter.get()
    if total is None and isinstance(items, Sized):
        total = len(items)
    if reporter is None or total == 0:
        yield from items
        return
    task = Task(description, total, unit, per, named=name is not None)
    reporter.begin(task)
    try:
        for item in items:
            reporter.begin_item(task, name(item) if name else "")
            yield item
            reporter.end_item(task)
    finally:
        reporter.end(task)
