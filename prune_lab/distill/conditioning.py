"""Random conditioning (arXiv:2504.02011): noisy latents paired with captions that are not theirs.

What a model learns from a few pictures it learns for their captions alone. So now and then a noisy latent is shown with
a caption from a long list, and the student learns the teacher's answer to that pair: many captions need few pictures.
There is no right noise for such a pair, so the loss against the noise leaves it out; only the losses against the
teacher count. The more noise, the less of the picture is left to contradict the caption, and the likelier another
caption is: its probability is p * (1 - alpha_bar(t)), with p = ``distill.random_conditioning``. (In the paper, too, the
probability depends on t; the curve here is ours.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prune_lab.config import DistillConfig
from prune_lab.distill.batches import Batch
from prune_lab.distill.data import TrainingData, with_prefix
from prune_lab.distill.encoding import encoders_digest
from prune_lab.errors import ConfigError, DataError
from prune_lab.families.drawing import reads_text
from prune_lab.models.silence import quiet
from prune_lab.probes import encode_captions, schedule_of
from prune_lab.runs.tensor_files import read_tensors
from prune_lab.runtime import atomic_write, generator_for, tensors_digest, track

_FORMAT = "prune_lab captions 1"
_CHUNK = 64  # captions encoded at a time


@dataclass(frozen=True, slots=True, eq=False)
class OtherCaptions:
    """M captions as the model gets them, memory-mapped where they come from a file."""

    embeddings: Tensor  # (M, L, D)
    added: Mapping[str, Tensor]  # SDXL: text_embeds (M, P)
    digest: str  # 16 hexadecimal digits of the tensors

    def __len__(self) -> int:
        return len(self.embeddings)


def other_captions(pipeline: Any, captions: Sequence[str], path: Path) -> OtherCaptions:
    """``captions`` encoded by ``pipeline``, once: read from ``path`` where that file holds them by the same encoders.

    Kept in the number format of the text encoder, which loses nothing. Raises DataError without captions, StorageError
    when the file cannot be written.
    """
    if not reads_text(pipeline):
        raise ConfigError(
            f"asked for distill.random_conditioning with a {type(pipeline).__name__}, whose model reads no captions; "
            "set distill.random_conditioning = 0"
        )
    if not captions:
        raise DataError(
            "asked for random conditioning without captions; give a list of them in distill.captions"
        )
    content = json.dumps([encoders_digest(pipeline), list(captions)])
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    remedy = "remove it and run the step again"
    if path.is_file():
        metadata, tensors = read_tensors(path, _FORMAT, "read the captions in", remedy)
        if metadata["key"] == key:
            return OtherCaptions(tensors["embeddings"], with_prefix("added.", tensors), metadata["digest"])
    starts = range(0, len(captions), _CHUNK)
    parts = []
    with quiet():  # captions that are too long are cut off
        for start in track(starts, "encoding captions", unit="captions", per=_CHUNK):
            parts.append(encode_captions(pipeline, captions[start : start + _CHUNK]))
    encoders = (getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2"))
    dtype = next(encoder.dtype for encoder in encoders if encoder is not None)

    def kept(tensor: Tensor) -> Tensor:
        return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()

    tensors = {"embeddings": kept(torch.cat([embeddings for embeddings, _ in parts]))}
    for name in parts[0][1]:
        tensors[f"added.{name}"] = kept(torch.cat([added[name] for _, added in parts]))
    digest = tensors_digest(tensors)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, {"format": _FORMAT, "key": key, "digest": digest})
    return OtherCaptions(tensors["embeddings"], with_prefix("added.", tensors), digest)


def probability(scheduler: Any, timesteps: Tensor, most: float) -> Tensor:
    """Probability (B,) that a latent at ``timesteps`` (B,) is shown with another caption, ``most`` in pure noise."""
    kept = schedule_of(scheduler.config).kept[timesteps.cpu()]
    return most * (1 - kept)


def recondition(
    batch: Batch,
    others: OtherCaptions,
    data: TrainingData,
    scheduler: Any,
    settings: DistillConfig,
    step: int,
    *,
    part: slice = slice(None),
) -> Batch:
    """``batch`` of step ``step`` with other captions for some rows, whose task loss weighs 0.

    Drawn from the seed and the step alone, as the batch is; ``batch`` holds its places ``part``. A share of
    ``settings.caption_dropout`` of the other captions is the empty one of ``data``.
    """
    size, generator = settings.batch, generator_for(settings.seed, "random conditioning", step)
    draws = torch.rand(size, generator=generator)[part]
    places = torch.randint(0, len(others), (size,), generator=generator)[part]
    empty = (torch.rand(size, generator=generator) < settings.caption_dropout)[part]
    chosen = draws < probability(scheduler, batch.timesteps, settings.random_conditioning)
    device = batch.embeddings.device
    captions = torch.where(empty[:, None, None], data.empty_embedding, others.embeddings[places].float())
    shown = chosen.to(device)
    added = dict(batch.added)
    for name, tensor in others.added.items():
        texts = torch.where(empty[:, None], data.empty_added[name], tensor[places].to(added[name].dtype))
        added[name] = torch.where(shown[:, None], texts.to(device), added[name])
    return replace(
        batch,
        embeddings=torch.where(shown[:, None, None], captions.to(device), batch.embeddings),
        weights=torch.where(shown, 0.0, batch.weights),
        added=added,
    )


def check_captions_fit(others: OtherCaptions, data: TrainingData) -> None:
    """Raise DataError when ``others`` are embeddings of another shape than those of ``data``."""
    found, wanted = tuple(others.embeddings.shape[1:]), tuple(data.empty_embedding.shape)
    if found != wanted or others.added.keys() != data.empty_added.keys():
        raise DataError(
            f"asked for random conditioning with captions of {found[0]} tokens of width {found[1]}, the training data "
            f"have {wanted[0]} and {wanted[1]}; encode both with the pipeline of the teacher"
        )
