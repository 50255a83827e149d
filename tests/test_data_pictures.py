"""Pictures in every mode and format: what comes out of a gradient is what arithmetic says, or nothing at all."""

from __future__ import annotations

import functools
import io
import itertools
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

from prune_lab.distill import decoding
from prune_lab.distill.decoding import FORMATS, MOST_RATIO, decode_image
from prune_lab.errors import DataError

Numbers = NDArray[np.float64]

# What stores exactly, and what loses at most this many of 255 levels of a gradient.
LOSS = {"PNG": 0, "TIFF": 0, "BMP": 0, "PPM": 0, "GIF": 0, "WEBP": 0, "JPEG2000": 0, "JPEG": 8, "AVIF": 8}
SETTINGS: dict[str, dict[str, Any]] = {
    "WEBP": {"lossless": True, "exact": True},
    "JPEG": {"quality": 100, "subsampling": 0},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}


def gradient(height: int, width: int, channels: int, slope: int) -> Numbers:
    """Values from 0 to 1 (height, width, channels) that rise slowly, in each channel another way."""
    rows, columns = np.mgrid[0:height, 0:width].astype(float)
    across, down = columns / (width - 1), rows / (height - 1)
    ways = [across, down, 1 - across, (across + down) / 2, 1 - down]
    return np.stack([ways[(channel + slope) % len(ways)] for channel in range(channels)], axis=-1)


def on_white(colours: Numbers, alpha: Numbers) -> Numbers:
    return colours * alpha + 1 - alpha


def rounded(values: Numbers, white: int) -> Numbers:
    """Values as integers up to ``white`` store them."""
    return np.round(values * white) / white


