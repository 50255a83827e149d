"""The user's own data, or what the model drew, in three parts: for the probe, the held-out loss, and to train on."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune_lab.config import DataConfig, ProbeConfig
from prune_lab.distill import (
    ImageSource,
    LatentCache,
    LiveData,
    Split,
    Subset,
    TrainingData,
    encoded_now,
    is_cache,
    source_of,
    split_rows,
)
from prune_lab.distill.decoding import UNREADABLE, decode_image
from prune_lab.distill.encoding import crop_variants, encode_texts
from prune_lab.distill.image_source import note_left_out
from prune_lab.errors import DataError
from prune_lab.probes import Probe, class_count, encode_pictures, picture_side, probe_of_latents


def probe_of_few(
    pipeline: Any,
    latents: Tensor,
    captions: Sequence[str],
    kinds: Sequence[str],
    settings: ProbeConfig,
    *,
    seed: int,
    text: tuple[Tensor, Mapping[str, Tensor]] | None = None,
) -> Probe:
    """A probe of ``probe.samples`` rows of latents (N, C, h, w): few pictures give several, each at its own timestep.

    It has fewer rows where all pictures at all ``probe.timesteps`` are fewer. ``text``: see ``probe_of_latents``.
    """
    pictures, samples = len(latents), settings.samples
    each = max(1, min(settings.timesteps, math.ceil(samples / pictures)))
    probe = probe_of_latents(
        pipeline,
        latents,
        captions,
        kinds,
        timesteps=settings.timesteps,
        seed=seed,
        per_picture=each,
        text=text,
    )
    if len(probe) <= samples:
        return probe
    turns = [picture * each + turn for turn in range(each) for picture in range(pictures)]
    return probe.rows(sorted(turns[:samples]))


def told_classes(pipeline: Any, captions: Sequence[str]) -> tuple[Tensor, Mapping[str, Tensor]] | None:
    """What the captions of a model of classes say, as ``probe_of_latents`` takes it; None for any other model."""
    if not class_count(pipeline):
        return None
    side = picture_side(pipeline)
    return encode_texts(pipeline, captions, (side, side), batch=len(captions))


def _checked(rows: TrainingData, pipeline: Any) -> TrainingData:
    """``rows``. Raises DataError for a cache that other encoders than those of ``pipeline`` made."""
    return rows.check(pipeline) if isinstance(rows, LatentCache) else rows


def rows_of(source: ImageSource, rows: Sequence[int]) -> ImageSource:
    """The images ``rows`` of ``source``, in that order."""
    return dataclasses.replace(
        source,
        captions=tuple(source.captions[row] for row in rows),
        digest=f"{source.digest}-{hash_of(rows)}",
        name=lambda row: source.name(rows[row]),
        content=lambda row: source.content(rows[row]),
    )


def hash_of(rows: Sequence[int]) -> str:
    """16 hexadecimal digits that change with any of ``rows``."""
    return hashlib.sha256(repr(list(rows)).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, eq=False)
class OwnData:
    """Images, or latents that were encoded or drawn before, with the rows of each part; no image is in two of them."""

    rows: ImageSource | TrainingData
    split: Split

    @classmethod
    def of(
        cls,
        rows: ImageSource | TrainingData,
        *,
        probe: int,
        validate: int,
        seed: int,
        by_caption: bool = True,
    ) -> OwnData:
        """``rows`` in parts, drawn with ``seed``: ``probe`` and ``validate`` rows, or a quarter of all if that is less.

        ``by_caption``: no caption is in two parts; a model of classes meets all of them in each. Raises DataError for
        fewer than three different images.
        """
        named = map(rows.name, range(len(rows))) if isinstance(rows, ImageSource) else rows.pictures
        pictures = tuple(named)
        known = pictures if all(pictures) else None  # unknown in a cache of version 0.1
        captions = rows.captions if by_caption else ("",) * len(rows)
        split = split_rows(captions, known, probe=probe, validate=validate, seed=seed)
        return cls(rows, split)

    @classmethod
    def open(
        cls, settings: DataConfig, samples: int, *, reads_text: bool = True, classes: int = 0
    ) -> OwnData:
        """What ``data.source`` names, images or a finished cache, with at most ``samples`` rows held out twice.

        ``reads_text`` and ``classes`` say what the model is told of a picture: images need no captions where that is
        nothing. Raises DataError.
        """
        ready = Path(settings.source).expanduser()
        rows: ImageSource | TrainingData
        if not is_cache(ready):
            rows = source_of(settings, captioned=reads_text or classes > 0)
        elif settings.limit:
            raise DataError(
                f"asked for data.limit = {settings.limit} images of the finished cache {ready}; it is used whole: "
                "set data.limit = 0, or build a smaller one with prune-lab data ... --limit"
            )
        else:
            rows = LatentCache.load(ready)
        told = {"probe": samples, "validate": samples, "seed": settings.seed}
        return cls.of(rows, **told, by_caption=reads_text)

    def captions(self, part: Tensor) -> tuple[str, ...]:
        """The captions of the rows of a part."""
        captions = self.rows.captions
        return tuple(captions[row] for row in part.tolist())

    def probe(self, pipeline: Any, part: Tensor, settings: ProbeConfig, *, seed: int) -> Probe:
        """The probe of the images of a part (see ``probe_of_few``); ``seed`` draws noise and timesteps.

        Raises DataError where none of them can be read.
        """
        if not isinstance(self.rows, ImageSource):
            rows = _checked(self.rows, pipeline)
            kinds = rows.kinds if isinstance(rows, LatentCache) else ("",) * len(rows)
            batch = rows.rows(part, torch.zeros(len(part), dtype=torch.int64))
            known = [kinds[row] for row in part.tolist()]
            told = batch.embeddings, batch.added
            return probe_of_few(
                pipeline, batch.mean, self.captions(part), known, settings, seed=seed, text=told
            )
        pixels, captions = self._images(pipeline, self.rows, part.tolist())
        latents, none = encode_pictures(pipeline, pixels), [""] * len(captions)
        text = told_classes(pipeline, captions)
        return probe_of_few(pipeline, latents, captions, none, settings, seed=seed, text=text)

    def _images(self, pipeline: Any, source: ImageSource, rows: Sequence[int]) -> tuple[Tensor, list[str]]:
        side, cropped = picture_side(pipeline), DataConfig()
        found: list[Tensor] = []
        captions, damaged = [], list[str]()
        for row in rows:
            try:
                found.append(crop_variants(decode_image(source.content(row)), side, cropped, row, (0,)))
            except UNREADABLE as error:
                damaged.append(f"{source.name(row)}: {error}")
                continue
            captions.append(source.captions[row])
        if not found:
            raise DataError(
                f"asked for {len(rows)} held-out images of {source.title}, none of them can be read ({damaged[0]}); "
                "give images such as PNG, JPEG or WebP"
            )
        note_left_out(f"the held-out images of {source.title}", damaged)
        return torch.cat(found), captions

    def training(self, pipeline: Any, settings: DataConfig, folder: Path) -> TrainingData:
        """The rows to train on; images are encoded into ``folder`` now, or on demand where ``data.cached`` is false."""
        train = self.split.train
        if not isinstance(self.rows, ImageSource):
            return Subset.of(_checked(self.rows, pipeline), train)
        source = rows_of(self.rows, train.tolist())
        if settings.cached:
            return encoded_now(pipeline, source, settings, folder)
        return LiveData.of(pipeline, source, settings)
