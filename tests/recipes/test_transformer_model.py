"""The second shipped model: how it starts and what it is taught, resuming, storing, and the whole recipe in small."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from diffusers import PixArtAlphaPipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer
from typer.testing import CliRunner

import prune_lab.assets
from prune_lab.assets import assets_folder, load_pictures, reference_folder, transformer_folder
from prune_lab.assets.assembling import assembled
from prune_lab.errors import ConfigError
from recipes.reference_model.captions import CaptionedLatents, tokens
from recipes.reference_model.denoiser import Float32Attention
from recipes.reference_model.evaluate import Sampling
from recipes.reference_model.noising import draw_noisy
from recipes.reference_model.settings import Recipe
from recipes.reference_model.steps import step_generator
from recipes.transformer_model import build, evaluate
from recipes.transformer_model.__main__ import app
from recipes.transformer_model.captioned import Captioned, real_tokens
from recipes.transformer_model.losses import by_transformer, caption_losses, errors, held_out_rows
from recipes.transformer_model.settings import NoiseLevels, TransformerShape, read_recipe
from recipes.transformer_model.storage import CARD, as_float8, as_shipped, packed_names
from recipes.transformer_model.study import DEMO, by_hand, control_plans, draw_pairs, study_page
from recipes.transformer_model.training import train_transformer, velocity_loss
from recipes.transformer_model.transformer import build_transformer, predicted, start_as_pixart

TINY = TransformerShape(layers=2, heads=2, head_width=8, text_width=16, latent=8)
LENGTHS = torch.tensor([2, 5, 3, 4])  # tokens of the tiny captions, with both marks

OWN = assets_folder() / "transformer"
TINY_RECIPE = """
[transformer]
layers = 2
heads = 2
head_width = 8
[training]
steps = 2
batch = 4
"""


def _tiny_captions() -> Captioned:
    generator = torch.Generator().manual_seed(0)
    data = CaptionedLatents(
        latents=torch.randn(6, 4, 8, 8, generator=generator),
        ids=torch.arange(20).reshape(4, 5),
        full=torch.tensor([1, 2, 3, 1, 2, 3]),
        plain=torch.tensor([1, 2, 3, 1, 2, 3]),
        weight=torch.ones(6),
    )
    mask = (torch.arange(5) < LENGTHS[:, None]).long()
    return Captioned(data, torch.randn(4, 5, 16, generator=generator), mask)


def _random_transformer(seed: int = 0) -> Any:
    """As the library starts it, so that every layer says something."""
    torch.manual_seed(seed)
    return build_transformer(TINY).eval()


def test_the_shipped_shape_has_twelve_blocks_and_seven_and_a_half_million_parameters() -> None:
    with torch.device("meta"):
        model = build_transformer(read_recipe().transformer)
    assert sum(value.numel() for value in model.parameters()) == 7_498_960
    assert len(model.transformer_blocks) == 12
    # PixArt's pipeline halves the channels of a prediction that has twice as many as the latents.
    assert model.config.out_channels == model.config.in_channels == 4


def test_it_starts_with_zero_for_an_answer_and_open_self_attention() -> None:
    model = build_transformer(TINY)
    start_as_pixart(model)
    captioned = _tiny_captions()
    inputs = torch.randn(4, 4, 8, 8), torch.tensor([1, 300, 600, 999]), captioned.text, captioned.mask
    assert torch.equal(predicted(model, *inputs), torch.zeros(4, 4, 8, 8))
    for block in model.transformer_blocks:
        assert not block.attn2.to_out[0].weight.any()
        assert block.attn1.to_out[0].weight.any()


def test_masks_and_states_are_those_that_the_pipeline_gives_its_transformer() -> None:
    folder = reference_folder()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True).eval()
    captions = ["", "noto emoji, red apple", "twemoji, woman firefighter, dark skin tone " * 5]
    data = CaptionedLatents.of(torch.zeros(3, 4, 8, 8), captions, captions, torch.ones(3), tokenizer)
    captioned = Captioned.of(data, encoder, tokenizer)
    shape = dataclasses.replace(TINY, text_width=128, latent=16)
    pipeline = PixArtAlphaPipeline.from_pretrained(
        folder, transformer=build_transformer(shape), local_files_only=True
    )
    with torch.no_grad():
        text, mask, _, _ = pipeline.encode_prompt(captions, False, max_sequence_length=24)
    assert torch.equal(captioned.mask, mask)
    assert mask.sum(1).tolist()[::2] == [2, 24]
    assert torch.equal(real_tokens(tokens(tokenizer, captions), tokenizer.eos_token_id), mask)
    torch.testing.assert_close(captioned.text[mask.bool()], text[mask.bool()], atol=1e-5, rtol=1e-5)


def test_nothing_behind_a_captions_end_changes_the_answer() -> None:
    model, captioned = _random_transformer(), _tiny_captions()
    inputs = torch.randn(4, 4, 8, 8), torch.tensor([1, 300, 600, 999])
    other = torch.where(captioned.mask[..., None].bool(), captioned.text, torch.full((), 7.0))
    wanted = predicted(model, *inputs, captioned.text, captioned.mask)
    torch.testing.assert_close(predicted(model, *inputs, other, captioned.mask), wanted)
    assert not torch.allclose(predicted(model, *inputs, other, torch.ones_like(captioned.mask)), wanted)


def test_attention_in_float32_equals_the_librarys_with_a_mask() -> None:
    model, captioned = _random_transformer(), _tiny_captions()
    inputs = torch.randn(4, 4, 8, 8), torch.tensor([1, 300, 600, 999]), captioned.text, captioned.mask
    with torch.no_grad():
        wanted = predicted(model, *inputs)
        model.set_attn_processor(Float32Attention())
        torch.testing.assert_close(predicted(model, *inputs), wanted, atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_mean_squared_error_of_the_velocity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # no bfloat16
    model, captioned = _random_transformer(), _tiny_captions()
    found = velocity_loss(model, captioned, 8, 1.5, seed=3, step=4)
    rows = draw_noisy(captioned.data, 8, 1.5, step_generator(3, 4))
    alone = [
        # Row by row without its padding: no mask is needed.
        model(
            rows.noisy[n, None],
            encoder_hidden_states=captioned.text[rows.caption[n], None, : LENGTHS[rows.caption[n]]],
            timestep=rows.times[n, None],
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        for n in range(8)
    ]
    wanted = (torch.cat(alone) - rows.velocity).square().mean()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_an_interrupted_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    captioned, recipe = _tiny_captions(), Recipe(steps=6, batch=4, rate=1e-2, warmup=2, cooldown=2)
    levels = NoiseLevels(even_from=4)
    whole = train_transformer(captioned, TINY, levels, recipe, tmp_path / "whole")
    for until in (2, 5, None):
        parts = train_transformer(captioned, TINY, levels, recipe, tmp_path / "parts", until=until)
    assert all(torch.equal(value, parts.state_dict()[name]) for name, value in whole.state_dict().items())
    start = build_transformer(TINY)
    torch.manual_seed(recipe.seed)
    assert not torch.equal(start.proj_out.weight, whole.proj_out.weight)


def test_a_picture_shown_often_is_learned(tmp_path: Path) -> None:
    several = _tiny_captions()
    one = several.data.latents[:1].repeat(6, 1, 1, 1)
    captioned = dataclasses.replace(several, data=dataclasses.replace(several.data, latents=one))
    recipe = Recipe(steps=80, batch=8, rate=1e-2, warmup=5, cooldown=40, ema=0.9)
    trained = train_transformer(captioned, TINY, NoiseLevels(), recipe, tmp_path)
    rows = held_out_rows(captioned, rounds=4)
    nothing = rows.velocity.double().square().mean((1, 2, 3)).mean()
    assert errors(by_transformer(trained), captioned, rows).mean() < 0.9 * nothing


def test_noisy_timesteps_lose_their_preference_from_a_step_on() -> None:
    assert [NoiseLevels(1.5, even_from=10).at(step) for step in (0, 9, 10)] == [1.5, 1.5, 1.0]
    assert NoiseLevels(1.5).at(10_000) == 1.5


def test_held_out_rows_show_every_picture_at_evenly_spread_timesteps() -> None:
    captioned = _tiny_captions()
    rows = held_out_rows(captioned, rounds=5)
    assert sorted((rows.times * 30 // 1000).tolist()) == list(range(30))
    assert torch.equal(rows.caption, captioned.data.full.repeat(5))
    assert all(
        torch.equal(getattr(rows, name), getattr(held_out_rows(captioned, rounds=5), name))
        for name in rows.__slots__
    )


def test_the_large_matrices_are_stored_in_one_byte_and_nearly_unchanged() -> None:
    model, captioned = _random_transformer(), _tiny_captions()
    names = packed_names(model)
    numbers = {name: value.numel() for name, value in model.state_dict().items()}
    whole = build_transformer(read_recipe().transformer)
    share = sum(whole.get_parameter(name).numel() for name in packed_names(whole))
    assert share / sum(value.numel() for value in whole.parameters()) > 0.98
    assert set(names) < set(numbers)
    rows = held_out_rows(captioned, rounds=2)
    inputs = rows.noisy, rows.times, captioned.text[rows.caption], captioned.mask[rows.caption]
    with torch.no_grad():
        exact = predicted(model, *inputs)
        changes = [
            float((predicted(one, *inputs) - exact).square().mean() / exact.square().mean())
            for one in (as_shipped(model), as_float8(model))
        ]
    assert changes[0] < 1e-3
    assert changes[0] < changes[1] / 4
    assert torch.equal(predicted(model, *inputs), exact)  # it was itself left as it was


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[transformer]\nlayer = 2", "no setting 'layer'; did you mean layers"),
        ("[denoiser]\nheads = 1", r"section \[denoiser\]"),
        ("[transformer]\npatch = 3", "patch=3.*divides"),
        ("[noise]\nnoisier = 0", "noisier=0.*above 0"),
        ("[training]\nsteps = 0\nbatch = 1\nrate = 1.0", "steps=0"),
        ("[training", "cannot be read"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_reason(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(tmp_path / "r.toml")


def _run_card() -> dict[str, Any]:
    """The names that the card's snippet leaves behind."""
    found = re.search(r"```python\n(.*?)```", CARD.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    names: dict[str, Any] = {}
    exec(found[1], names)
    return names


@pytest.mark.long
def test_the_whole_recipe_builds_a_pipeline_that_the_cards_call_draws_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"train": load_pictures("train").iloc[:12], "heldout": load_pictures("heldout").iloc[:6]}
    monkeypatch.setattr(build, "load_pictures", few.__getitem__)
    monkeypatch.setattr(evaluate, "load_pictures", few.__getitem__)
    (tmp_path / "tiny.toml").write_text(TINY_RECIPE)
    work, out = tmp_path / "work", tmp_path / "out"
    options = ["--config", str(tmp_path / "tiny.toml"), "--out", str(out), "--device", "cpu"]
    answer = CliRunner().invoke(app, ["train", "--work", str(work), *options])
    assert answer.exit_code == 0, answer.output
    own = out / "transformer"
    assert {path.relative_to(own).as_posix() for path in own.rglob("*") if path.is_file()} == {
        "README.md",
        "model_index.json",
        "transformer/config.json",
        "transformer/packed.safetensors",
    }
    assert str(reference_folder()) not in (own / "model_index.json").read_text()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = assembled(own, reference_folder())
    monkeypatch.setattr(prune_lab.assets, "transformer_folder", lambda: folder)
    names = _run_card()
    assert names["picture"].size == (64, 64)
    pipe = names["pipe"]
    assert type(pipe).__name__ == "PixArtAlphaPipeline"
    assert pipe.transformer.dtype == torch.float32
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert all(
        torch.equal(value, stored[name].float()) for name, value in pipe.transformer.state_dict().items()
    )
    # What is read is the trained model, as nearly as a byte a number allows.
    trained = load_file(work / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(
        (value - trained[name]).abs().max() <= trained[name].abs().max() / 200 + 2**-24
        for name, value in pipe.transformer.state_dict().items()
    )

    # Run again with the checkpoint gone: nothing is trained a second time, and the same comes out.
    (work / "transformer.ckpt.safetensors").unlink()
    before = (own / "transformer" / "packed.safetensors").read_bytes()
    assert CliRunner().invoke(app, ["train", "--work", str(work), *options]).exit_code == 0
    assert (own / "transformer" / "packed.safetensors").read_bytes() == before
    assert not (work / "transformer.ckpt.safetensors").exists()

    metrics = evaluate.evaluate_transformer(
        tmp_path / "report", assets=out, rounds=1, sampling=Sampling(steps=1)
    )
    assert metrics["rows"] == 6
    assert set(metrics["stored"]) == {"float32", "int8", "float8"}
    assert metrics["models"]["transformer"]["loss"] == pytest.approx(metrics["stored"]["int8"], rel=1e-4)
    assert metrics["training"]["steps"] == 2
    assert {"transformer", "reference U-Net", "real"} <= metrics["drawn"].keys()
    page = (tmp_path / "report" / "README.md").read_text()
    assert all((tmp_path / "report" / name).is_file() for name in re.findall(r"\((\w+\.png)\)", page))
    assert "| 900-999 |" in page


def test_controls_of_a_chain_by_hand() -> None:
    blocks = [f"B{number}" for number in range(1, 13)]
    assert by_hand(blocks, 4) == {
        "contiguous-4": ["B5", "B6", "B7", "B8"],
        "every-3-of-12": ["B3", "B6", "B9", "B12"],
    }
    assert by_hand(blocks, 6) == {
        "contiguous-6": ["B4", "B5", "B6", "B7", "B8", "B9"],
        "every-2-of-12": ["B2", "B4", "B6", "B8", "B10", "B12"],
    }


def test_the_page_of_a_study_is_made_of_the_tables_of_a_report(tmp_path: Path) -> None:
    pairs = pd.DataFrame({"first": ["a", "a", "b"], "second": ["b", "c", "c"], "impact": [2.0, 6.0, 8.0]})
    pairs["sum"] = [2.0, 3.0, 4.0]
    draw_pairs(tmp_path / "pairs.png", pairs)
    assert (tmp_path / "pairs.png").stat().st_size > 1000
    page = study_page(DEMO, pairs, 600)
    assert "| parameters | 8.77 M | 8.77 M |" in page
    assert "All 3 pairs were removed too. The impact of a pair is 2.00 times" in page
    assert "from 1.00 to 2.00" in page
    assert "| bk-base | 14 | 65% | 0.29 | 0.4289 | 0.3759 | 3 |" in page


def test_the_lightest_blocks_are_a_control() -> None:
    plans = {plan.name: plan for plan in control_plans("transformer")}
    weights = {}
    model = PixArtAlphaPipeline.from_pretrained(transformer_folder(), local_files_only=True).transformer
    for number, block in enumerate(model.transformer_blocks, 1):
        matrices = [one.detach() for one in block.parameters() if one.ndim == 2]
        weights[f"B{number}"] = sum(float(one.abs().sum(1).mean()) for one in matrices) / len(matrices)
    for size in (4, 6):
        assert set(plans[f"magnitude-{size}"].removed) == set(sorted(weights, key=weights.__getitem__)[:size])


def test_the_shipped_card_draws_with_the_shipped_model() -> None:
    names = _run_card()
    assert names["picture"].size == (64, 64)
    assert len(names["picture"].getcolors(64 * 64)) > 50  # more than a flat area
    assert (OWN / "README.md").read_bytes() == CARD.read_bytes()


@pytest.mark.long
def test_the_shipped_transformer_is_small_and_listens_to_captions() -> None:
    assert sum(path.stat().st_size for path in OWN.rglob("*") if path.is_file()) <= 8e6
    pipeline = PixArtAlphaPipeline.from_pretrained(transformer_folder(), local_files_only=True)
    config = pipeline.transformer.config
    assert (config.num_layers, config.num_attention_heads, config.attention_head_dim) == (12, 6, 32)
    frame = load_pictures("heldout").iloc[:48]
    captioned = evaluate.captioned_rows(pipeline, frame)
    rows = held_out_rows(captioned, rounds=2)
    model = by_transformer(pipeline.transformer)
    assert float(errors(model, captioned, rows).mean()) < 0.335  # 0.3234 when it was shipped
    losses = caption_losses(model, captioned, rows)
    assert losses["right"] < 0.5  # 0.472, 0.881 and 1.556
    assert 0.8 < losses["none"] < losses["another"]
