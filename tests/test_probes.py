"""Probes: right noise, balanced rows, one digest, and files that are whole or refused."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SASolverScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from prune_lab.errors import DataError, UnsupportedModelError
from prune_lab.probes import (
    Probe,
    encode_captions,
    encode_pictures,
    load_probe,
    make_probe,
    predict,
    random_probe,
    schedule_of,
)
from prune_lab.probes.making import _assign_timesteps
from prune_lab.runtime import seeded

CAPTIONS = ["noto emoji, cat", "a red house", "noto emoji, dog", "a blue boat"]
GROUPS = ["emoji", "art", "emoji", "art"]


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_folder: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, safety_checker=None)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), generator=seeded(7), dtype=torch.uint8)


@pytest.fixture
def probe(tiny_config: dict[str, Any]) -> Probe:
    return random_probe(tiny_config, samples=5, seed=3)


def alphas_by_hand(length: int = 1000) -> torch.Tensor:
    """Cumulative products of SD's schedule: the square roots of beta go linearly from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, length, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def test_noisy_is_the_schedule_of_the_pipeline(pipeline: Any, pictures: torch.Tensor) -> None:
    probe = make_probe(pipeline, pictures, CAPTIONS, GROUPS, timesteps=4, seed=0)
    latents = encode_pictures(pipeline, pictures).double()
    alpha = alphas_by_hand()[probe.timesteps][:, None, None, None]
    by_hand = alpha.sqrt() * latents + (1 - alpha).sqrt() * probe.noise.double()
    torch.testing.assert_close(probe.noisy.double(), by_hand, rtol=1e-5, atol=1e-5)
    assert torch.equal(probe.target, probe.noise)
    assert sorted(probe.timesteps.tolist()) == [125, 375, 625, 875]  # middles of four equal parts of 1000


def test_latents_are_the_scaled_mode(pipeline: Any, pictures: torch.Tensor) -> None:
    with torch.no_grad():
        moments = pipeline.vae.quant_conv(pipeline.vae.encoder(pictures.float() / 127.5 - 1))
    mean = moments[:, :4]  # the other four channels are the logarithm of the variance
    by_hand = mean * 0.18215
    latents = encode_pictures(pipeline, pictures, batch=3)
    torch.testing.assert_close(latents, by_hand, rtol=1e-4, atol=1e-5)
    assert latents.dtype == torch.float32
    assert not latents.is_inference()


