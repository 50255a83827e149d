"""The shipped reference model and its data are what they claim to be, and the recipe that makes them works."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer
from typer.testing import CliRunner

from prune_lab.assets import (
    COLUMNS,
    assets_folder,
    decode_pictures,
    load_pictures,
    reference_folder,
    scorer_folder,
)
from prune_lab.blocks import architecture_of, block_groups
from prune_lab.errors import ConfigError, DataError
from prune_lab.importance import score_groups
from prune_lab.models import resolve_model
from prune_lab.probes import Probe, make_probe, predict
from prune_lab.surgery import bypassed
from recipes.reference_model.__main__ import app
from recipes.reference_model.autoencoder import (
    AutoencoderShape,
    build_autoencoder,
    decode,
    encode,
    psnr,
    standardise,
    train_autoencoder,
)
from recipes.reference_model.build import train_reference
from recipes.reference_model.captions import build_tokenizer
from recipes.reference_model.clip import (
    ClipShape,
    build_clip,
    embed_pairs,
    pair_loss,
    retrieval,
    text_tower,
    train_clip,
)
from recipes.reference_model.dataset import (
    caption,
    clip_art_title,
    encode_picture,
    plain_subject,
    split_frame,
    square_picture,
    tone_words,
)
from recipes.reference_model.denoiser import (
    SCHEDULE,
    DenoiserShape,
    Float32Attention,
    build_denoiser,
    build_scheduler,
    noise_levels,
    open_main_path,
)
from recipes.reference_model.denoising import (
    Objective,
    SupervisedDenoiser,
    TrainingBatch,
    draw_batch,
    hooked,
    severed,
    train_denoiser,
)
from recipes.reference_model.evaluate import Sampling, evaluate_reference, loss_by_timestep, thinned
from recipes.reference_model.packages import Package, fetch_package
from recipes.reference_model.pairs import CaptionedLatents
from recipes.reference_model.settings import read_recipe
from recipes.reference_model.steps import Recipe, batch_indices
from recipes.reference_model.text_encoder import LayoutReader, train_text_encoder

SHIPPABLE = {"noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "fluent": "MIT", "openclipart": "public-domain"}
TINY_AUTOENCODER = AutoencoderShape(channels=(8, 8, 8), groups=4)
TINY_CLIP = ClipShape(
    text_width=16, text_layers=1, picture_width=16, picture_layers=1, heads=2, patch=16, shared=16
)
TINY_DENOISER = DenoiserShape(channels=(8, 8, 8, 8), heads=2, groups=4, text_width=16, latent=8)


@pytest.fixture(scope="module")
def heldout() -> pd.DataFrame:
    return load_pictures("heldout")


@pytest.fixture(scope="module")
def train() -> pd.DataFrame:
    return load_pictures("train")


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    loaded = StableDiffusionPipeline.from_pretrained(
        reference_folder(), dtype=torch.float32, local_files_only=True
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def scorer() -> tuple[CLIPModel, CLIPTokenizer]:
    model = CLIPModel.from_pretrained(scorer_folder(), dtype=torch.float32, local_files_only=True).eval()
    return model, CLIPTokenizer.from_pretrained(scorer_folder(), local_files_only=True)


@pytest.fixture(scope="module")
def probe(pipeline: StableDiffusionPipeline, heldout: pd.DataFrame) -> Probe:
    rows = heldout.iloc[:48]
    return make_probe(
        pipeline,
        decode_pictures(rows),
        rows["caption"].tolist(),
        rows["group"].tolist(),
        timesteps=16,
        seed=1,
    )


# What ships --------------------------------------------------------------------------------------------------------


def test_the_pipeline_is_plain_diffusers_and_draws(pipeline: StableDiffusionPipeline) -> None:
    assert pipeline.safety_checker is None
    assert pipeline.feature_extractor is None
    picture = pipeline(
        "noto emoji, red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0)
    )
    assert picture.images[0].size == (64, 64)


def test_the_blocks_are_those_of_stable_diffusion(pipeline: StableDiffusionPipeline) -> None:
    ours, theirs = architecture_of(pipeline.unet), architecture_of(resolve_model("sd-v1.4").config)
    described = [[(b.name, b.path, b.kind, b.removable) for b in one.blocks] for one in (ours, theirs)]
    assert described[0] == described[1]
    assert len(ours.blocks) == 38
    assert sum(block.removable for block in ours.blocks) == 34


def test_all_weights_are_half_precision_safetensors_within_the_budget() -> None:
    files = [*reference_folder().rglob("*.safetensors"), *scorer_folder().rglob("*.safetensors")]
    assert len(files) == 4
    assert sum(path.stat().st_size for path in files) <= 40e6
    for path in files:
        floats = [tensor for tensor in load_file(path).values() if tensor.is_floating_point()]
        assert floats
        assert all(tensor.dtype == torch.float16 and bool(tensor.isfinite().all()) for tensor in floats)
    other = {path.suffix for folder in (reference_folder(), scorer_folder()) for path in folder.rglob("*.*")}
    assert other <= {".json", ".txt", ".safetensors"}


def test_the_pictures_are_many_attributed_and_freely_licensed(
    train: pd.DataFrame, heldout: pd.DataFrame
) -> None:
    both = pd.concat([train, heldout])
    assert tuple(train.columns) == tuple(heldout.columns) == COLUMNS
    assert len(both) >= 11_000
    assert 600 <= len(heldout) <= 1_000
    assert {(row.source, row.licence) for row in both.itertuples()} == set(SHIPPABLE.items())
    folder = assets_folder() / "pictures"
    assert sum(path.stat().st_size for path in folder.glob("*.parquet")) <= 25e6
    page = (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
    assert all(f"| {source} | {int((both['source'] == source).sum()):,} |" in page for source in SHIPPABLE)


def test_no_held_out_combination_was_trained_on(train: pd.DataFrame, heldout: pd.DataFrame) -> None:
    key = ["style", "subject", "tone"]
    trained = set(map(tuple, train[key].to_numpy()))
    assert trained.isdisjoint(map(tuple, heldout[key].to_numpy()))
    assert set(heldout["style"]) <= set(train["style"])
    # Most held-out subjects were seen in another style, and most of those never in the held-out one.
    assert heldout["subject"].isin(set(train["subject"])).mean() > 0.9
    pairs = set(zip(train["style"], train["subject"], strict=True))
    unseen = [pair not in pairs for pair in zip(heldout["style"], heldout["subject"], strict=True)]
    assert np.mean(unseen) > 0.5


def test_the_autoencoder_reconstructs_held_out_pictures(
    pipeline: StableDiffusionPipeline, heldout: pd.DataFrame
) -> None:
    pictures = decode_pictures(heldout.iloc[:24])
    assert float(psnr(pipeline.vae, pictures).mean()) > 25
    latents = encode(pipeline.vae, decode_pictures(heldout.iloc[:96]))
    assert latents.shape[1:] == (4, 16, 16)
    assert float((latents.std((0, 2, 3)) - 1).abs().max()) < 0.15


def test_the_scorer_finds_captions_and_an_untrained_one_does_not(
    scorer: tuple[CLIPModel, CLIPTokenizer], heldout: pd.DataFrame
) -> None:
    model, tokenizer = scorer
    rows = heldout.drop_duplicates("subject").iloc[:100]
    pictures, captions = decode_pictures(rows), rows["caption"].tolist()
    torch.manual_seed(0)
    untrained = CLIPModel(model.config).eval()
    found = [
        retrieval(*embed_pairs(one, tokenizer, pictures, captions), captions) for one in (model, untrained)
    ]
    assert found[0]["picture_to_text_r1"] > 0.5
    assert found[1]["picture_to_text_r1"] < 0.1


def test_the_text_encoder_reads_the_scorers_tokens_and_is_not_its_tower(
    pipeline: StableDiffusionPipeline, scorer: tuple[CLIPModel, CLIPTokenizer]
) -> None:
    model, tokenizer = scorer
    ids = tokenizer(["fluent emoji, rocket"], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(
        ids, pipeline.tokenizer(["fluent emoji, rocket"], padding="max_length", return_tensors="pt").input_ids
    )
    with torch.no_grad():
        one = pipeline.text_encoder(ids).last_hidden_state
        other = model.text_model(input_ids=ids).last_hidden_state
    assert one.shape == other.shape
    # What draws the pictures is not what judges them.
    assert float((one - other).norm() / other.norm()) > 0.1


def test_the_unet_denoises_and_listens_to_the_caption(
    pipeline: StableDiffusionPipeline, probe: Probe
) -> None:
    right = (predict(pipeline.unet, probe) - probe.target).square().mean()
    assert float(right) < 0.5  # predicting nothing costs 1
    turned = {
        **{name: getattr(probe, name) for name in Probe.__slots__},
        "embeddings": probe.embeddings.roll(17, 0),
    }
    wrong = (predict(pipeline.unet, Probe(**turned)) - probe.target).square().mean()
    assert float(wrong) > 1.02 * float(right)


def test_the_mid_stage_is_worth_a_thousandth(pipeline: StableDiffusionPipeline, probe: Probe) -> None:
    groups = [
        one for one in block_groups(architecture_of(pipeline.unet), "stage") if one.name in ("Md", "Up1")
    ]
    impacts = score_groups(pipeline.unet, groups, probe, bootstrap=100).frame().set_index("group")
    assert impacts.loc["Md", "impact"] >= 1e-3
    assert (impacts["low"] > 0).all()


# How the data set is made ---------------------------------------------------------------------------------------------


def test_captions_compose_style_subject_and_tone() -> None:
    assert plain_subject("flag: Åland Islands") == "flag of åland islands"
    assert plain_subject("kiss: man, man") == "kiss man, man"
    assert tone_words("1f469-1f3ff-200d-1f692") == "dark skin tone"
    assert tone_words("1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3fd") == "light and medium skin tone"
    assert tone_words("1f34e") == ""
    assert caption("noto emoji", "red apple", "") == "noto emoji, red apple"
    assert (
        caption("noto emoji", "woman firefighter", "dark skin tone")
        == "noto emoji, woman firefighter, dark skin tone"
    )


@pytest.mark.parametrize(
    ("title", "licence", "subject"),
    [
        ("Red Apple 01", "http://web.resource.org/cc/PublicDomain", "red apple"),
        ("Red Apple", "http://creativecommons.org/licenses/GPL/2.0/", None),
        ("Red Apple", "", None),
        ("Clipart by Somebody", "http://web.resource.org/cc/PublicDomain", None),
        ("xqzzt", "http://web.resource.org/cc/PublicDomain", None),
    ],
)
def test_clip_art_needs_a_public_domain_mark_and_an_english_title(
    title: str, licence: str, subject: str | None
) -> None:
    svg = f'<svg><dc:title>{title}</dc:title><cc:license rdf:resource="{licence}"/></svg>'
    path = "./usr/share/openclipart/svg/food/fruit/apple.svg"
    assert clip_art_title(svg, path, {"red", "apple"}) == subject


def test_transparent_pictures_go_on_white_in_proportion(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (100, 50), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 50, 50))
    picture.save(tmp_path / "a.png")
    square = np.asarray(square_picture((tmp_path / "a.png").read_bytes()))
    assert square.shape == (64, 64, 3)
    assert square[5, 32].tolist() == [255, 255, 255]  # above the picture
    assert square[32, 50].tolist() == [255, 255, 255]  # its transparent half
    assert square[32, 10].tolist() == [255, 0, 0]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 40), st.sampled_from(["", "dark", "light"])),
        min_size=1,
        max_size=300,
    )
)
def test_a_split_loses_nothing_and_shares_no_combination(rows: list[tuple[str, int, str]]) -> None:
    frame = pd.DataFrame(
        [(f"{s}, {n}, {t}", s, str(n), t) for s, n, t in rows],
        columns=["caption", "style", "subject", "tone"],
    )
    train, held = split_frame(frame)
    assert sorted([*train["caption"], *held["caption"]]) == sorted(frame["caption"])
    assert set(train["caption"]).isdisjoint(held["caption"])
    again, _ = split_frame(frame.iloc[::-1].reset_index(drop=True))
    assert sorted(again["caption"]) == sorted(train["caption"])  # the order of the rows does not matter


def test_a_missing_package_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"the client 'npm' is not installed.*--sources"):
        fetch_package(Package("npm", "some-pictures@1", "some-pictures-1.tgz"), tmp_path / "sources")
    (tmp_path / "some-pictures-1.tgz").write_bytes(b"")
    assert (
        fetch_package(Package("npm", "some-pictures@1", "some-pictures-1.tgz"), tmp_path).name
        == "some-pictures-1.tgz"
    )


# How the parts are trained --------------------------------------------------------------------------------------------


def test_every_row_comes_once_a_pass() -> None:
    seen = torch.cat([batch_indices(10, 4, seed=3, step=step) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_the_rate_warms_up_holds_and_cools_down() -> None:
    recipe = Recipe(steps=100, batch=1, rate=2.0, warmup=10, cooldown=20)
    assert [recipe.rate_at(step) for step in (0, 9, 50, 79, 90, 99)] == pytest.approx([0.2, 2, 2, 2, 1, 0.1])


def test_after_a_restart_the_rate_warms_up_again_and_cools_down_over_the_rest() -> None:
    recipe = Recipe(
        steps=100, batch=1, rate=2.0, warmup=10, cooldown=20, restart=50, restart_rate=1.0, weight_decay=0
    )
    steps = (0, 29, 40, 49, 50, 59, 75, 99)
    # By hand: up to 50 as above with its end there; then up to min((k + 1) / 10, (100 - step) / 50).
    assert [recipe.rate_at(step) for step in steps] == pytest.approx([0.2, 2, 1, 0.1, 0.1, 0.82, 0.5, 0.02])


@pytest.mark.parametrize("wrong", [{"restart": 100}, {"restart": -1}, {"restart": 5, "restart_rate": 0.0}])
def test_a_restart_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="a restart comes before the last step"):
        Recipe(steps=100, batch=1, rate=2.0, **wrong)


def test_equal_captions_are_all_right_answers() -> None:
    same = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    sure = torch.where(same, 50.0, -50.0)
    # Two equal captions share the answer: the least loss possible is their entropy, log 2 for two of three rows.
    assert float(pair_loss(sure, same)) == pytest.approx(2 / 3 * np.log(2), abs=1e-4)


def test_retrieval_counts_by_hand() -> None:
    pictures = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = retrieval(pictures, texts, ["a", "b", "b"])  # the third picture is nearer to "a"
    assert found["picture_to_text_r1"] == pytest.approx(2 / 3)
    assert found["text_to_picture_r1"] == 1
    assert (found["pictures"], found["texts"]) == (3, 2)


def test_standardising_changes_latents_and_no_picture() -> None:
    torch.manual_seed(0)
    model = build_autoencoder(TINY_AUTOENCODER).eval()
    pictures = torch.randint(
        0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    before = decode(model, encode(model, pictures)).int()
    standardise(model, pictures)
    latents = encode(model, pictures)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    assert int((decode(model, latents).int() - before).abs().max()) <= 1


def test_float32_attention_equals_the_librarys() -> None:
    torch.manual_seed(0)
    unet = build_denoiser(TINY_DENOISER).eval()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 7, 16))
    with torch.no_grad():
        wanted = unet(*inputs).sample
        unet.set_attn_processor(Float32Attention())
        torch.testing.assert_close(unet(*inputs).sample, wanted, atol=1e-5, rtol=1e-5)


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


def test_pairs_are_drawn_by_weight_with_and_without_their_captions(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["noto, red apple"] * 3, tmp_path / "t", vocabulary=600, length=12)
    captions, plain = ["noto, red apple", "noto, dog", "fluent, dog"], ["red apple", "dog", "dog"]
    weight = torch.tensor([1.0, 0.0, 3.0])
    data = CaptionedLatents.of(torch.zeros(3, 4, 8, 8), captions, plain, weight, tokenizer)
    assert len(data.ids) == 6  # the empty one, three with a style, two without
    assert (data.full.tolist(), data.plain.tolist()) == ([1, 2, 3], [4, 5, 5])
    rows, caption = data.draw(4000, torch.Generator().manual_seed(0))
    assert set(rows.tolist()) == {0, 2}
    assert float((rows == 2).float().mean()) == pytest.approx(0.75, abs=0.03)
    shares = {kind: float((caption == number).float().mean()) for kind, number in (("none", 0), ("plain", 5))}
    assert shares == pytest.approx({"none": 0.1, "plain": 0.075}, abs=0.02)
    assert set(caption[rows == 2].tolist()) == {0, 3, 5}
    data.save(tmp_path / "pairs.safetensors")
    again = CaptionedLatents.load(tmp_path / "pairs.safetensors")
    assert torch.equal(again.ids, data.ids)
    assert torch.equal(again.weight, weight)


def test_a_text_encoder_learns_where_things_lie(tmp_path: Path) -> None:
    """Two captions, two layouts: only those drawn without a caption are left; the scorer's tower stays as it was."""
    captions = ["light above", "light below"] * 8
    tokenizer = build_tokenizer(captions, tmp_path / "t", vocabulary=600, length=8)
    tower = text_tower(build_clip(TINY_CLIP, tokenizer))
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    latents = torch.ones(16, 4, 8, 8)
    latents[::2, :, 4:] = -1
    latents[1::2, :, :4] = -1
    data = CaptionedLatents.of(latents, captions, captions, torch.ones(16), tokenizer)
    recipe = Recipe(steps=200, batch=32, rate=1e-2, warmup=5, cooldown=100, ema=0.5)
    trained = train_text_encoder(tower, data, recipe, tmp_path)
    loss = pd.read_csv(tmp_path / "text_encoder.csv")["loss"]
    assert loss.head(3).mean() > 0.9  # nothing known: the variance, 1
    assert loss.tail(20).mean() < 0.15  # a tenth of the captions is left out, and costs 1 each
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    assert not torch.equal(next(trained.parameters()), next(tower.parameters()))


