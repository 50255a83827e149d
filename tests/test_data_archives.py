"""Single images out of tars and Parquet files: any row in any order, without a second copy, damage noticed."""

from __future__ import annotations

import random
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from training_images import add_to_tar, captions_of, contents, open_source, png_image

from prune_lab.config import DataConfig
from prune_lab.distill import archives, build_cache
from prune_lab.distill.archives import parquet_table
from prune_lab.distill.image_source import IMAGE_SUFFIXES

ROWS = 150


def content_of(row: int) -> bytes:
    return np.random.default_rng(row).bytes(200 + row)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of 150 rows in all, in row groups of 40, with a column that only one of them has."""
    folder = tmp_path_factory.mktemp("parquet")
    frame = pd.DataFrame({"image": [content_of(row) for row in range(ROWS)], "text": map(str, range(ROWS))})
    frame[:90].to_parquet(folder / "a.parquet", row_group_size=40)
    frame[90:].assign(more=1).to_parquet(folder / "b.parquet", row_group_size=40)
    return [folder / "a.parquet", folder / "b.parquet"]


def test_cells_of_parquet_files_are_read_in_any_order(paths: list[Path]) -> None:
    table = parquet_table(paths)
    assert table.columns == ("image", "text")
    assert table.column("text") == [str(row) for row in range(ROWS)]
    read, rows = table.cells("image"), random.Random(0).sample(range(ROWS), ROWS)
    assert [read(row) for row in rows] == [content_of(row) for row in rows]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(table.cells("image"), rows)) == [content_of(row) for row in rows]


def test_rows_in_order_are_decoded_once(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    class Watched(archives.ParquetFile):  # type: ignore[misc]
        def __init__(self, path: Path, **more: Any) -> None:
            opened.append(path)
            super().__init__(path, **more)

    table = parquet_table(paths)
    monkeypatch.setattr(archives, "ParquetFile", Watched)
    read = table.cells("image")
    with ThreadPoolExecutor(4) as pool:  # as the build of a cache reads, batch by batch
        for start in range(0, ROWS, 15):
            rows = range(start, start + 15)
            assert list(pool.map(read, rows)) == [content_of(row) for row in rows]
    assert opened == [paths[0]] * 3 + [paths[1]] * 2  # once for each row group


def test_images_in_a_damaged_page_are_left_out(tiny_pipeline: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = range(6)
    frame = pd.DataFrame({"image": [png_image(row) for row in rows], "text": [str(row) for row in rows]})
    frame.to_parquet(path, row_group_size=3, compression="gzip")
    content = bytearray(path.read_bytes())
    content[2000:4000] = b"?" * 2000  # in the images of the first row group
    path.write_bytes(content)
    cache = build_cache(tiny_pipeline, open_source(str(path)), DataConfig(batch=2), tmp_path / "cache").cache
    assert captions_of(cache) == ("3", "4", "5")
    assert [text.split(":")[0] for text in cache.left_out] == [f"row {row} of {path}" for row in range(3)]


def test_files_in_a_tar_are_read_in_any_order(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for row in range(5):
            add_to_tar(archive, f"{row}.png", png_image(row))
            add_to_tar(archive, f"{row}.txt", str(row).encode())
    source, rows = open_source(str(tmp_path / "a.tar")), (4, 0, 3, 3)
    assert [source.content(row) for row in rows] == [png_image(row) for row in rows]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_image_of_any_ending_is_found_in_an_archive(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    files = {f"{row}{ending}": png_image(row) for row, ending in enumerate(IMAGE_SUFFIXES)}
    files |= {f"{row}.txt": f"caption {row}".encode() for row in range(len(IMAGE_SUFFIXES))}
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name, content in files.items():
                add_to_tar(archive, name, content)
    else:
        with zipfile.ZipFile(path, "w") as packed:
            for name, content in files.items():
                packed.writestr(name, content)
    source = open_source(str(path))
    assert source.left_out == ()
    assert dict(contents(source)) == {f"caption {row}": png_image(row) for row in range(len(IMAGE_SUFFIXES))}
