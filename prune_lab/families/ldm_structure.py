"""The configs of a model in the CompVis/LDM layout, from the names and shapes of its tensors.

Front ends read the structure in the same way. What shapes do not show (scheduler, attention heads, activation) is that
of the original which the file is shaped like: Stable Diffusion 1, 2 or XL.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from prune_lab.errors import UnsupportedModelError

Shapes = Mapping[str, tuple[int, ...]]
Kind = Literal["sd-v1", "sd-v2", "sdxl"]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
# Where the text encoders of each kind begin, and whether they are laid out as OpenAI's CLIP or as OpenCLIP.
_TEXT: dict[Kind, dict[str, tuple[str, str]]] = {
    "sd-v1": {"text_encoder": ("cond_stage_model.transformer.text_model.", "clip")},
    "sd-v2": {"text_encoder": ("cond_stage_model.model.", "open_clip")},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.text_model.", "clip"),
        "text_encoder_2": ("conditioner.embedders.1.model.", "open_clip"),
    },
}
_EMBEDDING = {"clip": "embeddings.token_embedding.weight", "open_clip": "token_embedding.weight"}
_POSITIONS = {"clip": "embeddings.position_embedding.weight", "open_clip": "positional_embedding"}
_HEAD_WIDTH = 64
_OPEN_CLIP_H_LAYERS = 24  # of which Stable Diffusion 2 reads the last but one


def kind_of(shapes: Shapes) -> Kind:
    """Which original the file is shaped like; raises UnsupportedModelError saying what it holds instead."""
    if f"{UNET}input_blocks.0.0.weight" not in shapes:
        raise UnsupportedModelError(_what_it_is(shapes))
    for kind, encoders in _TEXT.items():
        if all(f"{prefix}{_EMBEDDING[layout]}" in shapes for prefix, layout in encoders.values()):
            if not any(key.startswith(VAE) for key in shapes):
                raise UnsupportedModelError(
                    "it has no VAE (first_stage_model): give a file with the VAE in it"
                )
            return kind
    if f"conditioner.embedders.0.model.{_EMBEDDING['open_clip']}" in shapes:
        raise UnsupportedModelError(
            "it is the refiner of Stable Diffusion XL, which is not read as a single file: give its diffusers folder"
        )
    raise UnsupportedModelError(
        "it has a U-Net and not the text encoder of Stable Diffusion 1, 2 or XL: give a whole checkpoint"
    )


def _what_it_is(shapes: Shapes) -> str:
    if any("lora" in key for key in shapes):
        return "it is a LoRA, an addition to a model: give the model itself"
    if any(key.startswith(("down_blocks.", "mid_block.", "encoder.", "text_model.")) for key in shapes):
        return "it is one part of a model in diffusers' layout: give the folder that holds its config.json"
    return f"it has no U-Net ({UNET}*); single files of Stable Diffusion 1, 2 and XL are read"


# U-Net -------------------------------------------------------------------------------------------------------------


def _count(shapes: Iterable[str], path: str) -> int:
    """How many of ``path.0.``, ``path.1.``, ... there are in a row."""
    found = {int(match[1]) for key in shapes if (match := re.match(rf"{re.escape(path)}\.(\d+)\.", key))}
    return next(number for number in itertools.count() if number not in found)


def _layer(shapes: Shapes, block: str) -> tuple[int, int]:
    """Width and transformer layers of the residual block ``block.0`` and the attention after it."""
    return shapes[f"{block}.0.out_layers.3.weight"][0], _count(shapes, f"{block}.1.transformer_blocks")


def _levels(shapes: Shapes) -> list[list[tuple[int, int]]]:
    """Per level, outermost first, width and transformer layers of each layer on the way down."""
    levels: list[list[tuple[int, int]]] = [[]]
    for number in range(1, _count(shapes, "input_blocks")):
        if f"input_blocks.{number}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append(_layer(shapes, f"input_blocks.{number}"))
    return levels


def _up_levels(shapes: Shapes, layers: list[int]) -> list[list[tuple[int, int]]]:
    """The same on the way up, innermost first."""
    numbers = iter(range(_count(shapes, "output_blocks")))
    return [
        [_layer(shapes, f"output_blocks.{number}") for number in itertools.islice(numbers, count + 1)]
        for count in reversed(layers)
    ]


def _stage_types(levels: list[list[tuple[int, int]]], side: str) -> list[str]:
    attends = [{depth > 0 for _, depth in level} for level in levels]
    if any(len(kinds) != 1 for kinds in attends):
        raise UnsupportedModelError(
            "its U-Net has stages with attention after some of their residual blocks only, which no plain diffusers "
            "config describes: give the model it was made from"
        )
    return [f"CrossAttn{side}Block2D" if kinds == {True} else f"{side}Block2D" for kinds in attends]


def has_even_depths(config: Mapping[str, Any]) -> bool:
    """Whether all stages of the U-Net of ``config`` have equally many layers: diffusers' loader counts no others."""
    return isinstance(config.get("layers_per_block", 2), int)


