"""Folders of data as they are found: nothing outside is read, what is no data is passed by, a bad file costs itself."""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_images import CACHED, add_to_tar, captions_of, open_source, png_image
from typer.testing import CliRunner

from prune_lab.cli import app
from prune_lab.config import DataConfig
from prune_lab.distill import LatentCache, LiveData, build_cache
from prune_lab.distill.image_source import is_hidden, left_out_text
from prune_lab.errors import DataError
from prune_lab.session.own import OwnData


def pairs(folder: Path, count: int = 3) -> Path:
    """``count`` pictures with their captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in range(count):
        (folder / f"{row}.png").write_bytes(png_image(row))
        (folder / f"{row}.txt").write_text(f"caption {row}")
    return folder


# What is no data -------------------------------------------------------------------------------------------------

HIDDEN = (
    "._0.png",
    ".ipynb_checkpoints/0.png",
    "__MACOSX/0.png",
    "__MACOSX/more/._0.png",
    ".git/x/0.png",
    "@eaDir/0.png",
    "Thumbs.db",
)


@settings(max_examples=15)
@given(
    hidden=st.lists(st.sampled_from(HIDDEN), min_size=1, unique=True),
    below=st.lists(st.sampled_from(["a", "b.c", "10_x y"]), max_size=2),
    kind=st.sampled_from(["folder", "tar", "zip", "glob"]),
)
def test_hidden_files_and_folders_are_no_data(
    hidden: list[str], below: list[str], kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("hidden")
    folder = pairs(root / ".data" / "found")  # above the folder a dot says nothing
    for name in hidden:
        path = folder.joinpath(*below, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_image(7))
        if path.suffix == ".png":
            path.with_suffix(".txt").write_text("hidden")
            (path.parent / ".metadata.csv").write_text("file_name,text\n0.png,hidden\n")
        if path.parent.name[0] in "._@":
            (path.parent / "metadata.csv").write_text("file_name,text\n0.png,hidden\n")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    text = str(folder)
    if kind == "tar":
        text = str(root / "a.tar")
        with tarfile.open(text, "w") as archive:
            for path in files:
                add_to_tar(archive, f"./{path.relative_to(folder)}", path.read_bytes())
    elif kind == "zip":
        text = str(root / "a.zip")
        with zipfile.ZipFile(text, "w") as packed:
            for path in files:
                packed.write(path, path.relative_to(folder))
    elif kind == "glob":
        text = f"{folder}/**"
    source = open_source(text)
    assert sorted(source.captions) == ["caption 0", "caption 1", "caption 2"]
    assert source.left_out == ()


def test_what_is_hidden_is_told_by_any_part_of_a_path() -> None:
    assert all(is_hidden(f"{before}{name}") for before in ("", "a/", "./a/") for name in HIDDEN)
    assert not any(map(is_hidden, ("a/0.png", "./a.b/../c/0.png", "../0.png", "a..b", "MACOSX/0.png")))


@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_left_out_and_nothing_waits_for_it(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "found", 4)
    for name in ("1.png", "2.txt", "4.png", "4.txt", "5.png"):
        (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / "1.png")
    os.mkfifo(folder / "2.txt")
    (folder / "4.png").symlink_to(folder / "nowhere.png")
    (folder / "5.png").symlink_to(folder / "3.png")  # a link is the file that it leads to
    (folder / "5.txt").write_text("linked")
    (folder / "more").symlink_to(tmp_path)
    (folder / "3.jpg").mkdir()
    source = open_source(str(folder))
    assert sorted(source.captions) == ["caption 0", "caption 3", "linked"]
    assert sorted(text.removeprefix(f"{folder}/") for text in source.left_out) == [
        "1.png: no regular file",
        "2.png: no caption",
        "2.txt: no regular file",
        "4.png: a link that leads nowhere",
        "more: a link to a folder, which is not followed",
    ]
    with pytest.raises(DataError, match=r"found nothing there \(.*1\.png: no regular file\)"):
        open_source(str(folder / "1.png"))


# Inside the folder -----------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    way=st.sampled_from(["absolute", "parent", "long way", "link"]),
    kind=st.sampled_from(["csv", "jsonl", "parquet", "cells", "cell dicts"]),
)
def test_a_table_reads_no_picture_outside_of_its_folder_unless_asked(
    way: str, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("outside")
    pairs(root / "secret", 1)
    folder = root / "found"
    folder.mkdir()
    (folder / "link").symlink_to(root / "secret")
    outside = {
        "absolute": f"{root}/secret/0.png",
        "parent": "../secret/0.png",
        "long way": "a/../../found/../secret/0.png",
        "link": "link/0.png",
    }[way]
    (folder / "mine.png").write_bytes(png_image(1))
    rows = [{"image": outside, "text": "a secret"}, {"image": "mine.png", "text": "mine"}]
    path = folder / f"metadata.{kind}"
    if kind == "csv":
        path.write_text("\n".join(["image,text", *(f"{row['image']},{row['text']}" for row in rows)]))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        (folder / "mine.png").rename(folder / "mine.bin")
        names = [outside, "mine.bin"]
        cells = names if kind == "cells" else [{"bytes": None, "path": name} for name in names]
        pd.DataFrame({"image": cells, "text": ["a secret", "mine"]}).to_parquet(folder / "a.parquet")
        source = open_source(str(folder))
        assert source.content(1) == png_image(1)
        with pytest.raises(ValueError, match="which lies outside of"):
            source.content(0)
        if way != "link":
            assert open_source(str(folder), outside=True).content(0) == png_image(0)
        return
    source = open_source(str(folder))
    assert source.captions == ("mine",)
    if way != "long way":
        told = [text for text in source.left_out if "lies outside of" in text]
        assert len(told) == 1
        assert "data.outside = true" in told[0]
    asked = open_source(str(folder), outside=True)
    assert (asked.captions, asked.content(0)) == (("a secret", "mine"), png_image(0))


def test_a_table_alone_reads_the_pictures_beside_it(tmp_path: Path) -> None:
    pairs(tmp_path / "more", 2)
    (tmp_path / "list.csv").write_text(
        "path,caption\nmore/0.png,a\n" + f"{tmp_path}/more/1.png,b\n/etc/passwd,c\n"
    )
    source = open_source(str(tmp_path / "list.csv"))
    assert source.captions == ("a", "b")
    assert source.left_out[0].startswith("list.csv names /etc/passwd, which lies outside of")


# One bad file ----------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(
    bad=st.lists(
        st.sampled_from(["cut", "text", "empty", "long", "latin", "no json", "folder"]),
        min_size=1,
        max_size=4,
    )
)
def test_one_bad_file_costs_itself_and_a_set_without_any_says_the_first_reason(
    bad: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = pairs(tmp_path_factory.mktemp("bad") / "found", 2)
    for row, kind in enumerate(bad, 2):
        picture, caption = folder / f"{row}.png", folder / f"{row}.txt"
        picture.write_bytes(png_image(row))
        if kind == "latin":
            caption.write_bytes(b"caf\xe9")
        elif kind == "no json":
            (folder / f"{row}.json").write_text("{")
        elif kind == "folder":
            caption.mkdir()
        else:
            picture.unlink()
    source = open_source(str(folder))
    named = [kind for kind in bad if kind in ("latin", "no json", "folder")]
    assert source.captions == ("caption 0", "caption 1")
    assert len(source.left_out) == len(named)
    for row in range(2):
        (folder / f"{row}.txt").unlink()
    with pytest.raises(DataError, match=r"no caption for any \(") as caught:
        open_source(str(folder))
    assert "\n" not in str(caught.value)


def test_one_damaged_table_of_several_is_left_out(tmp_path: Path) -> None:
    for name, content in (
        ("a", b"file_name,text\n0.png,x\n"),
        ("b", b"PAR1"),
        ("c", b"name,size\n0.png,3\n"),
    ):
        pairs(tmp_path / name, 1)
        (tmp_path / name / "0.txt").unlink()
        (tmp_path / name / ("metadata.parquet" if name == "b" else "metadata.csv")).write_bytes(content)
    source = open_source(str(tmp_path))
    assert source.captions == ("x",)
    assert [text.split(":")[0] for text in source.left_out[:2]] == ["b/metadata.parquet", "c/metadata.csv"]


def test_a_shard_without_a_readable_picture_is_empty_and_the_cache_whole(
    tiny_pipeline: Any, tmp_path: Path
) -> None:
    folder = pairs(tmp_path / "found", 7)
    for row in (3, 4, 5, 6):
        (folder / f"{row}.png").write_bytes(b"no picture")
    source = open_source(str(folder))
    cache = build_cache(tiny_pipeline, source, CACHED, tmp_path / "cache").cache
    assert [shard.rows for shard in cache.shards] == [3, 0, 0]
    assert len(cache.left_out) == 4
    again = LatentCache.load(tmp_path / "cache")
    assert captions_of(again) == ("caption 0", "caption 1", "caption 2")
    import torch

    found = again.rows(torch.tensor([2, 0]), torch.tensor([0, 0]))
    assert found.mean.shape[0] == 2
    for row in range(3):
        (folder / f"{row}.png").write_bytes(b"no picture")
    with pytest.raises(
        DataError, match=r"asked to encode 7 images .* none of them can be read \(.*0\.png: no picture"
    ):
        build_cache(tiny_pipeline, open_source(str(folder)), CACHED, tmp_path / "other")
    assert not list((tmp_path / "other").glob("*.safetensors"))


def test_pictures_of_odd_shape_are_left_out_by_the_verb_and_counted(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    from PIL import Image

    folder = pairs(tmp_path / "found", 3)
    Image.new("1", (1, 100_000)).save(folder / "1.png")
    (folder / "2.txt").write_bytes(b"\xff")
    verb = ["data", str(tiny_pipeline_folder), "--data", str(folder), "--out", str(tmp_path / "cache")]
    found = CliRunner().invoke(app, [*verb, "--device", "cpu", "--json"])
    assert found.exit_code == 0, found.output
    assert (json.loads(found.stdout)[0]["rows"], json.loads(found.stdout)[0]["left_out"]) == (1, 2)
    assert "left out 2 (no text 1, not readable 1); the first: " in found.stderr
    listed = tmp_path / "cache/cache.json"
    assert f"; all are listed in {listed}" in " ".join(found.stderr.split())
    assert len(json.loads(listed.read_text())["left_out"]) == 2


def test_held_out_pictures_that_cannot_be_read_are_told(
    tiny_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    monkeypatch.setattr("prune_lab.distill.image_source.note_once", heard.append)
    folder = pairs(tmp_path / "found", 12)
    own = OwnData.open(DataConfig(source=str(folder)), 3)
    first = own.split.probe.tolist()[0]
    (folder / f"{sorted(map(str, range(12)))[first]}.png").write_bytes(b"no picture")
    from prune_lab.config import ProbeConfig

    own.probe(tiny_pipeline, own.split.probe, ProbeConfig(samples=3, timesteps=1), seed=0)
    assert len(heard) == 1
    assert heard[0].startswith(f"of the held-out images of {folder} are left out 1; the first: ")


def test_data_on_demand_still_name_the_picture(tiny_pipeline: Any, tmp_path: Path) -> None:
    import torch

    folder = pairs(tmp_path / "found", 2)
    (folder / "1.png").write_bytes(png_image(1)[:200])
    live = LiveData.of(tiny_pipeline, open_source(str(folder)), dataclasses.replace(CACHED, cached=False))
    with pytest.raises(DataError, match=r"1\.png, found no readable image"):
        live.rows(torch.tensor([1]), torch.tensor([0]))


def test_reasons_are_counted_apart() -> None:
    texts = [
        "a.png: no caption",
        "metadata.csv names b, which is not there",
        "b.png: no caption",
        "c.png: truncated",
    ]
    assert left_out_text(texts) == (
        "left out 4 (no caption 2, no such picture 1, not readable 1); the first: a.png: no caption"
    )
    assert left_out_text(texts[:1]) == "left out 1; the first: a.png: no caption"
    assert left_out_text([]) == left_out_text([], Path("cache.json")) == ""
    assert left_out_text(texts, Path("data/cache.json")).endswith("; all are listed in data/cache.json")


EMPTY = st.lists(st.sampled_from(["a cat", "", " ", "\t"]), min_size=1, max_size=6)


@settings(max_examples=8)
@given(captions=EMPTY, table=st.booleans())
def test_captions_that_are_empty_are_kept_and_counted(
    captions: list[str], table: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = pairs(tmp_path_factory.mktemp("found"), len(captions))
    for row, caption in enumerate(captions):
        (folder / f"{row}.txt").write_text(caption)
    if table:
        lines = ["file_name,caption", *(f'{row}.png,"{caption}"' for row, caption in enumerate(captions))]
        (folder / "metadata.csv").write_text("\n".join(lines))
    heard: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prune_lab.distill.image_source.note_once", heard.append)
        assert len(open_source(str(folder))) == len(captions)
    empty = [row for row, caption in enumerate(captions) if not caption.strip()]
    assert len(heard) == bool(empty)
    if empty:
        assert f" {len(empty)} of {len(captions)} captions are empty" in heard[0]
        assert heard[0].endswith(f"the first: {folder}/{empty[0]}.png")
