"""Files that we wrote are read back whole, or refused in one line that names the file and the cure."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import prune_lab as pl
from prune_lab import schemas
from prune_lab.blocks import Architecture
from prune_lab.candidates import load_candidate
from prune_lab.distill import LatentData, load_heldout, load_recovery
from prune_lab.errors import DataError, PruneLabError, RunError
from prune_lab.importance import ScoreCache
from prune_lab.models import resolve_model
from prune_lab.plans import read_plan
from prune_lab.probes import load_probe
from prune_lab.profiling import Profile
from prune_lab.report import read_pictures, read_run, write_report
from prune_lab.runs import Run, load_run_config, open_run, read_picture, read_records, read_typed
from prune_lab.runs.records import typed
from prune_lab.runtime import write_frame, write_json
from prune_lab.schemas import Cells, Records
from prune_lab.session import read_scores
from prune_lab.workflow.comparing import comparison

TABLES = {name: one for name, one in vars(schemas).items() if isinstance(one, Records)}


# Tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("records", TABLES.values(), ids=TABLES)
def test_every_column_is_of_one_kind(records: Records) -> None:
    named = [name for names in records.cells.values() for name in names.split()]
    assert sorted(named) == sorted({*records.columns, *records.optional})
    assert {*records.key} <= {*records.columns}


TEXTS = st.one_of(
    st.sampled_from(
        ["NA", "null", "None", "nan", "007", "12e4", "1e5", "True", "inf", ' "', "a,b", "\r\n", "é", "狐"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
)


def cells_like(cells: Cells) -> st.SearchStrategy[Any]:
    """Values that the cells of a column may hold."""
    least = max(cells.least, -(2.0**62))
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "text": st.sampled_from(cells.words) if cells.words else TEXTS,
        "truth": st.booleans(),
        "integer": st.integers(math.ceil(least), 2**53 if cells.missing else 2**62),
        "number": st.floats(least, allow_nan=False, allow_infinity=cells.infinite),
    }
    return st.one_of(st.none(), kinds[cells.kind]) if cells.missing else kinds[cells.kind]


@st.composite
def frames(draw: st.DrawFn) -> tuple[Records, pd.DataFrame]:
    records = draw(st.sampled_from(list(TABLES.values())))
    names = [*records.columns, *(name for name in records.optional if draw(st.booleans()))]
    rows = draw(st.integers(int(records.rows), 4))
    columns = {
        name: draw(
            st.lists(
                cells_like(records.cells_of(name)),
                min_size=rows,
                max_size=rows,
                unique_by=str if name in records.key else None,
            )
        )
        for name in names
    }
    return records, pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})


@settings(max_examples=40)
@given(frames())
def test_what_is_written_is_read_back(tmp_path: Path, drawn: tuple[Records, pd.DataFrame]) -> None:
    records, frame = drawn
    write_frame(tmp_path / "table.csv", frame)
    found = read_records(tmp_path / "table.csv", records)
    assert list(found.columns) == list(frame.columns)
    for name in frame:
        for old, new in zip(frame[name], found[name], strict=True):
            assert (
                pd.isna(new) if old is None else (new == old and isinstance(new, str) == isinstance(old, str))
            )


GOOD = "step,seconds\nscores,31.25\nreport,0.5\n"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "an empty file"),
        ("\n\n", "an empty file"),
        ("step,seconds\n", "no rows"),
        (GOOD[:-1], "that its last line is cut off"),
        (GOOD[:-5], "that its last line is cut off"),
        (GOOD.replace("0.5", ""), "nothing in row 2 of seconds, which holds a finite number of at least 0"),
        (GOOD.replace("0.5", "-1"), "'-1' in row 2 of seconds"),
        (GOOD.replace("0.5", "nan"), "'nan' in row 2 of seconds"),
        (GOOD.replace("0.5", "inf"), "'inf' in row 2 of seconds"),
        (GOOD.replace("0.5", "1e999"), "'1e999' in row 2 of seconds"),
        (GOOD.replace("0.5", "1_0"), "'1_0' in row 2 of seconds"),
        (GOOD.replace("0.5", "half"), "'half' in row 2 of seconds"),
        (GOOD.replace("0.5", "\x00\x00"), "in row 2 of seconds"),
        (GOOD.replace("report,0.5", "report"), "1 cells in row 2, which should have 2"),
        (GOOD.replace("report,0.5", "report,0.5,"), "3 cells in row 2"),
        (GOOD.replace("report", '"report'), "no CSV"),
        (GOOD.replace("seconds", "minutes"), "no column seconds"),
        (GOOD.replace("seconds", "seconds,seconds").replace("5\n", "5,1\n"), "a column that is there twice"),
        (GOOD.replace("seconds", "seconds,more").replace("5\n", "5,1\n"), "the column 'more'"),
        (GOOD.replace("report", "scores"), "row 2 a second time"),
        ("<html>\n", "no column step, seconds"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, content: str, found: str) -> None:
    path = tmp_path / "steps.csv"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        read_records(path, schemas.STEP_SECONDS)
    assert str(caught.value) == f"asked to read {path}, found {str(caught.value).split('found ')[1]}"
    assert found in str(caught.value)
    assert "delete it and make it again" in str(caught.value)


def test_a_table_that_a_spreadsheet_saved_is_read(tmp_path: Path) -> None:
    (tmp_path / "steps.csv").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    frame = read_records(tmp_path / "steps.csv", schemas.STEP_SECONDS)
    assert frame.to_dict("list") == {"step": ["scores", "report"], "seconds": [31.25, 0.5]}


# JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hint", [int, float, list[float], float | None, dict[str, int | str]])
@pytest.mark.parametrize("number", [2**63, -(2**63), 10**400, -(10**4000)], ids=lambda one: str(one)[:9])
def test_an_integer_that_no_file_holds_is_damage(hint: Any, number: int) -> None:
    value = {list[float]: [number], dict[str, int | str]: {"a": number}}.get(hint, number)
    with pytest.raises(ValueError, match=r"where "):
        typed(hint, value)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda values: values.pop("macs"), "no 'macs'"),
        (lambda values: values.update(more=1), "the unknown entry 'more'"),
        (lambda values: values.update(params="7"), "'7' where a whole number belongs at params"),
        (lambda values: values.update(params=True), "True where a whole number belongs at params"),
        (lambda values: values.update(params=1.5), "1.5 where a whole number belongs at params"),
        (lambda values: values.update(latent=[16]), "1 items where 2 belong at latent"),
        (lambda values: values.update(latency=[]), "a list where an object belongs at latency"),
        (lambda values: values.update(uncounted={"aten::add": None}), "null where a whole number belongs"),
        (lambda values: values["latency"].update(median_ms=math.nan), "nan where a finite number belongs"),
        (lambda values: values["latency"].update(median_ms=math.inf), "inf where a finite number belongs"),
        (lambda values: values["latency"].update(median_ms="12"), "belongs at latency.median_ms"),
    ],
)
def test_a_damaged_profile_is_refused(
    finished: Run, tmp_path: Path, change: Callable[[dict[str, Any]], object], found: str
) -> None:
    source = finished.candidate(finished.plan_ids()[0]).profile
    assert read_typed(source, Profile).as_dict() == json.loads(source.read_text())
    values = json.loads(source.read_text())
    change(values)
    write_json(tmp_path / "profile.json", values)
    with pytest.raises(DataError, match=r"profile\.json, found .*; delete it and make it again") as caught:
        read_typed(tmp_path / "profile.json", Profile)
    assert found in str(caught.value)


# Pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_read_as_they_were_written_or_refused(tmp_path: Path) -> None:
    """Every byte of a PNG is under a checksum or a signature, so no change of one goes unseen."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    assert np.array_equal(read_picture(path), pixels)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with pytest.raises(DataError, match=r"a\.png, found .*; delete"):
            read_picture(path)
        path.write_bytes(content[:place])
        with pytest.raises(DataError, match=r"a\.png, found .*; delete"):
            read_picture(path)
    for other in (Image.new("L", (7, 5)), Image.new("RGBA", (7, 5)), Image.new("P", (7, 5))):
        other.save(path)
        with pytest.raises(DataError, match=r"a\.png, found a damaged picture \(mode"):
            read_picture(path)
    Image.new("RGB", (7, 5)).save(path, format="JPEG")
    with pytest.raises(DataError, match="found no PNG picture"):
        read_picture(path)


