"""From an image file to pixels: orientation, transparency, crops and flips."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_images import CACHED, MANY, png_image

from prune_lab.distill.decoding import decode_image
from prune_lab.distill.encoding import crop_variants


def test_a_picture_is_scaled_to_its_short_side_and_cut_in_the_middle() -> None:
    image = Image.open(io.BytesIO(png_image(0)))  # 40 x 56
    resized = image.resize((44, 32), Image.Resampling.BILINEAR).crop((6, 0, 38, 32))
    found = crop_variants(image, 32, CACHED, 0, (0,))
    assert torch.equal(found[0], torch.from_numpy(np.array(resized)).permute(2, 0, 1))


def test_variants_are_drawn_from_seed_row_and_number() -> None:
    image = decode_image(png_image(0))
    first = crop_variants(image, 32, MANY, 0, range(3))
    assert torch.equal(first, crop_variants(image, 32, MANY, 0, range(3)))
    assert torch.equal(first[2:], crop_variants(image, 32, MANY, 0, (2,)))
    assert torch.equal(first[:1], crop_variants(image, 32, CACHED, 0, (0,)))
    assert not torch.equal(first[2], crop_variants(image, 32, MANY, 1, (2,))[0])
    assert not torch.equal(first[2], crop_variants(image, 32, dataclasses.replace(MANY, seed=6), 0, (2,))[0])
    unflipped = crop_variants(image, 32, dataclasses.replace(MANY, flip=False), 0, range(3))
    assert torch.equal(first[1], unflipped[1].flip(-1))
    assert torch.equal(first[2], unflipped[2])
    settings = dataclasses.replace(MANY, variants=200)
    cuts = {
        tuple(cut[:, :, 0].flatten().tolist())
        for cut in crop_variants(image, 32, settings, 0, range(0, 200, 2))
    }
    assert len(cuts) == 13  # 44 - 32 places and the one at the end: all are reached


def test_pictures_of_other_modes_become_rgb_on_white_and_upright() -> None:
    def saved(image: Image.Image, kind: str = "PNG", **more: Any) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, kind, **more)
        return decode_image(buffer.getvalue())

    assert saved(Image.new("RGBA", (4, 4), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert saved(Image.new("L", (4, 4), 7)).getpixel((0, 0)) == (7, 7, 7)
    # 16 bits to 8: 65535 / 257 = 255
    grey = np.array([[0, 257, 40000, 65535]])
    for kind, pixels in (
        ("PNG", grey.astype(np.uint16)),
        ("PPM", grey.astype(np.int32)),
        ("TIFF", grey.astype(np.uint16)),
        ("TIFF", grey.astype(np.int32)),
        ("TIFF", (grey / 65535).astype(np.float32)),
        ("TIFF", (grey / 257).astype(np.float32)),
    ):
        row = np.asarray(saved(Image.fromarray(pixels), kind))
        np.testing.assert_array_equal(row[0, :, 0], [0, 1, 156, 255])  # 40000 / 257 = 155.6
        assert (row == row[..., :1]).all()
    with pytest.raises(ValueError, match="from -5 to 70000"):
        saved(Image.fromarray(np.array([[-5, 70000]], dtype=np.int32)), "TIFF")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    assert saved(Image.new("RGB", (4, 6)), "JPEG", exif=exif).size == (6, 4)