def test_a_layout_is_put_together_from_its_cells() -> None:
    torch.manual_seed(0)
    reader = LayoutReader(width=16, heads=2, channels=4, side=8)
    assert reader(torch.randn(3, 5, 16)).shape == (3, 4, 8, 8)
    states = torch.randn(1, 5, 16)
    with torch.no_grad():
        before = reader(states)
        reader.queries[6] += 1.0  # second row of cells, third cell
        moved = (reader(states) - before).abs().amax((0, 1)) > 1e-4
    wanted = torch.zeros(8, 8, dtype=torch.bool)
    wanted[2:4, 4:6] = True
    assert torch.equal(moved, wanted)


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


def _tiny_batch(**changes: torch.Tensor) -> TrainingBatch:
    batch = draw_batch(_tiny_pairs(), TINY_TEXT, 4, Objective(severed=0, deaf=0), seed=0, step=0)
    return dataclasses.replace(batch, **changes)


def _random_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return build_denoiser(TINY_DENOISER).eval()


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


def test_training_the_other_parts_lowers_their_losses(tmp_path: Path, train: pd.DataFrame) -> None:
    rows = train.iloc[:32]
    pictures, captions = decode_pictures(rows), rows["caption"].tolist()
    tokenizer = build_tokenizer(captions, tmp_path / "tokenizer", vocabulary=700, length=12)
    recipe = Recipe(steps=24, batch=8, rate=4e-3, warmup=2, cooldown=4, ema=0.5)
    train_autoencoder(pictures, TINY_AUTOENCODER, recipe, tmp_path)
    train_clip(
        pictures, captions, rows["style"].tolist(), tokenizer, TINY_CLIP, Recipe(40, 32, 4e-3, 2, 4), tmp_path
    )
    for name in ("autoencoder", "clip"):
        loss = pd.read_csv(tmp_path / f"{name}.csv")["loss"]
        assert loss.tail(4).mean() < 0.85 * loss.head(4).mean(), name


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    recipe = Recipe(steps=2, batch=2, rate=1e-3)
    train_denoiser(_tiny_pairs(), TINY_TEXT, TINY_DENOISER, recipe, tmp_path, until=1)
    wider = DenoiserShape(channels=(16, 16, 16, 16), heads=2, groups=4, text_width=16, latent=8)
    with pytest.raises(DataError, match="another model"):
        train_denoiser(_tiny_pairs(), TINY_TEXT, wider, recipe, tmp_path)


