"""The service: where and how a model will work, which decides what a pass of it takes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from prune_lab.config import check_numbers
from prune_lab.errors import BudgetError, ConfigError, DeviceError
from prune_lab.families import (
    family_of,
    film_frames,
    knows_its_size,
    latent_shape,
    picture_scale,
    plain_config,
    text_form,
)
from prune_lab.models import ModelSource
from prune_lab.runtime import pick_device, pick_dtype, printable, read_json

Backend = Literal["eager", "compiled", "onnx", "openvino", "executorch"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
_VAES = ("vae", "vqvae", "movq")  # as pipelines call theirs


def pixels_per_latent(source: ModelSource) -> int | None:
    """Pixels of a picture's side behind one of the latent's: by the VAE of a pipeline, 1 where that has none; of a
    model alone what its family says, None where that does not know it.
    """
    usual = family_of(source.config).pixels(source.config)
    if source.folder is None or not source.is_pipeline:
        return usual
    configs = (source.folder / name / "config.json" for name in _VAES)
    vae = next((path for path in configs if path.is_file()), None)
    config = read_json(vae) if vae is not None else None
    return (picture_scale(config) or usual) if isinstance(config, dict) else 1


def _size_words(config: Mapping[str, Any], latent: int | None, pixels: int | None) -> str:
    height, width = latent_shape(config, latent)
    return f"latents of {width} x {height}" if pixels is None else f"{pixels * width} x {pixels * height}"


def latent_of_pixels(pixels: int, source: ModelSource) -> int:
    """The side of the latent of a picture of ``pixels`` squared. Raises ConfigError when it is no whole number, or when
    nothing says how many pixels one of a latent is.
    """
    side = pixels_per_latent(source)
    if side is None:
        raise ConfigError(
            f"asked for pictures of {pixels} pixels of {source.text}, a {source.called} without the VAE that makes "
            "pixels of its latents, and VAEs of its class are several: give the folder of its pipeline, or leave the "
            "size out"
        )
    if pixels < side or pixels % side:
        near = max(side, round(pixels / side) * side)
        raise ConfigError(
            f"asked for pictures of {pixels} pixels; {source.text} makes {side} pixels of each side of a latent: "
            f"give a multiple of {side}, such as {near}"
        )
    return pixels // side


def drawn_latent(source: ModelSource, pixels: int) -> int | None:
    """Side of the latent of pictures of ``pixels`` per side, where the model has no size of its own (FLUX, Wan) and one
    is asked for; else None.
    """
    if not pixels or family_of(source.config).component == "unet" or "sample_size" in source.config:
        return None
    return latent_of_pixels(pixels, source)


def check_asked_size(source: ModelSource, pixels: int | None) -> None:
    """Raise ConfigError where a model is to be shown pictures of ``pixels`` per side and has a size of its own.

    A model alone is shown noise, of any size.
    """
    if not pixels or not source.is_pipeline or "sample_size" not in source.config:
        return
    scale = pixels_per_latent(source)
    if scale is None:
        return
    height, width = (scale * side for side in latent_shape(source.config))
    if {height, width} != {pixels}:
        raise ConfigError(
            f"asked for pictures of {pixels} pixels of {source.text}, whose config says {width} x {height}: it is "
            "scored at that size; leave --resolution out"
        )


def picture_size(source: ModelSource, pixels: int | None = None) -> tuple[int | None, str]:
    """(side of the latent, ``512 x 512``) for pictures of ``pixels`` squared; None and the model's own without, which
    is that of its latents where nobody knows the pixels.

    Raises ConfigError when the VAE cannot make that size, or when neither the model nor the caller names one.
    """
    if pixels is not None:
        return latent_of_pixels(pixels, source), f"{pixels} x {pixels}"
    if not knows_its_size(source.config):
        called = family_of(source.config).called
        raise ConfigError(
            f"asked for the costs of {source.text}, found no sample_size in the config of its {called}; give the size "
            "of the pictures, such as --resolution 512"
        )
    return None, _size_words(source.config, None, pixels_per_latent(source))


def check_frames(source: ModelSource, frames: int | None) -> None:
    """Raise ConfigError where ``frames`` are asked of a model of pictures."""
    if frames is not None and not family_of(source.config).frames:
        raise ConfigError(
            f"asked for {frames} frames of {source.text}, a model of pictures; frames are of models of films: leave "
            "--frames out"
        )


def size_text(
    source: ModelSource, latent: int | None = None, tokens: int | None = None, frames: int | None = None
) -> str:
    """The size that multiply-adds are counted at, in words: ``512 x 512 pixels, 77 tokens``, None being the model's
    own; of a model alone, whose pixels nobody knows, that of the latent.
    """
    config = plain_config(source.config)
    pixels = pixels_per_latent(source) if source.is_pipeline else None
    words = [_size_words(config, latent, pixels) + (" pixels" if pixels is not None else "")]
    if film := film_frames(config, frames):
        words.append(f"{film} latent {'frame' if film == 1 else 'frames'}")
    if text_form(config)[1]:
        words.append(f"{tokens or source.tokens} tokens")
    return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Service:
    """Device, number format, batch and size with which a model works; one call of it is one step of a sampler."""

    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 1
    latent: int | None = None  # side of the square latent; None: the size in the model's config
    tokens: int | None = None  # words of text; None: 77
    backend: Backend = "eager"
    frames: int | None = None  # of the latent of a film; None: what the model is meant for

    @property
    def sizes(self) -> Mapping[str, Any]:
        """Batch, latent, tokens and frames, as ``example_inputs`` takes them."""
        names = ("batch", "latent", "tokens", "frames")
        return {name: getattr(self, name) for name in names}

    def text(self, config: Mapping[str, Any], pixels: int | None = None) -> str:
        """The service in words: ``cpu float32, 512 x 512, batch 1, 77 tokens``; the backend where it is not eager.

        ``pixels`` is what ``pixels_per_latent`` gives, without it the family's; where that does not know it either, the
        size is that of the latents, and says so.
        """
        size = _size_words(config, self.latent, pixels or family_of(config).pixels(config))
        words = f"{self.device} {self.dtype}, {size}, batch {self.batch}"
        if film := film_frames(config, self.frames):
            words += f", {film} latent {'frame' if film == 1 else 'frames'}"
        words += f", {self.tokens} tokens" if self.tokens else ""
        return words if self.backend == "eager" else f"{words}, {self.backend}"


_NUMBERS = re.compile(r"(batch|tokens|frames)\s*=\s*([1-9]\d{0,18})", re.ASCII)
_PIXELS = re.compile(r"[1-9]\d{0,4}", re.ASCII)


def read_service(text: str, own: Service, source: ModelSource) -> Service:
    """``own`` with what ``text`` says otherwise: device, number format, pixels, batch=N, tokens=N, frames=N, backend.

    In any order: ``float16,512,batch=1``, ``cuda:1,compiled`` or ``openvino``. Pixels are of a square picture. Raises
    BudgetError for a part that is none of them or is said twice, ConfigError for a number out of range or a size that
    the VAE cannot make, DeviceError for a device that is not here.
    """
    said: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        found = _part(part, source)
        if found.keys() & said.keys():
            raise BudgetError(
                f"asked for a latency at {text!r}, which says {', '.join(found)} twice; say it once"
            )
        said |= found
    if not said:
        raise BudgetError(f"asked for a latency at {text!r}, which names nothing; {_REMEDY}")
    return dataclasses.replace(own, **said)


_REMEDY = (
    f"after @ write device, number format, pixels, runtime ({', '.join(BACKENDS[1:])}), batch=N, tokens=N or frames=N, "
    "as in 0.7x@float16,512,batch=1 or 0.7x@openvino"
)


def _part(part: str, source: ModelSource) -> dict[str, Any]:
    if match := _NUMBERS.fullmatch(part):
        found = {match[1]: int(match[2])}
        check_numbers(**found)
        check_frames(source, found.get("frames"))
        return found
    if _PIXELS.fullmatch(part):
        check_numbers(resolution=int(part))
        return {"latent": latent_of_pixels(int(part), source)}
    if part in BACKENDS:
        return {"backend": part}
    if re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,4})?", part, re.ASCII):
        return {"device": str(pick_device(part))}
    try:
        return {"dtype": str(pick_dtype(part)).removeprefix("torch.")}
    except DeviceError:
        raise BudgetError(
            f"cannot read {printable(part, 60)!r} in what a latency is asked at; {_REMEDY}"
        ) from None
