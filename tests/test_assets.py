"""The shipped reference model and its pictures are what they claim to be."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from prune_lab.assets import (
    COLUMNS,
    assets_folder,
    decode_pictures,
    load_pictures,
    reference_folder,
    scorer_folder,
)
from prune_lab.blocks import architecture_of, block_groups
from prune_lab.importance import ScoringContext, score
from prune_lab.models import resolve_model
from prune_lab.probes import Probe, make_probe, predict

SHIPPABLE = {"noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "fluent": "MIT", "openclipart": "public-domain"}


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
    pictures = decode_pictures(heldout.iloc[:96]).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(pictures).latent_dist.mean
        found = pipeline.vae.decode(latents[:24]).sample.clamp(-1, 1)
    error = ((found - pictures[:24]) * 127.5).square().mean((1, 2, 3))
    assert float((10 * torch.log10(255.0**2 / error)).mean()) > 25
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
    assert len(set(captions)) == len(captions)  # one right answer each
    pixels = pictures.float() / 127.5 - 1
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        found = [
            one(pixel_values=pixels, input_ids=ids).logits_per_image.argmax(1) for one in (model, untrained)
        ]
    right = [float((one == torch.arange(len(captions))).float().mean()) for one in found]
    assert right[0] > 0.5
    assert right[1] < 0.1


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


@pytest.mark.long
def test_the_mid_stage_is_worth_a_thousandth(pipeline: StableDiffusionPipeline, probe: Probe) -> None:
    groups = [
        one for one in block_groups(architecture_of(pipeline.unet), "stage") if one.name in ("Md", "Up1")
    ]
    impacts = score(ScoringContext(pipeline.unet, probe), groups, bootstrap=100).frame().set_index("group")
    assert impacts.loc["Md", "impact"] >= 1e-3
    assert (impacts["low"] > 0).all()
