"""From captions to what a model reads: text embeddings, and what comes with them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prune_lab.errors import DataError, UnsupportedModelError
from prune_lab.families import conditions_of, family_of, model_of
from prune_lab.families.drawing import reads_text, text_length
from prune_lab.models.silence import quiet
from prune_lab.probes.latents import finite
from prune_lab.runtime import note_once
from prune_lab.text_tables import one_line, whole_characters

# Captions --------------------------------------------------------------------------------------------------------

MOST_CHARACTERS = (
    8192  # of a text that a tokenizer is given: a hundred times the tokens that a text encoder reads
)


def cut_texts(texts: Sequence[str]) -> list[str]:
    """``texts`` as a tokenizer takes them: whole characters only, and at most ``MOST_CHARACTERS`` of them.

    The tokens that a text encoder reads are the same; a text of millions of characters would keep the tokenizer busy
    for minutes.
    """
    return [
        whole_characters(text if len(text) <= MOST_CHARACTERS else " ".join(text.split())[:MOST_CHARACTERS])
        for text in texts
    ]


_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def _encoded(pipeline: Any, captions: list[str]) -> tuple[Any, ...]:
    """What the pipeline's ``encode_prompt`` makes of captions, without those of an empty caption.

    It is called as the pipeline itself does while it draws: what both of them take has the default of drawing.
    """
    encoders = [getattr(pipeline, name, None) for name in _ENCODERS]
    device = next((encoder.device for encoder in encoders if encoder is not None), None)
    # instruct-pix2pix has only the older method, which gives a tensor
    encode = getattr(pipeline, "encode_prompt", None) or getattr(pipeline, "_encode_prompt", None)
    if device is None or encode is None:
        raise UnsupportedModelError(
            f"asked for the text embeddings of a {type(pipeline).__name__}, found no text encoder that it reads "
            "captions with; give a pipeline that draws from captions"
        )
    takes = inspect.signature(encode).parameters
    drawing = inspect.signature(type(pipeline).__call__).parameters
    arguments = {name: drawing[name].default for name in takes if name in drawing}
    arguments |= {name: None for name, one in takes.items() if one.default is one.empty}
    ours = {
        "max_sequence_length": text_length(pipeline),
        "clean_caption": False,
        "prompt": captions,
        "batch_size": len(captions),
        "device": device,
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    answer = encode(**arguments | {name: value for name, value in ours.items() if name in takes})
    return (answer,) if isinstance(answer, Tensor) else answer


def note_cut(pipeline: Any, texts: Sequence[str], what: str) -> None:
    """Say once how many of ``texts``, called ``what``, are longer than the text encoder reads; and the first."""
    tokenizer = getattr(pipeline, "tokenizer", None) or getattr(pipeline, "tokenizer_2", None)
    if tokenizer is None:
        return
    most = tokenizer.model_max_length
    # Few tokens are added, such as that of the end, and no other is less than a byte: most texts need no look.
    long = [text for text in texts if len(text) + 4 > most or not text.isascii()]
    cut, first = 0, ""
    with quiet():
        for start in range(0, len(long), 1024):  # millions of captions at once would fill the memory
            part = long[start : start + 1024]
            found = tokenizer(cut_texts(part)).input_ids
            over = [text for text, ids in zip(part, found, strict=True) if len(ids) > most]
            cut, first = cut + len(over), first or next(iter(over), "")
    if cut:
        note_once(
            f"{cut:,} of {len(texts):,} {what} are cut off after the {most} tokens that the text encoder reads; the "
            f"first: {one_line(first[:60])}..."
        )


def _read(value: Any, count: int) -> list[Tensor]:
    """The rows of what a pipeline made of ``count`` captions, on the CPU: numbers are float32, masks as they are."""
    rows = list(value)
    if len(rows) != count:
        raise DataError(
            f"asked to encode {count} captions, found {len(rows)} texts; the pipeline must give one for each"
        )
    return [row.float().cpu() if row.is_floating_point() else row.cpu() for row in rows]


def _as_long(rows: Sequence[Tensor], length: int) -> Tensor:
    """The rows (L, ...), filled up with zeros to ``length``."""
    return torch.stack([F.pad(row, (0, 0) * (row.ndim - 1) + (0, length - len(row))) for row in rows])


def encode_captions(
    pipeline: Any, captions: Sequence[str], *, batch: int = 32
) -> tuple[Tensor, dict[str, Tensor]]:
    """Text embeddings (N, L, D), float32 on the CPU, and by name the other conditions (N, ...) that come with a text,
    such as a pooled text or the mask of its words. (N, 0, 0) and nothing of a model that reads no text.

    Raises UnsupportedModelError for a pipeline that does not read captions.
    """
    if not reads_text(pipeline):
        return torch.zeros(len(captions), 0, 0), {}
    model = model_of(pipeline)
    names = family_of(model).answers
    if not names:
        raise UnsupportedModelError(
            f"asked for the text embeddings of a {type(pipeline).__name__}, found that it makes them in several "
            "calls, which this program does not know; its folder of the model alone can be scored with noise"
        )
    masks = {condition.name for condition in conditions_of(model) if condition.words}
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad(), quiet():  # of captions that are too long ``note_cut`` speaks, once
        for start in range(0, len(captions), batch):
            part = cut_texts(captions[start : start + batch])
            answer = _encoded(pipeline, part)
            given = dict(zip(names, answer, strict=False))
            texts = _read(given["text"], len(part))
            whole = [torch.ones(len(text), dtype=torch.int64) for text in texts]  # no word is left out
            given |= {name: whole for name in masks if given.get(name) is None}
            for name, rows in given.items():
                if name:
                    found.setdefault(name, []).extend(_read(rows, len(part)))
    longest = max(len(one) for one in found["text"])
    embeddings = _as_long(found.pop("text"), longest)
    added = {
        name: _as_long(found[name], longest) if name in masks else torch.stack(found[name])
        for name in sorted(found)
    }
    checked = {name: finite(rows, f"{name} of texts") for name, rows in added.items()}
    return finite(embeddings, "text embeddings"), checked
