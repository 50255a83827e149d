"""Tiny models of every family that is known: their configs, random weights, and random inputs of the right shapes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

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
        "axes_lens": (128, 128, 128),
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
        "axes_lens": [256, 32, 32],
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
        **_HEADS,
        "num_layers": 4,
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 16,
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
}
"""By name of the class: settings of a tiny model, everything else is as the class has it."""


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
            return torch.ones_like(value)
        return torch.randn(value.shape, generator=generator)

    return {name: filled(value, name) for name, value in made.items()}