def unet_config(kind: Kind, preset: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The config of the U-Net in ``shapes``, with what they do not show from ``preset``."""
    inner = {key.removeprefix(UNET): shape for key, shape in shapes.items() if key.startswith(UNET)}
    downs = _levels(inner)
    layers = [len(level) for level in downs]
    if not all(layers):
        raise UnsupportedModelError(
            "its U-Net has a stage without layers, which no plain diffusers config describes"
        )
    ups = _up_levels(inner, layers)
    widths = [level[0][0] for level in downs]
    depths = [max(depth for _, depth in (*down, *up)) for down, up in zip(downs, reversed(ups), strict=True)]
    blocks_of_middle = _count(inner, "middle_block")
    contexts = {shape[1] for key, shape in inner.items() if key.endswith("attn2.to_k.weight")}
    projections = {len(shape) for key, shape in inner.items() if key.endswith(".1.proj_in.weight")}
    if len(contexts) != 1 or blocks_of_middle not in (0, 1, 3):
        raise UnsupportedModelError("its U-Net is not like that of Stable Diffusion 1, 2 or XL")
    config = {
        **preset,
        "in_channels": inner["input_blocks.0.0.weight"][1],
        "out_channels": inner["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "down_block_types": _stage_types(downs, "Down"),
        "up_block_types": _stage_types(ups, "Up"),
        "mid_block_type": (None, "UNetMidBlock2D", "", "UNetMidBlock2DCrossAttn")[blocks_of_middle],
        "cross_attention_dim": contexts.pop(),
        "use_linear_projection": projections == {2},
    }
    if set(depths) - {0, 1}:
        config["transformer_layers_per_block"] = [max(depth, 1) for depth in depths]
    if kind != "sd-v1":
        config["attention_head_dim"] = [max(1, width // _HEAD_WIDTH) for width in widths]
    if kind == "sdxl":
        config["projection_class_embeddings_input_dim"] = inner["label_emb.0.0.weight"][1]
    elif "label_emb.0.0.weight" in inner:
        raise UnsupportedModelError(
            "its U-Net takes class labels or an image embedding, which is not read here"
        )
    return config


# VAE and text encoders ---------------------------------------------------------------------------------------------


def vae_config(kind: Kind, shapes: Shapes) -> dict[str, Any]:
    """The config of the VAE in ``shapes``."""
    inner = {key.removeprefix(VAE): shape for key, shape in shapes.items() if key.startswith(VAE)}
    levels = range(_count(inner, "encoder.down"))
    widths = [inner[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in levels]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": inner["encoder.conv_in.weight"][1],
        "out_channels": inner["decoder.conv_out.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": _count(inner, "encoder.down.0.block"),
        "latent_channels": inner["decoder.conv_in.weight"][1],
        "norm_num_groups": 32,
        "sample_size": 1024 if kind == "sdxl" else 512,
        "scaling_factor": 0.13025 if kind == "sdxl" else 0.18215,
        "force_upcast": True,
    }


def text_configs(kind: Kind, shapes: Shapes) -> dict[str, dict[str, Any]]:
    """The config of each text encoder in ``shapes``."""
    return {
        part: _text_config(
            kind, part, layout, {k.removeprefix(p): s for k, s in shapes.items() if k.startswith(p)}
        )
        for part, (p, layout) in _TEXT[kind].items()
    }


def _text_config(kind: Kind, part: str, layout: str, inner: Shapes) -> dict[str, Any]:
    vocabulary, width = inner[_EMBEDDING[layout]]
    layers = _count(inner, "encoder.layers" if layout == "clip" else "transformer.resblocks")
    wider = (
        "encoder.layers.0.mlp.fc1.weight" if layout == "clip" else "transformer.resblocks.0.mlp.c_fc.weight"
    )
    if kind == "sd-v2" and layers == _OPEN_CLIP_H_LAYERS:
        layers -= 1
    projected = part == "text_encoder_2"
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner[wider][0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "max_position_embeddings": inner[_POSITIONS[layout]][0],
        "hidden_act": "quick_gelu" if layout == "clip" else "gelu",
        "projection_dim": inner["text_projection"][1] if projected else width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 1,
    }


# Around them -------------------------------------------------------------------------------------------------------

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def scheduler_config(kind: Kind, prediction_type: str) -> dict[str, Any]:
    """The scheduler that the original came with."""
    if kind == "sdxl":
        more = {"timestep_spacing": "leading", "interpolation_type": "linear"}
        return {
            "_class_name": "EulerDiscreteScheduler",
            **_BETAS,
            **more,
            "prediction_type": prediction_type,
        }
    if prediction_type == "epsilon":
        return {"_class_name": "PNDMScheduler", **_BETAS, "skip_prk_steps": True, "set_alpha_to_one": False}
    more_ddim = {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": prediction_type}
    return {"_class_name": "DDIMScheduler", **_BETAS, **more_ddim}


# The class of the pipeline by the channels that the U-Net takes, with 4 of them the latents.
_PIPELINES: dict[int, dict[Kind, str]] = {
    4: {
        "sd-v1": "StableDiffusionPipeline",
        "sd-v2": "StableDiffusionPipeline",
        "sdxl": "StableDiffusionXLPipeline",
    },
    8: {"sd-v1": "StableDiffusionInstructPix2PixPipeline"},
    9: {
        "sd-v1": "StableDiffusionInpaintPipeline",
        "sd-v2": "StableDiffusionInpaintPipeline",
        "sdxl": "StableDiffusionXLInpaintPipeline",
    },
}


def model_index(kind: Kind, in_channels: int, scheduler: str) -> dict[str, Any]:
    """The ``model_index.json`` of a pipeline of that kind."""
    name = _PIPELINES.get(in_channels, {}).get(kind)
    if name is None:
        raise UnsupportedModelError(
            f"its U-Net takes {in_channels} channels; read are 4 (text to picture), 9 (inpainting) and, in the size of "
            "Stable Diffusion 1, 8 (instructions); a file for depth lacks what estimates it: give the diffusers folder"
        )
    index: dict[str, Any] = {
        "_class_name": name,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if kind == "sdxl":
        second = {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
        return index | second | {"force_zeros_for_empty_prompt": True}
    none = {
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    return index | none