def stored(values: Numbers, mode: str) -> Image.Image:
    """An image of ``mode`` that holds ``values``."""
    bytes_ = np.round(values * 255).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(np.round(values[..., 0] * 65535).astype(np.uint16))
    if mode == "I":
        return Image.fromarray(np.round(values[..., 0] * 65535).astype(np.int32))
    if mode == "F":
        return Image.fromarray(values[..., 0].astype(np.float32))
    if mode == "1":
        return Image.fromarray(bytes_[..., 0] > 127)
    if mode == "P":
        image = Image.fromarray(bytes_[..., 0])
        image.putpalette([level for value in range(256) for level in (value, 255 - value, value // 2)])
        return image
    return Image.frombytes(mode, (values.shape[1], values.shape[0]), bytes_.tobytes())


def shown(values: Numbers, mode: str) -> Numbers:
    """What ``stored(values, mode)`` shows, (H, W, 3) from 0 to 1."""
    eight = rounded(values, 255)
    grey = np.repeat(eight[..., :1], 3, axis=-1)
    if mode in ("I;16", "I"):
        return np.repeat(rounded(values[..., :1], 65535), 3, axis=-1)
    if mode == "F":
        return np.repeat(values[..., :1], 3, axis=-1)
    if mode == "1":
        return np.repeat(np.where(np.round(values[..., :1] * 255) > 127, 1.0, 0.0), 3, axis=-1)
    if mode == "P":
        level = np.round(values[..., 0] * 255)
        return np.stack([level, 255 - level, level // 2], axis=-1) / 255
    if mode in ("L", "LA"):
        return on_white(grey, eight[..., 1:]) if mode == "LA" else grey
    if mode == "CMYK":
        return (1 - eight[..., :3]) * (1 - eight[..., 3:])
    if mode == "YCbCr":
        light, blue, red = (255 * eight[..., place] - (128 if place else 0) for place in range(3))
        found = np.stack(
            [light + 1.402 * red, light - 0.344136 * blue - 0.714136 * red, light + 1.772 * blue], -1
        )
        return np.clip(found / 255, 0, 1)
    return on_white(eight[..., :3], eight[..., 3:]) if mode == "RGBA" else eight


MODES = {
    "1": 1,
    "L": 1,
    "LA": 2,
    "P": 1,
    "RGB": 3,
    "RGBA": 4,
    "CMYK": 4,
    "YCbCr": 3,
    "I;16": 1,
    "I": 1,
    "F": 1,
}


def saved(image: Image.Image, kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def check(content: bytes, wanted: Numbers, loss: float) -> None:
    found = np.asarray(decode_image(content), dtype=float)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted * 255, atol=loss + 1)  # each step rounds to a level once


DEEP = ("PNG", "TIFF", "PPM", "JPEG2000")  # formats that hold more than 8 bits


def decoded(content: bytes) -> NDArray[np.uint8] | str:
    """The pixels in a file, or in one line why there are none."""
    try:
        return np.asarray(decode_image(content))
    except DataError as error:
        return str(error)


def kinds_of(mode: str) -> tuple[str, ...]:
    """The formats that Pillow writes images of ``mode`` in, as they are."""
    if mode in ("I;16", "I", "F"):
        chosen = DEEP
    elif mode in ("1", "L", "P"):
        chosen = FORMATS
    else:  # in a GIF it would choose a palette
        chosen = tuple(kind for kind in FORMATS if kind != "GIF")

    def writable(kind: str) -> bool:
        try:
            saved(stored(gradient(8, 8, MODES[mode], 0), mode), kind)
        except (OSError, KeyError, ValueError):
            return False
        return True

    return tuple(filter(writable, chosen))


def test_every_mode_and_every_format_is_tried() -> None:
    tried = {mode: kinds_of(mode) for mode in MODES}
    assert all(tried.values())
    assert set(itertools.chain(*tried.values())) == set(FORMATS)
    assert sum(map(len, tried.values())) > 55


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=3)
@given(size=st.tuples(st.integers(16, 40), st.integers(16, 40)), slope=st.integers(0, 4))
def test_a_gradient_in_any_mode_and_format_comes_back(mode: str, size: tuple[int, int], slope: int) -> None:
    values = gradient(*size, MODES[mode], slope)
    for kind in kinds_of(mode):
        content = saved(stored(values, mode), kind, **SETTINGS.get(kind, {}))
        dropped = mode == "RGBA" and kind in ("BMP", "PPM", "JPEG")  # no alpha is written
        wanted = shown(values[..., :3], "RGB") if dropped else shown(values, mode)
        check(content, wanted, LOSS[kind] or (4 if mode == "YCbCr" else 0))


# What Pillow does not write: PNG and TIFF by hand ---------------------------------------------------------------


def png(samples: NDArray[np.int64], depth: int, colour: int, *, more: bytes = b"") -> bytes:
    """A PNG of ``samples`` (H, W, channels) of ``depth`` bits; ``more`` are chunks before the pixels."""
    height, width, _ = samples.shape
    rows = samples.reshape(height, -1)
    if depth == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = ((rows[..., None] >> np.arange(depth)[::-1]) & 1).reshape(height, -1).astype(np.uint8)
        packed = [np.packbits(row).tobytes() for row in bits]
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in packed))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def tiff(samples: NDArray[np.int64], bits: int, photometric: int, order: str) -> bytes:
    """A grey TIFF of ``samples`` (H, W) of 12 or 16 bits; ``order`` is < or > as for struct."""
    height, width = samples.shape
    if bits == 16:
        pixels = samples.astype(f"{order}u2").tobytes()
    else:
        rows = ((samples[..., None] >> np.arange(12)[::-1]) & 1).reshape(height, -1).astype(np.uint8)
        pixels = b"".join(np.packbits(row).tobytes() for row in rows)
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    tags += [(278, height), (279, len(pixels))]
    start = 8 + len(pixels)
    start += start % 2
    content = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    content = (content + pixels).ljust(start, b"\0") + struct.pack(f"{order}H", len(tags))
    for tag, value in tags:
        content += struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value)
    return content + b"\0\0\0\0"


GREY, COLOUR, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 4, 6
CHANNELS = {GREY: 1, COLOUR: 3, GREY_ALPHA: 2, COLOUR_ALPHA: 4}
DEPTHS = [*((GREY, depth) for depth in (1, 2, 4)), *itertools.product(CHANNELS, (8, 16))]
SIZES = st.tuples(st.integers(16, 40), st.integers(16, 40))


@settings(max_examples=30)
@given(
    size=SIZES,
    slope=st.integers(0, 4),
    kind=st.sampled_from(DEPTHS),
)
def test_a_png_of_any_depth_comes_back(size: tuple[int, int], slope: int, kind: tuple[int, int]) -> None:
    colour, depth = kind
    white = 2**depth - 1
    values = np.round(gradient(*size, CHANNELS[colour], slope) * white)
    known = values / white
    if colour in (GREY, GREY_ALPHA):
        known = np.concatenate([known[..., :1]] * 3 + [known[..., 1:]], axis=-1)
    wanted = on_white(known[..., :3], known[..., 3:]) if known.shape[-1] == 4 else known
    check(
        png(values.astype(np.int64), depth, colour), wanted, 1 if known.shape[-1] == 4 else 0
    )  # two roundings


@settings(max_examples=20)
@given(
    size=SIZES,
    kind=st.sampled_from([(GREY, 1), (GREY, 2), (GREY, 4), (GREY, 8), (GREY, 16), (COLOUR, 8), (COLOUR, 16)]),
    place=st.floats(0, 1),
    extra=st.booleans(),
)
def test_the_one_transparent_value_of_a_png_is_white(
    size: tuple[int, int], kind: tuple[int, int], place: float, extra: bool
) -> None:
    colour, depth = kind
    white, channels = 2**depth - 1, CHANNELS[colour]
    values = np.round(gradient(*size, channels, 0) * white).astype(np.int64)
    key = values[int(place * (size[0] - 1)), int(place * (size[1] - 1))]
    if extra and depth < 16:
        key = key + white + 1  # no pixel has it
    content = png(values, depth, colour, more=chunk(b"tRNS", b"".join(struct.pack(">H", one) for one in key)))
    if (colour, depth) == (COLOUR, 16):
        with pytest.raises(DataError, match="one of which is transparent"):
            decode_image(content)
        return
    known = np.where((values == key).all(axis=-1, keepdims=True), 1.0, values / white)
    check(content, np.repeat(known, 3 // channels, axis=-1), 0)


@settings(max_examples=10)
@given(
    size=SIZES,
    slope=st.integers(0, 4),
    order=st.sampled_from("<>"),
    negative=st.booleans(),
    twelve=st.booleans(),
)
def test_a_grey_tiff_of_many_bits_comes_back_or_is_refused(
    size: tuple[int, int], slope: int, order: str, negative: bool, twelve: bool
) -> None:
    white = 4095 if twelve else 65535
    values = gradient(*size, 1, slope)
    samples = np.round((1 - values if negative else values)[..., 0] * white).astype(np.int64)
    content = tiff(samples, 12 if twelve else 16, 0 if negative else 1, order)
    found = decoded(content)
    if isinstance(found, str):
        assert twelve or (negative and order == ">"), found  # Pillow does not read these
    else:
        check(content, np.repeat(values, 3, axis=-1), 0)


def test_floats_whose_white_is_not_known_are_refused() -> None:
    values = gradient(16, 16, 1, 0)[..., 0].astype(np.float32)
    for white in (1.0, 255.0):
        check(
            saved(Image.fromarray(values * np.float32(white)), "TIFF"), np.repeat(values[..., None], 3, -1), 0
        )
    for odd in (
        values * 1.5,
        values * 300,
        values - 0.1,
        np.full_like(values, np.nan),
        np.full_like(values, np.inf),
    ):
        with pytest.raises(DataError, match="grey values from"):
            decode_image(saved(Image.fromarray(odd.astype(np.float32)), "TIFF"))


# Palettes, several frames, orientation, colour profiles ----------------------------------------------------------


@settings(max_examples=12)
@given(
    size=SIZES,
    kind=st.sampled_from(["PNG", "GIF"]),
    clear=st.sets(st.integers(0, 255), min_size=1, max_size=40),
)
def test_transparent_colours_of_a_palette_are_white(
    size: tuple[int, int], kind: str, clear: set[int]
) -> None:
    values = gradient(*size, 1, 0)
    alpha = bytes(100 if index in clear else 255 for index in range(256))
    more: dict[str, Any] = {"transparency": alpha if kind == "PNG" else min(clear)}
    content = saved(stored(values, "P"), kind, optimize=False, **more)
    index = np.round(values * 255)
    opaque = (
        np.where(np.isin(index, list(clear)), 100 / 255, 1.0)
        if kind == "PNG"
        else (index != min(clear)) * 1.0
    )
    check(content, on_white(shown(values, "P"), opaque), 0)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_the_first_of_several_frames_counts(kind: str) -> None:
    frames = [stored(gradient(24, 32, 1, slope), "L") for slope in range(3)]
    if kind == "MPO":
        frames = [frame.convert("RGB") for frame in frames]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **SETTINGS.get(kind, {}))
    with Image.open(io.BytesIO(content)) as kept:
        assert getattr(kept, "n_frames", 1) == 3
    check(content, shown(gradient(24, 32, 1, 0), "L"), 8 if kind in ("AVIF", "MPO") else 0)


UPRIGHT: dict[int, Callable[[Numbers], Numbers]] = {  # by EXIF's definition of where row 0 and column 0 are
    1: lambda values: values,
    2: lambda values: values[:, ::-1],
    3: lambda values: values[::-1, ::-1],
    4: lambda values: values[::-1],
    5: lambda values: values.transpose(1, 0, 2),
    6: lambda values: values[::-1].transpose(1, 0, 2),
    7: lambda values: values[::-1, ::-1].transpose(1, 0, 2),
    8: lambda values: values[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_picture_is_turned_upright_once(orientation: int, kind: str) -> None:
    values, exif = gradient(20, 32, 3, 0), Image.Exif()
    exif[0x0112] = orientation
    content = saved(stored(values, "RGB"), kind, exif=exif, **SETTINGS.get(kind, {}))
    check(content, UPRIGHT[orientation](shown(values, "RGB")), LOSS[kind])


def profile(space: bytes, power: float) -> bytes:
    """An ICC profile of sRGB's primaries (adapted to D50), or of grey, whose values to the ``power`` are light."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(power * 256)) + b"\0\0"
    tags = {b"wtpt": xyz(0.9642, 1, 0.8249), b"cprt": b"text\0\0\0\0none\0\0\0\0"}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"mine\0" + bytes(78) + b"\0"
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {b"rXYZ": xyz(0.4360, 0.2225, 0.0139), b"gXYZ": xyz(0.3851, 0.7169, 0.0971)}
        tags |= {b"bXYZ": xyz(0.1431, 0.0606, 0.7141), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    start, entries, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        entries += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"\0\0\0\0", 0x02400000, b"mntr", space, b"XYZ ")
    head = (head + bytes(12) + b"acsp").ljust(68, b"\0") + fixed(0.9642) + fixed(1) + fixed(0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + entries + body


def srgb(light: Numbers) -> Numbers:
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055)


@settings(max_examples=10)
@given(
    power=st.sampled_from([1.0, 1.5, 1.8, 2.6]),
    mode=st.sampled_from(["L", "LA", "RGB", "RGBA"]),
    kind=st.sampled_from(["PNG", "TIFF", "WEBP"]),
    grey=st.booleans(),
)
def test_colours_of_a_profile_become_those_of_srgb(power: float, mode: str, kind: str, grey: bool) -> None:
    values = gradient(24, 30, MODES[mode], 0)
    grey = grey and mode in ("L", "LA") and kind != "WEBP"  # which stores RGB
    icc = profile(b"GRAY" if grey else b"RGB ", power)
    content = saved(stored(values, mode), kind, icc_profile=icc, **SETTINGS.get(kind, {}))
    alpha = rounded(values[..., -1:], 255) if mode[-1] == "A" else np.ones_like(values[..., :1])
    colours = shown(values[..., :3], "RGB") if mode[:3] == "RGB" else shown(values[..., :1], "L")
    check(content, on_white(srgb(colours**power), alpha), 2)


def test_a_profile_that_says_srgb_or_nothing_changes_no_bit() -> None:
    image = stored(gradient(24, 30, 3, 0), "RGB")
    plain = np.asarray(decode_image(saved(image, "PNG")))
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (own, own[:200], b"no profile at all" * 20, profile(b"GRAY", 1.0), b"x"):
        found = np.asarray(decode_image(saved(image, "PNG", icc_profile=icc)))
        np.testing.assert_array_equal(found, plain)


# What is refused -------------------------------------------------------------------------------------------------


def test_cmyk_that_may_be_inverted_or_not_is_refused() -> None:
    content = saved(stored(gradient(16, 16, 4, 0), "CMYK"), "JPEG", **SETTINGS["JPEG"])
    place = content.index(b"\xff\xee\0\x0eAdobe")
    with pytest.raises(DataError, match="CMYK without Adobe's mark"):
        decode_image(content[:place] + content[place + 16 :])


@functools.cache
def whole_pictures() -> list[bytes]:
    rng = np.random.default_rng(0)
    noisy = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    more = [
        saved(noisy, "JPEG", progressive=True),
        saved(noisy, "WEBP"),
        saved(noisy, "TIFF", compression="tiff_lzw"),
    ]
    more += [saved(noisy, "TIFF", compression="jpeg")]
    return [*(saved(noisy, kind, **SETTINGS.get(kind, {})) for kind in FORMATS), *more]


@settings(max_examples=60)
@given(place=st.floats(0, 1), which=st.integers(0, 12))
def test_a_picture_that_is_cut_off_is_refused_or_whole(place: float, which: int) -> None:
    content = whole_pictures()[which]
    whole = np.asarray(decode_image(content))
    found = decoded(content[: int(place * len(content))])
    if isinstance(found, str):
        assert found
        assert "\n" not in found
    else:
        np.testing.assert_array_equal(found, whole)


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32), which=st.integers(0, 12), flips=st.integers(1, 30))
def test_damage_is_a_data_error_and_nothing_else(seed: int, which: int, flips: int) -> None:
    content, draws = bytearray(whole_pictures()[which]), random.Random(seed)
    for _ in range(flips):
        content[draws.randrange(len(content))] = draws.randrange(256)
    found = decoded(bytes(content))
    if isinstance(found, str):
        assert "\n" not in found
        assert " at 0x" not in found
    else:
        assert found.shape[2] == 3


@pytest.mark.parametrize("size", [(1, 3_000_000), (3_000_000, 1), (2, 2 * MOST_RATIO + 1), (60_000, 60_000)])
def test_sizes_are_judged_before_anything_is_decoded(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = struct.pack(">IIBBBBB", *size, 8, GREY, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    monkeypatch.setattr(decoding.ImageOps, "exif_transpose", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match=rf"{size[0]:,} x {size[1]:,} pixels; at most"):
        decode_image(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"8BPS" + bytes(60),
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
    ],
)
def test_other_formats_and_heads_alone_are_refused(content: bytes) -> None:
    with pytest.raises(DataError) as caught:
        decode_image(content)
    assert "\n" not in str(caught.value)
