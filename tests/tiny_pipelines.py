"""Tiny pipeline folders of several kinds with random weights: real classes, built in about a second each.

Encoders and tokenizers are real as well: CLIP as for Stable Diffusion, and T5 with a tokenizer that spells letters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from conftest import TINY_UNET, build_text_encoder, build_tokenizer, build_unet, save_tiny_pipeline
from tiny_models import with_random_weights

CAPTION_LENGTH = 16  # tokens
_WIDTH = 32  # of what T5 writes, and so of the texts that the transformers read
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8}
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-'"

# Parts ----------------------------------------------------------------------------------------------------------------


def t5_tokenizer() -> Any:
    """A T5 tokenizer that spells words letter by letter, its words numbered as those of T5: padding is 0."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary = [*special, *((letter, -3.0) for letter in _LETTERS)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=CAPTION_LENGTH)


def _t5_settings() -> dict[str, Any]:
    narrow = {"d_model": _WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return {**narrow, "vocab_size": 4 + len(_LETTERS), "feed_forward_proj": "gated-gelu"}


def t5_encoder() -> Any:
    """A T5 encoder of two layers."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**_t5_settings())).eval()


def umt5_encoder() -> Any:
    """A UMT5 encoder of two layers."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(**_t5_settings())).eval()


def _clip_with_projection() -> Any:
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(build_text_encoder().config).eval()


def picture_vae(**settings: Any) -> Any:
    """A VAE of pictures whose latents are half as high and wide as these."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        **settings,
    )
    return vae.eval()


def video_vae() -> Any:
    """A VAE of videos: 8 x 8 pixels to one latent, of frames 4 to one behind the first."""
    from diffusers import AutoencoderKLWan

    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 2.0, 1.0, 0.5]}
    return AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **statistics).eval()


def _flow(**settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**settings)


# Kinds ----------------------------------------------------------------------------------------------------------------


def _pixart(folder: Path) -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        **_HEADS,
        num_layers=4,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=_WIDTH,
    )
    return PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=picture_vae(),
        transformer=with_random_weights(transformer),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )


def _sd3(folder: Path) -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        **_HEADS,
        num_layers=4,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 2),
        qk_norm="rms_norm",
    )
    tokenizer = build_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    return StableDiffusion3Pipeline(
        transformer=with_random_weights(transformer),
        scheduler=_flow(shift=3.0),
        vae=picture_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=_clip_with_projection(),
        tokenizer=tokenizer,
        text_encoder_2=_clip_with_projection(),
        tokenizer_2=tokenizer,
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
    )


def _flux(folder: Path) -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        **_HEADS,
        in_channels=16,
        num_layers=3,
        num_single_layers=3,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        scheduler=_flow(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
        ),
        vae=picture_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=build_text_encoder().eval(),
        tokenizer=build_tokenizer(folder.with_name(f"{folder.name}-tokenizer")),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=with_random_weights(transformer),
    )


def _wan(folder: Path) -> Any:
    from diffusers import WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=4,
        in_channels=4,
        out_channels=4,
        text_dim=_WIDTH,
        freq_dim=8,
        ffn_dim=24,
    )
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=video_vae(),
        scheduler=_flow(shift=3.0),
        transformer=with_random_weights(transformer),
    )


def _ddpm(folder: Path) -> Any:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return DDPMPipeline(unet=unet.eval(), scheduler=DDPMScheduler(num_train_timesteps=1000))


def _dit(folder: Path) -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        **_HEADS, num_layers=4, in_channels=4, out_channels=8, sample_size=8, num_embeds_ada_norm=1000
    )
    return DiTPipeline(
        transformer=with_random_weights(transformer),
        vae=picture_vae(),
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02),
        id2label={0: "tench", 1: "goldfish, Carassius auratus"},
    )


BUILDERS: Mapping[str, Callable[[Path], Any]] = {
    "pixart": _pixart,
    "sd3": _sd3,
    "flux": _flux,
    "wan": _wan,
    "ddpm": _ddpm,
    "dit": _dit,
}
KINDS = ("sd", *BUILDERS)

_PROMPT: dict[str, Any] = {"prompt": "a red cat", "output_type": "np"}
_SQUARE = {"height": 16, "width": 16}
DRAWN_WITH: Mapping[str, Mapping[str, Any]] = {
    "sd": _PROMPT,
    "pixart": {
        **_PROMPT,
        "max_sequence_length": CAPTION_LENGTH,
        "use_resolution_binning": False,
        "clean_caption": False,
    },
    "sd3": {**_PROMPT, "max_sequence_length": CAPTION_LENGTH},
    "flux": {**_PROMPT, **_SQUARE, "max_sequence_length": CAPTION_LENGTH},
    "wan": {**_PROMPT, "height": 32, "width": 32, "num_frames": 1, "max_sequence_length": CAPTION_LENGTH},
    "ddpm": {"output_type": "np"},
    "dit": {"class_labels": [1], "output_type": "np"},
}
"""By kind: what its pipeline is called with to draw one small picture."""


def tiny_pipeline(kind: str, folder: Path) -> Path:
    """``folder``, to which a pipeline of this ``kind`` was written; the global random state stays as it was."""
    if kind == "sd":
        save_tiny_pipeline(folder, build_unet(TINY_UNET))
        return folder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BUILDERS[kind](folder).save_pretrained(folder, safe_serialization=True)
    return folder


def drawn(pipeline: Any, kind: str, steps: int = 2, seed: int = 0) -> torch.Tensor:
    """One picture (H, W, 3) of numbers from 0 to 1, as plain diffusers draws it; of a video its one frame."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    found = pipeline(**DRAWN_WITH[kind], num_inference_steps=steps, generator=generator)
    return torch.as_tensor(found.frames[0][0] if kind == "wan" else found.images[0])
