"""What pictures are judged by: a CLIP model, and an Inception in TorchScript that the user names by its file.

An Inception file holds a program of its maker's beside the weights. torch's interpreter runs that, not Python, and
nothing in it is unpickled by Python; still it is foreign code, so it is run for no other reason than that the user
named the file.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from prune_lab.assets import decode_pictures, load_pictures
from prune_lab.config import SHIPPED, DataConfig
from prune_lab.distill.decoding import decode_image
from prune_lab.distill.sources import source_of
from prune_lab.errors import DataError, ModelFormatError
from prune_lab.evaluation import clip_embeddings
from prune_lab.models import ScorerInputs
from prune_lab.runtime import note_once, open_regular, path_text, read_bytes, track
from prune_lab.zero_shot.drawing import as_kept, check_drawn_for, mark_of
from prune_lab.zero_shot.protocol import Protocol, Row

_SIDE = 299  # pixels of what an Inception sees
_PIXELS = 32  # of a side at which pictures are compared without any model
_MOST_INCEPTION = 2**30  # bytes of the file
_ROUNDED = 0.01  # by which probabilities in half precision may miss 1

Scorer = tuple[Any, ScorerInputs]
Inception = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Features (N, D) and logits (N, classes), where it has any, of pictures uint8 (N, 3, H, W)."""


