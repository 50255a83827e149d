"""The transformer: PixArt's own class, small, and how it starts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from recipes.transformer_model.settings import TransformerShape

_NORMAL = 0.02  # spread of what is not started by Xavier's rule


def build_transformer(shape: TransformerShape) -> PixArtTransformer2DModel:
    """A freshly made transformer of the shape that predicts as many channels as it reads (no learned variance)."""
    return PixArtTransformer2DModel(
        sample_size=shape.latent,
        patch_size=shape.patch,
        in_channels=shape.latent_channels,
        out_channels=shape.latent_channels,
        num_layers=shape.layers,
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_width,
        cross_attention_dim=shape.width,
        caption_channels=shape.text_width,
    )


@torch.no_grad()
def start_as_pixart(transformer: PixArtTransformer2DModel) -> None:
    """Initialise in place as PixArt's authors do (arXiv:2310.00426, their `initialize_weights`).

    Linear layers by Xavier's rule, what makes the modulation of a timestep and of the caption small; attention to the
    caption and the last layer start at zero, so that the first answer is zero.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patches = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(len(patches.weight), -1))
    embedder = transformer.adaln_single.emb.timestep_embedder
    projection = transformer.caption_projection
    small = (embedder.linear_1, embedder.linear_2, transformer.adaln_single.linear)
    for layer in (*small, projection.linear_1, projection.linear_2):
        nn.init.normal_(layer.weight, std=_NORMAL)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
    nn.init.zeros_(transformer.proj_out.weight)


def predicted(
    transformer: PixArtTransformer2DModel,
    noisy: torch.Tensor,
    times: torch.Tensor,
    text: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """The prediction (N, C, h, w) for noisy latents, timesteps (N,), text states (N, L, D) and their mask (N, L)."""
    nothing: dict[str, Any] = {
        "resolution": None,
        "aspect_ratio": None,
    }  # asked for by the class, used at 1024 px
    found = transformer(
        noisy,
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        timestep=times,
        added_cond_kwargs=nothing,
    ).sample
    assert isinstance(found, torch.Tensor)
    return found
