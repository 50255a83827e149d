"""The U-Net of the reference model: its schedule and start, what its training takes away from which rows, resuming."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from prune_lab.blocks import architecture_of
from prune_lab.errors import DataError
from prune_lab.surgery import bypassed
from recipes.reference_model.captions import CaptionedLatents
from recipes.reference_model.denoiser import (
    SCHEDULE,
    Float32Attention,
    build_denoiser,
    build_scheduler,
    noise_levels,
    open_main_path,
)
from recipes.reference_model.denoising import (
    SupervisedDenoiser,
    TrainingBatch,
    draw_batch,
    hooked,
    severed,
    train_denoiser,
)
from recipes.reference_model.settings import DenoiserShape, Objective, Recipe

TINY_DENOISER = DenoiserShape(channels=(8, 8, 8, 8), heads=2, groups=4, text_width=16, latent=8)
TINY_TEXT = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))  # states of the tiny captions


def _tiny_pairs() -> CaptionedLatents:
    generator = torch.Generator().manual_seed(0)
    return CaptionedLatents(
        latents=torch.randn(1, 4, 8, 8, generator=generator).repeat(6, 1, 1, 1),
        ids=torch.arange(20).reshape(4, 5),
        full=torch.tensor([1, 2, 3, 1, 2, 3]),
        plain=torch.tensor([1, 2, 3, 1, 2, 3]),
        weight=torch.ones(6),
    )


def _tiny_batch(**changes: torch.Tensor) -> TrainingBatch:
    batch = draw_batch(_tiny_pairs(), TINY_TEXT, 4, Objective(severed=0, deaf=0), seed=0, step=0)
    return dataclasses.replace(batch, **changes)


def _random_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return build_denoiser(TINY_DENOISER).eval()


def test_float32_attention_equals_the_librarys() -> None:
    torch.manual_seed(0)
    unet = build_denoiser(TINY_DENOISER).eval()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 7, 16))
    with torch.no_grad():
        wanted = unet(*inputs).sample
        unet.set_attn_processor(Float32Attention())
        torch.testing.assert_close(unet(*inputs).sample, wanted, atol=1e-5, rtol=1e-5)


def test_the_answer_is_the_velocity_of_the_schedule() -> None:
    data = _tiny_pairs()
    batch = draw_batch(data, TINY_TEXT, 16, Objective(noisier=1), seed=3, step=5)
    schedule = DDPMScheduler.from_config(build_scheduler().config)
    assert schedule.config.prediction_type == "v_prediction"
    kept = schedule.alphas_cumprod[batch.times].sqrt()[:, None, None, None]
    latents = data.latents[:1].repeat(16, 1, 1, 1)  # all six are the same picture
    noise = (batch.noisy - kept * latents) / (1 - kept.square()).sqrt()
    torch.testing.assert_close(
        batch.velocity, schedule.get_velocity(latents, noise, batch.times), atol=1e-4, rtol=1e-4
    )
    # Every batch sees all noise levels: one timestep in each of its 16 slices of the schedule.
    assert (batch.times * 16 // 1000).tolist() == list(range(16))


def test_the_schedule_ends_in_noise_alone() -> None:
    signal, spread = noise_levels()
    assert (float(signal[-1]), float(spread[-1])) == (0, 1)
    torch.testing.assert_close(signal.square() + spread.square(), torch.ones(1000))
    own = DDPMScheduler(**SCHEDULE).alphas_cumprod.sqrt()
    assert float(own[-1]) == pytest.approx(0.0683, abs=1e-4)  # of SD's own betas
    # arXiv:2305.08891, algorithm 1: shifted by the last value, scaled so that the first stays.
    wanted = (own - own[-1]) * own[0] / (own[0] - own[-1])
    torch.testing.assert_close(signal, wanted, atol=1e-5, rtol=1e-4)
    data = _tiny_pairs()
    last = draw_batch(data, TINY_TEXT, 1000, Objective(noisier=1), seed=0, step=0)
    torch.testing.assert_close(
        last.velocity[-1], -data.latents[0]
    )  # in noise alone the answer is the picture


@pytest.mark.parametrize("noisier", [1.0, 1.5, 3.0])
def test_noisy_timesteps_are_drawn_as_often_as_asked(noisier: float) -> None:
    times = draw_batch(_tiny_pairs(), TINY_TEXT, 2000, Objective(noisier=noisier), seed=1, step=1).times
    for late in (0.1, 0.3, 0.6):
        # t >= 1 - late where u^noisier <= late
        assert float((times >= 1000 * (1 - late)).float().mean()) == pytest.approx(
            late ** (1 / noisier), abs=2e-3
        )


def test_the_auxiliaries_fade_in_the_last_part_of_the_training() -> None:
    objective = Objective(supervision=0.4, severed=0.2, deaf=0.8, fade_from=100, fade_to=0.25)
    assert [objective.at(step, 300).supervision for step in (0, 100, 200, 300)] == pytest.approx(
        [0.4, 0.4, 0.25, 0.1]
    )
    last = objective.at(300, 300)
    assert (last.severed, last.deaf, last.severed_above) == pytest.approx((0.05, 0.2, 400))
    assert objective.at(10, 50) == objective  # a training that ends before
    early = Objective(supervision=0.4, fade_from=100, fade_until=200, fade_to=0.25)
    assert [early.at(step, 300).supervision for step in (150, 200, 300)] == pytest.approx([0.25, 0.1, 0.1])


def test_noisy_timesteps_lose_their_preference_from_a_step_on() -> None:
    objective = Objective(noisier=2.0, even_from=100)
    assert [objective.at(step, 300).noisier for step in (0, 99, 100, 299)] == [2, 2, 1, 1]
    assert Objective(noisier=2.0).at(299, 300).noisier == 2


def test_a_supervised_pass_is_the_plain_one_where_nothing_is_taken_away() -> None:
    unet, batch = _random_unet(), _tiny_batch()
    wanted = unet(batch.noisy, batch.times, batch.text).sample
    found, read = SupervisedDenoiser(unet)(batch)
    assert torch.equal(found, wanted)
    assert [tuple(one.shape) for one in read] == [(4, 4, 4, 4), (4, 4, 4, 4), (4, 4, 8, 8), (4, 4, 8, 8)]
    assert torch.equal(unet(batch.noisy, batch.times, batch.text).sample, wanted)  # no hook stayed behind


def test_deaf_rows_hear_their_caption_in_the_mid_stage_alone() -> None:
    unet = _random_unet()
    batch = _tiny_batch(deaf=torch.tensor([True, False, True, False]))
    model = SupervisedDenoiser(unet)

    def changed(path: str) -> list[bool]:
        """Rows whose answer depends on the caption while this block is away."""
        other = dataclasses.replace(batch, text=batch.text.flip(2))
        with bypassed(unet, [path]):
            return ((model(batch)[0] - model(other)[0]).abs().amax((1, 2, 3)) > 1e-5).tolist()

    assert changed("Md.R1") == [True, True, True, True]
    assert changed("Md.A1") == [False, True, False, True]


def test_severed_rows_lose_the_skips_of_the_outermost_up_stages() -> None:
    unet, cut = _random_unet(), torch.tensor([0, 2, 4, 3])
    seen: list[list[bool]] = []

    def look(_module: torch.nn.Module, _args: object, kwargs: dict[str, Any]) -> None:
        skips = kwargs["res_hidden_states_tuple"]
        seen.append([bool(torch.stack([(s[row] != 0).any() for s in skips]).all()) for row in range(4)])

    batch = _tiny_batch()
    with severed(unet, cut):
        handles = [stage.register_forward_pre_hook(look, with_kwargs=True) for stage in unet.up_blocks]
        unet(batch.noisy, batch.times, batch.text)
    for handle in handles:
        handle.remove()
    # Up1 (innermost) to Up4; a row keeps its skips where fewer stages are cut than lie outside.
    assert seen == [
        [True, True, False, True],
        [True, True, False, False],
        [True, False, False, False],
        [True, False, False, False],
    ]


def test_every_block_starts_as_nothing_and_the_main_path_is_open() -> None:
    unet, batch = _random_unet(), _tiny_batch()
    open_main_path(unet)
    with torch.no_grad():
        whole = unet(batch.noisy, batch.times, batch.text).sample
        for block in architecture_of(unet).blocks:
            if block.removable and not block.skip_channels:  # in up stages the shortcut leaves with the block
                with bypassed(unet, [block.name]):
                    assert torch.equal(unet(batch.noisy, batch.times, batch.text).sample, whole), block.name
        outputs: dict[int, torch.Tensor] = {}
        with (
            hooked([unet.mid_block, unet.up_blocks[0]], outputs.__setitem__),
            severed(unet, torch.full((4,), 4)),
        ):
            unet(batch.noisy, batch.times, batch.text)
    # Without skips the innermost up stage hands on what the mid stage gave, enlarged.
    assert float(outputs[1].std() / outputs[0].std()) > 0.5


@pytest.mark.long
def test_training_the_denoiser_lowers_its_loss_and_resumes_exactly(tmp_path: Path) -> None:
    data, recipe = _tiny_pairs(), Recipe(steps=40, batch=8, rate=3e-3, warmup=5, cooldown=10, ema=0.9)
    whole = train_denoiser(data, TINY_TEXT, TINY_DENOISER, recipe, tmp_path / "whole")
    curve = pd.read_csv(tmp_path / "whole" / "denoiser.csv")
    assert curve["loss"].tail(8).mean() < 0.8 * curve["loss"].head(8).mean()
    train_denoiser(data, TINY_TEXT, TINY_DENOISER, recipe, tmp_path / "cut", until=17)
    resumed = train_denoiser(data, TINY_TEXT, TINY_DENOISER, recipe, tmp_path / "cut")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert pd.read_csv(tmp_path / "cut" / "denoiser.csv")["loss"].tolist() == curve["loss"].tolist()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    recipe = Recipe(steps=2, batch=2, rate=1e-3)
    train_denoiser(_tiny_pairs(), TINY_TEXT, TINY_DENOISER, recipe, tmp_path, until=1)
    wider = DenoiserShape(channels=(16, 16, 16, 16), heads=2, groups=4, text_width=16, latent=8)
    with pytest.raises(DataError, match="another model"):
        train_denoiser(_tiny_pairs(), TINY_TEXT, wider, recipe, tmp_path)
