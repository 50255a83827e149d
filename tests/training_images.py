"""Small captioned images, and the settings that the tests of training data encode and draw them with."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from prune_lab.config import DataConfig, DistillConfig
from prune_lab.distill import ImageSource, LatentCache, source_of
from prune_lab.distill.cache import read_cache_file

CAPTIONS = ("a cat", "a dog, smiling", "two cats", "", "an owl", "a fox", "rain")
CACHED = DataConfig(shard=3, batch=2)
MANY = dataclasses.replace(CACHED, crop="random", flip=True, variants=3, seed=5)
TRAINING = DistillConfig(batch=4, caption_dropout=0.3, seed=2)


def png_image(row: int) -> bytes:
    """An image of noise that is wide, high or square, and of more pixels than the tiny pipeline draws."""
    height, width = ((40, 56), (64, 48), (32, 32))[row % 3]
    pixels = np.random.default_rng(row).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, captions: Sequence[str] = CAPTIONS) -> Path:
    """A folder as `datasets` reads it: images and metadata.csv."""
    (folder / "more").mkdir(parents=True)
    names = [("more/" if row % 2 else "") + f"{row}.png" for row in range(len(captions))]
    for row, name in enumerate(names):
        (folder / name).write_bytes(png_image(row))
    pd.DataFrame({"file_name": names, "text": captions}).to_csv(folder / "metadata.csv", index=False)
    return folder


def open_source(text: str, **more: Any) -> ImageSource:
    """The images that ``text`` names, with ``more`` settings of the table ``data``."""
    return source_of(DataConfig(source=text, **more))


def captions_of(cache: LatentCache) -> tuple[str, ...]:
    """The captions of all rows, read from all shards."""
    files = [read_cache_file(cache.folder / shard.file)[0]["captions"] for shard in cache.shards]
    return tuple(caption for captions in files for caption in captions)


def contents(source: ImageSource) -> list[tuple[str, bytes]]:
    return [(source.captions[row], source.content(row)) for row in range(len(source))]


def add_to_tar(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
