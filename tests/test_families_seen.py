"""The table of families and verbs: it is made of what tests saw, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import families_seen
import pytest
from families_seen import (
    BEGIN,
    END,
    PAGE,
    README,
    ROWS,
    Row,
    family_page,
    family_table,
    read_rows,
    with_table,
    written_rows,
)

from prune_lab.families import FAMILIES

TESTS = """
import pytest

def test_sees(seen): seen("A", "blocks"); seen({"_class_name": "B"}, "prune", form="own")

@pytest.mark.parametrize("works", [True, False])
def test_fails_at_last(seen, works): seen("C" if works else "D", "draw"); assert works

def test_silent(): pass
"""


def test_the_table_is_that_of_the_rows() -> None:
    rows, readme = read_rows(ROWS.read_text(encoding="utf-8")), README.read_text(encoding="utf-8")
    assert readme.count(BEGIN) == readme.count(END) == 1
    assert with_table(readme, family_table(rows)) == readme, "run `python -m tests.families_seen`"
    assert family_page(rows) == PAGE.read_text(encoding="utf-8"), "run `python -m tests.families_seen`"


def test_every_family_has_rows_and_every_row_a_test() -> None:
    rows = read_rows(ROWS.read_text(encoding="utf-8"))
    assert {row.family for row in rows} == set(FAMILIES)
    for test in {row.test for row in rows}:
        file, name = test.split("::")
        text = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\([^)]*\bseen: Seen\b", text, re.MULTILINE), f"{test} says nothing"


def test_a_line_of_the_table() -> None:
    rows = [Row(name, verb, "", "", "t") for name in ("B", "C", "A") for verb in ("blocks", "score")]
    rows += [Row("A", "prune", form, "", "t") for form in ("own", "native")]
    rows += [Row("A", "prune", "native", "native: B1 stays", "t")]
    rows += [Row("T", verb, "", "", "t") for verb in families_seen.VERBS]
    _, _, *lines = family_page(rows)[family_page(rows).index("| class") :].replace("\u2013", "-").splitlines()
    assert lines == [
        "| `A` | - | yes | - | yes | - | native, own | - | - | native: B1 stays |",
        "| `B` | - | yes | - | yes | - | - | - | - |  |",
        "| `C` | - | yes | - | yes | - | - | - | - |  |",
        "| `T` | A | yes | yes | yes | yes | yes | yes | yes |  |",
    ]
    _, _, *lines = family_table(rows).replace("\u2013", "-").splitlines()
    assert lines == [
        "| `T` | A | yes |  |",
        "| `A` | - | native, own | native: B1 stays |",
        "| `B`, `C` | - | - |  |",
    ]
    assert read_rows(written_rows([*rows, rows[0]._replace(test="u")])) == set(rows)
    many = [Row(f"{name}Transformer2DModel", "blocks", "", "", "t") for name in "VWXYZ"]
    assert family_table(many).splitlines()[2].startswith("| 5 transformers, [V to Z](reports/families.md) |")


@pytest.fixture
def apart(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with ``TESTS``, a table of rows and a README of its own."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(families_seen, "ROOT", pytester.path)
    monkeypatch.setattr(families_seen, "ROWS", pytester.path / "rows.csv")
    monkeypatch.setattr(families_seen, "README", pytester.path / "README.md")
    monkeypatch.setattr(families_seen, "PAGE", pytester.path / "page.md")
    families_seen.README.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    families_seen.ROWS.write_text(
        written_rows([Row("A", "blocks", "", "", "t"), Row("Z", "draw", "", "", "t")])
    )
    pytester.makeconftest("pytest_plugins = ('families_seen',)")
    pytester.makepyfile(test_it=TESTS)
    return pytester


def names(text: str) -> list[str]:
    return sorted(row.family for row in read_rows(text))


def test_a_row_that_is_not_in_the_file_fails(apart: pytest.Pytester) -> None:
    before = families_seen.ROWS.read_text()
    result = apart.runpytest_inprocess("-p", "no:cacheprovider", "-k", "not fails")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*family='B'*is no row of rows.csv; run this test with --seen=add*"])
    assert families_seen.ROWS.read_text() == before


@pytest.mark.parametrize(("how", "found"), [("add", ["A", "B", "C", "Z"]), ("new", ["A", "B", "C"])])
def test_what_passed_is_written(apart: pytest.Pytester, how: str, found: list[str]) -> None:
    result = apart.runpytest_inprocess("-p", "no:cacheprovider", f"--seen={how}")
    result.assert_outcomes(passed=2 + (how == "add"), failed=1, deselected=int(how == "new"))
    lines = {"add": "rows.csv: 4 rows", "new": "*no test saw any more: Z draw"}
    result.stdout.fnmatch_lines([lines[how]])
    assert names(families_seen.ROWS.read_text()) == found
    readme, page = (
        path.read_text().replace("\u2013", "-") for path in (families_seen.README, families_seen.PAGE)
    )
    assert readme.startswith("before\n")
    assert readme.endswith("\nafter\n")
    assert "`B` | - | own |" in readme
    assert "`B` | - | - | - | - | - | own |" in page
    assert "`D`" not in readme + page


def test_tests_that_are_broken_off_write_nothing(apart: pytest.Pytester) -> None:
    apart.makepyfile(test_late="def test_stops(seen): raise KeyboardInterrupt")
    before = families_seen.ROWS.read_text()
    result = apart.runpytest_inprocess("-p", "no:cacheprovider", "--seen=new", no_reraise_ctrlc=True)
    result.stdout.fnmatch_lines(["rows.csv stays as it was: the tests did not run to their end"])
    assert families_seen.ROWS.read_text() == before
