"""The batch of a training step: drawn by seed and step alone, from memory, from a cache, or encoded on demand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import SCHEDULER, made_up_data
from narrow_pipelines import narrow
from training_images import CACHED, MANY, TRAINING, open_source, write_images

from prune_lab.distill import LatentCache, LatentData, LiveData, build_cache, draw_batch
from prune_lab.distill.batches import batch_rows, generator_for

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("batches") / "images")


@pytest.fixture(scope="module")
def cache(tiny_pipeline: Any, shared_folder: Path) -> LatentCache:
    source = open_source(str(shared_folder))
    return build_cache(tiny_pipeline, source, MANY, shared_folder.with_name("cache")).cache


def test_a_batch_of_latents_in_memory_is_what_it_always_was() -> None:
    data, step = made_up_data(), 3
    batch = draw_batch(data, SCHEDULER, TRAINING, step)
    rows = torch.tensor(batch_rows(5, 4, TRAINING.seed, step))
    generator = generator_for(TRAINING.seed, "step", step)
    noise = torch.randn((4, 4, 16, 16), generator=generator)
    timesteps = torch.randint(0, 1000, (4,), generator=generator)
    dropped = torch.rand(4, generator=generator) < TRAINING.caption_dropout
    assert torch.equal(batch.target, noise)
    assert torch.equal(batch.timesteps, timesteps)
    assert torch.equal(batch.noisy, SCHEDULER.add_noise(data.latents[rows], noise, timesteps))
    wanted = torch.where(dropped[:, None, None], data.empty_embedding, data.embeddings[rows])
    assert torch.equal(batch.embeddings, wanted)


def test_latents_are_drawn_from_the_distribution_of_the_vae(cache: LatentCache) -> None:
    batch = draw_batch(cache, SCHEDULER, TRAINING, 2)
    chosen = torch.tensor(batch_rows(7, 4, TRAINING.seed, 2))
    variants = torch.randint(0, 3, (4,), generator=generator_for(TRAINING.seed, "variant", 2))
    rows = cache.rows(chosen, variants)
    noise = torch.randn(rows.mean.shape, generator=generator_for(TRAINING.seed, "vae", 2))
    latents = rows.mean + (rows.log_variance / 2).exp() * noise
    assert torch.equal(batch.noisy, SCHEDULER.add_noise(latents, batch.target, batch.timesteps))
    modes = LatentData(rows.mean, rows.embeddings, cache.empty_embedding, ("",) * 4)
    assert modes.rows(torch.arange(4), torch.zeros(4, dtype=torch.int64)).log_variance is None


def test_a_batch_of_the_cache_follows_from_seed_and_step_alone(cache: LatentCache) -> None:
    first = draw_batch(cache, SCHEDULER, TRAINING, 4)
    draw_batch(cache, SCHEDULER, TRAINING, 5)
    again = draw_batch(LatentCache.load(cache.folder), SCHEDULER, TRAINING, 4)
    for name in ("noisy", "target", "timesteps", "embeddings", "weights"):
        assert torch.equal(getattr(first, name), getattr(again, name))


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_a_part_of_a_batch_equals_that_part_of_the_whole(cache: LatentCache, offset: float) -> None:
    settings = dataclasses.replace(TRAINING, noise_offset=offset, min_snr=5.0)
    whole = draw_batch(cache, SCHEDULER, settings, 2)
    for part in (slice(0, 1), slice(1, 4)):
        found = draw_batch(cache, SCHEDULER, settings, 2, part=part)
        for name in ("noisy", "target", "timesteps", "embeddings", "weights"):
            assert torch.equal(getattr(found, name), getattr(whole, name)[part])


def test_live_data_give_the_batches_of_the_cache(
    tiny_pipeline: Any, shared_folder: Path, cache: LatentCache
) -> None:
    live = LiveData.of(tiny_pipeline, open_source(str(shared_folder)), MANY)
    assert (len(live), live.variants, live.channels, live.empty_embedding.shape[-1]) == (7, 3, 4, 16)
    for step in (1, 2):
        found, wanted = (draw_batch(data, SCHEDULER, TRAINING, step) for data in (live, cache))
        for name in ("noisy", "target", "timesteps", "embeddings"):
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name))
    other = dataclasses.replace(MANY, seed=6)
    assert live.digest != LiveData.of(tiny_pipeline, open_source(str(shared_folder)), other).digest


def test_every_epoch_of_the_cache_uses_every_picture_once(cache: LatentCache) -> None:
    settings = dataclasses.replace(TRAINING, caption_dropout=0.0, batch=7)
    batch = draw_batch(cache, SCHEDULER, settings, 3)
    told = cache.rows(torch.arange(7), torch.zeros(7, dtype=torch.int64)).embeddings
    places = [(batch.embeddings[row] == told).flatten(1).all(dim=1).nonzero().item() for row in range(7)]
    assert sorted(places) == list(range(7))


def test_sdxl_is_told_the_size(tiny_pipeline: Any, shared_folder: Path, tmp_path: Path) -> None:
    own = narrow("sdxl", tiny_pipeline)
    cache = build_cache(own, open_source(str(shared_folder)), CACHED, tmp_path / "cache").cache
    rows = cache.rows(torch.tensor([5, 1]), torch.tensor([0, 0]))
    assert rows.added["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2
    tokens = own.tokenizer_2(
        ["a fox", "a dog, smiling"], padding="max_length", max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        pooled = own.text_encoder_2(tokens.input_ids).text_embeds
    torch.testing.assert_close(
        rows.added["text_embeds"], pooled, rtol=2e-3, atol=2e-3
    )  # of a file in float16
    batch = draw_batch(cache, SCHEDULER, dataclasses.replace(TRAINING, caption_dropout=0.99), 1)
    assert torch.equal(batch.added["text_embeds"], cache.empty_added["text_embeds"].expand(4, -1))
