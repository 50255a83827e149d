"""Tiny models of every family that is known: their configs, random weights, and random inputs of the right shapes."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from prune_lab.families import example_inputs, family_of

_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8}  # blocks 16 wide
_VIDEO_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
_PACKED: dict[str, Any] = {"in_channels": 16, "axes_dims_rope": (2, 2, 4), "joint_attention_dim": 12}

TINY_TRANSFORMERS: Mapping[str, Mapping[str, Any]] = {
    "PixArtTransformer2DModel": {
        **_HEADS,
        "num_layers": 4,
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
    },
    "SanaTransformer2DModel": {
        **_HEADS,
        "num_layers": 4,
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
    },
    "DiTTransformer2DModel": {
        **_HEADS,
        "num_layers": 4,
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    },
    "AuraFlowTransformer2DModel": {
        **_HEADS,
        "sample_size": 8,
        "num_mmdit_layers": 3,
        "num_single_dit_layers": 3,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pos_embed_max_size": 16,
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 4,
        "num_refiner_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 2,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (512, 128, 128),
        "cap_feat_dim": 12,
    },
    "ZImageTransformer2DModel": {
        "in_channels": 4,
        "dim": 16,
        "n_layers": 4,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 12,
        "axes_dims": [4, 2, 2],
        "axes_lens": [1024, 32, 32],
    },
    "CogView3PlusTransformer2DModel": {
        **_HEADS,
        "num_layers": 4,
        "in_channels": 4,
        "out_channels": 4,
        "text_embed_dim": 12,
        "time_embed_dim": 8,
        "condition_dim": 2,
        "pos_embed_max_size": 8,
        "sample_size": 8,
    },
    "CogView4Transformer2DModel": {
        **_HEADS,
        "num_layers": 4,
        "in_channels": 4,
        "out_channels": 4,
        "text_embed_dim": 12,
        "time_embed_dim": 8,
        "condition_dim": 4,
        "pos_embed_max_size": 8,
        "sample_size": 8,
        "rope_axes_dim": (8, 8),
    },
    "SD3Transformer2DModel": {
        **_HEADS,
        "num_layers": 4,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 6,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0, 2),
        "qk_norm": "rms_norm",
    },
    "FluxTransformer2DModel": {
        **_HEADS,
        **_PACKED,
        "num_layers": 3,
        "num_single_layers": 3,
        "pooled_projection_dim": 6,
        "guidance_embeds": True,
    },
    "Flux2Transformer2DModel": {
        **_HEADS,
        **_PACKED,
        "num_layers": 3,
        "num_single_layers": 3,
        "axes_dims_rope": (2, 2, 2, 2),
        "timestep_guidance_channels": 8,
    },
    "BriaTransformer2DModel": {**_HEADS, **_PACKED, "num_layers": 3, "num_single_layers": 3},
    "LongCatImageTransformer2DModel": {**_HEADS, **_PACKED, "num_layers": 3, "num_single_layers": 3},
    "OvisImageTransformer2DModel": {
        **_HEADS,
        **_PACKED,
        "out_channels": 16,
        "num_layers": 3,
        "num_single_layers": 3,
    },
    "ChromaTransformer2DModel": {
        **_HEADS,
        **_PACKED,
        "num_layers": 2,
        "num_single_layers": 2,
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 8,
        "approximator_layers": 1,
    },
    "QwenImageTransformer2DModel": {**_HEADS, **_PACKED, "num_layers": 4, "out_channels": 4},
    "WanTransformer3DModel": {
        **_VIDEO_HEADS,
        "num_layers": 4,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 12,
        "freq_dim": 8,
        "ffn_dim": 24,
    },
    "ChronoEditTransformer3DModel": {
        **_VIDEO_HEADS,
        "num_layers": 3,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 12,
        "freq_dim": 8,
        "ffn_dim": 24,
    },
    "SkyReelsV2Transformer3DModel": {
        **_VIDEO_HEADS,
        "num_layers": 3,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 12,
        "freq_dim": 8,
        "ffn_dim": 24,
    },
    "CogVideoXTransformer3DModel": {
        **_VIDEO_HEADS,
        "num_layers": 4,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 12,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": 6,
        "use_rotary_positional_embeddings": True,
    },
    "LTXVideoTransformer3DModel": {
        **_HEADS,
        "num_layers": 4,
        "in_channels": 8,
        "out_channels": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
    },
    "AllegroTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,  # a third of it for each axis
        "num_layers": 4,
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 24,
        "caption_channels": 12,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 4,
    },
    "MochiTransformer3DModel": {
        **_HEADS,
        "num_layers": 4,
        "in_channels": 4,
        "pooled_projection_dim": 16,
        "text_embed_dim": 8,
        "time_embed_dim": 4,
        "max_sequence_length": 6,
    },
    "HunyuanVideoTransformer3DModel": {
        **_HEADS,
        "num_layers": 3,
        "num_single_layers": 3,
        "num_refiner_layers": 1,
        "in_channels": 4,
        "out_channels": 4,
        "text_embed_dim": 12,
        "pooled_projection_dim": 6,
        "rope_axes_dim": (2, 2, 4),
    },
    "PRXTransformer2DModel": {
        "in_channels": 4,
        "context_in_dim": 12,
        "hidden_size": 16,
        "num_heads": 2,
        "depth": 4,
        "axes_dim": [4, 4],
    },
    "SanaVideoTransformer3DModel": {
        **_VIDEO_HEADS,
        "num_layers": 3,
        "in_channels": 4,
        "out_channels": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 12,
    },
    "HunyuanImageTransformer2DModel": {
        **_HEADS,
        "num_layers": 3,
        "num_single_layers": 3,
        "num_refiner_layers": 1,
        "in_channels": 4,
        "out_channels": 4,
        "text_embed_dim": 12,
        "rope_axes_dim": (4, 4),
    },
    "HunyuanDiT2DModel": {
        **_HEADS,
        "num_layers": 6,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 16,
        "cross_attention_dim": 8,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 6,
        "text_len": 3,
        "text_len_t5": 4,
    },
    "LatteTransformer3DModel": {
        **_HEADS,
        "num_layers": 4,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000,
        "norm_elementwise_affine": False,
        "video_length": 4,
    },
}
"""By name of the class: settings of a tiny model, everything else is as the class has it."""


def _width(settings: Mapping[str, Any]) -> int:
    return int(settings["num_attention_heads"] * settings["attention_head_dim"])


def _as_wide(*names: str) -> Callable[[random.Random, dict[str, Any]], dict[str, Any]]:
    """Those settings that must be as wide as the blocks."""
    return lambda generator, settings: dict.fromkeys(names, _width(settings))


def _of_sd3(generator: random.Random, settings: dict[str, Any]) -> dict[str, Any]:
    dual = [i for i in range(settings["num_layers"]) if generator.random() < 0.5]
    return {
        "caption_projection_dim": _width(settings),
        "dual_attention_layers": dual,
        "qk_norm": generator.choice([None, "rms_norm"]),
        "patch_size": generator.choice([1, 2]),
    }


def _of_pixart(generator: random.Random, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "cross_attention_dim": _width(settings),
        "use_additional_conditions": generator.choice([None, False]),
        "patch_size": generator.choice([1, 2]),
    }


def _of_sana(generator: random.Random, settings: dict[str, Any]) -> dict[str, Any]:
    heads = {"num_cross_attention_heads": 2, "cross_attention_head_dim": _width(settings) // 2}
    return {
        **heads,
        "cross_attention_dim": _width(settings),
        "guidance_embeds": generator.random() < 0.5,
        "qk_norm": generator.choice([None, "rms_norm_across_heads"]),
    }


def _of_cogvideo(generator: random.Random, settings: dict[str, Any]) -> dict[str, Any]:
    turned, across_time = generator.random() < 0.5, generator.choice([None, 2])
    return {
        "use_rotary_positional_embeddings": turned,
        "patch_size_t": across_time if turned else None,  # the places that are added know single frames only
        "ofs_embed_dim": generator.choice([None, 8]),
    }


def _of_wan(generator: random.Random, settings: dict[str, Any]) -> dict[str, Any]:
    pictures = generator.random() < 0.5
    return {
        "cross_attn_norm": generator.random() < 0.5,
        "image_dim": 6 if pictures else None,
        "added_kv_proj_dim": _width(settings) if pictures else None,
    }


_MORE: Mapping[str, Callable[[random.Random, dict[str, Any]], dict[str, Any]]] = {
    "SD3Transformer2DModel": _of_sd3,
    "PixArtTransformer2DModel": _of_pixart,
    "SanaTransformer2DModel": _of_sana,
    "CogVideoXTransformer3DModel": _of_cogvideo,
    "WanTransformer3DModel": _of_wan,
    "AuraFlowTransformer2DModel": _as_wide("caption_projection_dim"),
    "LTXVideoTransformer3DModel": _as_wide("cross_attention_dim"),
    "AllegroTransformer3DModel": _as_wide("cross_attention_dim"),
    "LatteTransformer3DModel": _as_wide("cross_attention_dim"),
    "HunyuanDiT2DModel": _as_wide("hidden_size"),
    "SanaVideoTransformer3DModel": _of_sana,
    "FluxTransformer2DModel": lambda generator, settings: {"guidance_embeds": generator.random() < 0.5},
    "HunyuanVideoTransformer3DModel": lambda generator, settings: {
        "guidance_embeds": generator.random() < 0.5
    },
    "DiTTransformer2DModel": lambda generator, settings: {"patch_size": generator.choice([1, 2])},
    "MochiTransformer3DModel": lambda generator, settings: {
        "pooled_projection_dim": generator.choice([8, 24])
    },
}
_DEPTHS = (
    "num_layers",
    "n_layers",
    "depth",
    "num_single_layers",
    "num_mmdit_layers",
    "num_single_dit_layers",
)


def drawn_config(class_name: str, generator: random.Random, deepest: int = 5) -> dict[str, Any]:
    """The config of a tiny model of random depth and width, and of random settings where the class has kinds."""
    settings = dict(TINY_TRANSFORMERS[class_name])
    for name in _DEPTHS:
        if name in settings:
            pairs = class_name == "HunyuanDiT2DModel"  # an odd number has no partner
            settings[name] = generator.randint(1, deepest) * (2 if pairs else 1)
    if "num_attention_heads" in settings and class_name != "Lumina2Transformer2DModel":
        settings["num_attention_heads"] = generator.choice([1, 2, 3])
    more = _MORE.get(class_name)
    return {**settings, **(more(generator, settings) if more else {}), "_class_name": class_name}


FEW = ("PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel")


def others_long(names: Iterable[str]) -> list[Any]:
    """The names as parameters of a test, of which those of transformers are for the long tests but for a few."""
    rare = TINY_TRANSFORMERS.keys() - set(FEW)
    return [pytest.param(name, marks=pytest.mark.long) if name in rare else name for name in names]


def tiny_config(class_name: str, **settings: Any) -> dict[str, Any]:
    """The config of a tiny model of the class, with these settings changed; ``_class_name`` included."""
    return {**TINY_TRANSFORMERS[class_name], **settings, "_class_name": class_name}


def tiny_model(class_name: str, seed: int = 0, **settings: Any) -> Any:
    """A tiny model of the class in evaluation mode; every one of its tensors is random, zeros and ones included."""
    config = tiny_config(class_name, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what diffusers says of its own parts
        model = family_of(config).model_class().from_config(config)
    return with_random_weights(model, seed)


def with_random_weights(model: Any, seed: int = 0) -> Any:
    """The same model with random numbers in every tensor that is saved: nothing is zero at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def random_inputs(model: Any, seed: int = 1, *, batch: int = 1, latent: int = 8, tokens: int = 6) -> Any:
    """Arguments of the model's ``forward``, with random numbers where they are free."""
    generator = torch.Generator().manual_seed(seed)
    made = example_inputs(model.config, batch=batch, latent=latent, tokens=tokens)

    def filled(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {inner: filled(one, inner) for inner, one in value.items()}
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [filled(one, name) for one in value]
        if not isinstance(value, Tensor) or name.endswith(("ids", "mask")) or value.dtype == torch.bool:
            return value
        if name in ("timestep", "timesteps", "t"):
            return torch.full_like(value, 500 if not value.is_floating_point() else 0.5)
        if not value.is_floating_point():
            return torch.ones_like(value) if name == "class_labels" else value
        return torch.randn(value.shape, generator=generator)

    return {name: filled(value, name) for name, value in made.items()}
