"""What a model of any class takes and answers: as the real pipeline gives it to its model, and reads its answer."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    CogVideoXPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    FluxPipeline,
    LTXPipeline,
    Lumina2Pipeline,
    MochiPipeline,
    PRXPipeline,
    QwenImagePipeline,
)
from tiny_models import TINY_TRANSFORMERS, others_long, tiny_model
from tiny_pipelines import DRAWN_WITH, drawn, tiny_pipeline
from torch import Tensor

from prune_lab.blocks import architecture_of, block_groups
from prune_lab.errors import DataError, UnsupportedModelError
from prune_lab.families import (
    family_of,
    forward_inputs,
    latent_channels,
    latent_form,
    model_of,
    predict_with,
    prediction_of,
)
from prune_lab.importance import ScoringContext, score
from prune_lab.probes import (
    drawn_rows,
    encode_captions,
    pipeline_conditions,
    predict,
    probe_of_latents,
    random_probe,
    rows_of_size,
)
from prune_lab.surgery import bypassed

PACKED = ("flux",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By kind its tiny pipeline, loaded once."""
    loaded: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in loaded:
            folder = tiny_pipeline(kind, tmp_path_factory.mktemp(kind) / "model")
            loaded[kind] = DiffusionPipeline.from_pretrained(folder)
        return loaded[kind]

    return get


class Watched:
    """What a pipeline gives its model, and its scheduler, in each step of drawing."""

    def __init__(self, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[dict[str, Any]] = []
        self.outputs: list[Any] = []
        self.predictions: list[Tensor] = []
        model, scheduler = model_of(pipeline), pipeline.scheduler
        forward, step = model.forward, scheduler.step
        takes, steps = inspect.signature(forward), inspect.signature(step)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.given.append(dict(takes.bind(*args, **kwargs).arguments))
            answer = forward(*args, **kwargs)
            self.outputs.append(answer[0])
            return answer

        def stepped(*args: Any, **kwargs: Any) -> Any:
            self.predictions.append(steps.bind(*args, **kwargs).arguments["model_output"])
            return step(*args, **kwargs)

        monkeypatch.setattr(model, "forward", watched)
        monkeypatch.setattr(scheduler, "step", stepped)


def plain(value: Any) -> Any:
    """Only what says something: no None, and not how the answer is to be given."""
    if isinstance(value, dict):
        found = {name: plain(one) for name, one in value.items()}
        kept = {name: one for name, one in found.items() if one is not None and name != "return_dict"}
        return kept or None
    return value


def assert_alike(ours: Any, theirs: Any, name: str = "inputs") -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), name
        for key in theirs:
            assert_alike(ours[key], theirs[key], key)
    elif isinstance(theirs, Tensor):
        assert ours.shape == theirs.shape, name
        assert ours.dtype == theirs.dtype or name in ("timestep", "class_labels"), (
            name,
            ours.dtype,
            theirs.dtype,
        )
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-6, msg=name)
    else:
        assert ours == theirs, name


def unpacked_by_hand(rows: Tensor, side: int) -> Tensor:
    return FluxPipeline._unpack_latents(rows, 8 * side, 8 * side, 8)


