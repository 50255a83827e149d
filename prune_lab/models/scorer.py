"""The CLIP model that judges pictures against prompts, and what prepares both for it.

transformers' own picture preparation wants torchvision; these few lines read the same settings file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from prune_lab.assets import scorer_folder
from prune_lab.config import NO_SCORER
from prune_lab.errors import (
    ConfigError,
    ModelFormatError,
    ModelNotFoundError,
    PruneLabError,
    UnsupportedModelError,
)
from prune_lab.families import embedding_width
from prune_lab.models.answers import refuse_silent, scorer_complaint
from prune_lab.models.components import check_part, check_vocabulary, reason_of
from prune_lab.models.conversion import refuse_flawed
from prune_lab.models.files import json_object, weight_files
from prune_lab.models.hub import HUB_ID, hub_folder
from prune_lab.models.kinship import of_shipped_family
from prune_lab.models.silence import quiet
from prune_lab.models.sources import ModelSource, shipped
from prune_lab.models.views import STEMS, component_view

# The CLIP models whose text towers the text encoders of Stable Diffusion are, by layers and width.
_CLIP_OF_ENCODER = {
    (12, 768): "openai/clip-vit-large-patch14",
    (23, 1024): "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    (24, 1024): "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
}
_CLIP_WORDS = 49408  # in the vocabulary of both


def _resized(pictures: Tensor, resize: tuple[int, int] | int, resample: int) -> Tensor:
    height, width = pictures.shape[2:]
    if isinstance(resize, int):
        shorter = min(height, width)
        resize = (height * resize // shorter, width * resize // shorter)
    if (height, width) == resize:
        return pictures
    # Pillow itself, since CLIP models were trained on what it gives, to the last bit
    resized = np.empty((len(pictures), *resize, 3), np.uint8)
    for slot, picture in zip(resized, pictures.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
        slot[:] = np.asarray(Image.fromarray(picture).resize(resize[::-1], Image.Resampling(resample)))
    return torch.from_numpy(resized).permute(0, 3, 1, 2)


@dataclasses.dataclass(frozen=True, slots=True)
class ScorerInputs:
    """Captions and pictures in the form that a CLIP model takes, by the settings that lie beside its weights."""

    tokenizer: CLIPTokenizer
    max_tokens: int
    resize: tuple[int, int] | int | None  # (height, width), the length of the shorter side, or as they come
    resample: int  # Pillow's number of the filter
    crop: tuple[int, int] | None  # (height, width) cut from the middle
    mean: tuple[float, ...]  # of each channel, for pixels in 0..1
    deviation: tuple[float, ...]

    def captions(self, texts: Sequence[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, each (N, max_tokens), cut and padded."""
        length = {"padding": "max_length", "truncation": True, "max_length": self.max_tokens}
        batch = self.tokenizer(list(texts), return_tensors="pt", **length)
        return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}

    def pictures(self, pictures: Tensor, device: str | torch.device = "cpu") -> Tensor:
        """``pixel_values`` (N, 3, H, W), float32, from uint8 pictures (N, 3, height, width)."""
        pixels = pictures if self.resize is None else _resized(pictures, self.resize, self.resample)
        pixels = pixels.to(device, torch.float32)
        if self.crop is not None:
            height, width = self.crop
            top, left = (pixels.shape[2] - height) // 2, (pixels.shape[3] - width) // 2
            pixels = pixels[:, :, top : top + height, left : left + width]
        mean = torch.tensor(self.mean, device=device).reshape(-1, 1, 1)
        deviation = torch.tensor(self.deviation, device=device).reshape(-1, 1, 1)
        return (pixels / 255 - mean) / deviation


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _size(size: Any) -> tuple[int, int] | int:
    if isinstance(size, int):
        return size
    return int(size["shortest_edge"]) if "shortest_edge" in size else _pair(size)


