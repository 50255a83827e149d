"""Tiny pipelines with random weights, of U-Nets that take more than latents, timestep and text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from conftest import TINY_UNET, build_unet

# What each kind of U-Net takes beside, as its config says it. Widths are narrow; numbers of channels are real.
LCM = {"time_cond_proj_dim": 32}
INPAINTING = {"in_channels": 9}
EDITING = {"in_channels": 8}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "cross_attention_dim": 32,  # two encoders of width 16
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}
REFINER = SDXL | {"cross_attention_dim": 16, "projection_class_embeddings_input_dim": 5 * 8 + 16}


def _parts(pipeline: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    unet = build_unet(TINY_UNET | dict(changes))
    return {**pipeline.components, "unet": unet, "safety_checker": None, "feature_extractor": None}


def lcm(pipeline: Any) -> Any:
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    parts = _parts(pipeline, LCM) | {"scheduler": LCMScheduler.from_config(pipeline.scheduler.config)}
    return LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


def inpainting(pipeline: Any) -> Any:
    from diffusers import StableDiffusionInpaintPipeline

    return StableDiffusionInpaintPipeline(**_parts(pipeline, INPAINTING), requires_safety_checker=False)


def editing(pipeline: Any) -> Any:
    from diffusers import StableDiffusionInstructPix2PixPipeline

    return StableDiffusionInstructPix2PixPipeline(**_parts(pipeline, EDITING), requires_safety_checker=False)


def image_to_image(pipeline: Any) -> Any:
    from diffusers import StableDiffusionImg2ImgPipeline

    return StableDiffusionImg2ImgPipeline(**_parts(pipeline, {}), requires_safety_checker=False)


def with_controlnet(pipeline: Any) -> Any:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    parts = _parts(pipeline, {})
    with torch.random.fork_rng(devices=[]):
        control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(16, 16))
    return StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)


def _two_encoders(pipeline: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        second = CLIPTextModelWithProjection(pipeline.text_encoder.config).eval()
    parts = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    unet = build_unet(TINY_UNET | dict(changes))
    return parts | {"unet": unet, "text_encoder_2": second, "tokenizer_2": pipeline.tokenizer}


def sdxl(pipeline: Any) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(**_two_encoders(pipeline, SDXL), add_watermarker=False)


def refiner(pipeline: Any) -> Any:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    parts = _two_encoders(pipeline, REFINER) | {"text_encoder": None, "tokenizer": None}
    return StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)


NARROW: Mapping[str, Callable[[Any], Any]] = {
    "lcm": lcm,
    "inpainting": inpainting,
    "editing": editing,
    "sdxl": sdxl,
    "refiner": refiner,
    "image-to-image": image_to_image,
    "controlnet": with_controlnet,
}


def narrow(kind: str, pipeline: Any) -> Any:
    """A pipeline of this ``kind`` made of the parts of ``pipeline``, which stays as it is."""
    made = NARROW[kind](pipeline)
    made.set_progress_bar_config(disable=True)
    return made
