"""The reference U-Net: Stable Diffusion's topology, narrower, trained on cached latents and text embeddings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from prune_lab.blocks import architecture_of
from prune_lab.reference.clip import tokens
from prune_lab.reference.steps import Recipe, slices, step_generator, train
from prune_lab.runtime import atomic_write

# Stable Diffusion v1's own schedule (its scheduler_config.json).
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}

_NO_CAPTION = 0.1  # share of pictures trained without a caption, for classifier-free guidance
_SKIP_GAIN = 0.4  # of a skip beside the main path, at initialisation
_STYLELESS = 0.1  # share of captions without their style word


def noise_levels() -> tuple[torch.Tensor, torch.Tensor]:
    """(signal, noise) factors (1000,) of the schedule: noisy = signal * latent + noise * epsilon."""
    kept = DDPMScheduler(**SCHEDULE).alphas_cumprod
    return kept.sqrt(), (1 - kept).sqrt()


@dataclass(frozen=True, slots=True)
class DenoiserShape:
    """Widths of the U-Net; its stages and layers are Stable Diffusion's and not a choice."""

    channels: tuple[int, int, int, int] = (32, 64, 128, 128)
    heads: int = 4
    groups: int = 16
    text_width: int = 128
    latent: int = 16
    latent_channels: int = 4


@dataclass(frozen=True, slots=True)
class Objective:
    """How much the error at a noise level counts: `floor` + noise / signal power, at most `limit`, mean 1.

    With equal weights the loss is mostly about grain in almost clean latents, which needs no inner stage; what a
    picture shows is decided at higher noise. The first `plain_steps` are trained with equal weights.

    From step `skip_dropout_from` on, a share `skip_dropout` of the pictures in a batch is trained without the skips
    into the two middle up stages, meant to send their context through the innermost stages. No run without it was
    made to compare with. It did not keep the mid stage in use: see `open_main_path`.
    """

    floor: float = 0.3
    limit: float = 10.0
    plain_steps: int = 1000
    skip_dropout: float = 0.25
    skip_dropout_from: int = 1750

    def weights(self, step: int) -> torch.Tensor:
        """Weight (1000,) of each timestep at a training step."""
        signal, spread = noise_levels()
        if step < self.plain_steps:
            return torch.ones_like(signal)
        weight = (self.floor + (spread / signal).square()).clamp(max=self.limit)
        return weight / weight.mean()


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
    """Initialise the width-changing 1 x 1 convolutions and the samplers so that the inner stages are heard.

    With the library's default every such layer divides the variance of the main path by about three; a first run
    ended with the mid stage's removal impact at 5e-9 after 750 steps. Here the main path is passed on as it is and
    skips are mixed in at `_SKIP_GAIN`. The mid stage then starts at 6e-2, but training still lets it fall: 6e-4 at
    step 250, 7e-5 at 750, 2e-7 at the end (3,900). So this slows the silencing of the inner stages, no more.
    """
    for block in architecture_of(unet).blocks:
        shortcut = getattr(unet.get_submodule(block.path), "conv_shortcut", None)
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


def build_scheduler() -> PNDMScheduler:
    """The scheduler the pipeline ships with, set as Stable Diffusion v1's."""
    return PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)


@dataclass(frozen=True, slots=True)
class CachedPairs:
    """What the U-Net is trained on: latents (N, C, h, w) and, by caption number, text embeddings (M, L, D).

    `full` and `plain` give a row's caption number with and without the style word; number 0 is the empty caption.
    `weight` is how often a row is drawn, relative to the others.
    """

    latents: torch.Tensor
    embeddings: torch.Tensor
    full: torch.Tensor
    plain: torch.Tensor
    weight: torch.Tensor

    def save(self, path: Path) -> None:
        """Write the tensors as safetensors; embeddings in float16, which the text tower ships in anyway."""
        tensors = {
            "latents": self.latents.contiguous(),
            "embeddings": self.embeddings.half().contiguous(),
            "full": self.full,
            "plain": self.plain,
            "weight": self.weight,
        }
        with atomic_write(path) as temporary:
            save_file(tensors, temporary)

    @classmethod
    def load(cls, path: Path) -> CachedPairs:
        """The pairs saved at `path`."""
        read = load_file(path)
        return cls(
            **{name: value.float() if value.is_floating_point() else value for name, value in read.items()}
        )


@torch.no_grad()
def embed_captions(
    tower: CLIPTextModel, tokenizer: CLIPTokenizer, captions: Sequence[str], batch: int = 256
) -> torch.Tensor:
    """Last hidden states (N, L, D), float32 on the CPU: what the pipeline's U-Net attends to."""
    ids = tokens(tokenizer, captions)
    parts = [
        tower(ids[part].to(tower.device)).last_hidden_state.float().cpu() for part in slices(len(ids), batch)
    ]
    return torch.cat(parts)