def _scorer_inputs(folder: Path, tokenizer: CLIPTokenizer, max_tokens: int) -> ScorerInputs:
    own = folder / "preprocessor_config.json"
    if own.is_file():
        settings = json_object(own)
    else:  # what newer versions of transformers write
        settings = json_object(folder / "processor_config.json").get("image_processor", {})
    try:
        return ScorerInputs(
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            resize=_size(settings["size"]) if settings.get("do_resize", True) else None,
            resample=int(settings.get("resample", Image.Resampling.BICUBIC)),
            crop=_pair(settings["crop_size"]) if settings.get("do_center_crop", True) else None,
            mean=tuple(map(float, settings["image_mean"])),
            deviation=tuple(map(float, settings["image_std"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFormatError(
            f"the picture settings in {folder} lack or misstate {error}; fetch preprocessor_config.json again"
        ) from None


def load_scorer(
    text: str = "reference", *, device: str | torch.device = "cpu"
) -> tuple[CLIPModel, ScorerInputs]:
    """A CLIP model in eval mode, float32, and what prepares captions and pictures for it.

    ``text`` is ``reference``, a folder or a hub id. Raises ModelNotFoundError, ModelFormatError or
    UnsupportedModelError as ``resolve_model`` does.
    """
    path = Path(text).expanduser()
    if text == "reference":
        folder = shipped(scorer_folder(), "the scorer 'reference'")
    elif path.is_dir():
        folder = path
    elif HUB_ID.fullmatch(text):
        folder = hub_folder(text)
    else:
        raise ModelNotFoundError(
            f"asked for the scorer {text!r}, found no folder of that name; give reference, a folder or a hub id"
        )
    config = json_object(folder / "config.json")
    if config.get("model_type") != "clip":
        raise UnsupportedModelError(
            f"asked for a CLIP model to score with, found model_type {config.get('model_type')!r} in {folder}; "
            "give a folder that CLIPModel.save_pretrained wrote, or reference"
        )
    words = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    check_part(folder, CLIPModel)
    check_vocabulary(words, CLIPTokenizer)
    named = f"the scorer {text}"
    try:
        with quiet(), component_view(folder, STEMS["transformers"]) as view:
            model = CLIPModel.from_pretrained(
                view, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
            tokenizer = CLIPTokenizer.from_pretrained(words, local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever the libraries raise about files that make no sense
        raise ModelFormatError(
            f"asked for {named}, which cannot be loaded: {reason_of(error)}; fetch it again"
        ) from None
    refuse_flawed(model.state_dict().items(), named)
    limit = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    inputs = _scorer_inputs(folder, tokenizer, limit)
    model = model.to(device).eval()
    refuse_silent(scorer_complaint(model, tokenizer, inputs.pictures), named)
    return model, inputs


# Which one ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class ScorerChoice:
    """The scorer of a model: what ``load_scorer`` takes, its name for people, and why it is this one or none."""

    text: str  # empty: there is none
    name: str
    reason: str


def _in_hub_cache(repository: str) -> Path | None:
    """The folder of ``repository`` in the hub's cache on this machine, where its config and safetensors are there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json")
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    try:
        weight_files(folder)
    except PruneLabError:
        return None
    return folder


def _clip_of_text_encoder(source: ModelSource) -> str:
    """The hub id of the CLIP model that the text encoder of ``source`` is a part of; empty where it is not known."""
    path = source.folder / "text_encoder" / "config.json" if source.folder is not None else None
    if path is None or not path.is_file():
        return ""
    config = json_object(path)
    if config.get("vocab_size") != _CLIP_WORDS:
        return ""
    size = int(config.get("num_hidden_layers", 0)), int(config.get("hidden_size", 0))
    return _CLIP_OF_ENCODER.get(size, "")


def choose_scorer(asked: str, source: ModelSource) -> ScorerChoice:
    """The scorer that judges the pictures of ``source``: the one ``asked`` for, or the model's own; or none, and why.

    The shipped scorer knows emoji of 64 pixels and judges the shipped models and their students alone. Without a name
    other models get the CLIP model of their text encoder where it lies in the hub's cache; nothing is downloaded for
    that. Raises ConfigError when the shipped one is asked to judge another model.
    """
    ours = of_shipped_family(source)
    if asked == NO_SCORER:
        return ScorerChoice("", "none", "evaluate.scorer is none")
    if source.is_pipeline and not embedding_width(source.config):
        return ScorerChoice("", "none", "not measured: the model reads no text")
    if asked == "reference" and not ours:
        raise ConfigError(
            f"asked to judge pictures of {source.text} with the scorer reference, which knows 64-pixel emoji and "
            "judges the shipped models alone; give a CLIP folder or hub id with evaluate.scorer, or none"
        )
    if asked:
        return ScorerChoice(asked, asked, "named by evaluate.scorer")
    if ours:
        return ScorerChoice("reference", "reference", "it ships with the model")
    if not source.is_pipeline:
        return ScorerChoice("", "none", "a model alone draws no pictures")
    known = _clip_of_text_encoder(source)
    folder = _in_hub_cache(known) if known else None
    if folder is not None:
        return ScorerChoice(str(folder), known, "the CLIP model of its text encoder, from the hub's cache")
    remedy = f"name a CLIP folder or hub id with evaluate.scorer{f', such as {known}' if known else ''}"
    return ScorerChoice("", "none", f"no CLIP model for it on this machine; {remedy}")