# A whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def architecture(tiny_pipeline_folder: Path) -> Architecture:
    return resolve_model(str(tiny_pipeline_folder)).architecture


@pytest.fixture
def damaged_run(finished: Run, tmp_path: Path) -> Run:
    """A finished run, free to be damaged."""
    shutil.copytree(finished.folder, tmp_path / "run")
    return Run(tmp_path / "run")


def readers_of(run: Run, architecture: Architecture) -> Iterator[tuple[Path, Callable[[], object]]]:
    """Every file of a run that is read back, and what reads it."""
    yield run.config, lambda: load_run_config(run)
    yield run.environment, lambda: open_run(run.folder, must_exist=True)
    for path in (run.blocks, run.importance, run.importance_parts, run.criteria, run.costs, run.reductions):
        yield path, lambda: read_run(run)
    for path in (run.pipeline_profile, run.ranking, run.steps, run.picture_prompts, run.choices, run.sources):
        yield path, lambda: read_run(run)
    yield run.importance, lambda: read_scores(run)
    yield run.latency_rounds, lambda: read_records(run.latency_rounds, schemas.ROUNDS)
    yield run.searched, lambda: read_records(run.searched, schemas.SEARCHED)
    yield run.probe, lambda: load_probe(run.probe)
    yield run.data, lambda: LatentData.load(run.data)
    for path in run.scores_dir.iterdir():
        yield path, lambda path=path: ScoreCache(path)  # type: ignore[misc]
    files = pd.read_csv(run.picture_prompts)["file"].tolist()
    yield run.teacher_pictures / files[0], lambda: read_pictures(run.teacher_pictures, files)
    one = run.plan_ids()[0]
    paths = run.candidate(one)
    yield run.plan(one), lambda: read_plan(run.plan(one), architecture)
    yield run.plan(one), lambda: read_run(run)
    yield paths.plan, lambda: load_candidate(paths.folder, architecture)
    yield paths.profile, lambda: load_candidate(paths.folder, architecture).profile
    yield paths.recovery, lambda: load_recovery(paths.folder)
    yield paths.recovery, lambda: read_run(run)
    yield paths.distilled / "recovery.json", lambda: load_recovery(paths.folder)
    yield paths.heldout, lambda: load_heldout(paths.folder)
    yield paths.pictures_pruned / files[1], lambda: read_pictures(paths.pictures_pruned, files)


