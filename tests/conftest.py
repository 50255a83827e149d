"""A small network with Stable Diffusion's exact topology, and a whole pipeline folder around it.

Four stages, three with cross-attention, two layers per block: the same 38 block names as SD-v1.4, in milliseconds.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

# Beside other workers one thread each, also of what a test starts: two on one core only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# A property test has no business failing because the machine was busy; in CI it tries the same examples every time.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

torch.set_num_threads(min(2, torch.get_num_threads()))

TINY_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [8, 16, 32, 32],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}

# Small networks of the other shapes that are supported.
SHAPES: dict[str, dict[str, Any]] = {
    "sd-v1": TINY_UNET,
    "sd-v2": {**TINY_UNET, "use_linear_projection": True, "attention_head_dim": [1, 2, 4, 4]},
    "sdxl": {
        **TINY_UNET,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [8, 16, 32],
        "transformer_layers_per_block": [1, 2, 3],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    },
}


def build_unet(config: dict[str, Any], seed: int = 0) -> Any:
    """A randomly initialised float32 U-Net in eval mode; the global random state stays as it was."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel.from_config(config).eval()


@pytest.fixture(autouse=True)
def _same_randomness() -> None:
    """Whatever a test draws without a generator of its own is the same every time and in every order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_unet_shared() -> Any:
    """The one tiny U-Net that the copies of ``tiny_unet`` are made from; do not change it."""
    return build_unet(TINY_UNET)


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """A U-Net config with SD's topology and few channels."""
    return copy.deepcopy(TINY_UNET)


@pytest.fixture
def tiny_unet(tiny_unet_shared: Any) -> Any:
    """A U-Net of ``tiny_config``, the same weights in every test, and free to be changed."""
    return copy.deepcopy(tiny_unet_shared)


@pytest.fixture(scope="session")
def tiny_pipeline_folder(tmp_path_factory: pytest.TempPathFactory, tiny_unet_shared: Any) -> Path:
    """A complete ``StableDiffusionPipeline`` folder in safetensors with random weights; copy it to change it.

    Latents are 4 x 16 x 16, pictures 3 x 32 x 32, captions 16 tokens of width 16.
    """
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline

    root = tmp_path_factory.mktemp("tiny-pipeline")
    folder = root / "pipeline"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(8, 16),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=32,
        )
        text_encoder = build_text_encoder()
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=build_tokenizer(root),
        unet=tiny_unet_shared,
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def tiny_scorer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``CLIPModel`` folder with random weights, its tokenizer and its picture settings (32 x 32 pixels)."""
    from transformers import CLIPConfig, CLIPModel

    root = tmp_path_factory.mktemp("tiny-scorer")
    folder = root / "scorer"
    tokenizer = build_tokenizer(root)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config=build_text_encoder().config.to_dict(),
                vision_config={**vision, "image_size": 32, "patch_size": 8, "projection_dim": 16},
                projection_dim=16,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pictures = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures), encoding="utf-8")
    return folder


def build_text_encoder() -> Any:
    """A two-layer CLIP text model of width 16 over 16 tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(_vocabulary()),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            projection_dim=16,
            bos_token_id=_vocabulary()["<|startoftext|>"],
            eos_token_id=_vocabulary()["<|endoftext|>"],
        )
    )


def build_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that spells words letter by letter; its two files are written to ``folder``."""
    from transformers import CLIPTokenizer

    (folder / "vocab.json").write_text(json.dumps(_vocabulary()), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def _vocabulary() -> dict[str, int]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.-'"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}


@pytest.fixture
def tiny_inputs(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of one forward pass of ``tiny_unet`` on a batch of two."""
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 16, 16, generator=generator),
        "timestep": torch.tensor([20, 700]),
        "encoder_hidden_states": torch.randn(2, 7, tiny_config["cross_attention_dim"], generator=generator),
    }