def cache_pairs(
    latents: torch.Tensor,
    captions: Sequence[str],
    plain: Sequence[str],
    weight: torch.Tensor,
    tower: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> CachedPairs:
    """The training pairs of latents (N, C, h, w) with their captions, each distinct caption embedded once."""
    number = {caption: index for index, caption in enumerate(dict.fromkeys(["", *captions, *plain]))}
    return CachedPairs(
        latents=latents,
        embeddings=embed_captions(tower, tokenizer, list(number)),
        full=torch.tensor([number[caption] for caption in captions]),
        plain=torch.tensor([number[caption] for caption in plain]),
        weight=weight,
    )


class Float32Attention:
    """Attention whose product runs in float32 under bfloat16 autocast, for training on a CPU.

    There the fused kernel's bfloat16 backward pass takes longer than the rest of the step together. Reads the same
    weights as diffusers' own processors; knows only what a Stable Diffusion U-Net needs (no masks, no norms).
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The attended states (N, T, C) of hidden states (N, T, C) over the text's, or over themselves."""
        assert attention_mask is None
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.reshape(*states.shape[:2], attn.heads, -1).transpose(1, 2).float()

        query, key, value = heads(attn.to_q(hidden_states)), heads(attn.to_k(seen)), heads(attn.to_v(seen))
        with torch.autocast(hidden_states.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(query, key, value)
        projection, dropout = attn.to_out
        found = dropout(projection(mixed.transpose(1, 2).flatten(2)))
        assert isinstance(found, torch.Tensor)
        return found


@contextlib.contextmanager
def skips_dropped(unet: UNet2DConditionModel, kept: torch.Tensor) -> Iterator[None]:
    """Inside, the skips into the middle up stages are zero for rows where `kept` (N,) is False."""
    factor = kept.float()[:, None, None, None]

    def drop(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        skips = tuple(skip * factor.to(skip) for skip in kwargs["res_hidden_states_tuple"])
        return args, {**kwargs, "res_hidden_states_tuple": skips}

    handles = [stage.register_forward_pre_hook(drop, with_kwargs=True) for stage in unet.up_blocks[1:3]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train_denoiser(
    data: CachedPairs,
    shape: DenoiserShape,
    recipe: Recipe,
    folder: Path,
    *,
    objective: Objective | None = None,
    device: str = "cpu",
    say: Callable[[str], None] | None = None,
    until: int | None = None,
) -> UNet2DConditionModel:
    """The U-Net trained to predict the noise in the latents, all timesteps equally often; averaged weights."""
    objective = Objective() if objective is None else objective
    torch.manual_seed(recipe.seed)
    model = build_denoiser(shape)
    open_main_path(model)
    model.to(device)
    if torch.device(device).type == "cpu":
        model.set_attn_processor(Float32Attention())
    signal, spread = noise_levels()

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        generator = step_generator(recipe.seed, step)
        rows = torch.multinomial(data.weight, recipe.batch, replacement=True, generator=generator)
        draw = torch.rand(recipe.batch, generator=generator)
        caption = torch.where(draw < _NO_CAPTION + _STYLELESS, data.plain[rows], data.full[rows])
        caption = caption.masked_fill(draw < _NO_CAPTION, 0)
        # One timestep per equal slice of the schedule: every batch sees all noise levels.
        place = (torch.arange(recipe.batch) + torch.rand(recipe.batch, generator=generator)) / recipe.batch
        times = (place * len(signal)).long().clamp(max=len(signal) - 1)
        latents = data.latents[rows]
        noise = torch.randn(latents.shape, generator=generator)
        noisy = signal[times, None, None, None] * latents + spread[times, None, None, None] * noise
        dropped = torch.rand(recipe.batch, generator=generator) < objective.skip_dropout
        kept = ~(dropped & (step >= objective.skip_dropout_from))
        with skips_dropped(model, kept), torch.autocast(torch.device(device).type, torch.bfloat16):
            found = model(noisy.to(device), times.to(device), data.embeddings[caption].to(device)).sample
        error = (found.float() - noise.to(device)).square().mean((1, 2, 3))
        return {"loss": (objective.weights(step)[times].to(device) * error).mean(), "mse": error.mean()}

    average = train(model, loss_at, recipe, folder, "denoiser", say=say, until=until)
    model.load_state_dict(average, strict=False)
    model.set_attn_processor(AttnProcessor2_0())
    return model.eval()