def _folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut in the middle": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "without its last byte": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "another table": lambda path: path.write_text("when,who\n1,you\n"),
    "other JSON": lambda path: path.write_text("[[1, {}], null]"),
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe\xfa" + path.read_bytes()),
    "a folder": _folder_in_its_place,
}


OFTEN = ("cut in the middle", "zeros", "no UTF-8", "a folder")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(damage, id=name, marks=[] if name in OFTEN else pytest.mark.long)
        for name, damage in DAMAGES.items()
    ],
)
def test_a_damaged_file_of_a_run_is_refused_by_name(
    damaged_run: Run, architecture: Architecture, damage: Callable[[Path], object]
) -> None:
    for path, read in readers_of(damaged_run, architecture):
        read()
        backup = path.read_bytes()
        damage(path)
        with pytest.raises(PruneLabError) as caught:
            read()
        message = str(caught.value)
        assert path.name in message
        assert "\n" not in message
        if path.is_dir():
            path.rmdir()
        path.write_bytes(backup)


def _numbers_in(path: Path) -> list[tuple[int, int]]:
    """(row, column) of every cell of a CSV that is a number."""
    rows = [line.split(",") for line in path.read_text().splitlines()]
    return [
        (row, column)
        for row, cells in enumerate(rows[1:], 1)
        for column, cell in enumerate(cells)
        if cell.replace(".", "").replace("-", "").replace("e", "").isdigit()
    ]


@pytest.mark.long
def test_a_number_of_a_table_that_became_something_else_is_refused(
    damaged_run: Run, architecture: Architecture
) -> None:
    draw = random.Random(20)
    text_columns = {"probe", "model", "name", "plan_id", "budget", "service", "of"}
    tried = 0
    for path, read in readers_of(damaged_run, architecture):
        if path.suffix != ".csv" or '"' in path.read_text():
            continue
        backup = path.read_text()
        names = backup.splitlines()[0].split(",")
        for row, column in draw.sample(_numbers_in(path), min(3, len(_numbers_in(path)))):
            if names[column] in text_columns:
                continue
            for instead in draw.sample(["many", "nan", "inf", "-inf", "0x10", "1 000", "1,5"], 3):
                lines = [line.split(",") for line in backup.splitlines()]
                lines[row][column] = instead
                path.write_text("\n".join(map(",".join, lines)) + "\n")
                with pytest.raises(DataError) as caught:
                    read()
                assert path.name in str(caught.value)
                assert f"row {row}" in str(caught.value)
                tried += 1
        path.write_text(backup)
    assert tried > 60


