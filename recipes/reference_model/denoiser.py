"""The reference U-Net: Stable Diffusion's topology, narrower, and how it starts."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from prune_lab.blocks import architecture_of
from recipes.reference_model.settings import DenoiserShape

# Stable Diffusion v1's own schedule (its scheduler_config.json).
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}

_SKIP_GAIN = 0.4  # of a skip beside the main path, at initialisation


@functools.cache
def noise_levels() -> tuple[torch.Tensor, torch.Tensor]:
    """(signal, noise) factors (1000,) of the schedule: noisy = signal * latent + noise * epsilon.

    Stable Diffusion's schedule, rescaled to end in noise alone (arXiv:2305.08891). Its own last timestep still shows
    where the picture is light and dark; a model trained on that reads the layout off the noise that it starts from,
    and only the colours off the caption.
    """
    kept = DDPMScheduler(**SCHEDULE, rescale_betas_zero_snr=True).alphas_cumprod
    return kept.sqrt(), (1 - kept).sqrt()


def build_denoiser(shape: DenoiserShape) -> UNet2DConditionModel:
    """A freshly initialised U-Net of the shape, with the 38 blocks of Stable Diffusion v1."""
    return UNet2DConditionModel(
        sample_size=shape.latent,
        in_channels=shape.latent_channels,
        out_channels=shape.latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=shape.channels,
        layers_per_block=2,
        norm_num_groups=shape.groups,
        attention_head_dim=shape.heads,
        cross_attention_dim=shape.text_width,
    )


@torch.no_grad()
def open_main_path(unet: UNet2DConditionModel) -> None:
    """Initialise in place so that the main path runs through the whole network and every block starts as nothing.

    With the library's default every width-changing 1 x 1 convolution and sampler divides the variance of the main path
    by about three, and the blocks along it add noise of its own size. Here the main path is passed on as it is, skips
    are mixed in at `_SKIP_GAIN`, and the last layer of every residual and attention block is zero (as in guided
    diffusion, arXiv:2105.05233), so a block is heard when it has learned something and not before.
    """
    for block in architecture_of(unet).blocks:
        module = unet.get_submodule(block.path)
        last = module.conv2 if block.kind == "resnet" else module.proj_out
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        shortcut = getattr(module, "conv_shortcut", None)
        if shortcut is None:
            continue
        main = block.in_channels - block.skip_channels
        passed = torch.empty(block.out_channels, main)
        if main == block.out_channels:
            nn.init.eye_(passed)
        else:
            nn.init.orthogonal_(passed, gain=max(1.0, block.out_channels / main) ** 0.5)
        mixed = torch.empty(block.out_channels, block.skip_channels)
        if block.skip_channels:
            gain = max(1.0, block.out_channels / block.skip_channels) ** 0.5
            nn.init.orthogonal_(mixed, gain=_SKIP_GAIN * gain)
        shortcut.weight.copy_(torch.cat([passed, mixed], dim=1)[:, :, None, None])
        shortcut.bias.zero_()
    for sampler in architecture_of(unet).samplers:
        convolution = unet.get_submodule(sampler.path).conv
        convolution.weight.mul_(0.5)
        convolution.weight[:, :, 1, 1] += torch.eye(len(convolution.weight))


def build_scheduler() -> DDIMScheduler:
    """The scheduler the pipeline ships with: SD's betas rescaled to end in noise alone, for a velocity (as v2.1's)."""
    return DDIMScheduler(
        **SCHEDULE,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",  # starts at the last timestep, which the rescaling is about
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class Float32Attention:
    """Attention whose product runs in float32 under bfloat16 autocast, for training on a CPU.

    There the fused kernel's bfloat16 backward pass takes longer than the rest of the step together. Reads the same
    weights as diffusers' own processors; knows only what an SD U-Net and a PixArt transformer need (no norms).
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The attended states (N, T, C) of hidden states (N, T, C) over the text's, or over themselves.

        A mask is a bias (N, 1, L) on the scores, the same for all heads.
        """
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.reshape(*states.shape[:2], attn.heads, -1).transpose(1, 2).float()

        query, key, value = heads(attn.to_q(hidden_states)), heads(attn.to_k(seen)), heads(attn.to_v(seen))
        with torch.autocast(hidden_states.device.type, enabled=False):
            bias = None if attention_mask is None else attention_mask[:, None].float()
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        projection, dropout = attn.to_out
        found = dropout(projection(mixed.transpose(1, 2).flatten(2)))
        assert isinstance(found, torch.Tensor)
        return found