def test_latents_are_shifted_when_the_vae_says_so(
    pipeline: Any, pictures: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = encode_pictures(pipeline, pictures)
    config = dict(pipeline.vae.config) | {"shift_factor": 0.5}
    monkeypatch.setattr(pipeline.vae, "_internal_dict", type(pipeline.vae.config)(config))
    shifted = encode_pictures(pipeline, pictures)
    torch.testing.assert_close(shifted, plain - 0.5 * 0.18215, rtol=1e-4, atol=1e-5)


def test_velocity_target(pipeline: Any, pictures: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, prediction_type="v_prediction"
    )
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    probe = make_probe(pipeline, pictures, CAPTIONS, GROUPS, timesteps=2, seed=0)
    alpha = alphas_by_hand()[probe.timesteps][:, None, None, None]
    latents = encode_pictures(pipeline, pictures).double()
    by_hand = alpha.sqrt() * probe.noise.double() - (1 - alpha).sqrt() * latents
    torch.testing.assert_close(probe.target.double(), by_hand, rtol=1e-5, atol=1e-5)


def test_a_kind_of_prediction_that_is_not_known_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'trigflow'"):
        schedule_of({"prediction_type": "trigflow"})


# Schedules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_schedule_is_that_of_the_plain_scheduler(kind: str) -> None:
    plain = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind, num_train_timesteps=50)
    schedule = schedule_of(plain.config)
    clean, noise = torch.randn(2, 50, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    steps = schedule.timesteps
    assert torch.equal(steps, torch.arange(50))
    assert torch.equal(schedule.add_noise(clean, noise, steps), plain.add_noise(clean, noise, steps))
    wanted = {"epsilon": noise, "sample": clean, "v_prediction": plain.get_velocity(clean, noise, steps)}
    assert torch.equal(schedule.target(clean, noise, steps), wanted[kind])


@pytest.mark.parametrize("maker", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_the_schedule_of_cogvideo_is_its_own(maker: Any) -> None:
    plain = maker(rescale_betas_zero_snr=True, snr_shift_scale=3.0, prediction_type="v_prediction")
    clean, noise = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    steps, schedule = torch.tensor([0, 400, 800, 999]), schedule_of(plain.config)
    assert torch.equal(schedule.add_noise(clean, noise, steps), plain.add_noise(clean, noise, steps))
    assert torch.equal(schedule.target(clean, noise, steps), plain.get_velocity(clean, noise, steps))


@pytest.mark.parametrize("shift", [1.0, 3.0, 1.73])
@pytest.mark.parametrize("maker", [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler])
def test_a_flow_goes_straight_from_latents_to_noise(maker: Any, shift: float) -> None:
    more: dict[str, Any] = {"shift": shift}
    if maker is UniPCMultistepScheduler:
        more = {"flow_shift": shift, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    plain = maker(num_train_timesteps=1000, **more)
    schedule = schedule_of(plain.config)
    assert (schedule.kind, schedule.length) == ("flow", 1000)
    if maker is FlowMatchEulerDiscreteScheduler:
        # The sampler's own training timesteps, which are not whole numbers, within half a step.
        assert (schedule.timesteps.flip(0) - plain.timesteps).abs().max() <= 0.501
    clean, noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(3)).double()
    steps = torch.tensor([1, 250, 1000])
    share = torch.tensor([0.001, 0.25, 1.0]).reshape(3, 1, 1, 1)
    noisy = schedule.add_noise(clean, noise, steps)
    torch.testing.assert_close(noisy, (1 - share) * clean + share * noise, rtol=1e-6, atol=1e-6)
    # A step of the size of the whole share along the target is the clean latent.
    torch.testing.assert_close(
        noisy - share * schedule.target(clean, noise, steps), clean, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "maker",
    [
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
        DEISMultistepScheduler,
        SASolverScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_a_sampler_that_goes_by_flow_sigmas_is_trained_on_its_own_way(maker: Any, kind: str) -> None:
    """The mixture is that of the sampler itself, and what the model is asked for leads it to the clean latents."""
    plain = maker(use_flow_sigmas=True, flow_shift=3.0, prediction_type=kind)
    plain.set_timesteps(10)
    if kind == "v_prediction":
        with pytest.raises(UnsupportedModelError, match="use_flow_sigmas"):
            schedule_of(plain.config)
        return
    schedule = schedule_of(plain.config)
    clean, noise = torch.randn(2, 1, 2, 4, 4, generator=torch.Generator().manual_seed(4))
    at = 4
    steps = plain.timesteps[at : at + 1].round().long()
    plain.sigmas[at] = steps / 1000  # of a whole number, where the sampler's own is between two
    plain._step_index = at
    signal, scale = plain._sigma_to_alpha_sigma_t(plain.sigmas[at])
    noisy = schedule.add_noise(clean, noise, steps)
    torch.testing.assert_close(noisy, signal * clean + scale * noise, rtol=1e-6, atol=1e-6)
    told = plain.convert_model_output(schedule.target(clean, noise, steps), sample=noisy)
    wanted = noise if maker is DEISMultistepScheduler else clean  # which it goes by
    torch.testing.assert_close(told, wanted, rtol=1e-4, atol=1e-5)


def test_a_schedule_with_a_moving_shift_is_even() -> None:
    config = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0).config
    assert torch.equal(schedule_of(config).timesteps, torch.arange(1, 1001))


def test_embeddings_are_the_text_encoders(pipeline: Any) -> None:
    tokens = pipeline.tokenizer(
        CAPTIONS, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        by_hand = pipeline.text_encoder(tokens.input_ids)[0]
    embeddings, added = encode_captions(pipeline, CAPTIONS, batch=3)
    torch.testing.assert_close(embeddings, by_hand)
    assert added == {}


def test_same_seed_same_digest(pipeline: Any, pictures: torch.Tensor) -> None:
    def digest(seed: int) -> str:
        return make_probe(pipeline, pictures, CAPTIONS, GROUPS, timesteps=4, seed=seed).digest

    assert digest(0) == digest(0) != digest(1)


def test_pictures_can_repeat_over_timesteps(pipeline: Any, pictures: torch.Tensor) -> None:
    probe = make_probe(pipeline, pictures, CAPTIONS, GROUPS, timesteps=4, seed=0, per_picture=2)
    assert probe.pictures.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert probe.captions[2:4] == ("a red house", "a red house")
    assert torch.equal(probe.embeddings[2], probe.embeddings[3])
    assert Counter(probe.timesteps.tolist()) == dict.fromkeys([125, 375, 625, 875], 2)
    for picture in range(4):
        assert len(probe.timesteps[probe.pictures == picture].unique()) == 2


@given(
    data=st.data(),
    groups=st.lists(st.sampled_from("abc"), min_size=1, max_size=40),
    strata=st.integers(1, 12),
)
def test_timesteps_are_balanced(data: st.DataObject, groups: list[str], strata: int) -> None:
    per_picture = data.draw(st.integers(1, strata))
    timesteps = _assign_timesteps(
        groups, strata=strata, per_picture=per_picture, length=1000, generator=seeded(0)
    )
    uses = Counter(timesteps.flatten().tolist())
    middles = {int((stratum + 0.5) * 1000 / strata) for stratum in range(strata)}
    assert set(uses) <= middles
    assert max(uses.values()) - (min(uses.values()) if len(uses) == strata else 0) <= 1
    assert all(len(set(row)) == per_picture for row in timesteps.tolist())
    for kind in set(groups):
        rows = timesteps[[group == kind for group in groups]].flatten().tolist()
        within = Counter(rows)
        assert max(within.values()) <= -(
            -len(rows) // strata
        )  # no timestep is used twice before all are once


@pytest.mark.parametrize(
    ("captions", "timesteps", "per_picture", "found"),
    [
        (CAPTIONS[:3], 4, 1, "3 captions"),
        (CAPTIONS, 2, 3, "3 of them per picture"),
        (CAPTIONS, 0, 1, "0 timesteps"),
        (CAPTIONS, 1001, 1, "schedule has 1000"),
    ],
)
def test_impossible_probes_are_refused(
    pipeline: Any, pictures: torch.Tensor, captions: list[str], timesteps: int, per_picture: int, found: str
) -> None:
    with pytest.raises(DataError, match=found):
        make_probe(pipeline, pictures, captions, GROUPS, timesteps=timesteps, seed=0, per_picture=per_picture)


def test_float_pictures_are_refused(pipeline: Any) -> None:
    with pytest.raises(DataError, match="uint8"):
        encode_pictures(pipeline, torch.zeros(2, 3, 32, 32))


def test_rows_must_agree(probe: Probe) -> None:
    with pytest.raises(DataError, match="captions"):
        Probe(
            noisy=probe.noisy,
            noise=probe.noise,
            timesteps=probe.timesteps,
            embeddings=probe.embeddings,
            captions=("one",),
            groups=probe.groups,
            target=probe.target,
        )


# Files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sdxl_config(tiny_config: dict[str, Any]) -> dict[str, Any]:
    return tiny_config | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 24,
    }


def test_save_and_load(sdxl_config: dict[str, Any], tmp_path: Path) -> None:
    probe = random_probe(sdxl_config, samples=3, seed=0)
    probe.save(tmp_path / "probe.safetensors")
    loaded = load_probe(tmp_path / "probe.safetensors")
    assert loaded.digest == probe.digest
    assert (loaded.captions, loaded.groups) == (probe.captions, probe.groups)
    for name, tensor in probe.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor), name
    assert set(loaded.added) == {"text_embeds", "time_ids"}
    assert loaded.added["time_ids"][0].tolist() == [128, 128, 0, 0, 128, 128]
    assert [path.name for path in tmp_path.iterdir()] == ["probe.safetensors"]


def test_damaged_files_are_refused(probe: Probe, tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    probe.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="damaged"):
        load_probe(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="damaged"):
        load_probe(path)
    path.write_bytes(content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])
    with pytest.raises(DataError, match="changed"):
        load_probe(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(DataError, match="another kind"):
        load_probe(path)
    with pytest.raises(DataError, match="no such file"):
        load_probe(tmp_path / "nothing.safetensors")


def test_a_failed_write_leaves_the_old_probe(
    probe: Probe, tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "probe.safetensors"
    probe.save(path)
    shutil.copy(path, tmp_path / "old")

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match="No space left"):
        random_probe(tiny_config, samples=2, seed=9).save(path)
    assert path.read_bytes() == (tmp_path / "old").read_bytes()
    assert {entry.name for entry in tmp_path.iterdir()} == {"probe.safetensors", "old"}


# Predictions -----------------------------------------------------------------------------------------------------


def test_predictions_are_the_models_own(tiny_unet: Any, probe: Probe) -> None:
    with torch.no_grad():
        by_hand = tiny_unet(probe.noisy, probe.timesteps, probe.embeddings).sample
    torch.testing.assert_close(predict(tiny_unet, probe, batch=8), by_hand, rtol=0, atol=0)
    torch.testing.assert_close(predict(tiny_unet, probe, batch=2), by_hand, rtol=1e-4, atol=1e-5)


def test_prediction_gives_back_the_training_mode(tiny_unet: Any, probe: Probe) -> None:
    tiny_unet.train()
    tiny_unet.mid_block.eval()
    before = [module.training for module in tiny_unet.modules()]
    predict(tiny_unet, probe)
    assert [module.training for module in tiny_unet.modules()] == before


def test_sdxl_conditioning_reaches_the_model(sdxl_config: dict[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(sdxl_config).eval()
    probe = random_probe(sdxl_config, samples=2, seed=0)
    with torch.no_grad():
        by_hand = unet(
            probe.noisy, probe.timesteps, probe.embeddings, added_cond_kwargs=dict(probe.added)
        ).sample
    torch.testing.assert_close(predict(unet, probe), by_hand, rtol=0, atol=0)


def test_random_probe_has_the_models_shapes(probe: Probe) -> None:
    assert probe.noisy.shape == probe.target.shape == (5, 4, 16, 16)
    assert probe.embeddings.shape == (5, 77, 16)
    assert len(set(probe.timesteps.tolist())) == 5
    assert probe.pictures.tolist() == [0, 1, 2, 3, 4]
    assert len(probe) == 5


# SDXL ------------------------------------------------------------------------------------------------------------


def test_sdxl_pipeline_carries_its_conditioning(
    sdxl_config: dict[str, Any], pipeline: Any, pictures: torch.Tensor
) -> None:
    """Two text encoders side by side, a pooled embedding, and the picture's size: all as the pipeline makes them."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        second = CLIPTextModelWithProjection(pipeline.text_encoder.config).eval()
        # 16 + 16 wide embeddings, a pooled one of 16 and 6 numbers about the size in 8 channels each
        config = sdxl_config | {
            "cross_attention_dim": 32,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        }
        unet = UNet2DConditionModel.from_config(config).eval()
    xl = StableDiffusionXLPipeline(
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        text_encoder_2=second,
        tokenizer=pipeline.tokenizer,
        tokenizer_2=pipeline.tokenizer,
        unet=unet,
        scheduler=pipeline.scheduler,
        add_watermarker=False,
    )
    probe = make_probe(xl, pictures, CAPTIONS, GROUPS, timesteps=2, seed=0)
    tokens = pipeline.tokenizer(
        CAPTIONS, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        pooled = second(tokens.input_ids).text_embeds
    torch.testing.assert_close(probe.added["text_embeds"], pooled)
    by_pipeline = xl._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, 16)
    assert torch.equal(probe.added["time_ids"], by_pipeline.repeat(4, 1))
    assert probe.embeddings.shape == (4, 16, 32)
    assert predict(unet, probe).isfinite().all()