@pytest.mark.long
def test_a_flipped_byte_is_never_a_traceback(damaged_run: Run, architecture: Architecture) -> None:
    """What a flip leaves readable only the digest of the manifest can tell; everything else is one line."""
    draw = random.Random(21)
    for path, read in readers_of(damaged_run, architecture):
        backup = path.read_bytes()
        for _ in range(4):
            changed = bytearray(backup)
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
            path.write_bytes(changed)
            with contextlib.suppress(PruneLabError):
                read()
        path.write_bytes(backup)


def test_files_of_other_candidates_are_refused(damaged_run: Run, architecture: Architecture) -> None:
    one, other = damaged_run.plan_ids()[:2]
    mine, theirs = damaged_run.candidate(one), damaged_run.candidate(other)
    shutil.copy(damaged_run.plan(other), damaged_run.plan(one))
    with pytest.raises(DataError, match=f"found the id {one} and the blocks of plan {other}"):
        read_plan(damaged_run.plan(one), architecture)
    with pytest.raises(DataError, match=f"found the id {one} and the blocks of plan {other}"):
        read_run(damaged_run)
    shutil.copy(theirs.plan, mine.plan)
    with pytest.raises(DataError, match=f"found the id {one}"):
        load_candidate(mine.folder, architecture)
    shutil.copy(theirs.distilled / "recovery.json", mine.distilled / "recovery.json")
    with pytest.raises(DataError, match=f"found the verdict on plan {other}"):
        load_recovery(mine.folder)


@pytest.mark.parametrize("part", ["", "unet", "vae", "text_encoder"])
def test_a_model_or_a_part_of_one_is_no_run(tiny_pipeline_folder: Path, part: str) -> None:
    folder = tiny_pipeline_folder / part
    for read in (pl.open_run, lambda folder: open_run(folder, must_exist=True)):
        with pytest.raises(RunError, match=r"found a model or a part of one there .*; give the folder"):
            read(folder)


def test_a_table_of_scores_that_is_given_is_read_before_anything_is_done(
    finished: Run, tmp_path: Path, tiny_pipeline_folder: Path
) -> None:
    (tmp_path / "scores.csv").write_text(finished.importance.read_text()[:-4])
    with pytest.raises(DataError, match=r"scores\.csv, found that its last line is cut off"):
        pl.load(tiny_pipeline_folder).search(params="80%", importance=tmp_path / "scores.csv")


# What a page shows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("ranking.csv", "0.", "1."),
        ("costs.csv", ",1", ",2"),
        ("importance.csv", "0.2", "0.3"),
        ("choices.json", "A2", "A1"),
    ],
)
def test_a_digit_that_was_changed_is_not_reported(damaged_run: Run, name: str, old: str, new: str) -> None:
    """The file is a good one still; the manifest tells that it is not what its step has written."""
    path = damaged_run.folder / name
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(
        DataError, match=rf"{name}, found something else than its step has written; delete it and run"
    ):
        write_report(damaged_run)
    with pytest.raises(DataError, match=name):
        _ = pl.open_run(damaged_run.folder).tables
    if name == "ranking.csv":
        model = load_run_config(damaged_run).model
        with pytest.raises(DataError, match=name):
            comparison(model, [str(damaged_run.folder)])


def test_a_picture_of_another_run_is_not_shown(damaged_run: Run) -> None:
    path = sorted(damaged_run.teacher_pictures.glob("*.png"))[0]
    Image.new("RGB", (32, 32), "red").save(path)
    with pytest.raises(DataError, match=f"{path.name}, found something else than its step has written"):
        write_report(damaged_run)


@pytest.mark.parametrize("name", ["importance.csv", "costs.csv", "plans/searched.csv"])
def test_reading_a_run_makes_nothing_anew(damaged_run: Run, name: str) -> None:
    path = damaged_run.folder / name
    path.write_text(path.read_text().replace(",", ";", 3))
    before = {file: file.read_bytes() for file in damaged_run.folder.rglob("*") if file.is_file()}
    results = pl.open_run(damaged_run.folder)
    for read in (lambda: results.plans, lambda: results.plan("bk-tiny"), lambda: results.compare("bk-base")):
        with pytest.raises(PruneLabError, match=rf"{name}( was changed|, found)"):
            read()
    assert {file: file.read_bytes() for file in damaged_run.folder.rglob("*") if file.is_file()} == before
