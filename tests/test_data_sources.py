"""Where training images come from: folders, tables, tars, the hub, and what ships inside the package."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hub_server import serve
from training_images import CACHED, CAPTIONS, add_to_tar, contents, open_source, png_image, write_images

from prune_lab.config import DataConfig
from prune_lab.distill import source_of
from prune_lab.distill.decoding import decode_image
from prune_lab.distill.encoding import crop_variants
from prune_lab.errors import DataError


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that `datasets` writes its Arrow copies into, of this test alone."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "datasets"


def as_jsonl(folder: Path) -> str:
    folder.mkdir()
    lines = []
    for row, caption in enumerate(CAPTIONS):
        (folder / f"{row}.png").write_bytes(png_image(row))
        lines.append(json.dumps({"file_name": f"{row}.png", "caption": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


def as_pairs(folder: Path) -> str:
    folder.mkdir()
    for row, caption in enumerate(CAPTIONS):
        (folder / f"{row}.png").write_bytes(png_image(row))
        (folder / f"{row}.txt").write_text(caption, encoding="utf-8")
    return str(folder)


def captioned_table() -> Any:
    from datasets import Dataset, Features, Image, Value

    rows = [
        {"picture": {"bytes": png_image(row), "path": None}, "prompt": caption}
        for row, caption in enumerate(CAPTIONS)
    ]
    return Dataset.from_list(rows, Features({"picture": Image(), "prompt": Value("string")}))


def as_parquet(folder: Path) -> str:
    folder.mkdir()
    table = captioned_table()
    table.select(range(4)).to_parquet(folder / "part-0.parquet")
    table.select(range(4, 7)).to_parquet(folder / "part-1.parquet")
    return str(folder)


def as_plain_parquet(folder: Path) -> str:
    folder.mkdir()
    frame = pd.DataFrame({"jpg": [png_image(row) for row in range(len(CAPTIONS))], "caption": CAPTIONS})
    frame.to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def as_tars(folder: Path) -> str:
    folder.mkdir()
    for number, rows in enumerate((range(4), range(4, 7))):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
            for row in rows:
                add_to_tar(archive, f"{row:04d}.png", png_image(row))
                add_to_tar(archive, f"{row:04d}.mask.png", b"of the same sample, under another name")
                if row % 2:
                    add_to_tar(archive, f"{row:04d}.txt", CAPTIONS[row].encode())
                else:
                    add_to_tar(archive, f"{row:04d}.json", json.dumps({"caption": CAPTIONS[row]}).encode())
        frame = pd.DataFrame({"key": [f"{row:04d}" for row in rows], "caption": "of the log"})
        frame.to_parquet(folder / f"{number:05d}.parquet")  # as img2dataset lays them beside
    return str(folder)


def as_glob_of_tars(folder: Path) -> str:
    return f"{as_tars(folder)}/*.tar"


KINDS = [as_jsonl, as_pairs, as_parquet, as_plain_parquet, as_tars, as_glob_of_tars]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_every_kind_of_source_has_the_same_pictures_and_captions(
    make: Any, tmp_path: Path, image_folder: Path
) -> None:
    source = open_source(make(tmp_path / "found"))
    assert contents(source) == [(caption, png_image(row)) for row, caption in enumerate(CAPTIONS)]
    assert contents(source) == contents(open_source(str(image_folder)))
    assert source.left_out == ()


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_nothing_is_copied_to_read_a_source(make: Any, tmp_path: Path, datasets_cache: Path) -> None:
    text = make(tmp_path / "found")
    before = sorted(tmp_path.rglob("*"))
    contents(open_source(text))
    assert sorted(tmp_path.rglob("*")) == before
    assert not datasets_cache.exists()


def as_arrow(folder: Path) -> None:
    """In a format whose rows only `datasets` can read."""
    captioned_table().save_to_disk(folder / "saved")
    (folder / "saved" / "data-00000-of-00001.arrow").rename(folder / "train.arrow")
    shutil.rmtree(folder / "saved")


READ_FROM_THE_HUB = """
import hashlib, json, sys
from prune_lab.config import DataConfig
from prune_lab.distill import source_of
found = {}
for name in sys.argv[1:]:
    source = source_of(DataConfig(source=name))
    digests = [hashlib.sha1(source.content(row)).hexdigest() for row in range(len(source))]
    found[name] = [sorted(zip(source.captions, digests)), source.digest, source.title]
