"""Folders of captioned images as people keep them, and what is said when none can be used."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_images import add_to_tar, open_source, png_image
from typer.testing import CliRunner

from prune_lab.cli import app
from prune_lab.distill.image_source import texts_in
from prune_lab.errors import DataError

Make = Callable[[Path], Any]
CAPTIONS = ("a cat", "two dogs, smiling", "rain")
BOM = b"\xef\xbb\xbf"


def images(folder: Path, names: tuple[str, ...] = ("0.png", "1.png", "2.png")) -> Path:
    for row, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png_image(row))
    return folder


def beside(folder: Path, ending: str, encode: Callable[[str], bytes] = str.encode) -> None:
    images(folder)
    for row, caption in enumerate(CAPTIONS):
        (folder / f"{row}{ending}").write_bytes(encode(caption))


def table(
    folder: Path,
    name: str,
    lines: list[str],
    *,
    mark: bytes = b"",
    names: tuple[str, ...] = ("0.png", "1.png", "2.png"),
) -> None:
    images(folder, names)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(mark + "\n".join(lines).encode())


def jsonl(names: tuple[str, ...], **more: Any) -> list[str]:
    return [
        json.dumps({"file_name": name, "text": caption, **more})
        for name, caption in zip(names, CAPTIONS, strict=True)
    ]


def separated(mark: str, header: tuple[str, str]) -> list[str]:
    rows = [f'{row}.png{mark}"{caption}"' for row, caption in enumerate(CAPTIONS)]
    return [mark.join(header), *rows]


def img2dataset(folder: Path) -> None:
    for row, caption in enumerate(CAPTIONS):
        stem = folder / f"{row % 2:05d}" / f"{row:09d}"
        images(folder, (f"{row % 2:05d}/{row:09d}.jpg",))
        stem.with_suffix(".jpg").write_bytes(png_image(row))
        stem.with_suffix(".txt").write_text(caption)
        stem.with_suffix(".json").write_text(json.dumps({"caption": "of the log", "width": 3}))
    for shard in range(2):
        pd.DataFrame({"url": ["http://x/0.jpg"], "caption": ["log"], "key": ["0"]}).to_parquet(
            folder / f"{shard:05d}.parquet"
        )
        (folder / f"{shard:05d}_stats.json").write_text('{"count": 1}')


def parquet_metadata(folder: Path) -> None:
    images(folder)
    frame = pd.DataFrame(
        {"File_Name": [f"{row}.png" for row in range(3)], "Captions": [[one] for one in CAPTIONS]}
    )
    frame.to_parquet(folder / "metadata.parquet")


KEPT: dict[str, Make] = {
    "txt": lambda folder: beside(folder, ".txt"),
    "TXT": lambda folder: beside(folder, ".TXT"),
    "caption": lambda folder: beside(folder, ".caption"),
    "Caption": lambda folder: beside(folder, ".Caption"),
    "after the whole name": lambda folder: beside(folder, ".png.txt"),
    "txt with a mark": lambda folder: beside(folder, ".txt", lambda text: BOM + text.encode()),
    "caption in UTF-16": lambda folder: beside(folder, ".caption", lambda text: text.encode("utf-16")),
    "json": lambda folder: beside(folder, ".json", lambda text: json.dumps({"Caption": text}).encode()),
    "json lists": lambda folder: beside(
        folder, ".json", lambda text: json.dumps({"captions": [text]}).encode()
    ),
    "img2dataset": img2dataset,
    "csv with a mark": lambda folder: table(
        folder, "metadata.csv", separated(",", ("file_name", "text")), mark=BOM
    ),
    "semicolons": lambda folder: table(folder, "metadata.csv", separated(";", ("File_Name", "Prompt"))),
    "tabs": lambda folder: table(folder, "metadata.csv", separated("\t", ("FILE_NAME", "TEXT"))),
    "bars": lambda folder: table(folder, "metadata.csv", separated("|", ("file_name", "caption"))),
    "tsv": lambda folder: table(folder, "metadata.tsv", separated("\t", ("file_name", "caption"))),
    "Metadata.CSV": lambda folder: table(folder, "Metadata.CSV", separated(",", ("file_name", "caption"))),
    "another csv": lambda folder: table(folder, "pictures.csv", separated(";", ("Image", "Prompt"))),
    "metadata.parquet": parquet_metadata,
    "jsonl": lambda folder: table(folder, "metadata.jsonl", jsonl(("0.png", "1.png", "2.png")), mark=BOM),
    "jsonl from a parent": lambda folder: table(
        folder / "train", "metadata.jsonl", jsonl(("train/0.png", "./train/1.png", "train\\2.png"))
    ),
    "jsonl from two parents": lambda folder: table(
        folder / "data/train", "metadata.jsonl", jsonl(("data/train/0.png", "train/1.png", "2.png"))
    ),
    "jsonl of a folder that was renamed": lambda folder: table(
        folder / "mine", "metadata.jsonl", jsonl(("train/0.png", "train/1.png", "train/2.png"))
    ),
    "jsonl beside the folder of images": lambda folder: (
        table(folder, "meta/metadata.jsonl", jsonl(("../images/0.png", "images/1.png", "images/2.png"))),
        images(folder / "images"),
        [(folder / f"{row}.png").unlink() for row in range(3)],
    ),
    "jsonl without endings": lambda folder: table(folder, "metadata.jsonl", jsonl(("0", "1", "2"))),
    "kohya": lambda folder: beside(folder / "10_sks cat", ".txt"),
}


@pytest.mark.parametrize("kind", KEPT)
def test_every_way_to_keep_captions_is_read(kind: str, tmp_path: Path) -> None:
    KEPT[kind](tmp_path / "found")
    source = open_source(str(tmp_path / "found"))
    found = sorted((source.captions[row], source.content(row)) for row in range(len(source)))
    assert found == sorted((caption, png_image(row)) for row, caption in enumerate(CAPTIONS))
    assert source.left_out == ()


def test_a_folder_inside_what_its_table_names_is_found_by_any_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    KEPT["jsonl from a parent"](tmp_path)
    monkeypatch.chdir(tmp_path / "train")
    for text in (".", "../train", str(tmp_path), str(tmp_path / "train"), "metadata.jsonl"):
        assert sorted(open_source(text).captions) == sorted(CAPTIONS)


def test_columns_can_be_named_for_a_folder_too(tmp_path: Path) -> None:
    lines = [
        "path,image,prompt,caption",
        *(f"x{row},{row}.png,{text!r},other" for row, text in enumerate("abc")),
    ]
    folder = tmp_path / "found"  # the data may not lie among the pictures
    table(folder, "list.csv", lines)
    for row in range(3):
        (folder / f"{row}.txt").write_text("beside")
    assert open_source(str(folder)).captions == ("beside",) * 3
    source = open_source(str(folder), image_column="Image", caption_column="prompt")
    assert source.captions == ("'a'", "'b'", "'c'")
    found = CliRunner().invoke(
        app,
        [
            *(
                "data",
                "reference",
                "--data",
                str(folder),
                "--out",
                str(tmp_path / "cache"),
                "--device",
                "cpu",
            ),
            *("--image-column", "image", "--caption-column", "prompt", "--json"),
        ],
    )
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)[0]["rows"] == 3


def test_lists_of_captions_are_a_row_each(tmp_path: Path) -> None:
    lines = [
        json.dumps({"file_name": "0.png", "captions": ["x", "y"]}),
        '{"file_name": "1.png", "captions": "z"}',
    ]
    table(tmp_path / "folder", "metadata.jsonl", lines)
    source = open_source(str(tmp_path / "folder"))
    assert source.captions == ("x", "y", "z")
    assert source.content(0) == source.content(1) == png_image(0)
    assert [text.split("/")[-1] for text in source.left_out] == ["2.png: no caption"]
    pd.DataFrame({"JPG": [png_image(0), png_image(1)], "Text": [["x", "y"], None]}).to_parquet(
        tmp_path / "a.parquet"
    )
    source = open_source(str(tmp_path / "a.parquet"))
    assert (source.captions, source.left_out) == (("x", "y"), ("row 1: no caption",))
    assert source.content(1) == png_image(0)
    with tarfile.open(tmp_path / "a.TAR", "w") as archive:
        add_to_tar(archive, "0.PNG", png_image(0))
        add_to_tar(archive, "0.json", BOM + b'{"Captions": ["x", "y"]}')
        add_to_tar(archive, "1.png", png_image(1))
        add_to_tar(archive, "1.caption", BOM + b"z")
    source = open_source(str(tmp_path / "a.TAR"))
    assert source.captions == ("x", "y", "z")
    assert source.content(1) == png_image(0)


def test_kohyas_repeats_say_how_often_an_image_counts(tmp_path: Path) -> None:
    for folder, row in (("10_sks cat", 0), ("4_cat", 1), ("0_unused", 2)):
        images(tmp_path / folder, (f"{row}.png",))
        (tmp_path / folder / f"{row}.caption").write_text(CAPTIONS[row])
    source = open_source(str(tmp_path))
    assert sorted(source.captions) == sorted(["a cat"] * 5 + ["two dogs, smiling"] * 2)
    assert len({source.name(row) for row in range(len(source))}) == 2
    assert source.left_out == (f"{tmp_path}/0_unused/2.png: its folder 0_unused says that it counts 0 times",)
    images(tmp_path, ("2.png",))
    (tmp_path / "2.txt").write_text("rain")
    assert len(open_source(str(tmp_path))) == 4  # now no numbers, but names of folders


def test_a_name_that_two_folders_share_is_not_guessed(tmp_path: Path) -> None:
    lines = jsonl(("train/0.png", "test/0.png", "1.png"))
    table(tmp_path, "metadata.jsonl", lines)
    source = open_source(str(tmp_path))
    assert source.captions == ("rain",)
    assert source.left_out[0] == (
        "metadata.jsonl names train/0.png, which is not there; 0.png may be any of test/0.png, train/0.png"
    )


def _nothing_there(folder: Path) -> None:
    table(folder, "metadata.jsonl", jsonl(("train/7.png", "train/8.png", "train/9.png")))


def _odd_ending(folder: Path) -> None:
    images(folder)
    (folder / "0.captoin").write_text("x")


def _images_elsewhere(folder: Path) -> None:
    folder.mkdir()
    (folder / "metadata.csv").write_text("file_name,text\nx.png,x\n")


def _unequal(folder: Path) -> None:
    table(folder, "metadata.csv", ["file_name,text", "0.png,a,b,c"])


@pytest.mark.parametrize(
    ("make", "more", "says"),
    [
        (
            _nothing_there,
            {},
            r"found 3 images and no caption for any \(metadata.jsonl names train/7.png, which is not",
        ),
        (
            lambda folder: table(folder, "metadata.json1", jsonl(("0.png", "1.png", "2.png"))),
            {},
            r"no caption for any \(metadata.json1 is not read; should it be called metadata.jsonl\?\)",
        ),
        (_odd_ending, {}, r"0.png: no caption in 0.captoin beside it; .txt, .caption, .json are read"),
        (images, {}, r"0.png: no caption\).*metadata.csv"),
        (_images_elsewhere, {}, r"found 0 images .*metadata.csv names x.png, which is not there"),
        (
            lambda folder: table(folder, "my.csv", ["image,says", "0.png,x"]),
            {},
            r"my.csv has the columns image, says; say which with --image-column and --caption-column",
        ),
        (
            lambda folder: table(folder, "my.csv", ["image,says", "0.png,x"]),
            {"image_column": "scan", "caption_column": "says"},
            r"my.csv has the columns image, says and not scan and says",
        ),
        (
            lambda folder: table(folder, "metadata.csv", ["name,text", "0.png,x"]),
            {},
            r"asked for the image_column any of file_name, .*metadata.csv, found name, text",
        ),
        (
            _unequal,
            {},
            r"metadata.csv, cannot read it \(line 2 has 4 columns and the first line 2; put quotes",
        ),
        (
            lambda folder: table(folder, "metadata.jsonl", ["", "{"]),
            {},
            r"metadata.jsonl, cannot read it \(line 2",
        ),
        (
            lambda folder: table(folder, "metadata.jsonl", ['{"file_name": "0.png", "text": 5}']),
            {},
            r"metadata.jsonl has no caption for 0.png",
        ),
        (lambda folder: beside(folder, ".txt", lambda _: b"\xff\xfe\x00"), {}, r"0.txt, found other bytes"),
        (
            lambda folder: beside(folder, ".txt", lambda _: b"caf\xe9"),
            {},
            r"0.txt, found other bytes than UTF-8",
        ),
    ],
)
def test_what_cannot_be_used_says_the_first_reason_and_the_file(
    make: Make, more: dict[str, str], says: str, tmp_path: Path
) -> None:
    make(tmp_path / "found")
    with pytest.raises(DataError, match=says) as caught:
        open_source(str(tmp_path / "found"), **more)
    assert "\n" not in str(caught.value)


def test_the_verb_counts_what_it_left_out_and_says_the_first(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    beside(tmp_path / "found", ".txt")
    (tmp_path / "found/1.png").write_bytes(b"no image")
    (tmp_path / "found/1.txt").write_text("broken")
    verb = [
        "data",
        str(tiny_pipeline_folder),
        "--data",
        str(tmp_path / "found"),
        "--out",
        str(tmp_path / "cache"),
    ]
    found = CliRunner().invoke(app, [*verb, "--device", "cpu", "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)[0]["left_out"] == 1
    assert f"left out 1; the first: {tmp_path}/found/1.png: " in found.stderr


NAMES = st.lists(st.sampled_from(["a", "b", "c 1", "d.e"]), min_size=1, max_size=3)
TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=12
)


@settings(max_examples=25)
@given(
    parts=st.lists(NAMES, min_size=1, max_size=4, unique_by=tuple),
    texts=st.lists(TEXT, min_size=4, max_size=4),
    mark=st.sampled_from([",", ";", "\t", "|"]),
    header=st.sampled_from([("file_name", "text"), ("File", "PROMPT"), ("IMAGE_PATH", "Caption")]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_any_table_gives_back_its_rows(
    parts: list[list[str]],
    texts: list[str],
    mark: str,
    header: tuple[str, str],
    encoding: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    names = ["/".join(part) + "/x.png" for part in parts]
    images(folder, tuple(names))
    frame = pd.DataFrame({header[0]: names, header[1]: texts[: len(names)]})
    frame.to_csv(folder / "metadata.csv", sep=mark, index=False, encoding=encoding, quoting=1)
    source = open_source(str(folder))
    assert [(source.captions[row], source.content(row)) for row in range(len(source))] == [
        (texts[row], (folder / name).read_bytes()) for row, name in enumerate(names)
    ]


def test_a_cell_holds_a_text_or_a_list_of_texts() -> None:
    assert texts_in("x") == ("x",)
    assert texts_in(["x", "y"]) == ("x", "y")
    assert [texts_in(cell) for cell in (None, 3, b"x", {"x": 1}, [], [1, "x"], float("nan"))] == [None] * 7


@pytest.mark.parametrize("place", ["model", "model/cache", "found", "found/cache", "."])
def test_data_are_not_written_among_the_model_or_the_pictures(
    place: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_pipeline_folder, tmp_path / "model")
    beside(tmp_path / "found", ".txt")
    before = sorted(tmp_path.rglob("*"))
    verb = [
        "data",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "found"),
        "--out",
        str(tmp_path / place),
    ]
    answer = CliRunner().invoke(app, [*verb, "--device", "cpu"])
    assert (answer.exit_code, len(answer.stderr.splitlines())) == (2, 1), answer.output
    assert f"asked to write {tmp_path / place}, which " in answer.stderr
    assert "that it is made from" in answer.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_caption_in_other_bytes_costs_its_own_picture(tmp_path: Path) -> None:
    beside(tmp_path / "found", ".txt")
    (tmp_path / "found/1.txt").write_bytes(b"\xe9t\xe9")
    source = open_source(str(tmp_path / "found"))
    assert len(source) == 2
    assert re.search(r"1\.png: .*1\.txt, found other bytes than UTF-8", "".join(source.left_out))


def test_a_caption_that_is_too_long_is_one_note(
    tiny_pipeline_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    beside(tmp_path / "found", ".txt")
    (tmp_path / "found/1.txt").write_text("x " * 300)
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    for logger in loggers:
        logger.addHandler(handler)
    verb = [
        "data",
        str(tiny_pipeline_folder),
        "--data",
        str(tmp_path / "found"),
        "--out",
        str(tmp_path / "new"),
    ]
    try:
        answer = CliRunner().invoke(app, [*verb, "--device", "cpu"])
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert answer.exit_code == 0, answer.output
    assert heard == []
    assert "1 of 3 captions are cut off after the 16 tokens" in answer.stderr
