"""What a U-Net takes beside latents, timestep and text: given as diffusers' pipelines do, or refused; never zeros."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_UNET, build_unet
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from distilling import SCHEDULER, SETTINGS
from narrow_pipelines import EDITING, INPAINTING, LCM, REFINER, SDXL, narrow
from training_images import CACHED, MANY, TRAINING, open_source, write_images
from typer.testing import CliRunner

from prune_lab.blocks import architecture_of
from prune_lab.cli import app
from prune_lab.counting import count_macs
from prune_lab.distill import (
    DistillSetup,
    LatentCache,
    LiveData,
    Student,
    build_cache,
    distill_together,
    draw_batch,
    feature_pairs,
)
from prune_lab.distill.decoding import decode_image
from prune_lab.distill.encoding import crop_variants, encode_data
from prune_lab.errors import DataError, UnsupportedModelError
from prune_lab.evaluation import generate
from prune_lab.families import conditions_of, example_inputs, forward_inputs, known_conditions
from prune_lab.importance import ScoringContext
from prune_lab.plans import parse_plan
from prune_lab.prefix_sharing import predict_without, replayed
from prune_lab.probes import (
    guidance_embedding,
    load_probe,
    make_probe,
    picture_rows,
    predict,
    probe_of_latents,
    random_probe,
)
from prune_lab.probes.conditions import draw_mask
from prune_lab.profiling import profile_pipeline
from prune_lab.runtime import generator_for, progress_shown, seeded
from prune_lab.surgery import materialise

pytestmark = pytest.mark.usefixtures("one_thread")

GIVEN: Mapping[str, dict[str, Any]] = {
    "lcm": LCM,
    "inpainting": INPAINTING,
    "editing": EDITING,
    "sdxl": SDXL,
    "refiner": REFINER,
    "inpainting with guidance": LCM | INPAINTING,
}
# Counted, and refused wherever the U-Net would be run on inputs made here; with a word of the reason.
REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "depth": ({"in_channels": 5}, "depth map"),
    "upscaler": ({"in_channels": 7, "num_class_embeds": 1000}, "small noisy picture"),
    "unknown channels": ({"in_channels": 12}, "8 channels behind the latents"),
    "noise level": ({"num_class_embeds": 10}, "one of 10 numbers"),
    "labels like timesteps": ({"class_embed_type": "timestep"}, "embedded like a timestep"),
    "labels as they are": ({"class_embed_type": "identity"}, "32 numbers"),
    "geowizard": (
        {"in_channels": 8, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 10},
        "10 numbers",
    ),
    "unclip": (
        {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 12},
        "12 numbers",
    ),
    "side by side": (
        {
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 6,
            "class_embeddings_concat": True,
        },
        "6 numbers",
    ),
    "kandinsky": ({"addition_embed_type": "image", "encoder_hid_dim": 24}, "embedded picture"),
    "kandinsky 2.1": (
        {
            "addition_embed_type": "text_image",
            "encoder_hid_dim": 24,
            "encoder_hid_dim_type": "text_image_proj",
        },
        "embedded picture",
    ),
    "kandinsky controlnet": (
        {"addition_embed_type": "image_hint", "encoder_hid_dim": 24, "in_channels": 8},
        "embedded picture",
    ),
    "image projection": ({"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 24}, "embedded picture"),
    "odd prediction": ({"out_channels": 7}, "and a variance of it"),
}
# Of these the inputs are those of any other U-Net.
PLAIN: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "wide text": {"encoder_hid_dim": 24, "encoder_hid_dim_type": "text_proj"},
    "text in the timestep": {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
    "fourier": {"time_embedding_type": "fourier"},
    "learned variance": {"out_channels": 8},
}


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), generator=seeded(7), dtype=torch.uint8)


CAPTIONS = ("a cat", "a red house", "a dog")
GROUPS = ("", "", "")


@contextmanager
def recorded(unet: Any) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of every forward pass of ``unet``, the first two by their names."""
    calls: list[dict[str, Any]] = []

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
        ignored = ("return_dict", "cross_attention_kwargs")
        calls.append({name: v for name, v in named.items() if v is not None and name not in ignored})

    handle = unet.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def form(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Shape and format of each tensor; a timestep that is one number for all rows counts as one for each."""
    rows = len(inputs["sample"])
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            found[name] = form({"sample": inputs["sample"], **value})
        else:
            found[name] = (tuple(value.expand(rows).shape if value.ndim == 0 else value.shape), value.dtype)
    return found


def inputs_of(probe: Any, unet: Any) -> dict[str, Any]:
    ((_, inputs),) = probe.batches(len(probe), unet)
    return dict(inputs)


# As the pipelines give it ----------------------------------------------------------------------------------------


DRAWN: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}


def test_guidance_is_embedded_as_the_pipeline_does_it(tiny_pipeline: Any, pictures: torch.Tensor) -> None:
    own = narrow("lcm", tiny_pipeline)
    probe = make_probe(own, pictures, CAPTIONS, GROUPS, timesteps=3, seed=0)
    with recorded(own.unet) as calls:
        own(list(CAPTIONS), **DRAWN | {"guidance_scale": 8.5})
    assert form(calls[0]) == form(inputs_of(probe, own.unet))
    assert torch.equal(calls[0]["timestep_cond"], guidance_embedding(torch.full((3,), 7.5), 32))
    assert len(probe.added["guidance"].unique(dim=0)) == 3
    # each row is the embedding of a number of LCM's own range, by diffusers' function
    near = own.get_guidance_scale_embedding(torch.linspace(2, 14, 120_001), embedding_dim=32)
    for row in probe.added["guidance"]:
        assert float((near - row).abs().amax(dim=1).min()) < 0.1
    outside = own.get_guidance_scale_embedding(torch.linspace(0, 1.9, 20_001), embedding_dim=32)
    assert all(float((outside - row).abs().amax(dim=1).min()) > 0.1 for row in probe.added["guidance"])


def test_odd_widths_are_padded_as_diffusers_does(tiny_pipeline: Any) -> None:
    scales = torch.tensor([0.0, 3.25, 13.9])
    by_diffusers = narrow("lcm", tiny_pipeline).get_guidance_scale_embedding(scales, embedding_dim=33)
    assert torch.equal(guidance_embedding(scales, 33), by_diffusers)


def test_mask_and_masked_picture_are_those_of_the_pipeline(
    tiny_pipeline: Any, pictures: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = narrow("inpainting", tiny_pipeline)
    probe = make_probe(own, pictures, CAPTIONS, GROUPS, timesteps=3, seed=0)
    masks = torch.stack([draw_mask((32, 32), generator_for(0, "mask", row)) for row in range(3)])
    # the pipeline draws from the VAE's distribution; its mode is the same every time
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    with recorded(own.unet) as calls:
        own(
            list(CAPTIONS),
            image=pictures.float() / 255,
            mask_image=masks,
            height=32,
            width=32,
            strength=1.0,
            **DRAWN,
        )
    found = inputs_of(probe, own.unet)
    assert form(calls[0]) == form(found)
    assert torch.equal(found["sample"][:, 4:5], calls[0]["sample"][:, 4:5])
    torch.testing.assert_close(found["sample"][:, 5:], calls[0]["sample"][:, 5:], rtol=1e-4, atol=1e-5)
    assert torch.equal(found["sample"][:, :4], probe.noisy)


def test_the_picture_to_edit_is_encoded_as_the_pipeline_does_it(
    tiny_pipeline: Any, pictures: torch.Tensor
) -> None:
    own = narrow("editing", tiny_pipeline)
    probe = make_probe(own, pictures, CAPTIONS, GROUPS, timesteps=3, seed=0)
    with recorded(own.unet) as calls:
        own(list(CAPTIONS), image=pictures.float() / 255, **DRAWN)
    found = inputs_of(probe, own.unet)
    assert form(calls[0]) == form(found)
    torch.testing.assert_close(found["sample"][:, 4:], calls[0]["sample"][:, 4:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["encoder_hidden_states"], calls[0]["encoder_hidden_states"])


@pytest.mark.parametrize("kind", ["sdxl", "refiner"])
def test_sizes_and_pooled_text_are_those_of_the_pipeline(
    tiny_pipeline: Any, pictures: torch.Tensor, kind: str
) -> None:
    own = narrow(kind, tiny_pipeline)
    probe = make_probe(own, pictures, CAPTIONS, GROUPS, timesteps=3, seed=0)
    more = {"image": pictures.float() / 255, "strength": 1.0} if kind == "refiner" else {}
    with recorded(own.unet) as calls:
        own(list(CAPTIONS), **DRAWN, **more)
    found = inputs_of(probe, own.unet)
    assert form(calls[0]) == form(found)
    for name in ("text_embeds", "time_ids"):
        torch.testing.assert_close(found["added_cond_kwargs"][name], calls[0]["added_cond_kwargs"][name])


# Given or refused, and counted in any case -------------------------------------------------------------------------


# Two stages of one layer: counting a U-Net costs by its operators.
SMALL_UNET = TINY_UNET | {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
}
ALL = {**PLAIN, **GIVEN, **{name: changes for name, (changes, _) in REFUSED.items()}}


@pytest.mark.parametrize("kind", ALL)
def test_every_kind_is_counted_with_inputs_it_accepts(kind: str) -> None:
    config = SMALL_UNET | ALL[kind]
    unet = build_unet(config)
    with torch.no_grad():
        predicted = unet(**example_inputs(config, batch=2, tokens=5), return_dict=False)[0]
    assert predicted.shape == (2, config["out_channels"], 16, 16)
    counted = count_macs(config, tokens=5)
    first = unet.conv_in.weight.numel() * 16 * 16
    assert counted.by_module["conv_in"] == (first, 0)
    assert counted.total > first


@pytest.mark.parametrize("kind", [*PLAIN, *GIVEN])
def test_a_known_kind_is_given_rows_that_are_not_zero(kind: str) -> None:
    config = SMALL_UNET | {**PLAIN, **GIVEN}[kind]
    probe = random_probe(config, samples=4, seed=0)
    assert set(probe.added) == {condition.name for condition in known_conditions(config)}
    for condition in known_conditions(config):
        rows = probe.added[condition.name]
        assert rows.shape == (4, *condition.row_shape(16, 16))
        assert (rows.flatten(1) != 0).any(dim=1).all(), condition.name
    unet = build_unet(config)
    parts = predict_without(unet, probe, [frozenset(), frozenset({"Md.R1"})], batch=2, width=1)
    found = [torch.cat(answers) for answers in zip(*(answers for _, answers in parts), strict=True)]
    assert torch.equal(found[0], predict(unet, probe, batch=2))
    wide = predict_without(unet, probe, [frozenset(), frozenset({"Md.R1"})], batch=4)
    for one, other in zip(next(wide)[1], found, strict=True):
        torch.testing.assert_close(one, other, rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("kind", REFUSED)
def test_an_unknown_kind_is_refused_in_one_line(kind: str) -> None:
    changes, reason = REFUSED[kind]
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        random_probe(TINY_UNET | changes, samples=2, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind.startswith(("labels", "side", "noise"))])
def test_a_replay_gives_labels_their_place(kind: str) -> None:
    """Labels are refused where inputs are made, not where a caller brings them."""
    unet = build_unet(SMALL_UNET | REFUSED[kind][0])
    inputs = example_inputs(unet.config, batch=1, tokens=5)
    inputs["sample"] = torch.randn(inputs["sample"].shape)
    inputs["class_labels"] = inputs["class_labels"] + 1
    sets = [frozenset({"Md.R1"}), frozenset[str]()]
    with torch.no_grad():
        found = replayed(unet, architecture_of(unet), lambda copies: unet(**inputs).sample, sets)
        assert torch.equal(dict(found)[(1,)], unet(**inputs).sample)


def test_inputs_of_another_model_are_refused() -> None:
    unet = build_unet(TINY_UNET | LCM)
    with pytest.raises(DataError, match=r"takes guidance.*found inputs with nothing"):
        predict(unet, random_probe(TINY_UNET, samples=2, seed=0))
    with pytest.raises(DataError, match=r"takes nothing.*found inputs with guidance"):
        predict(build_unet(TINY_UNET), random_probe(TINY_UNET | LCM, samples=2, seed=0))


def test_a_pipeline_that_cannot_give_it_is_refused(tiny_pipeline: Any, pictures: torch.Tensor) -> None:
    own = narrow("image-to-image", tiny_pipeline)
    own.unet = build_unet(TINY_UNET | INPAINTING)
    with pytest.raises(UnsupportedModelError, match=r"StableDiffusionImg2ImgPipeline.* takes mask"):
        make_probe(own, pictures, CAPTIONS, GROUPS, timesteps=3, seed=0)


def test_a_guided_score_of_a_model_that_takes_the_guidance_is_refused() -> None:
    config = TINY_UNET | LCM
    probe = random_probe(config, samples=2, seed=0)
    with pytest.raises(DataError, match=r"set score\.guidance = 1"):
        ScoringContext(build_unet(config), probe, guidance=7.5, unconditional=probe)


def test_it_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_unet(SMALL_UNET | {"num_class_embeds": 10}).save_pretrained(tmp_path / "unet")

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("prune_lab.session.session.load_model", read)
    asked = ["score", str(tmp_path / "unet"), "--run", str(tmp_path / "run"), "--device", "cpu"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2, (result.output, result.exception)
    assert "class labels (one of 10 numbers for each sample" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "probe.safetensors").exists()


@pytest.mark.long
def test_a_pipeline_is_timed_as_it_draws(tiny_pipeline: Any) -> None:
    def macs(own: Any, guidance: float) -> dict[str, float]:
        frame = profile_pipeline(own, steps=2, guidance=guidance, runs=2, warmup=0)
        return dict(zip(frame["part"], frame["macs"], strict=True))

    lcm, inpainting = narrow("lcm", tiny_pipeline), narrow("inpainting", tiny_pipeline)
    assert macs(lcm, 7.5) == macs(lcm, 1.0)  # no second pass with the empty caption
    assert macs(inpainting, 1.0)["vae_decoder"] == macs(lcm, 1.0)["vae_decoder"]


def test_masks_are_boxes_or_everything() -> None:
    masks = [draw_mask((64, 48), seeded(seed)) for seed in range(200)]
    whole = sum(bool(mask.all()) for mask in masks)
    assert 30 <= whole <= 70  # a quarter of 200
    for mask in masks:
        assert mask.shape == (1, 64, 48)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert mask.any()


@pytest.mark.parametrize("kind", ["lcm", "inpainting", "editing", "refiner"])
def test_a_probe_keeps_it_in_its_file(
    tiny_pipeline: Any, pictures: torch.Tensor, tmp_path: Path, kind: str
) -> None:
    own = narrow(kind, tiny_pipeline)
    probe = make_probe(own, pictures, CAPTIONS, GROUPS, timesteps=2, seed=0, per_picture=2)
    probe.save(tmp_path / "probe.safetensors")
    loaded = load_probe(tmp_path / "probe.safetensors")
    assert loaded.digest == probe.digest
    torch.testing.assert_close(predict(own.unet, loaded), predict(own.unet, probe), rtol=1e-4, atol=1e-5)
    assert predict(own.unet, loaded.rows([3, 0])).shape == (2, 4, 16, 16)


def test_the_masked_picture_of_latents_is_the_decoded_one(tiny_pipeline: Any) -> None:
    own = narrow("inpainting", tiny_pipeline)
    latents = torch.randn(2, 4, 16, 16, generator=seeded(0))
    probe = probe_of_latents(own, latents, CAPTIONS[:2], GROUPS[:2], timesteps=2, seed=3)
    with torch.no_grad():
        decoded = own.vae.decode(latents / own.vae.config.scaling_factor).sample.clamp(-1, 1)
        masks = torch.stack([draw_mask((32, 32), generator_for(3, "mask", row)) for row in range(2)])
        pixels = ((decoded + 1) * 127.5).round() / 127.5 - 1
        by_hand = own.vae.encode(pixels * (1 - masks)).latent_dist.mean * own.vae.config.scaling_factor
    torch.testing.assert_close(probe.added["masked_latents"], by_hand, rtol=1e-3, atol=1e-4)


def test_a_controlnet_is_left_out_with_a_note(
    tiny_pipeline: Any,
    pictures: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("prune_lab.runtime.progress._said", set())
    own = narrow("controlnet", tiny_pipeline)
    make_probe(own, pictures, CAPTIONS, GROUPS, timesteps=3, seed=0)  # where no one looks
    with progress_shown():
        for seed in range(2):
            make_probe(own, pictures, CAPTIONS, GROUPS, timesteps=3, seed=seed)
    assert capsys.readouterr().err.count("the ControlNet of this pipeline is left out") == 1


# Training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("conditions") / "images")


def test_each_crop_is_stored_with_its_own_mask(tiny_pipeline: Any, images: Path, tmp_path: Path) -> None:
    own, source = narrow("inpainting", tiny_pipeline), open_source(str(images))
    cache = build_cache(own, source, MANY, tmp_path / "cache").cache
    rows, variants = torch.tensor([6, 0, 3, 3]), torch.tensor([2, 0, 1, 2])
    found = cache.rows(rows, variants).added
    live = LiveData.of(own, source, MANY).rows(rows, variants).added
    for place, (row, variant) in enumerate(zip(rows.tolist(), variants.tolist(), strict=True)):
        pixels = crop_variants(decode_image(source.content(row)), 32, MANY, row, (variant,))
        draws = [generator_for(MANY.seed, f"mask {row}", variant)]
        by_hand = picture_rows(own, known_conditions(own.unet), pixels, draws)
        assert set(by_hand) == set(found) == set(live)
        for name, value in by_hand.items():
            torch.testing.assert_close(live[name][place], value[0], rtol=1e-4, atol=1e-5)
            # files hold half precision
            torch.testing.assert_close(found[name][place], value[0], rtol=2e-3, atol=2e-3)
    assert not torch.equal(found["masked_latents"][2], found["masked_latents"][3])
    assert LatentCache.load(cache.folder).check(own).digest == cache.digest


def test_a_cache_without_it_is_refused(tiny_pipeline: Any, images: Path, tmp_path: Path) -> None:
    plain = build_cache(tiny_pipeline, open_source(str(images)), CACHED, tmp_path / "plain").cache
    assert "conditions" not in plain.provenance
    with pytest.raises(DataError, match=r"holds nothing.*takes mask, masked_latents"):
        plain.check(narrow("inpainting", tiny_pipeline))
    plain.check(narrow("lcm", tiny_pipeline))  # the guidance is drawn while training


def test_guidance_is_drawn_by_seed_and_step(tiny_pipeline: Any, pictures: torch.Tensor) -> None:
    own = narrow("lcm", tiny_pipeline)
    data, conditions = encode_data(own, pictures, CAPTIONS), conditions_of(own.unet)

    def drawn(step: int, **more: Any) -> torch.Tensor:
        batch = draw_batch(data, own.scheduler, TRAINING, step, conditions=conditions, **more)
        return batch.added["guidance"]

    assert drawn(1).shape == (4, 32)
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert torch.equal(drawn(1, part=slice(2, 4)), drawn(1)[2:])
    without = draw_batch(data, own.scheduler, TRAINING, 1)
    with_guidance = draw_batch(data, own.scheduler, TRAINING, 1, conditions=conditions)
    assert torch.equal(without.noisy, with_guidance.noisy)


@pytest.mark.parametrize(
    "kind", ["lcm", "inpainting", pytest.param("editing", marks=pytest.mark.long), "refiner"]
)
def test_teacher_and_student_are_given_the_same(
    tiny_pipeline: Any, pictures: torch.Tensor, tmp_path: Path, kind: str
) -> None:
    own = narrow(kind, tiny_pipeline)
    teacher, data = own.unet, encode_data(own, pictures, CAPTIONS)
    validation = make_probe(own, pictures, CAPTIONS, GROUPS, timesteps=3, seed=1)
    architecture = architecture_of(teacher)
    plan = parse_plan("bk-small", architecture)
    settings = dataclasses.replace(
        SETTINGS, steps=2, warmup=1, micro_batch=1, checkpoint_every=1, validate_every=1
    )
    setup = DistillSetup(teacher, data, SCHEDULER, settings, validation)
    student = materialise(teacher, plan)
    one = Student(lambda: student, feature_pairs(architecture, plan), tmp_path / "student")
    with recorded(teacher) as by_teacher, recorded(student) as by_student:
        (recovery,) = distill_together(setup, [one])
    assert recovery.status == "done"
    trained = [call for call in by_student if len(call["sample"]) == 1]
    assert len(trained) == len(by_teacher) == 4
    wanted = {condition.place for condition in conditions_of(teacher)}
    for mine, teachers in zip(trained, by_teacher, strict=True):
        assert set(mine) == set(teachers) >= wanted
        for name, value in mine.items():
            both = ((value, teachers[name]),)
            if isinstance(value, Mapping):
                both = tuple((value[key], teachers[name][key]) for key in value)
            assert all(torch.equal(left, right) for left, right in both)


def test_data_without_it_are_refused_before_the_first_step(
    tiny_pipeline: Any, pictures: torch.Tensor, tmp_path: Path
) -> None:
    own = narrow("inpainting", tiny_pipeline)
    data = encode_data(tiny_pipeline, pictures, CAPTIONS)
    validation = make_probe(own, pictures, CAPTIONS, GROUPS, timesteps=3, seed=1)
    setup = DistillSetup(own.unet, data, SCHEDULER, SETTINGS, validation)
    architecture = architecture_of(own.unet)
    plan = parse_plan("bk-small", architecture)
    one = Student(
        lambda: materialise(own.unet, plan), feature_pairs(architecture, plan), tmp_path / "student"
    )
    with pytest.raises(DataError, match="takes mask, masked_latents of each picture"):
        distill_together(setup, [one])
    assert not (tmp_path / "student").exists()


# Drawing ---------------------------------------------------------------------------------------------------------


DRAW: dict[str, Any] = {"steps": 2, "guidance": 2.0}


@pytest.mark.parametrize("kind", ["lcm", "inpainting", "editing", "sdxl", "image-to-image", "controlnet"])
def test_every_kind_draws_from_prompts_alone(tiny_pipeline: Any, kind: str) -> None:
    own = narrow(kind, tiny_pipeline)
    unet = own.unet
    pictures = generate(own, ["a cat", "a dog"], [3], **DRAW)
    assert (pictures.dtype, tuple(pictures.shape)) == (torch.uint8, (2, 3, 32, 32))
    latents = generate(own, ["a cat", "a dog"], [3], latents=True, **DRAW)
    assert latents.shape == (2, 4, 16, 16)
    other = build_unet(dict(unet.config) | {"_class_name": "UNet2DConditionModel"}, seed=1)
    assert not torch.equal(generate(own, ["a cat", "a dog"], [3], model=other, **DRAW), pictures)
    assert own.unet is unet


@pytest.mark.parametrize("kind", ["image-to-image", "controlnet"])
def test_pictures_of_prompts_are_those_of_the_text_to_image_pipeline(tiny_pipeline: Any, kind: str) -> None:
    drawn = generate(narrow(kind, tiny_pipeline), ["a cat"], [3], **DRAW)
    assert torch.equal(drawn, generate(tiny_pipeline, ["a cat"], [3], **DRAW))


def test_a_refiner_does_not_draw(tiny_pipeline: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="found a refiner"):
        generate(narrow("refiner", tiny_pipeline), ["a cat"], [3], **DRAW)


def test_guidance_reaches_a_model_that_takes_it(tiny_pipeline: Any) -> None:
    own = narrow("lcm", tiny_pipeline)
    with recorded(own.unet) as calls:
        generate(own, ["a cat"], [3], steps=2, guidance=4.0)
    assert [len(call["sample"]) for call in calls] == [1, 1]  # no second pass with the empty caption
    assert torch.equal(calls[0]["timestep_cond"], guidance_embedding(torch.tensor([3.0]), 32))


def test_inputs_are_put_together_in_one_order() -> None:
    unet = build_unet(TINY_UNET | INPAINTING)
    parts = [torch.full((1, count, 16, 16), float(value)) for value, count in ((1, 4), (2, 1), (3, 4))]
    text, step = torch.zeros(1, 5, 16), torch.zeros(1, dtype=torch.long)
    inputs = forward_inputs(unet, parts[0], step, text, {"masked_latents": parts[2], "mask": parts[1]})
    assert inputs["sample"][0, :, 0, 0].tolist() == [1] * 4 + [2] + [3] * 4