print(json.dumps(found))
"""


@pytest.mark.long
def test_a_hub_id_is_loaded_by_datasets(tmp_path: Path) -> None:
    makers = {"parquet": as_parquet, "tars": as_tars, "folder": write_images, "arrow": as_arrow}
    hub = tmp_path / "hub/someone"
    hub.mkdir(parents=True)
    for name, make in makers.items():
        make(hub / name)
    parquet = hub / "parquet"
    for number in range(2):
        (parquet / f"part-{number}.parquet").rename(parquet / f"train-0000{number}-of-00002.parquet")
    shutil.copy(parquet / "train-00001-of-00002.parquet", parquet / "test-00000-of-00001.parquet")
    for path in (hub / "tars").glob("*.parquet"):
        path.unlink()  # `datasets` would take the logs for the data
    home = tmp_path / "home"
    with serve(hub.parent) as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        reader = subprocess.run(
            [sys.executable, "-c", READ_FROM_THE_HUB, *(f"someone/{name}" for name in makers)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert reader.returncode == 0, reader.stderr
    found = json.loads(reader.stdout)
    wanted = sorted(
        [caption, hashlib.sha1(png_image(row)).hexdigest()] for row, caption in enumerate(CAPTIONS)
    )
    assert all(rows == wanted and title == name for name, (rows, _, title) in found.items())
    assert len({digest for _, digest, _ in found.values()}) == 4

    def size(*paths: Path) -> int:
        return sum(path.stat().st_size for path in paths if path.is_file() and not path.is_symlink())

    for name in ("parquet", "tars", "folder"):  # one copy each of the train split, in the hub's own cache
        files = [path for path in (hub / name).rglob("*") if "test-" not in path.name]
        assert size(*(home / f"hub/datasets--someone--{name}/blobs").iterdir()) == size(*files)
    arrow = list((home / "datasets").rglob("*.arrow"))
    assert {path.relative_to(home / "datasets").parts[0] for path in arrow} == {"someone___arrow"}


def test_a_hub_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(DataError, match=r"images in someone/pictures, cannot load them \(Couldn't reach"):
        open_source("someone/pictures")  # tests are offline


def test_folders_and_tars_are_read_as_datasets_reads_them(tmp_path: Path, image_folder: Path) -> None:
    from datasets import Image, load_dataset

    def pairs(table: Any, image: str, text: str) -> list[tuple[str, bytes]]:
        rows = table.cast_column(image, Image(decode=False))
        return sorted(
            (row[text] or "", row[image]["bytes"] or Path(row[image]["path"]).read_bytes()) for row in rows
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # `datasets` leaves metadata.csv open
        images = load_dataset("imagefolder", data_dir=str(image_folder), split="train")
        gc.collect()
    assert sorted(contents(open_source(str(image_folder)))) == pairs(images, "image", "text")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as archive:
        for row, caption in enumerate(CAPTIONS):
            add_to_tar(archive, f"x/{row}.png", png_image(row))
            add_to_tar(archive, f"x/{row}.txt", caption.encode())
    tars = load_dataset("webdataset", data_files=str(tmp_path / "tars" / "a.tar"), split="train")
    assert sorted(contents(open_source(str(tmp_path / "tars")))) == pairs(tars, "png", "txt")


def test_the_shipped_pictures_in_the_order_of_a_run(tiny_pipeline: Any) -> None:
    from prune_lab.assets import decode_pictures
    from prune_lab.session.prompts import shipped_rows

    source, frame = open_source("reference", limit=5, seed=3), shipped_rows("train", 5, 3)
    assert source.captions == tuple(frame["caption"])
    for row, pixels in enumerate(decode_pictures(frame)):
        assert torch.equal(crop_variants(decode_image(source.content(row)), 64, CACHED, row, (0,))[0], pixels)


def test_what_has_no_partner_is_named_and_left_out(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "alone.png").write_bytes(png_image(9))
    with (image_folder / "metadata.csv").open("a", encoding="utf-8") as file:
        file.write("gone.png,a ghost\n0.png,a second caption\n")
    source = open_source(str(image_folder))
    assert source.captions == (*CAPTIONS, "a second caption")
    assert [text.removeprefix(f"{image_folder}/") for text in source.left_out] == [
        "metadata.csv names gone.png, which is not there",
        "alone.png: no caption",
    ]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in {
            "0.png": png_image(0),
            "0.txt": b"x",
            "1.png": png_image(1),
            "2.txt": b"y",
        }.items():
            add_to_tar(archive, name, content)
    source = open_source(str(tmp_path / "a.tar"))
    assert (source.captions, source.left_out) == (("x",), ("a.tar/1: no caption", "a.tar/2: no image"))


def _nothing(path: Path) -> str:
    path.mkdir()
    return str(path)


def _no_captions(path: Path) -> str:
    path.mkdir()
    (path / "0.png").write_bytes(png_image(0))
    return str(path)


def _no_pictures(path: Path) -> str:
    path.mkdir()
    (path / "notes.md").write_text("x")
    return str(path)


def _cut_tar(path: Path) -> str:
    whole = Path(as_tars(path)) / "00000.tar"
    whole.write_bytes(whole.read_bytes()[:9000])
    return str(path)


def _damaged_tar(path: Path) -> str:
    path.mkdir()
    with tarfile.open(path / "a.tar", "w") as archive:
        for name in ("0.png", "0.txt", "1.png", "1.txt"):
            add_to_tar(archive, name, b"x")
    content = bytearray((path / "a.tar").read_bytes())
    content[2048:2560] = b"?" * 512  # the header of 1.png
    (path / "a.tar").write_bytes(content)
    return str(path)


def _tar_cut_between_files(path: Path) -> str:
    whole = Path(_damaged_tar(path)) / "a.tar"
    whole.write_bytes(whole.read_bytes()[:2048])
    return str(path)


def _packed_tar(path: Path) -> str:
    path.mkdir()
    with tarfile.open(path / "a.tar", "w:gz") as archive:
        add_to_tar(archive, "0.png", png_image(0))
    return str(path)


def _other_columns(path: Path) -> str:
    path.mkdir()
    pd.DataFrame({"jpg": [png_image(0)], "says": ["x"]}).to_parquet(path / "a.parquet")
    return str(path)


def _broken_parquet(path: Path) -> str:
    path.mkdir()
    (path / "a.parquet").write_bytes(b"PAR1 and no more")
    return str(path)


def _numbers_for_captions(path: Path) -> str:
    path.mkdir()
    pd.DataFrame({"jpg": [png_image(0)], "text": [[1, 2]]}).to_parquet(path / "a.parquet")
    return str(path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (str, "no such file or folder"),
        (_nothing, "found nothing there"),
        (_no_captions, "1 images and no caption.*metadata.csv"),
        (_no_pictures, r"found \.md there"),
        (_cut_tar, r"00000\.tar.*fetch it again"),
        (_damaged_tar, r"a\.tar.*breaks off after 2,048 bytes"),
        (_tar_cut_between_files, r"a\.tar.*breaks off after 2,048 bytes"),
        (_packed_tar, r"a\.tar.*not compressed"),
        (_other_columns, r"caption_column any of .* found jpg, says; say which with data\.caption_column"),
        (_broken_parquet, "cannot load them"),
        (_numbers_for_captions, r"found list there.*data\.caption_column"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused_in_one_line(make: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        open_source(make(tmp_path / "found"))


def test_columns_can_be_named(tmp_path: Path) -> None:
    frame = pd.DataFrame({"scan": [png_image(1)], "says": ["x"], "text": ["y"], "jpg": [png_image(2)]})
    frame.to_parquet(tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), image_column="scan", caption_column="says")
    assert contents(source) == [("x", png_image(1))]


def test_the_digest_follows_the_data_and_not_their_place(tmp_path: Path, image_folder: Path) -> None:
    digest = open_source(str(image_folder)).digest
    assert open_source(str(image_folder)).digest == digest
    shutil.copytree(image_folder, tmp_path / "elsewhere")  # with the times of change
    assert open_source(str(tmp_path / "elsewhere")).digest == digest
    assert open_source(str(image_folder), limit=3).digest != digest
    assert (
        open_source(str(image_folder), limit=3).digest
        != open_source(str(image_folder), limit=3, seed=1).digest
    )
    (image_folder / "0.png").write_bytes(png_image(3))  # as many bytes, maybe, but another time
    changed = open_source(str(image_folder)).digest
    assert changed != digest
    text = (image_folder / "metadata.csv").read_text(encoding="utf-8")
    (image_folder / "metadata.csv").write_text(text.replace("an owl", "an elk"), encoding="utf-8")
    assert open_source(str(image_folder)).digest not in (changed, digest)


def test_the_settings_open_their_source(image_folder: Path) -> None:
    settings = DataConfig(source=str(image_folder), limit=2, seed=4)
    assert source_of(settings).captions == open_source(str(image_folder), limit=2, seed=4).captions
