"""What the tests saw of each family, and the table that the README shows of it.

A test that used a verb on a model of a family says so by the fixture ``seen`` when it is at its end; what a test that
passed has said is a row of ``reports/families.csv``, from which the tables in the README and in ``reports/families.md``
are made. Nothing is read from the families themselves: what no test has seen is not in the tables.

    pytest --seen=check   a row that the file lacks fails the test (what every run of the tests does)
    pytest --seen=add     rows of tests that passed are added to the file, and the tables are written anew
    pytest --seen=new     the same, and what the file had before is left out (`make families`)
    python -m tests.families_seen   writes the tables of the rows that are there
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS, README = ROOT / "reports" / "families.csv", ROOT / "README.md"
PAGE = ROOT / "reports" / "families.md"
BEGIN, END = "<!-- families: made by `make families` -->", "<!-- families: end -->"

VERBS = ("blocks", "profile", "score", "search", "prune", "distill", "draw")
FORMS = ("native", "neutral", "own")
WITHOUT_PIPELINE = VERBS[:5]  # what a model alone is enough for
MOST_NAMED = 4  # classes in a line of the README
ABOUT = """Made by `make families` of what the tests saw of tiny models; [families.csv](families.csv) names the tests.
What stands under `prune` are the forms of a student that were built. In tier A a tiny pipeline of the class went
through all verbs of the table; in tier B a tiny model went through all that need no pipeline. A dash means that no test
saw it. `convert` and `export --to single-file` are known of a `UNet2DConditionModel` alone and refuse the others."""

Seen = Callable[..., None]


class Row(NamedTuple):
    """One thing that a test saw of a class of models."""

    family: str
    verb: str
    form: str  # of the student that was built; empty for other verbs than prune
    exception: str  # what is left out or refused, in a few words; empty where the verb works
    test: str  # file::function

    @property
    def said(self) -> tuple[str, ...]:
        """The row without the test that saw it."""
        return self[:4]


def row_of(family: Any, verb: str, form: str, exception: str, test: str) -> Row:
    """A row of these values, which are checked; ``family`` is a class name, a model or a config."""
    if isinstance(family, Mapping):
        family = family["_class_name"]
    name = family if isinstance(family, str) else type(family).__name__
    assert verb in VERBS, f"{verb} is none of {', '.join(VERBS)}"
    assert form in FORMS, f"{form} is none of {', '.join(FORMS)}"
    assert not {"|", ";", "\n"} & set(exception), "an exception is a few words of one line"
    return Row(name, verb, form if verb == "prune" else "", exception, test)


# The file and the table ----------------------------------------------------------------------------------------------


def read_rows(text: str) -> set[Row]:
    """The rows of a table like ``reports/families.csv``."""
    return {Row(**line) for line in csv.DictReader(io.StringIO(text))}


def written_rows(rows: Iterable[Row]) -> str:
    """``rows`` as that table: in order, and of equal rows that several tests saw the first."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Row._fields)
    for _, same in itertools.groupby(sorted(rows), key=lambda row: row.said):
        writer.writerow(next(same))
    return out.getvalue()


def _cells(rows: Iterable[Row]) -> tuple[str, ...]:
    """What stands in a line of the table beside its classes: tier, verbs, exceptions."""
    rows = sorted(rows)
    worked = {verb: {row.form for row in rows if row.verb == verb and not row.exception} for verb in VERBS}
    tier = (
        "A" if all(worked.values()) else "B" if all(worked[verb] for verb in WITHOUT_PIPELINE) else "\u2013"
    )
    verbs = []
    for verb in VERBS:
        forms = [form for form in FORMS if form in worked[verb]]
        verbs.append(", ".join(forms) if forms else "yes" if worked[verb] else "\u2013")
    return tier, *verbs, "; ".join(dict.fromkeys(row.exception for row in rows if row.exception))


def _cells_of(rows: Iterable[Row]) -> dict[str, tuple[str, ...]]:
    """Of each class the cells beside it."""
    families: dict[str, list[Row]] = {}
    for row in sorted(rows):
        families.setdefault(row.family, []).append(row)
    return {name: _cells(seen) for name, seen in families.items()}


