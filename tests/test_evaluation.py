"""Held-out loss, generating with another U-Net in a pipeline, CLIP scores, and picture grids."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build_tokenizer
from PIL import Image

from prune_lab.errors import DataError
from prune_lab.evaluation import clip_scores, generate, heldout_loss, read_pictures, save_grid, save_pictures
from prune_lab.models import ScorerInputs, load_pipeline, resolve_model
from prune_lab.probes import random_probe


@pytest.fixture
def pipeline(tiny_pipeline_folder: Path) -> Any:
    return load_pipeline(resolve_model(str(tiny_pipeline_folder)))


def test_heldout_loss_is_the_mean_square_per_row(tiny_unet: Any) -> None:
    probe = random_probe(tiny_unet.config, samples=5, seed=3)
    losses = heldout_loss(tiny_unet, probe, batch=2)
    with torch.no_grad():
        found = tiny_unet(probe.noisy, probe.timesteps, probe.embeddings).sample
    expected = [float((found[row] - probe.target[row]).square().mean()) for row in range(5)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


DRAW: dict[str, Any] = {"steps": 3, "guidance": 2.0}


def test_every_prompt_meets_every_seed_prompt_by_prompt(pipeline: Any) -> None:
    pictures = generate(pipeline, ["a cat", "a dog"], [0, 7], **DRAW)
    assert (pictures.dtype, tuple(pictures.shape)) == (torch.uint8, (4, 3, 32, 32))
    for i, (prompt, seed) in enumerate([("a cat", 0), ("a cat", 7), ("a dog", 0), ("a dog", 7)]):
        drawn = pipeline(
            prompt,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=3,
            guidance_scale=2.0,
            output_type="np",
        ).images
        expected = torch.from_numpy((drawn[0] * 255).round()).permute(2, 0, 1)
        # kernels may round differently for another batch size
        assert (pictures[i].float() - expected).abs().max() <= 1


def test_pictures_do_not_depend_on_the_batch_or_on_earlier_ones(pipeline: Any) -> None:
    together = generate(pipeline, ["a cat", "a dog", "a fish"], [3], batch=3, **DRAW)
    apart = generate(pipeline, ["a cat", "a dog", "a fish"], [3], batch=1, **DRAW)
    alone = generate(pipeline, ["a fish"], [3], **DRAW)
    assert (together.int() - apart.int()).abs().max() <= 1
    assert torch.equal(apart[2:], alone)


def test_another_unet_draws_and_the_pipeline_gets_its_own_back(pipeline: Any) -> None:
    own, scheduler, bar = pipeline.unet, pipeline.scheduler, dict(pipeline._progress_bar_config)
    other = copy.deepcopy(own)
    with torch.no_grad():
        other.conv_out.weight.mul_(-1)
    first = generate(pipeline, ["a cat"], [0], **DRAW)
    changed = generate(pipeline, ["a cat"], [0], model=other, **DRAW)
    again = generate(pipeline, ["a cat"], [0], **DRAW)
    assert torch.equal(first, again)
    assert not torch.equal(first, changed)
    with torch.no_grad():
        other.conv_out.bias.fill_(torch.nan)
    with pytest.raises(DataError, match="not finite"):
        generate(pipeline, ["a cat"], [0], model=other, **DRAW)
    assert pipeline.unet is own
    assert pipeline.scheduler is scheduler
    assert pipeline._progress_bar_config == bar


def test_nothing_to_draw_is_refused(pipeline: Any) -> None:
    with pytest.raises(DataError, match="0 seeds"):
        generate(pipeline, ["a cat"], [], **DRAW)


@pytest.fixture
def scorer(tmp_path: Path) -> tuple[Any, ScorerInputs]:
    from transformers import CLIPConfig, CLIPModel

    tokenizer = build_tokenizer(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config={**sizes, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
                vision_config={**sizes, "image_size": 16, "patch_size": 8},
                projection_dim=8,
            )
        ).eval()
    inputs = ScorerInputs(
        tokenizer=tokenizer,
        max_tokens=16,
        resize=(16, 16),
        resample=3,
        crop=None,
        mean=(0.5, 0.4, 0.3),
        deviation=(0.2, 0.3, 0.4),
    )
    return model, inputs


def test_clip_scores_equal_the_cosine_from_the_towers(scorer: tuple[Any, ScorerInputs]) -> None:
    model, inputs = scorer
    pictures = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    prompts = ["a cat", "a dog", "a fish", "a very long caption of more than sixteen letters", ""]
    scores = clip_scores(scorer, pictures, prompts, batch=2)
    mean, deviation = (torch.tensor(values).reshape(3, 1, 1) for values in (inputs.mean, inputs.deviation))
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            seen = model.vision_model(((pictures[i] / 255 - mean) / deviation)[None])
            tokens = inputs.tokenizer(
                [prompt], padding="max_length", truncation=True, max_length=16, return_tensors="pt"
            )
            read = model.text_model(**tokens)
            expected = F.cosine_similarity(
                model.visual_projection(seen.pooler_output), model.text_projection(read.pooler_output)
            )
            assert float(scores[i]) == pytest.approx(expected.item(), abs=1e-5)
    assert clip_scores(scorer, pictures[:0], []).shape == (0,)
    with pytest.raises(DataError, match="5 images against 1 prompts"):
        clip_scores(scorer, pictures, ["a cat"])


def test_a_picture_scores_best_with_the_prompt_whose_embedding_it_has() -> None:
    class Model:
        device = torch.device("cpu")

        def __call__(self, **inputs: torch.Tensor) -> Any:
            return SimpleNamespace(
                image_embeds=F.normalize(inputs["pixel_values"]), text_embeds=F.normalize(inputs["words"])
            )

    class Inputs:
        def pictures(self, pictures: torch.Tensor, device: Any) -> torch.Tensor:
            return pictures.float().flatten(1)

        def captions(self, texts: list[str], device: Any) -> dict[str, torch.Tensor]:
            return {"words": torch.tensor([[float(number) for number in text.split()] for text in texts])}

    pictures = torch.tensor([[3, 0, 4]], dtype=torch.uint8).reshape(1, 3, 1, 1)
    for prompt, cosine in (("6 0 8", 1.0), ("0 9 0", 0.0), ("1 0 0", 0.6), ("-4 0 -3", -0.96)):
        assert clip_scores((Model(), Inputs()), pictures, [prompt]).tolist() == pytest.approx([cosine])  # type: ignore[arg-type]


def test_a_grid_holds_every_picture_where_it_belongs(tmp_path: Path) -> None:
    pictures = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    path = tmp_path / "grids" / "five.png"
    save_grid(path, pictures, columns=3, gap=2)
    grid = torch.tensor(list(Image.open(path).tobytes()), dtype=torch.uint8).reshape(10, 22, 3)
    for i in range(5):
        top, left = (i // 3) * 6, (i % 3) * 8
        assert torch.equal(grid[top : top + 4, left : left + 6].permute(2, 0, 1), pictures[i])
    assert bool((grid[4:6] == 255).all())
    assert bool((grid[6:, 16:] == 255).all())
    assert [file.name for file in path.parent.iterdir()] == ["five.png"]
    with pytest.raises(DataError, match="grid"):
        save_grid(path, pictures[:0])


def test_pictures_are_read_as_they_were_saved_in_the_order_of_their_names(tmp_path: Path) -> None:
    pictures = torch.randint(0, 256, (3, 3, 6, 10), dtype=torch.uint8)
    save_pictures(tmp_path / "set", pictures, ["b.png", "c.png", "a.png"])
    assert torch.equal(read_pictures(tmp_path / "set"), pictures[[2, 0, 1]])
    save_pictures(tmp_path / "set", pictures[:1], ["a.png"])  # a set replaces the one before
    assert len(read_pictures(tmp_path / "set")) == 1
    with pytest.raises(DataError, match="3 pictures under 1 names"):
        save_pictures(tmp_path / "set", pictures, ["a.png"])


def test_pictures_that_cannot_be_read_together_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no PNG files; remove it and draw again"):
        read_pictures(tmp_path)
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    Image.new("RGB", (5, 3)).save(tmp_path / "b.png")
    with pytest.raises(DataError, match="found sizes 4 x 3, 5 x 3"):
        read_pictures(tmp_path)
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(DataError, match=r"b\.png, found no PNG picture"):
        read_pictures(tmp_path)
