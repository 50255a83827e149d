"""Progress without a terminal: which lines are written when, by a clock that the test turns."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from prune_lab.runtime import bytes_text, duration_text, note, progress, progress_shown, track


@dataclass
class Log:
    """What plain lines would be written, and the time, which passes only when it is told to."""

    written: list[str] = field(default_factory=list)
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.lines = progress.Lines(self.written.append, lambda: self.now)

    def after(self, seconds: float) -> None:
        """Let time pass, looking every second as the thread does."""
        for _ in range(round(seconds)):
            self.now += 1
            self.lines.tick()

    def new(self) -> list[str]:
        """The lines since this was last asked."""
        found = list(self.written)
        self.written.clear()
        return found


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    with shown(log):
        yield log


@contextmanager
def shown(log: Log) -> Iterator[None]:
    token = progress._reporter.set(log.lines)
    try:
        yield
    finally:
        progress._reporter.reset(token)


def test_a_line_at_the_start_every_thirty_seconds_and_at_the_end(log: Log) -> None:
    for number in track(range(50), "removing blocks"):
        if number == 0:
            assert log.new() == ["removing blocks: started, 50 to do"]
        log.after(2)
    assert log.new() == [
        "removing blocks 14 of 50, 2.1 s each, 1 min 17 s left",
        "removing blocks 29 of 50, 2.1 s each, 43 s left",
        "removing blocks 44 of 50, 2.0 s each, 12 s left",
        "removing blocks: done, 50 of 50 in 1 min 40 s, 2.0 s each",
    ]


def test_an_item_that_takes_long_is_seen_too(log: Log) -> None:
    for _ in track([1, 2], "searching"):
        log.after(70)
    assert log.new() == [
        "searching: started, 2 to do",
        "searching 0 of 2, 30 s so far",
        "searching 0 of 2, 1 min 0 s so far",
        "searching 1 of 2, 1 min 30 s each, 1 min 30 s left",
        "searching 1 of 2, 2 min 0 s each, 2 min 0 s left",
        "searching: done, 2 of 2 in 2 min 20 s, 1 min 10 s each",
    ]


def test_throughput_in_units(log: Log) -> None:
    for _ in track(range(35), "distil", unit="samples", per=64):
        log.after(1)
    assert "distil 29 of 35, 61.9 samples/s, 6.2 s left" in log.new()


@pytest.mark.parametrize(
    ("per", "shown"),
    [(0.5, "2.0 s each"), (1, "1.0/s"), (12.34, "12.3/s"), (99.9, "99.9/s"), (7829.6, "7,830/s")],
)
def test_a_rate_has_no_more_digits_than_it_tells(per: float, shown: str, log: Log) -> None:
    for _ in track(range(2), "counting", per=per):
        log.after(1)
    assert log.new()[-1].endswith(f", {shown}")


def test_of_units_that_take_long_it_is_told_how_long_and_never_0_a_second(log: Log) -> None:
    for _ in track(range(3), "export", unit="parts"):
        log.after(40)
    assert log.new()[-1] == "export: done, 3 of 3 in 2 min 0 s, 40 s each"
    for _ in track(range(3), "drawing", unit="pictures"):
        log.after(5)
    assert log.new()[-1].endswith(", 0.2 pictures/s")


def test_of_many_tasks_inside_one_another_one_line_tells(log: Log) -> None:
    for _ in track(range(2), "building candidates"):
        for _ in track(range(4), "timing blocks"):
            for _ in track(range(2), "runs"):
                log.after(5)
    assert log.new() == [
        "building candidates: started, 2 to do",
        "building candidates 0 of 2 > timing blocks 2 of 4 > runs 1 of 2, 10 s each, 30 s left",
        "building candidates 1 of 2 > timing blocks 1 of 4 > runs 1 of 2, 10 s each, 1 min 0 s left",
        "building candidates: done, 2 of 2 in 1 min 20 s, 40 s each",
    ]


def test_named_steps_have_lines_of_their_own(log: Log) -> None:
    for step in track(["blocks", "scores", "report"], "step", name=str):
        if step == "scores":
            for _ in track(range(40), "removing blocks"):
                log.after(1)
        if step == "report":
            log.after(31)
    assert log.new() == [
        "step 1 of 3, blocks",
        "step 2 of 3, scores",
        "step 2 of 3, scores > removing blocks 29 of 40, 1.0 s each, 11 s left",
        "step 2 of 3, scores: done in 40 s",
        "step 3 of 3, report",
        "step 3 of 3, report, 30 s so far",
        "step 3 of 3, report: done in 31 s",
        "step: done, 3 of 3 in 1 min 11 s",
    ]


def test_a_task_that_stops_early_is_not_called_done(log: Log) -> None:
    for number in track(range(3), "drawing"):
        if number == 1:
            break
    assert log.new()[-1] == "drawing: stopped, 1 of 3 in 0.0 s"
    log.after(60)
    assert log.new() == []  # nothing goes on


def test_a_note_is_a_line_and_counts_as_a_sign_of_life(log: Log) -> None:
    note("memory: 2.0 GiB expected")
    log.new()
    for _ in track(range(2), "distil"):
        log.new()
        log.after(20)
        note("rung of 100 steps")
        assert log.new() == ["rung of 100 steps"]


def test_without_a_terminal_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_shown():
        assert list(track("ab", "spelling")) == ["a", "b"]
        note("a note")
    captured = capsys.readouterr()
    assert captured.out == ""
    first, last, said = captured.err.splitlines()
    assert first == "spelling: started, 2 to do"
    assert last.startswith("spelling: done, 2 of 2 in 0.0 s")
    assert said == "a note"
    note("nobody is shown this")
    assert list(track("ab", "spelling")) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_are_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_shown():
        for _ in track(["one", "two"], "step", name=str):
            note("a note")
    assert "a note" in terminal.getvalue()
    assert "started" not in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(512, "512 bytes"), (3 * 2**10, "3 KiB"), (840 * 2**20, "840 MiB"), (2.4 * 2**30, "2.4 GiB")],
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert bytes_text(count) == text


def test_a_task_within_a_step_counts_from_its_own_start(log: Log) -> None:
    def slow() -> Iterator[int]:
        log.after(30)  # nothing has come of it yet
        yield 0

    for _ in track(["scores"], "steps", name=str):
        log.after(5)
        log.new()
        list(track(slow(), "scoring rows", 4))
    assert log.new()[0] == "steps 1 of 1, scores > scoring rows 0 of 4, 25 s so far"


# In a notebook -----------------------------------------------------------------------------------------------------


def test_a_notebook_has_bars_that_change_in_place_and_vanish() -> None:
    shown: list[tuple[str, str]] = []
    times = iter(range(1000))
    cell = progress.Cell(lambda bars, words: shown.append((bars, words)), lambda: next(times))
    token = progress._reporter.set(cell)
    try:
        with progress_shown():  # one inside another changes nothing
            for _ in track([1, 2], "<plans>", name=lambda one: f"plan {one}"):
                list(track(range(3), "steps"))
    finally:
        progress._reporter.reset(token)
    words = [line for _, line in shown]
    assert words[0] == "<plans> 1 of 2, plan 1"
    assert any(line.startswith("<plans> 1 of 2, plan 1 > steps 2 of 3, ") for line in words)
    assert any(
        '<progress value="1" max="2"></progress> &lt;plans&gt; 2 of 2, plan 2' in bars for bars, _ in shown
    )
    assert shown[-1] == ("", "")


def test_what_is_short_is_not_shown_in_a_notebook() -> None:
    shown: list[tuple[str, str]] = []
    cell = progress.Cell(lambda bars, words: shown.append((bars, words)), lambda: 5.0)
    token = progress._reporter.set(cell)
    try:
        assert list(track(range(3), "steps")) == [0, 1, 2]
    finally:
        progress._reporter.reset(token)
    assert [words for _, words in shown] == [""]


def test_a_kernel_is_known_by_its_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not progress._in_notebook()
    shell = type("Shell", (), {"kernel": object()})()
    monkeypatch.setitem(
        sys.modules, "IPython", type("IPython", (), {"get_ipython": staticmethod(lambda: shell)})
    )
    assert progress._in_notebook()


def test_the_parts_of_an_export_are_named_and_no_time_is_foretold(log: Log) -> None:
    """A decoder takes other times than a text encoder: how long one took says nothing of the rest."""
    from prune_lab.export.edge import writing

    parts = [SimpleNamespace(name=name) for name in ("text_encoder", "model", "vae_decoder")]
    for number, part in enumerate(writing.tracked(parts, "OpenVINO"), 1):
        log.after(40)
        lines = log.new()
        assert f"export for OpenVINO {number} of 3, {part.name}" in lines[-1]
        assert not [line for line in lines if line.endswith("left")]
