"""What is short of something, or has too much of it: one line, nothing left behind, and a second start goes on."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import resource
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from prune_lab import text_tables
from prune_lab.cli import app
from prune_lab.config import DataConfig, RunConfig
from prune_lab.distill.sources import source_of
from prune_lab.errors import DataError, PruneLabError, StorageError
from prune_lab.prompts import read_prompts
from prune_lab.runs import open_run
from prune_lab.runs.lock import writing
from prune_lab.runtime import atomic_folder, atomic_write
from prune_lab.workflow.starting import start_run

pytestmark = pytest.mark.usefixtures("blank_figures")


@contextlib.contextmanager
def _limited(kind: int, most: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def _lowest_free() -> int:
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    return free


@pytest.mark.parametrize("more", range(6))
def test_with_few_open_files_writing_ends_in_one_line_and_leaves_nothing(tmp_path: Path, more: int) -> None:
    run = open_run(tmp_path / "run", must_exist=False)

    def write() -> None:
        with writing(run), atomic_folder(run.folder / "unet") as folder, contextlib.ExitStack() as held:
            with atomic_write(folder / "deep" / "a.json") as temporary:
                temporary.write_text("{}")
            while True:
                held.enter_context((folder / "b").open("w"))

    with (
        _limited(resource.RLIMIT_NOFILE, _lowest_free() + more),
        pytest.raises(StorageError, match="open files"),
    ):
        write()
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("most", [0, 60, 300, 900, 1500, 3000])
def test_a_start_that_fails_for_the_size_of_a_file_is_taken_over(
    tmp_path: Path, small_run_config: Any, most: int
) -> None:
    config: RunConfig = small_run_config()
    folder = tmp_path / "run"
    with _limited(resource.RLIMIT_FSIZE, most), contextlib.suppress(StorageError):
        start_run(config, folder)
    assert start_run(config, folder).done(folder / "config.toml")


def test_a_folder_with_files_of_others_is_no_start(tmp_path: Path, small_run_config: Any) -> None:
    (tmp_path / "environment.json").write_text('{"name": "conda"}')
    with pytest.raises(PruneLabError, match="other files there"):
        start_run(small_run_config(), tmp_path)


def test_a_name_that_is_too_long_is_called_so(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    asked = ["prune", str(tiny_pipeline_folder), "--plan", "bk-base", "--out", str(tmp_path / "o")]
    found = CliRunner().invoke(app, [*asked, "--variant", "v" * 300])
    assert found.exit_code == 2
    assert "too long; give a shorter name" in found.output
    assert not list(tmp_path.iterdir())


# Tables --------------------------------------------------------------------------------------------------------------


def _parquet(path: Path, texts: list[str], *, rows: int) -> None:
    column = pa.DictionaryArray.from_arrays(
        pa.array([n % len(texts) for n in range(rows)], pa.int32()), texts
    )
    pq.write_table(pa.table({"prompt": column}), path)


def test_tables_of_too_many_rows_or_characters_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_tables, "MOST_ROWS", 1000)
    monkeypatch.setattr(text_tables, "_MOST_BYTES", 100_000)
    rng = random.Random(5)
    for rows, length in [(1001 + rng.randrange(5000), 3), (900, 112 + rng.randrange(300)), (900, 60)]:
        texts = ["a" * length, "b" * length]
        lines = "\n".join(texts[n % 2] for n in range(rows))
        _parquet(tmp_path / "a.parquet", texts, rows=rows)
        (tmp_path / "a.txt").write_text(lines)
        (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"prompt\n" + lines.encode()))
        (tmp_path / "a.tsv").write_text("prompt\n" + lines)
        jsonl = "\n".join(json.dumps({"prompt": line}) for line in lines.split("\n"))
        (tmp_path / "a.jsonl").write_text(jsonl)
        for path in sorted(tmp_path.iterdir()):
            if length == 60:
                assert len(read_prompts(path).texts) == rows
            else:
                with pytest.raises(PruneLabError, match=r"more than 1,000 rows|100,000") as found:
                    read_prompts(path)
                assert "\n" not in str(found.value)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_columns_that_differ_in_case_alone_are_refused(tmp_path: Path, ending: str) -> None:
    names, path = ["Prompt", "prompt", "PROMPT"], tmp_path / f"a{ending}"
    random.Random(ending).shuffle(names)
    rows = {names[0]: "a", names[1]: "b"}
    if ending == ".csv":
        path.write_text(f"{names[0]},{names[1]}\na,b\n")
    elif ending == ".jsonl":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.table({name: [text] for name, text in rows.items()}), path)
    with pytest.raises(DataError, match=f"'{names[0]}' and '{names[1]}' are both there"):
        read_prompts(path)


def test_files_of_one_name_in_a_tar_are_counted(tmp_path: Path, image_folder: Path) -> None:
    picture = next(path for path in image_folder.rglob("*.png")).read_bytes()
    rng = random.Random(3)
    members = [(f"{stem}.{kind}", n) for stem in "abc" for kind in ("png", "txt") for n in range(2)]
    rng.shuffle(members)
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, _ in members:
            content = picture if name.endswith("png") else b"a caption"
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    source = source_of(DataConfig(source=str(path)))
    assert len(source) == 3
    assert len([one for one in source.left_out if "twice; the first counts" in one]) == 6


# Pipelines -----------------------------------------------------------------------------------------------------------


def _pipelines_with_a_unet() -> Iterator[str]:
    for name in sorted(dir(diffusers)):
        if name.endswith("Pipeline") and name != "DiffusionPipeline":
            found = getattr(diffusers, name)
            try:
                wanted = found._get_signature_types().get("unet", ())
            except Exception:  # one that wants another library
                continue
            if diffusers.UNet2DConditionModel in wanted:
                yield name


def _classes(name: str) -> list[dict[str, Any]]:
    if name == "scheduler":
        return [
            {"scheduler": ["diffusers", one]} for one in sorted(dir(diffusers)) if one.endswith("Scheduler")
        ]
    return [{"_class_name": one} for one in _pipelines_with_a_unet()]


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of numpy, for what diffusers does
@pytest.mark.parametrize("of", ["pipeline", "scheduler"])
def test_a_class_of_diffusers_draws_or_is_refused_in_one_line(
    tiny_pipeline_folder: Path, tmp_path: Path, of: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(
        tiny_pipeline_folder, folder
    )  # with its times: what was found sound is not looked at again
    index = json.loads((folder / "model_index.json").read_text())
    always = {
        "pipeline": [
            "StableDiffusionAttendAndExcitePipeline",
            "StableDiffusionPanoramaPipeline",
            "StableDiffusionPipeline",
        ],
        "scheduler": ["KarrasVeScheduler", "FlowMatchEulerDiscreteScheduler", "DDIMInverseScheduler"],
    }[of]
    every = _classes(of)
    named = [change for change in every if json.dumps(change).split('"')[-2] in always]
    for change in [{}, *named, *random.Random(len(every)).sample(every, 6)]:
        (folder / "model_index.json").write_text(json.dumps(index | change))
        out = tmp_path / "o.png"
        out.unlink(missing_ok=True)
        found = CliRunner().invoke(
            app, ["generate", str(folder), "--prompt", "a cat", "--steps", "2", "--out", str(out)]
        )
        assert found.exit_code in (0, 2), (change, found.exception)
        assert out.exists() == (found.exit_code == 0), change
        if change in named:
            drawn = change == {"_class_name": "StableDiffusionPipeline"}
            assert found.exit_code == (0 if drawn else 2), (change, found.output)