def test_the_tokenizer_has_tokens_for_any_text(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["red apple", "green apple"] * 3, tmp_path / "t", vocabulary=600, length=12)
    ids = tokenizer("a 犬 in Zürich, apple").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "a犬inzürich,apple"
    assert max(ids) == tokenizer.eos_token_id == len(tokenizer) - 1  # what CLIP's pooling looks for
    assert len(tokenizer("apple").input_ids) == 3


def test_loss_by_timestep_puts_every_row_in_its_bucket(
    pipeline: StableDiffusionPipeline, probe: Probe
) -> None:
    frame = loss_by_timestep(pipeline.unet, probe)
    assert frame["rows"].sum() == len(probe)
    wanted = (predict(pipeline.unet, probe) - probe.target).square().mean()
    whole = (frame["loss"] * frame["rows"]).sum() / frame["rows"].sum()
    assert whole == pytest.approx(float(wanted), rel=1e-5)


def test_a_thinned_curve_keeps_its_means_and_its_last_step() -> None:
    curve = pd.DataFrame({"step": range(25), "loss": [float(step) for step in range(25)]})
    thin = thinned(curve)
    assert thin["step"].tolist() == [9, 19, 24]
    assert thin["loss"].tolist() == [4.5, 14.5, 22.0]
    pd.testing.assert_frame_equal(thinned(thin), thin)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[denoiser]\nchanels = [1]", "no setting 'chanels'; did you mean channels"),
        ("[unet]\nsteps = 1", r"section \[unet\]"),
        ("denoiser = 3", "must be a table"),
        ("[clip]\ntext_width = 64", "make them equal"),
        ("[clip_training]\nsteps = 0", "steps=0"),
        ("[denoiser_objective]\ndeaf = 1.5", "deaf=1.5.*shares"),
        ("[denoiser_objective]\nnoisier = 0", "noisier=0.*above 0"),
        ("[clip", "cannot be read"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises((ConfigError, DataError), match=message):
        read_recipe(tmp_path / "r.toml")


TINY_RECIPE = """
[tokenizer]
vocabulary = 700
length = 12
[autoencoder]
channels = [8, 8, 8]
groups = 4
[autoencoder_training]
steps = 2
batch = 4
[clip]
text_width = 16
text_layers = 1
picture_width = 16
picture_layers = 1
heads = 2
patch = 16
shared = 16
[clip_training]
steps = 2
batch = 8
[text_encoder_training]
steps = 2
batch = 4
[denoiser]
channels = [8, 8, 8, 8]
heads = 2
groups = 4
text_width = 16
[denoiser_training]
steps = 2
batch = 4
"""


def test_the_whole_recipe_builds_a_loadable_model_and_resumes(tmp_path: Path, train: pd.DataFrame) -> None:
    pictures = tmp_path / "out" / "pictures"
    pictures.mkdir(parents=True)
    train.iloc[:24].to_parquet(pictures / "train.parquet")
    train.iloc[24:32].to_parquet(pictures / "heldout.parquet")
    (pictures / "ATTRIBUTION.md").write_text("as shipped")
    (tmp_path / "tiny.toml").write_text(TINY_RECIPE)
    build = {"config": tmp_path / "tiny.toml", "out": tmp_path / "out"}
    train_reference(tmp_path / "work", **build)
    built = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "reference", local_files_only=True)
    assert built.unet.config.block_out_channels == [8, 8, 8, 8]
    CLIPModel.from_pretrained(tmp_path / "out" / "scorer", local_files_only=True)
    assert {path.stem for path in (tmp_path / "out" / "curves").iterdir()} == {
        "autoencoder",
        "clip",
        "text_encoder",
        "denoiser",
    }

    # Run again with the finished parts there and the checkpoints gone: nothing is trained a second time.
    for checkpoint in (tmp_path / "work").glob("*.ckpt.safetensors"):
        checkpoint.unlink()
    shutil.rmtree(tmp_path / "out" / "reference")
    options = [word for name, path in build.items() for word in (f"--{name}", str(path))]
    answer = CliRunner().invoke(app, ["train", "--work", str(tmp_path / "work"), *options])
    assert answer.exit_code == 0, answer.output
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "reference", local_files_only=True)
    assert all(
        torch.equal(value, again.unet.state_dict()[name]) for name, value in built.unet.state_dict().items()
    )
    assert not list((tmp_path / "work").glob("*.ckpt.safetensors"))

    metrics = evaluate_reference(
        tmp_path / "report",
        assets=tmp_path / "out",
        curves=tmp_path / "out" / "curves",
        sampling=Sampling(steps=1),
    )
    assert metrics["pictures"] == {"train": 24, "heldout": 8}
    assert metrics["denoiser"]["rows"] == metrics["impacts"]["rows"] == 8
    assert metrics["training"]["denoiser"]["steps"] == 2
    page = (tmp_path / "report" / "README.md").read_text()
    assert "What falls short" in page  # two steps teach nothing, and the page says so
    assert all((tmp_path / "report" / name).is_file() for name in re.findall(r"\((\w+\.png)\)", page))


def test_a_picture_survives_storing() -> None:
    picture = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))).convert("RGB")
    frame = pd.DataFrame({"picture": [encode_picture(picture)]})
    stored = decode_pictures(frame)[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(stored - np.asarray(picture).astype(int)).mean() < 6


def test_clip_towers_read_the_tokenizers_marks(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["red apple"] * 3, tmp_path / "t", vocabulary=600, length=8)
    model = build_clip(TINY_CLIP, tokenizer)
    assert model.config.text_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.text_config.max_position_embeddings == 8