@pytest.mark.parametrize("kind", ["sd", "pixart", "sd3", "flux", "wan", "ddpm"])
def test_a_model_is_given_what_its_pipeline_gives_it(
    kind: str, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = made(kind)
    model, watched = model_of(pipeline), Watched(pipeline, monkeypatch)
    more = {"guidance_scale": 1.0} if kind in ("sd", "pixart", "sd3", "wan") else {}
    pipeline.set_progress_bar_config(disable=True)
    pipeline(**DRAWN_WITH[kind] | more, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    family, prompt = family_of(model), DRAWN_WITH[kind].get("prompt", "")
    text, known = encode_captions(pipeline, [prompt])
    for number, given in enumerate(list(watched.given)):
        theirs = plain(given)
        sample, timestep = theirs[family.latents], torch.as_tensor(theirs["timestep"]).reshape(-1)
        if kind in PACKED:
            side = 2 * int(np.sqrt(sample.shape[1]))
            sample, timestep = unpacked_by_hand(sample, side), timestep * 1000
        conditions = pipeline_conditions(pipeline)
        rows = dict(known) | drawn_rows(conditions, 1, torch.Generator().manual_seed(0))
        rows |= rows_of_size(model, rows, 1, (16, 16))
        ours = plain(forward_inputs(model, sample, timestep, text, rows))
        if kind in ("sd", "ddpm"):
            theirs["timestep"] = timestep  # one for all rows
        assert_alike(ours, theirs)
        with torch.no_grad():
            prediction = predict_with(model, sample, timestep, text, rows)
        theirs_read = watched.predictions[number]
        if kind in PACKED:
            theirs_read = unpacked_by_hand(theirs_read, side)
        torch.testing.assert_close(prediction, theirs_read, rtol=1e-5, atol=1e-6)


def test_a_pixart_of_1024_is_told_the_size_as_its_pipeline_tells_it(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only that one is told the size, in pixels of whatever VAE it has."""
    pipeline = copy.copy(made("pixart"))
    wide = {"attention_head_dim": 12, "cross_attention_dim": 24}  # a third of the width tells each number
    model = tiny_model("PixArtTransformer2DModel", sample_size=128, caption_channels=32, **wide)
    pipeline.transformer = model
    watched = Watched(pipeline, monkeypatch)
    asked = DRAWN_WITH["pixart"] | {"height": 48, "width": 64, "guidance_scale": 1.0}
    pipeline(**asked, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    theirs = watched.given[0]["added_cond_kwargs"]
    latents = torch.zeros(1, 4, 24, 32)
    probe = probe_of_latents(pipeline, latents, [asked["prompt"]], ["cats"], timesteps=1, seed=0)
    assert probe.added.keys() == {"encoder_attention_mask", "resolution", "aspect_ratio"}
    for name in theirs:
        torch.testing.assert_close(probe.added[name], theirs[name].reshape(1, -1), msg=name)


def test_a_model_of_classes_is_given_what_its_pipeline_gives_it(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = made("dit")
    model, watched = model_of(pipeline), Watched(pipeline, monkeypatch)
    drawn(pipeline, "dit")
    given = plain(watched.given[0])
    rows = {"class_labels": given["class_labels"]}
    empty = torch.zeros(2, 0, 0)
    ours = forward_inputs(model, given["hidden_states"], given["timestep"], empty, rows)
    assert_alike(plain(ours), given)
    prediction = prediction_of(model, watched.outputs[0], given["hidden_states"])
    assert torch.equal(prediction, watched.outputs[0][:, :4])  # behind it is the variance
    assert encode_captions(pipeline, ["7", "8"])[0].shape == (2, 0, 0)
    labels = drawn_rows(pipeline_conditions(pipeline), 200, torch.Generator().manual_seed(0))["class_labels"]
    assert 0 <= int(labels.min()) < int(labels.max()) < 1000


# Packing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("FluxTransformer2DModel", FluxPipeline),
        ("QwenImageTransformer2DModel", QwenImagePipeline),
    ],
)
def test_rows_are_packed_as_the_pipeline_packs_them(name: str, pipeline: Any) -> None:
    model = tiny_model(name)
    probe = random_probe(model.config, samples=2, seed=0, latent=8)
    sample = probe.noisy[..., :6]
    given = dict(probe.added)
    inputs = forward_inputs(model, sample, probe.timesteps, probe.embeddings, given)
    assert torch.equal(inputs["hidden_states"], pipeline._pack_latents(sample, 2, 4, 8, 6))
    assert torch.equal(prediction_of(model, inputs["hidden_states"], sample), sample)
    with pytest.raises(DataError, match="odd"):
        forward_inputs(model, probe.noisy[..., :5], probe.timesteps, probe.embeddings, given)


def test_flux2_places_are_those_of_its_pipeline() -> None:
    model = tiny_model("Flux2Transformer2DModel")
    probe = random_probe(model.config, samples=2, seed=0, latent=8)
    ((_, inputs),) = probe.batches(2, model)
    patches = Flux2Pipeline._patchify_latents(probe.noisy)
    assert torch.equal(inputs["hidden_states"], Flux2Pipeline._pack_latents(patches))
    assert torch.equal(inputs["img_ids"].long(), Flux2Pipeline._prepare_latent_ids(patches)[0])
    assert torch.equal(inputs["txt_ids"].long(), Flux2Pipeline._prepare_text_ids(probe.embeddings)[0])


@pytest.mark.parametrize(("patch", "across_time"), [(1, 1), (2, 1), (2, 2)])
def test_films_are_packed_as_ltx_packs_them(patch: int, across_time: int) -> None:
    settings = {"patch_size": patch, "patch_size_t": across_time}
    channels = 8 * patch**2 * across_time
    model = tiny_model("LTXVideoTransformer3DModel", in_channels=channels, out_channels=channels, **settings)
    assert latent_channels(model) == 8
    sample = torch.randn(2, 8, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    text, mask = torch.zeros(2, 3, 12), {"encoder_attention_mask": torch.ones(2, 3)}
    inputs = forward_inputs(model, sample, torch.tensor([1, 2]), text, mask)
    assert torch.equal(inputs["hidden_states"], LTXPipeline._pack_latents(sample, patch, across_time))
    assert torch.equal(prediction_of(model, inputs["hidden_states"], sample), sample)


def test_places_of_a_film_are_those_of_cogvideo() -> None:
    model = tiny_model("CogVideoXTransformer3DModel")
    maker = object.__new__(CogVideoXPipeline)
    object.__setattr__(maker, "__dict__", {"vae_scale_factor_spatial": 8, "transformer": model})
    theirs = maker._prepare_rotary_positional_embeddings(64, 48, 3, torch.device("cpu"))
    sample = torch.randn(1, 4, 3, 8, 6)
    inputs = forward_inputs(model, sample, torch.tensor([1]), torch.zeros(1, 6, 12), {})
    assert torch.equal(inputs["hidden_states"], sample.permute(0, 2, 1, 3, 4))
    for ours, wanted in zip(inputs["image_rotary_emb"], theirs, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_those_that_count_from_noise_predict_the_other_way() -> None:
    for name in ("Lumina2Transformer2DModel", "ZImageTransformer2DModel"):
        model = tiny_model(name)
        probe = random_probe(model.config, samples=2, seed=0, latent=8)
        mask = {key: rows.clone() for key, rows in probe.added.items()}
        (key,) = mask.keys() - {"schedule_length"}
        mask[key][0, 5:] = 0  # one of the texts is short
        timestep = torch.tensor([250, 750])
        inputs = forward_inputs(model, probe.noisy, timestep, probe.embeddings, mask)
        assert torch.equal(inputs["timestep" if "timestep" in inputs else "t"], torch.tensor([0.75, 0.25]))
        with torch.no_grad():
            output = model(**inputs, return_dict=False)[0]
        by_hand = -torch.stack([one.reshape(4, 8, 8) for one in output])
        assert torch.equal(prediction_of(model, output, probe.noisy), by_hand)
        # What is masked is not read.
        text = probe.embeddings.clone()
        text[0, 5:] = 9.0
        with torch.no_grad():
            again = predict_with(model, probe.noisy, timestep, text, mask)
        torch.testing.assert_close(again, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*LoraLoaderMixin:FutureWarning")  # PRX's own
@pytest.mark.parametrize("length", [1000, 400])
@pytest.mark.parametrize(
    ("pipeline", "name", "more"),
    [
        (Lumina2Pipeline, "Lumina2Transformer2DModel", {}),
        (PRXPipeline, "PRXTransformer2DModel", {"use_resolution_binning": False}),
        (MochiPipeline, "MochiTransformer3DModel", {"num_frames": 7}),
        (AuraFlowPipeline, "AuraFlowTransformer2DModel", {}),
    ],
)
def test_a_timestep_is_told_as_by_the_pipeline_whatever_the_length_of_its_schedule(
    pipeline: Any, name: str, more: dict[str, Any], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inverted = {"invert_sigmas": True} if pipeline is MochiPipeline else {}
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=length, **inverted)
    model = tiny_model(name)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    drawing = pipeline(**parts, transformer=model, scheduler=scheduler)
    drawing.set_progress_bar_config(disable=True)
    watched = Watched(drawing, monkeypatch)
    words, width = 6, random_probe(model.config, samples=1, seed=0, latent=8).embeddings.shape[-1]
    told = {
        "prompt_embeds": torch.zeros(1, words, width),
        "prompt_attention_mask": torch.ones(1, words, dtype=torch.bool),
    }
    size = {"height": 64, "width": 64, "guidance_scale": 1.0, "num_inference_steps": 4}
    drawing(**told, **size, **more, output_type="latent")
    steps = scheduler.timesteps.round()
    assert len(steps) == len(watched.given) == 4
    for step, given in zip(steps, watched.given, strict=True):
        place = length - step if inverted else step  # of the schedule, which counts from the picture
        rows = drawn_rows(pipeline_conditions(drawing), 1, torch.Generator(), length=length)
        rows |= {
            key: torch.ones(1, words) for key in ("encoder_attention_mask", "attention_mask") if key in given
        }
        form = (1, *latent_form(model, 8))
        inputs = forward_inputs(
            model, torch.zeros(form), place.reshape(1).long(), told["prompt_embeds"], rows
        )
        theirs = torch.as_tensor(given["timestep"]).float()
        torch.testing.assert_close(inputs["timestep"].float(), theirs, rtol=0, atol=1 if inverted else 2e-3)


# The model of a pipeline ----------------------------------------------------------------------------------------------


def test_a_pipeline_has_one_model() -> None:
    one = tiny_model("WanTransformer3DModel")

    class Pair:
        transformer, transformer_2 = one, one

    class Single:
        transformer, transformer_2 = one, None

    class Nothing:
        unet = None

    class Unknown:
        unet = torch.nn.Linear(1, 1)

    assert model_of(Single()) is one
    for pipeline, said in (
        (Pair(), "transformer, transformer_2"),
        (Nothing(), "found none"),
        (Unknown(), "class Linear"),
    ):
        with pytest.raises(UnsupportedModelError, match=said) as caught:
            model_of(pipeline)
        assert "\n" not in str(caught.value)


# Probes and scores of every family ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", others_long(sorted(TINY_TRANSFORMERS)))
def test_the_impacts_of_every_family_are_those_of_a_naive_loop(name: str) -> None:
    model = tiny_model(name)
    probe = random_probe(model.config, samples=3, seed=0, timesteps=3, latent=8)
    assert probe.noisy.shape[1:] == latent_form(model, 8)
    whole = predict(model, probe)
    assert whole.shape == probe.target.shape
    assert whole.isfinite().all()
    groups = block_groups(architecture_of(model), "block")
    table = score(ScoringContext(model, probe), groups, "output-mse")
    by_hand = []
    for group in groups:
        with bypassed(model, group.blocks, stand_in=True):
            change = predict(model, probe) - whole
        by_hand.append(float(change.square().sum() / whole.square().sum()))
    found = [float(impact) for impact in table.frame()["impact"]]
    assert np.allclose(found, by_hand, rtol=1e-4, atol=1e-9)


def test_aura_flow_takes_no_mask() -> None:
    """Its encoder gives one, and its pipeline keeps it to itself."""
    family = family_of(tiny_model("AuraFlowTransformer2DModel"))
    assert family.answers == ("text", None, None, None)
    assert "mask" not in " ".join(inspect.signature(family.model_class().forward).parameters)
    assert "prompt_attention_mask" in inspect.getsource(AuraFlowPipeline.encode_prompt)
