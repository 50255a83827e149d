"""Captions and prompts come back as they were written, through every kind of source; a bad one costs its own row."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_images import add_to_tar, open_source, png_image

from prune_lab import probes
from prune_lab.distill.image_source import left_out_text
from prune_lab.errors import DataError, PruneLabError
from prune_lab.probes import cut_texts, encode_captions
from prune_lab.probes.encoding import MOST_CHARACTERS, note_cut
from prune_lab.prompts import read_prompts
from prune_lab.text_tables import read_rows, read_table

# What a reader that guesses types makes numbers, truths or gaps of, and what a parser may stumble over.
GUESSED = (
    "NA",
    "N/A",
    "nan",
    "null",
    "None",
    "NULL",
    "007",
    "1e5",
    "-0",
    "1_000",
    "0x1F",
    "true",
    "FALSE",
    "inf",
    "2024-01-02",
)
ODD = (
    '"',
    "a, b",
    "a; b",
    "a\tb",
    'say "x"',
    "'",
    "\\n",
    "a\nb",
    "a\r\nb",
    "#",
    "=1+1",
    "\0",
    "a\0b",
    "\x0b",
    "\x1f",
    "\x85",
    "\u2028",
    "a\ufeffb",
    "é",
    "👩‍🚀",
    "<|endoftext|>",
    "{}",
    "[]",
    "x" * 200_000,
)
TEXTS = st.one_of(
    st.sampled_from([*GUESSED, *ODD]),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
).map(lambda text: text.strip().removeprefix("\ufeff").strip())
ROWS = st.lists(TEXTS, min_size=1, max_size=6)


def names(captions: Sequence[str]) -> list[str]:
    return [f"{row}.png" for row in range(len(captions))]


def separated(captions: Sequence[str], kind: str, mark: str) -> dict[str, bytes]:
    frame = pd.DataFrame({"file_name": names(captions), "caption": captions})
    buffer = io.StringIO(newline="")
    frame.to_csv(buffer, sep=mark, index=False, quoting=1, lineterminator="\n")
    return {f"metadata.{kind}": buffer.getvalue().encode()}


def as_lines(captions: Sequence[str], **more: Any) -> bytes:
    rows = zip(names(captions), captions, strict=True)
    return "\n".join(json.dumps({"file_name": name, "caption": text}, **more) for name, text in rows).encode()


def as_parquet(captions: Sequence[str], files: Sequence[Any], column: str) -> bytes:
    buffer = io.BytesIO()
    pd.DataFrame({column: files, "caption": list(captions)}).to_parquet(buffer)
    return buffer.getvalue()


# The files that hold captions, beside pictures called 0.png, 1.png ...
BESIDE: dict[str, Callable[[Sequence[str]], dict[str, bytes]]] = {
    "txt": lambda captions: {f"{row}.txt": text.encode() for row, text in enumerate(captions)},
    "caption": lambda captions: {
        f"{row}.caption": text.encode("utf-8-sig") for row, text in enumerate(captions)
    },
    "json": lambda captions: {
        f"{row}.json": json.dumps({"caption": text}).encode("utf-8-sig") for row, text in enumerate(captions)
    },
    "csv": lambda captions: separated(captions, "csv", ","),
    "semicolons": lambda captions: separated(captions, "csv", ";"),
    "tsv": lambda captions: separated(captions, "tsv", "\t"),
    "jsonl": lambda captions: {"metadata.jsonl": as_lines(captions)},
    "jsonl as it is": lambda captions: {"metadata.jsonl": as_lines(captions, ensure_ascii=False)},
    "parquet": lambda captions: {"metadata.parquet": as_parquet(captions, names(captions), "file_name")},
}


def packed(folder: Path, captions: Sequence[str], kind: str) -> str:
    """A tar, a zip or a Parquet file of pictures and captions."""
    path = folder / f"all.{kind}"
    files = {f"{row}.txt": text.encode("utf-8-sig") for row, text in enumerate(captions)}
    files |= {f"{row}.png": png_image(row) for row in range(len(captions))}
    if kind == "parquet":
        path.write_bytes(as_parquet(captions, [files[name] for name in names(captions)], "image"))
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name, content in files.items():
                add_to_tar(archive, name, content)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed_files:
            for name, content in files.items():
                packed_files.writestr(name, content)
    return str(path)


def filled(folder: Path, captions: Sequence[str], files: dict[str, bytes]) -> str:
    for row, name in enumerate(names(captions)):
        (folder / name).write_bytes(png_image(row))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)


@settings(max_examples=25)
@given(captions=ROWS)
def test_captions_come_back_from_every_kind_of_source(
    captions: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for number, make in enumerate(BESIDE.values()):
        (folder / str(number)).mkdir()
        source = open_source(filled(folder / str(number), captions, make(captions)))
        assert list(source.captions) == captions, list(BESIDE)[number]
        assert source.left_out == ()
    for kind in ("tar", "zip", "parquet"):
        source = open_source(packed(folder, captions, kind))
        assert list(source.captions) == captions, kind
        assert [source.content(row) for row in range(len(source))] == list(
            map(png_image, range(len(captions)))
        )


@settings(max_examples=25)
@given(
    prompts=st.lists(TEXTS.filter(bool), min_size=1, max_size=6),
    kinds=st.lists(TEXTS, min_size=6, max_size=6),
)
def test_prompts_come_back_from_every_kind_of_table(
    prompts: list[str], kinds: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, kinds = tmp_path_factory.mktemp("prompts"), kinds[: len(prompts)]
    frame = pd.DataFrame({"prompt": prompts, "kind": kinds})
    for name, mark in (("a.csv", ","), ("b.csv", ";"), ("a.tsv", "\t")):
        frame.to_csv(
            folder / name, sep=mark, index=False, quoting=1, lineterminator="\n", encoding="utf-8-sig"
        )
    frame.to_parquet(folder / "a.parquet")
    lines = [json.dumps(row) for row in frame.to_dict("records")]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode("utf-8-sig")))
    for path in sorted(folder.iterdir()):
        found = read_prompts(path)
        assert (list(found.texts), list(found.kinds)) == (prompts, kinds), path.name
    in_one_line = [text for text in prompts if "\n" not in text and "\r" not in text]
    if in_one_line:
        (folder / "a.txt").write_bytes("\r\n".join(in_one_line).encode("utf-8-sig"))
        assert list(read_prompts(folder / "a.txt").texts) == in_one_line


def test_null_and_numbers_of_json_are_no_prompts_and_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    monkeypatch.setattr("prune_lab.prompts.note_once", heard.append)
    rows = [{"prompt": "NA"}, {"prompt": None}, {"prompt": 7}, {"other": 1}, {"prompt": ["x", None]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_prompts(tmp_path / "a.jsonl").texts == ("NA", "x")
    assert heard == [
        "3 of 5 rows of a.jsonl hold no prompt and are left out; the first holds None in column prompt"
    ]


# One bad row -----------------------------------------------------------------------------------------------------

BAD_LINES = {
    "two columns more": (b"1.png,a,b,c", "has 4 columns and the first line 2; put quotes"),
    "a column less": (b"1.png", "has 1 columns and the first line 2"),
    "a quote never closed": (b'1.png,"a cat', "has a quote that"),
    "text after a quote": (b'1.png,"a" cat', "has a quote that ends before its cell"),
    "latin-1": (b"1.png,caf\xe9", "other bytes than UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_of_a_table_costs_its_own_row(kind: str, tmp_path: Path) -> None:
    bad, says = BAD_LINES[kind]
    lines = [b"file_name,caption", b"0.png,a cat", bad, b'2.png,"a ""dog"", wet"', b"3.png,rain"]
    source = open_source(filled(tmp_path, "abcd", {"metadata.csv": b"\n".join(lines)}))
    assert source.captions == ("a cat", 'a "dog", wet', "rain")
    assert source.left_out[0].startswith("metadata.csv: line 3 ")
    assert says in source.left_out[0]
    assert source.left_out[1:] == (f"{tmp_path}/1.png: no caption",)
    with pytest.raises(ValueError, match=r"line 3 (has|holds)"):
        read_table(tmp_path / "metadata.csv")
    frame, left_out = read_rows(tmp_path / "metadata.csv")
    assert (len(frame), len(left_out)) == (3, 1)


@settings(max_examples=20)
@given(
    bad=st.sampled_from(
        ["{", "[1]", "3", '{"file_name": "1.png", "caption": "x"', "\udce9", "[" * 5000, "1" * 5000]
    )
)
def test_a_bad_line_of_json_costs_its_own_row(bad: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("lines")
    lines = [*as_lines(["a", "b"]).decode().split("\n"), bad, '{"file_name": "2.png", "caption": null}']
    text = "\n".join(lines).encode(errors="surrogateescape")
    source = open_source(filled(folder, "abc", {"metadata.jsonl": text}))
    assert source.captions == ("a", "b")
    assert source.left_out[0].startswith("metadata.jsonl: line 3 ")
    assert source.left_out[1:] == ("metadata.jsonl has no caption for 2.png", f"{folder}/2.png: no caption")
    assert "left out 3 (" in left_out_text(source.left_out)


@settings(max_examples=30)
@given(text=st.text(st.sampled_from('",\n\rax'), max_size=60))
def test_any_table_is_read_or_refused_and_no_row_has_other_columns(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tables") / "a.csv"
    path.write_bytes(b"p,q\n" + text.encode())
    frame, left_out = read_rows(path)
    assert list(frame.columns) == ["p", "q"]
    assert all(isinstance(cell, str) for row in frame.to_numpy() for cell in row)
    assert all(one.startswith("line ") for one in left_out)
    last = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert len(frame) + len(left_out) <= len(last) + 1


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_one_bad_caption_costs_its_own_sample(kind: str, tmp_path: Path) -> None:
    files = {f"{row}.png": png_image(row) for row in range(5)}
    files |= {
        "0.txt": b"a",
        "1.txt": b"caf\xe9",
        "2.json": b"{",
        "3.json": b"[" * 300_000,
        "4.json": b'{"caption": "e"}',
    }
    path = tmp_path / f"a.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name, content in files.items():
                add_to_tar(archive, name, content)
    else:
        with zipfile.ZipFile(path, "w") as packed_files:
            for name, content in files.items():
                packed_files.writestr(name, content)
    source = open_source(str(path))
    assert source.captions == ("a", "e")
    assert [text.split(":")[0] for text in source.left_out] == [f"a.{kind}/{row}" for row in (1, 2, 3)]
    assert "other bytes than UTF-8 in .txt" in source.left_out[0]


def test_rows_of_parquet_without_text_are_left_out(tmp_path: Path) -> None:
    cells = [["a"], None, [], ["b", "c"]]
    pd.DataFrame({"image": [png_image(row) for row in range(4)], "text": cells}).to_parquet(
        tmp_path / "a.parquet"
    )
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    source = open_source(str(tmp_path))
    assert source.captions == ("a", "b", "c")
    assert [text.split(":")[0] for text in source.left_out] == ["b.parquet", "row 1", "row 2"]


# Text that is hard to store or to tokenise -----------------------------------------------------------------------


def test_half_characters_are_replaced_and_names_stay_in_one_line(tmp_path: Path) -> None:
    lines = [
        '{"file_name": "0.png", "caption": "a \\ud800 b"}',
        '{"file_name": "x\\n\\ud800", "caption": "c"}',
    ]
    source = open_source(filled(tmp_path, "a", {"metadata.jsonl": "\n".join(lines).encode()}))
    assert source.captions == ("a \ufffd b",)
    assert source.left_out == ("metadata.jsonl names x\\n\\ud800, which is not there",)
    (tmp_path / "a.jsonl").write_text('{"prompt": "\\udfff x"}')
    assert read_prompts(tmp_path / "a.jsonl").texts == ("\ufffd x",)


@settings(max_examples=15)
@given(
    text=st.one_of(
        TEXTS, st.text(max_size=30), st.sampled_from(["\ud800", "\0" * 50, "a" * 3_000_000, " " * 9000 + "x"])
    )
)
def test_any_text_is_encoded_as_its_beginning(text: str, tiny_pipeline: Any) -> None:
    start = time.perf_counter()
    found, _ = encode_captions(tiny_pipeline, [text])
    note_cut(tiny_pipeline, [text], "captions")
    assert time.perf_counter() - start < 5
    shorter = " ".join(text.split())[:400].encode(errors="replace").decode()
    if len(text) > MOST_CHARACTERS:
        wanted, _ = encode_captions(tiny_pipeline, [shorter])
        assert found.equal(wanted)
    assert all(len(one) <= MOST_CHARACTERS and one.encode() for one in cut_texts([text or "x"]))


def test_the_note_of_captions_that_are_cut_has_count_and_example(
    tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(probes.encoding, "note_once", heard.append)
    note_cut(tiny_pipeline, ["short", "a\nb " * 4000, "é " * 40], "captions")
    note_cut(tiny_pipeline, ["short"], "captions")
    assert len(heard) == 1
    assert heard[0].startswith(
        "2 of 3 captions are cut off after the 16 tokens that the text encoder reads; the first: a\\nb a"
    )
    assert len(heard[0]) < 250


# Damage and scale ------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(kind=st.sampled_from(["tar", "zip", "parquet"]), place=st.floats(0, 0.999), flip=st.booleans())
def test_a_damaged_archive_is_refused_or_read_right(
    kind: str, place: float, flip: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    captions = ["a cat", "NA", "rain"]
    path = Path(packed(tmp_path_factory.mktemp("damaged"), captions, kind))
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if flip:
        content[at] ^= 0x41
    path.write_bytes(content if flip else content[:at])
    try:
        source = open_source(str(path))
    except PruneLabError as error:
        line = str(error)
        assert "\n" not in line
        return
    if kind == "zip":  # each file has its sum
        rows = {png_image(row): text for row, text in enumerate(captions)}
        for row, text in enumerate(source.captions):
            try:
                assert rows[source.content(row)] == text
            except DataError:
                raise
            except (ValueError, OSError):
                continue
    assert len(source) <= len(captions)


@pytest.mark.parametrize("kind", ["a.txt", "a.csv", "a.jsonl", "a.parquet"])
def test_a_hundred_thousand_prompts_take_seconds(kind: str, tmp_path: Path) -> None:
    texts = [f"a cat number {row}, on a table" for row in range(100_000)]
    frame = pd.DataFrame({"prompt": texts})
    if kind == "a.txt":
        (tmp_path / kind).write_text("\n".join(texts))
    elif kind == "a.csv":
        frame.to_csv(tmp_path / kind, index=False)
    elif kind == "a.jsonl":
        frame.to_json(tmp_path / kind, orient="records", lines=True)
    else:
        frame.to_parquet(tmp_path / kind)
    start = time.perf_counter()
    assert read_prompts(tmp_path / kind).texts == tuple(texts)
    assert time.perf_counter() - start < 10


def test_a_table_of_a_hundred_thousand_rows_takes_seconds(tmp_path: Path) -> None:
    rows = [f'{row}.png,"a cat, number {row}"' for row in range(100_000)]
    content = "\n".join(["file_name,caption", *rows]).encode()
    start = time.perf_counter()
    source = open_source(filled(tmp_path, "abc", {"metadata.csv": content}))
    assert time.perf_counter() - start < 20
    assert (len(source), len(source.left_out)) == (3, 99_997)


def test_an_archive_of_text_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_lab.text_tables._MOST_BYTES", 10_000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a\n" * 1_000_000))
    with pytest.raises(DataError, match="more than 10,000 bytes"):
        read_prompts(tmp_path / "a.txt.gz")
    whole = gzip.compress(b"a\nb")
    for damaged in (whole[:-3], whole[:5], b"a\nb"):
        (tmp_path / "a.txt.gz").write_bytes(damaged)
        with pytest.raises(DataError, match="cannot unpack it"):
            read_prompts(tmp_path / "a.txt.gz")
    (tmp_path / "a.txt.gz").write_bytes(whole + gzip.compress(b"c"))
    assert read_prompts(tmp_path / "a.txt.gz").texts == ("a", "bc")
