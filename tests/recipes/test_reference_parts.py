"""What the trainings share, and the autoencoder, scorer, tokenizer and text encoder of the reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from prune_lab.assets import decode_pictures, load_pictures
from prune_lab.errors import DataError
from recipes.reference_model.autoencoder import (
    build_autoencoder,
    decode,
    encode,
    standardise,
    train_autoencoder,
)
from recipes.reference_model.captions import CaptionedLatents, build_tokenizer
from recipes.reference_model.clip import build_clip, pair_loss, retrieval, text_tower, train_clip
from recipes.reference_model.settings import AutoencoderShape, ClipShape, Recipe
from recipes.reference_model.steps import batch_indices
from recipes.reference_model.text_encoder import LayoutReader, train_text_encoder

TINY_AUTOENCODER = AutoencoderShape(channels=(8, 8, 8), groups=4)
TINY_CLIP = ClipShape(
    text_width=16, text_layers=1, picture_width=16, picture_layers=1, heads=2, patch=16, shared=16
)


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


def test_the_tokenizer_has_tokens_for_any_text(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["red apple", "green apple"] * 3, tmp_path / "t", vocabulary=600, length=12)
    ids = tokenizer("a 犬 in Zürich, apple").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "a犬inzürich,apple"
    assert max(ids) == tokenizer.eos_token_id == len(tokenizer) - 1  # what CLIP's pooling looks for
    assert len(tokenizer("apple").input_ids) == 3


def test_clip_towers_read_the_tokenizers_marks(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["red apple"] * 3, tmp_path / "t", vocabulary=600, length=8)
    model = build_clip(TINY_CLIP, tokenizer)
    assert model.config.text_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.text_config.max_position_embeddings == 8


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


@pytest.mark.long
def test_training_the_other_parts_lowers_their_losses(tmp_path: Path) -> None:
    rows = load_pictures("train").iloc[:32]
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