@dataclass(frozen=True, slots=True, eq=False)
class Extractors:
    """What is at hand to judge pictures with, and what to do where something is not."""

    clip: Scorer | None = None
    clip_name: str = ""
    clip_lacks: str = ""
    inception: Inception | None = None
    inception_name: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Features of N pictures, each (N, D) float32 on the CPU; None where nothing extracts them."""

    clip: Tensor | None = None
    texts: Tensor | None = None  # CLIP embeddings of the prompts
    inception: Tensor | None = None
    logits: Tensor | None = None
    pixels: Tensor | None = None


# Inception -------------------------------------------------------------------------------------------------------


def _as_pair(answer: Any, count: int, file: str) -> tuple[Tensor, Tensor | None]:
    """Features and logits of what an extractor answered for ``count`` pictures. Raises ModelFormatError for anything
    else: rows that are no picture's would be taken for those of another prompt.
    """
    found = answer if isinstance(answer, (tuple, list)) else (answer,)
    tensors = [one for one in found if isinstance(one, Tensor)]
    if len(tensors) != len(found) or not 1 <= len(found) <= 2:
        raise ModelFormatError(f"asked the Inception {file} for features, found {type(answer).__name__}")
    for one, what, needed in zip(tensors, ("features", "logits"), (2, 1), strict=False):
        if (
            one.ndim < 2
            or len(one) != count
            or one[0].numel() < needed
            or (what == "logits" and one.ndim != 2)
        ):
            raise ModelFormatError(
                f"asked the Inception {file} for {what} of {count} pictures, found {tuple(one.shape)}; give one that "
                "answers a row of numbers for each picture"
            )
    features = tensors[0].flatten(1).float().cpu()
    if not features.isfinite().all():
        raise ModelFormatError(
            f"asked the Inception {file} for features, found {tuple(features.shape)}, not finite"
        )
    return features, tensors[1].float().cpu() if len(tensors) == 2 else None


def _as_logits(answer: Any, file: str) -> Tensor:
    """Logarithms of the probabilities that an extractor answered. Raises ModelFormatError for what are none."""
    if not isinstance(answer, Tensor):
        raise ModelFormatError(f"asked the Inception {file} for classes, found {type(answer).__name__}")
    found = answer.float()
    if not (found.ndim == 2 and (found >= 0).all() and (found.sum(dim=1) - 1).abs().le(_ROUNDED).all()):
        raise ModelFormatError(
            f"asked the Inception {file} for probabilities of classes, found other numbers of shape "
            f"{tuple(found.shape)}; one that takes return_features is to answer softmax without it"
        )
    return found.clamp_min(1e-30).log()


def load_inception(file: str | Path, device: str | torch.device = "cpu") -> tuple[Inception, str]:
    """The Inception in the TorchScript ``file``, and its name with the beginning of its SHA-256.

    One whose ``forward`` takes ``return_features`` is given uint8 pictures and resizes them itself, and its answer
    without that are probabilities of classes. Any other is given floats from -1 to 1 of 299 x 299 pixels, resized
    bilinearly as pytorch-fid does it, and answers features, or features and logits. Raises StorageError for what
    is no file, ModelFormatError for one that is no TorchScript.
    """
    path = Path(file).expanduser()
    named = path_text(path)
    note_once(
        f"running the TorchScript program in {path.name}, because --inception names it: it is its maker's code"
    )
    with open_regular(path) as opened:
        if path.stat().st_size > _MOST_INCEPTION:
            raise ModelFormatError(
                f"asked for the Inception {named}, found more than {_MOST_INCEPTION:,} bytes"
            )
        content = io.BytesIO(opened.read())
        digest = hashlib.sha256(content.getbuffer()).hexdigest()[:16]
        try:
            with warnings.catch_warnings():
                # files of the kind that everybody has are TorchScript, whatever comes after it
                warnings.simplefilter("ignore", DeprecationWarning)
                module = torch.jit.load(content, map_location=device).eval()  # type: ignore[no-untyped-call]
            arguments = {one.name for one in module.forward.schema.arguments}
        except (RuntimeError, ValueError, AttributeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelFormatError(
                f"asked for the Inception {named}, which is no TorchScript that can be read ({reason:.120}); give a "
                "file that torch.jit.save wrote"
            ) from None

    def by_itself(pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        given = pictures.to(device)
        features, probabilities = module(given, return_features=True), module(given)
        return _as_pair((features, _as_logits(probabilities, named)), len(pictures), named)

    def plain(pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        given = F.interpolate(
            pictures.to(device).float() / 255, (_SIDE, _SIDE), mode="bilinear", align_corners=False
        )
        return _as_pair(module(given * 2 - 1), len(pictures), named)

    chosen = by_itself if "return_features" in arguments else plain

    def extract(pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        try:
            with torch.inference_mode():
                return chosen(pictures)
        except RuntimeError as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or ["nothing"]
            raise ModelFormatError(
                f"asked the Inception {named} for features, found {lines[-1].strip():.200}; give one that takes "
                "pictures of 299 x 299 pixels"
            ) from None

    return extract, f"{path.name} (sha256 {digest})"


# Pictures --------------------------------------------------------------------------------------------------------


def _tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


def drawn_picture(folder: Path, row: Row) -> Tensor:
    """The picture of ``row``, uint8 (3, H, W).

    Raises DataError for a damaged one and for one that the model of ``folder`` did not draw for this prompt and seed,
    StorageError for none.
    """
    path = folder / row.file
    content = read_bytes(path)
    try:
        picture = decode_image(content)
        check_drawn_for(row, mark_of(folder), content)
        return _tensor(picture)
    except DataError as error:
        raise DataError(
            f"asked for the picture {path.name} of {folder.name}, found {error}; remove it and give the same command "
            "again, or --force to draw all of them again"
        ) from None


@dataclass(frozen=True, slots=True, eq=False)
class RealPictures:
    """The real side: how many there are, what they are called, and each of them by its number."""

    name: str
    count: int
    picture: Callable[[int], Image.Image]


def real_pictures(named: str) -> RealPictures:
    """All pictures that ``named`` names: a folder, .parquet, .tar, .zip or hub id; ``shipped`` are the held-out ones.

    Raises DataError where there are none.
    """
    if named == SHIPPED:
        pixels = decode_pictures(load_pictures("heldout"))
        return RealPictures(
            "the shipped held-out pictures",
            len(pixels),
            lambda row: Image.fromarray(pixels[row].permute(1, 2, 0).contiguous().numpy()),
        )
    source = source_of(DataConfig(source=named), captioned=False)

    def picture(row: int) -> Image.Image:
        try:
            return decode_image(source.content(row))
        except DataError as error:
            raise DataError(
                f"asked for the real picture {source.name(row)}, found {error}; take it away or replace it"
            ) from None

    return RealPictures(Path(named).name, len(source), picture)


def real_batches(
    real: RealPictures, protocol: Protocol, side: tuple[int, int], batch: int
) -> Iterator[Tensor]:
    """The real pictures as the drawn ones are kept, uint8 (N, 3, height, width) of that ``side``, a batch at a time."""
    height, width = side
    for start in range(0, real.count, batch):
        rows = range(start, min(start + batch, real.count))
        kept = (as_kept(real.picture(row), protocol) for row in rows)
        alike = (one if one.size == (width, height) else one.resize((width, height)) for one in kept)
        yield torch.stack([_tensor(one) for one in alike])


def drawn_batches_of(folder: Path, rows: Sequence[Row], batch: int) -> Iterator[tuple[Tensor, list[str]]]:
    """The drawn pictures of ``rows`` with their prompts, a batch at a time. Raises DataError where sizes differ."""
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        pictures = [drawn_picture(folder, row) for row in part]
        if len({one.shape for one in pictures}) > 1:
            raise DataError(
                f"asked to judge the pictures of {folder.name}, found several sizes; give --force to draw them again"
            )
        yield torch.stack(pictures), [row.prompt for row in part]


def _check_embeddings(images: Tensor, texts: Tensor, prompts: Sequence[str], what: str, count: int) -> None:
    """Raise DataError, which names the first picture or prompt, for embeddings that are not finite."""
    for row in range(len(images)):
        of = f"the picture of {prompts[row]!r:.60}" if prompts[row] else "the picture"
        for embedding, named in ((images, of), (texts, f"the prompt {prompts[row]!r:.60}")):
            if not embedding[row].isfinite().all():
                raise DataError(
                    f"asked the CLIP model for {named} (number {count + row + 1} of the {what}), found an embedding "
                    "that is not finite; give another with --clip, or draw that picture again"
                )


def features_of(
    batches: Iterable[tuple[Tensor, list[str]]], extractors: Extractors, what: str, total: int
) -> Features:
    """The features of all pictures in ``batches``, which come with their prompts."""
    found: dict[str, list[Tensor]] = {}
    count = 0  # of pictures that are done
    for pictures, prompts in track(batches, f"judging {what}", total):
        if extractors.clip is not None:
            images, texts = clip_embeddings(extractors.clip, pictures, prompts)
            _check_embeddings(images, texts, prompts, what, count)
            found.setdefault("clip", []).append(images)
            found.setdefault("texts", []).append(texts)
        else:
            small = F.interpolate(pictures.float() / 255, (_PIXELS, _PIXELS), mode="area")
            found.setdefault("pixels", []).append(small.flatten(1))
        if extractors.inception is not None:
            features, logits = extractors.inception(pictures)
            found.setdefault("inception", []).append(features)
            if logits is not None:
                found.setdefault("logits", []).append(logits)
        count += len(pictures)
    return Features(**{name: torch.cat(parts) for name, parts in found.items()})


def drawn_features(
    folder: Path, rows: Sequence[Row], extractors: Extractors, name: str, batch: int = 32
) -> Features:
    """The features of the drawn pictures of ``rows``."""
    return features_of(
        drawn_batches_of(folder, rows, batch), extractors, f"pictures of {name}", math.ceil(len(rows) / batch)
    )


def real_features(
    real: RealPictures, protocol: Protocol, side: tuple[int, int], extractors: Extractors, batch: int = 32
) -> Features:
    """The features of the real pictures, which have no prompts."""
    pairs = ((one, [""] * len(one)) for one in real_batches(real, protocol, side, batch))
    return features_of(pairs, extractors, "real pictures", math.ceil(real.count / batch))
