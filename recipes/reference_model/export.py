"""Trained parts written as the folders that ship: a Stable Diffusion pipeline and its scorer, float16 safetensors."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from prune_lab.runtime import atomic_folder, read_json, write_json
from recipes.reference_model.clip import ClipShape, processor_settings
from recipes.reference_model.denoiser import build_scheduler


def export_pipeline(
    folder: Path,
    autoencoder: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> None:
    """Write `folder`, replacing what is there, as `StableDiffusionPipeline.from_pretrained` reads it."""
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(autoencoder).half(),
        text_encoder=copy.deepcopy(text_encoder).half(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet).half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with atomic_folder(folder, force=True) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        for path in temporary.rglob("config.json"):
            config = read_json(path)
            assert isinstance(config, dict)
            # Where a part was loaded from is a folder of the machine that built it and means nothing elsewhere.
            config.pop("_name_or_path", None)
            write_json(path, config)


def export_scorer(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer, shape: ClipShape) -> None:
    """Write `folder`, replacing what is there, as `CLIPModel.from_pretrained` reads it, with its tokenizer."""
    with atomic_folder(folder, force=True) as temporary:
        copy.deepcopy(model).half().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "preprocessor_config.json").write_text(
            json.dumps(processor_settings(shape), indent=2) + "\n"
        )


def weights_megabytes(folder: Path) -> float:
    """Size of all safetensors files under the folder, in megabytes (1e6 bytes)."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6


def as_float32(folder: Path) -> StableDiffusionPipeline:
    """The pipeline in the folder with float32 weights, offline and quiet."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, StableDiffusionPipeline)
    return pipeline
