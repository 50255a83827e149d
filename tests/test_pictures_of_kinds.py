"""Pictures of every kind of pipeline: into latents and back, drawn as plain diffusers draws them, and trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from tiny_pipelines import DRAWN_WITH, KINDS
from torch import Tensor
from training_images import png_image

from prune_lab.config import DataConfig, DistillConfig
from prune_lab.distill import build_cache, draw_batch, draw_cache, source_of
from prune_lab.distill.batches import batch_rows
from prune_lab.errors import DataError, UnsupportedModelError
from prune_lab.evaluation import generate
from prune_lab.families import known_conditions
from prune_lab.families.drawing import class_numbers, class_texts
from prune_lab.probes import (
    decode_latents,
    draw_at,
    encode_distributions,
    encode_pictures,
    encode_pixels,
    picture_side,
)
from prune_lab.prompts import Prompts
from prune_lab.runtime import generator_for, seeded

SIDES = {"sd": 32, "pixart": 16, "sd3": 16, "flux": 16, "wan": 32, "ddpm": 16, "dit": 16}
SHAPES = {
    "sd": (4, 16, 16),
    "pixart": (4, 8, 8),
    "sd3": (4, 8, 8),
    "flux": (4, 8, 8),
    "wan": (4, 1, 4, 4),
    "ddpm": (3, 16, 16),
    "dit": (4, 8, 8),
}
TEXT = {"ddpm": "picture 1", "dit": "class 1"}


@pytest.fixture(scope="module")
def loaded(pipeline_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """``loaded(kind)``: a pipeline by plain diffusers; FLUX and Wan, which have no size of their own, a small one."""
    kept: dict[str, Any] = {}

    def pipeline(kind: str) -> Any:
        if kind not in kept:
            kept[kind] = DiffusionPipeline.from_pretrained(pipeline_folder(kind))
            kept[kind].set_progress_bar_config(disable=True)
            draw_at(kept[kind], SIDES[kind])
        return kept[kind]

    return pipeline


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=seeded(seed), dtype=torch.uint8)


# In and out -----------------------------------------------------------------------------------------------------------


def by_hand(pipeline: Any, kind: str, pixels: Tensor) -> Tensor:
    """Latents as the training scripts of diffusers make them."""
    if kind == "ddpm":
        return pixels
    config = pipeline.vae.config
    with torch.no_grad():
        if kind == "wan":
            mode = pipeline.vae.encode(pixels[:, :, None]).latent_dist.mode()
            mean, deviation = (
                torch.tensor(values)[:, None, None, None]
                for values in (config.latents_mean, config.latents_std)
            )
            return (mode - mean) / deviation
        return (
            pipeline.vae.encode(pixels).latent_dist.mode() - (config.shift_factor or 0)
        ) * config.scaling_factor


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_becomes_latents_as_training_makes_them(kind: str, loaded: Callable[[str], Any]) -> None:
    pipeline, pictures = loaded(kind), noise(3, 3, SIDES[kind], SIDES[kind])
    expected = by_hand(pipeline, kind, pictures.float() / 127.5 - 1)
    found = encode_pictures(pipeline, pictures, batch=2)
    assert tuple(found.shape[1:]) == SHAPES[kind]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    mean, log_variance = encode_distributions(pipeline, pictures)
    torch.testing.assert_close(mean, found)
    assert (log_variance is None) == (kind == "ddpm")


def test_the_spread_of_latents_is_scaled_channel_by_channel(loaded: Callable[[str], Any]) -> None:
    pipeline, pictures = loaded("wan"), noise(1, 3, 32, 32)
    _, log_variance = encode_distributions(pipeline, pictures)
    with torch.no_grad():
        plain = pipeline.vae.encode((pictures.float() / 127.5 - 1)[:, :, None]).latent_dist
    expected = plain.std / torch.tensor(pipeline.vae.config.latents_std)[:, None, None, None]
    assert log_variance is not None
    torch.testing.assert_close((log_variance / 2).exp(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_a_drawn_picture_are_those_it_is_decoded_from(
    kind: str, loaded: Callable[[str], Any]
) -> None:
    pipeline, text = loaded(kind), TEXT.get(kind, "a red cat")
    asked: dict[str, Any] = {"steps": 2, "guidance": 1.5}
    pictures = generate(pipeline, [text], [0, 1], **asked)
    latents = generate(pipeline, [text], [0, 1], **asked, latents=True)
    assert tuple(latents.shape) == (2, *SHAPES[kind])
    if kind == "dit":  # it hands out no latents: those of its pictures are taken
        expected = encode_pixels(pipeline, pictures.float() / 127.5 - 1)
        torch.testing.assert_close(latents, expected, rtol=0, atol=0.05)
        return
    assert (decode_latents(pipeline, latents).int() - pictures.int()).abs().max() <= 1


def test_a_vae_without_a_distribution_gives_its_latents(loaded: Callable[[str], Any]) -> None:
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    ).eval()
    pipeline = loaded("pixart")
    kept, pipeline.vae = pipeline.vae, vae
    try:
        pictures = noise(2, 3, 16, 16)
        with torch.no_grad():
            expected = vae.encode(pictures.float() / 127.5 - 1).latent * 0.4
        torch.testing.assert_close(encode_pictures(pipeline, pictures), expected)
        assert encode_distributions(pipeline, pictures)[1] is None
        with torch.no_grad():
            drawn = (vae.decode(expected / 0.4).sample / 2 + 0.5).clamp(0, 1) * 255
        assert (decode_latents(pipeline, expected).float() - drawn).abs().max() <= 1
    finally:
        pipeline.vae = kept


# Drawn ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_that_plain_diffusers_draws(kind: str, loaded: Callable[[str], Any]) -> None:
    pipeline, text = loaded(kind), TEXT.get(kind, "a red cat")
    guidance = {} if kind == "ddpm" else {"guidance_scale": 1.5}
    found = generate(pipeline, [text], [3], steps=2, guidance=1.5)
    source = generator_for(3, text, 0) if kind == "ddpm" else seeded(3)
    plain = pipeline(**DRAWN_WITH[kind], **guidance, num_inference_steps=2, generator=source)
    picture = torch.as_tensor(plain.frames[0][0] if kind == "wan" else plain.images[0]).permute(2, 0, 1)
    assert tuple(found.shape) == (1, 3, SIDES[kind], SIDES[kind])
    assert (found[0].int() - (picture * 255).round().int()).abs().max() <= 1


def test_a_model_that_is_asked_for_nothing_draws_other_pictures_by_name(
    loaded: Callable[[str], Any],
) -> None:
    pipeline = loaded("ddpm")
    both = generate(pipeline, ["picture 1", "picture 2"], [0], steps=2, guidance=7.5)
    again = generate(pipeline, ["picture 2"], [0], steps=2, guidance=7.5)
    assert not torch.equal(both[0], both[1])
    assert torch.equal(both[1], again[0])


def class_pipeline() -> DDPMPipeline:
    """A model of pixels that is told one of five classes."""
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=5,
    )
    return DDPMPipeline(model.eval(), DDPMScheduler(num_train_timesteps=100))


def test_classes_of_a_model_of_pixels_are_drawn_by_number() -> None:
    pipeline = class_pipeline()
    model = pipeline.unet
    found = generate(pipeline, ["class 1", "4"], [0], steps=3, guidance=1.0)
    for picture, number in zip(found, (1, 4), strict=True):
        pipeline.scheduler.set_timesteps(3)
        source = seeded(0)
        image = torch.randn(1, 3, 8, 8, generator=source)
        for step in pipeline.scheduler.timesteps:
            with torch.no_grad():
                predicted = model(image, step, class_labels=torch.tensor([number])).sample
            image = pipeline.scheduler.step(predicted, step, image, generator=source).prev_sample
        expected = ((image[0] / 2 + 0.5).clamp(0, 1) * 255).round().int()
        assert (picture.int() - expected).abs().max() <= 1
    assert not torch.equal(found[0], found[1])
    with pytest.raises(DataError, match=r"asked for the class of '5'.*give 0 to 4"):
        generate(pipeline, ["5"], [0], steps=3, guidance=1.0)
    with pytest.raises(DataError, match="a red cat"):
        class_numbers(["a red cat"], 5)
    assert class_texts(5, 3, first=4) == ("class 4", "class 0", "class 1")


def test_classes_come_with_the_pictures(tmp_path: Path) -> None:
    pipeline = class_pipeline()
    names = ["class 3", "1", "class 0", "class 3"]
    folder = tmp_path / "mine"
    folder.mkdir()
    for row, name in enumerate(names):
        (folder / f"{row}.png").write_bytes(png_image(row))
        (folder / f"{row}.txt").write_text(name)
    settings = DataConfig(source=str(folder), flip=True, format="float16", count=7, steps=2)
    own = build_cache(pipeline, source_of(settings), settings, tmp_path / "own").cache
    drawn = draw_cache(pipeline, Prompts(("unread",), ("",)), settings, tmp_path / "drawn").cache
    everything = torch.arange(4)
    for cache, expected in ((own, [3, 1, 0, 3]), (drawn, [0, 1, 2, 3, 4, 0, 1])):
        batch = cache.rows(torch.arange(len(cache)), torch.zeros(len(cache), dtype=torch.int64))
        labels = batch.added["class_labels"]
        assert labels.dtype == torch.int64
        assert sorted(labels.tolist()) == sorted(expected)  # prompts are drawn in an order of their own
        assert batch.log_variance is None
        assert tuple(batch.mean.shape[1:]) == (3, 8, 8)
    rows = own.rows(everything, torch.ones_like(everything))
    assert torch.equal(rows.mean, own.rows(everything, torch.zeros_like(everything)).mean.flip(-1))
    # a training batch tells the model the class of each picture
    conditions = known_conditions(pipeline.unet)
    batch = draw_batch(own, pipeline.scheduler, DistillConfig(batch=4), 1, conditions=conditions)
    order = torch.tensor(batch_rows(4, 4, 0, 1))
    assert torch.equal(batch.added["class_labels"], torch.tensor([3, 1, 0, 3])[order])
    assert tuple(batch.embeddings.shape) == (4, 0, 0)
    (folder / "0.txt").write_text("a red cat")
    with pytest.raises(DataError, match="asked for the class of 'a red cat'"):
        build_cache(pipeline, source_of(settings), settings, tmp_path / "other")


def test_a_size_is_asked_of_models_without_one(loaded: Callable[[str], Any]) -> None:
    pipeline = loaded("sd3")
    draw_at(pipeline, 512)
    assert picture_side(pipeline) == 16  # its own
    with pytest.raises(DataError, match="multiples of 16; give 32"):
        draw_at(loaded("wan"), 33)
    assert picture_side(loaded("wan")) == 32


def test_parts_that_hide_the_latents_are_refused() -> None:
    from diffusers import LDMPipeline, VQModel

    pipeline = LDMPipeline(
        VQModel(), UNet2DModel(sample_size=8, block_out_channels=(32,) * 4), DDPMScheduler()
    )
    with pytest.raises(UnsupportedModelError, match="its vqvae makes them"):
        encode_pixels(pipeline, noise(1, 3, 8, 8))
