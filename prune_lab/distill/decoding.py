"""From the bytes of an image file to its pixels, or one line that says why not.

Pillow reads the formats. What it leaves open is settled here: how large a picture may be, what grey values of more
than 8 bits mean, which colours a profile describes, what is behind a transparent picture.
"""

from __future__ import annotations

import functools
import io
import itertools
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps

from prune_lab.errors import DataError

MOST_BYTES = 2**29  # of a file
MOST_PIXELS = 2**27  # 11,585 x 11,585: half a gigabyte while it is decoded
MOST_RATIO = 32  # of the long side to the short one, which is scaled to that of the model
# Pillow knows more: some are programs (EPS), others need other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF")
# What getting the bytes of an image and decoding them raises for one that cannot be used.
UNREADABLE = (OSError, ValueError, zlib.error)
_SAME_COLOURS = 2  # of 255: profiles that differ less from sRGB are sRGB, of which there are many versions
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value


# Opening ---------------------------------------------------------------------------------------------------------


@functools.cache
def _factories() -> tuple[Any, ...]:
    """Of each format, what makes an image of a file, and what tells by its first bytes whether it can."""
    Image.init()
    return tuple(Image.OPEN[name] for name in FORMATS if name in Image.OPEN)


def _opened(content: bytes) -> ImageFile.ImageFile:
    """The image in a file, of which only the header is read. Raises DataError for no known format.

    Not by ``Image.open``: that warns, on stderr and for the whole process, of sizes that are judged here.
    """
    for factory, accepts in _factories():
        if accepts is None or accepts(content[:16]) is True:
            try:
                file: ImageFile.ImageFile = factory(io.BytesIO(content), "")
            except SyntaxError:  # it is of another format
                continue
            return file
    raise DataError(f"no picture in one of the formats {', '.join(FORMATS)}")


def _check_size(size: tuple[int, int]) -> None:
    short, long = sorted(size)
    if long * short > MOST_PIXELS:
        raise DataError(f"{size[0]:,} x {size[1]:,} pixels; at most {MOST_PIXELS:,} are decoded")
    if long > MOST_RATIO * short:
        raise DataError(
            f"{size[0]:,} x {size[1]:,} pixels; at most {MOST_RATIO} times as long as wide is decoded"
        )


# Values and colours ----------------------------------------------------------------------------------------------


def _eight_bits(image: Image.Image, kind: str, *, twelve: bool, negative: bool) -> Image.Image:
    """A grey image of more than 8 bits a pixel, from a file of this ``kind``, in 8 bits, which Pillow would cut off.

    Integers are of 16 bits (65535 is white), or of ``twelve``. Floats go to 1, or to 255 where any is well above 1; so
    do the 32-bit integers of a TIFF, to 255 unless any is above that. In a ``negative`` zero is white. Raises DataError
    for other numbers, also floats a little above 1, which may be of either kind.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        white = 1 if high <= 1 else 255 if high > 16 else 0
    elif image.mode == "I" and kind == "TIFF" and high <= 255:
        white = 255
    else:
        white = 4095 if twelve else 65535
    if not 0 <= low <= high <= white:  # nan, too
        raise DataError(f"grey values from {low:g} to {high:g}; save it with 8 or 16 bits")
    key = image.info.get("transparency")
    grey = np.empty(values.shape, dtype=np.uint8)
    for row, part in enumerate(values):  # row by row: float64 takes eight times the memory
        scaled = np.round(part.astype(np.float64) * (255 / white)).astype(np.uint8)
        grey[row] = 255 - scaled if negative else scaled
        if isinstance(key, int):  # the one value that is transparent
            grey[row][part == key] = 255
    return Image.fromarray(grey)


def _fit_transparent_value(image: Image.Image, kind: str, depth: int) -> None:
    """Bring the one value that a PNG of ``depth`` bits says is transparent to the 8 bits that Pillow decodes to."""
    key = image.info.get("transparency")
    if kind != "PNG" or not isinstance(key, (int, tuple)) or image.mode not in ("L", "RGB"):
        return
    if image.mode == "RGB" and depth == 16:
        raise DataError("16 bits a colour, one of which is transparent; save it with an alpha channel")
    scale = 255 // (2**depth - 1) if depth < 8 else 1
    scaled = tuple(value * scale for value in ((key,) if isinstance(key, int) else key))
    if max(scaled) > 255:  # which no pixel has
        del image.info["transparency"]
    else:
        image.info["transparency"] = scaled[0] if isinstance(key, int) else scaled


def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What turns colours of ``mode`` by this ICC ``profile`` into sRGB; None where it does not fit."""
    try:
        read = ImageCms.getOpenProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(read, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@functools.lru_cache(maxsize=64)
def _says_other_colours(profile: bytes, mode: str) -> bool:
    """Whether colours of ``mode`` by this ICC ``profile`` differ from what they are without it, which is sRGB.

    A profile that is damaged, or for other pictures, says nothing.
    """
    transform = _transform(profile, mode)
    if transform is None or mode == "CMYK":
        return transform is not None
    steps = range(0, 256, 51)
    colours = itertools.product(steps, repeat=len(mode))  # L or RGB
    sample = Image.frombytes(mode, (6, 6 ** (len(mode) - 1)), bytes(itertools.chain(*colours)))
    plain, found = (
        np.asarray(one, dtype=np.int16) for one in (sample.convert("RGB"), transform.apply(sample))
    )
    return int(np.abs(plain - found).max()) > _SAME_COLOURS


def _space(profile: bytes) -> str:
    """The mode of pictures that an ICC profile is for; empty for other spaces."""
    return {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}.get(profile[16:20], "")


def _in_srgb(image: Image.Image) -> Image.Image:
    """The image in the colours of sRGB where its profile says others; else as it is."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not (mode := _space(profile)):
        return image
    grey, inks = image.mode in ("1", "L", "LA"), image.mode == "CMYK"
    if ((mode == "L") != grey and mode != "RGB") or (mode == "CMYK") != inks:
        return image  # the profile of another picture
    if not _says_other_colours(profile, mode):
        return image
    transform = _transform(profile, mode)
    assert transform is not None
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    found: Image.Image | None = transform.apply(image.convert(mode))
    assert found is not None
    if alpha is not None:
        found.putalpha(alpha)
    return found


# All -------------------------------------------------------------------------------------------------------------


def _decoded(content: bytes) -> Image.Image:
    with _opened(content) as file:
        _check_size(file.size)
        kind, tags = file.format or "", getattr(file, "tag_v2", {})
        bits, negative = tags.get(_BITS_PER_SAMPLE), tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        if kind in ("JPEG", "MPO") and file.mode == "CMYK" and "adobe" not in file.info:
            raise DataError("CMYK without Adobe's mark, which would say what 255 means; save it as RGB")
        file.load()
        image = ImageOps.exif_transpose(file)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = _eight_bits(image, kind, twelve=bits == (12,), negative=negative)
        _fit_transparent_value(image, kind, content[24] if kind == "PNG" else 8)
        if image.mode in ("La", "RGBa"):
            image = image.convert(image.mode.upper())
        image = _in_srgb(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def decode_image(content: bytes) -> Image.Image:
    """The image in a file: the first of several, upright, in sRGB, on white where it is transparent.

    Raises DataError, which says why in one line without a name, for what is damaged, cut off, of another format, longer
    than ``MOST_RATIO`` times its width, of more than ``MOST_PIXELS``, or of values whose meaning is not known.
    """
    try:
        return _decoded(content)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file leads Pillow to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(reason) from None