def _markdown(heads: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    table = [heads, ("---",) * len(heads), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def _together(names: list[str]) -> str:
    """Several classes in one cell, by name where they are few."""
    if len(names) <= MOST_NAMED:
        return ", ".join(f"`{name}`" for name in names)
    short = [name.removesuffix("Model").partition("Transformer")[0] for name in names]
    return f"{len(names)} transformers, [{short[0]} to {short[-1]}](reports/families.md)"


def family_table(rows: Iterable[Row]) -> str:
    """The README's table in Markdown: tier, forms and exceptions; classes of which the same is known share a line."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for name, (tier, *verbs, exceptions) in _cells_of(rows).items():
        lines.setdefault((tier, verbs[VERBS.index("prune")], exceptions), []).append(name)
    return _markdown(
        ("class", "tier", "forms", "exceptions"),
        (
            (_together(names), *cells)
            for cells, names in sorted(lines.items(), key=lambda line: (line[0][0], line[1]))
        ),
    )


def family_page(rows: Iterable[Row]) -> str:
    """The page with a line for each class and a column for each verb."""
    lines = ((f"`{name}`", *cells) for name, cells in _cells_of(rows).items())
    return f"# What works with which class\n\n{ABOUT}\n\n{_markdown(('class', 'tier', *VERBS, 'exceptions'), lines)}\n"


def with_table(readme: str, table: str) -> str:
    """The text of a README with ``table`` between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def write_tables() -> None:
    """Write what the rows that are there say into the README, and the page with a line for each class."""
    rows = read_rows(ROWS.read_text(encoding="utf-8"))
    README.write_text(with_table(README.read_text(encoding="utf-8"), family_table(rows)), encoding="utf-8")
    PAGE.write_text(family_page(rows), encoding="utf-8")


# The plugin ----------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seen",
        choices=("check", "add", "new"),
        default="check",
        help="what to do with what tests saw of families",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--seen") != "check" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(config.getoption("--seen") == "add"), "families-seen-writer")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    """Of a session that writes all rows anew only the tests that say something are run."""
    if config.getoption("--seen") == "new":
        silent = [item for item in items if "seen" not in item.fixturenames]
        items[:] = [item for item in items if "seen" in item.fixturenames]
        config.hook.pytest_deselected(items=silent)


@pytest.fixture(scope="session")
def rows_seen() -> frozenset[tuple[str, ...]]:
    """What the committed rows say."""
    return frozenset(row.said for row in read_rows(ROWS.read_text(encoding="utf-8")))


@pytest.fixture
def seen(request: pytest.FixtureRequest, rows_seen: frozenset[tuple[str, ...]]) -> Seen:
    """``seen(family, verb, form="native", exception="")``: this test saw that verb work on a model of that family.

    ``family`` is a class name, a model or a config; ``form`` counts for ``prune`` alone. With an ``exception`` it saw
    what is refused or left out instead, in a few words. Call it at the end of the test, once for each verb.
    """
    test = f"{request.path.name}::{request.node.name.partition('[')[0]}"

    def said(family: Any, verb: str, form: str = "native", exception: str = "") -> None:
        row = row_of(family, verb, form, exception, test)
        if request.config.getoption("--seen") == "check" and row.said not in rows_seen:
            pytest.fail(
                f"{row} is no row of {ROWS.relative_to(ROOT)}; run this test with --seen=add", pytrace=False
            )
        request.node.user_properties.append(("seen", tuple(row)))

    return said


class Writer:
    """Gathers the rows of tests that passed and writes them, and the tables, when the session ends."""

    def __init__(self, keeps: bool) -> None:
        self.before = read_rows(ROWS.read_text(encoding="utf-8")) if ROWS.exists() else set()
        self.rows: set[Row] = set(self.before) if keeps else set()
        self.said = ""  # at the end

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.rows |= {Row(*value) for name, value in report.user_properties if name == "seen"}

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            self.said = f"{ROWS.name} stays as it was: the tests did not run to their end"
            return
        ROWS.write_text(written_rows(self.rows), encoding="utf-8")
        write_tables()
        gone = {row.said for row in self.before} - {row.said for row in self.rows}
        self.said = f"{ROWS.name}: {len({row.said for row in self.rows})} rows"
        self.said += "".join(
            f"\n  no test saw any more: {' '.join(filter(None, said))}" for said in sorted(gone)
        )

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(self.said)


if __name__ == "__main__":
    write_tables()
