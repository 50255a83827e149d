"""Random conditioning: which rows get another caption, what counts for them, and that a run still resumes exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import SCHEDULER, SETTINGS, made_up_data, same, setup_for, students_of, validation_probe
from safetensors.torch import load_file

from prune_lab.config import DistillConfig, RunConfig
from prune_lab.distill import (
    OtherCaptions,
    distill_together,
    draw_batch,
    other_captions,
)
from prune_lab.distill.conditioning import probability, recondition
from prune_lab.distill.losses import student_losses, teacher_output
from prune_lab.errors import ConfigError, DataError, RunError
from prune_lab.probes import encode_captions
from prune_lab.runtime import generator_for
from prune_lab.session import ensure_captions
from prune_lab.workflow import Session, start_run

pytestmark = pytest.mark.usefixtures("one_thread")

OFTEN = dataclasses.replace(SETTINGS, batch=4, steps=4, random_conditioning=0.9, caption_dropout=0.3)


def made_up_captions(count: int = 6, seed: int = 9) -> OtherCaptions:
    generator = torch.Generator().manual_seed(seed)
    return OtherCaptions(torch.randn(count, 7, 16, generator=generator), {}, f"digest {seed}")


def test_rows_get_another_caption_as_a_naive_loop_says() -> None:
    data, others, settings = (
        made_up_data(),
        made_up_captions(),
        dataclasses.replace(OFTEN, batch=64, min_snr=5.0),
    )
    before = draw_batch(data, SCHEDULER, settings, 3)
    after = recondition(before, others, data, SCHEDULER, settings, 3)
    generator = generator_for(settings.seed, "random conditioning", 3)
    draws = torch.rand(64, generator=generator).tolist()
    places = torch.randint(0, 6, (64,), generator=generator).tolist()
    dropped = torch.rand(64, generator=generator).tolist()
    changed = 0
    for row in range(64):
        share = 1 - float(SCHEDULER.alphas_cumprod[before.timesteps[row]])
        wanted, weight = before.embeddings[row], before.weights[row]
        if draws[row] < 0.9 * share:
            changed += 1
            wanted = data.empty_embedding if dropped[row] < 0.3 else others.embeddings[places[row]]
            weight = torch.tensor(0.0)
        assert torch.equal(after.embeddings[row], wanted)
        assert torch.equal(after.weights[row], weight)
    assert 20 < changed < 60
    for name in ("noisy", "target", "timesteps"):
        assert torch.equal(getattr(after, name), getattr(before, name))


def test_more_noise_makes_another_caption_likelier() -> None:
    found = probability(SCHEDULER, torch.tensor([0, 500, 999]), 0.8)
    wanted = [0.8 * (1 - float(SCHEDULER.alphas_cumprod[step])) for step in (0, 500, 999)]
    torch.testing.assert_close(found, torch.tensor(wanted))
    assert found[0] < 0.01
    assert 0.79 < found[2] < 0.8


def test_the_parts_of_processes_make_the_whole_batch() -> None:
    data, others = made_up_data(), made_up_captions()
    whole = recondition(draw_batch(data, SCHEDULER, OFTEN, 2), others, data, SCHEDULER, OFTEN, 2)
    for part in (slice(0, 2), slice(2, 4)):
        own = draw_batch(data, SCHEDULER, OFTEN, 2, part=part)
        own = recondition(own, others, data, SCHEDULER, OFTEN, 2, part=part)
        for field in ("noisy", "embeddings", "weights", "timesteps"):
            assert torch.equal(getattr(own, field), getattr(whole, field)[part])


def test_sdxl_gets_the_pooled_text_of_the_same_caption() -> None:
    data, others = made_up_data(), made_up_captions()
    sizes = {"text_embeds": torch.zeros(5, 3), "time_ids": torch.ones(5, 6)}
    pooled = torch.arange(1.0, 7)[:, None].expand(6, 3)
    data = dataclasses.replace(data, added=sizes, empty_added={"text_embeds": torch.full((3,), -1.0)})
    others = dataclasses.replace(others, added={"text_embeds": pooled})
    settings = dataclasses.replace(OFTEN, batch=32)
    batch = draw_batch(data, SCHEDULER, settings, 2)
    found = recondition(batch, others, data, SCHEDULER, settings, 2)
    assert torch.equal(found.added["time_ids"], torch.ones(32, 6))
    for row in range(32):
        number = float(found.added["text_embeds"][row, 0])
        if number > 0:
            assert torch.equal(found.embeddings[row], others.embeddings[int(number) - 1])
        elif number == -1:
            assert torch.equal(found.embeddings[row], data.empty_embedding)
    assert found.added["text_embeds"].max() > 0


def test_only_the_losses_against_the_teacher_count_for_other_captions(tiny_unet: Any) -> None:
    (student,) = students_of(tiny_unet, Path(), ("bk-small",))
    settings = dataclasses.replace(OFTEN, batch=8, random_conditioning=0.6)
    data, others = made_up_data(), made_up_captions()
    batch = recondition(draw_batch(data, SCHEDULER, settings, 5), others, data, SCHEDULER, settings, 5)
    unet = student.load()
    output = teacher_output(tiny_unet, [], batch, torch.float32)
    losses = student_losses(unet, output, [], batch, variant="raw", precision=torch.float32, forward=unet)
    with torch.no_grad():
        inputs = batch.noisy, batch.timesteps, batch.embeddings
        taught, found = (model(*inputs).sample for model in (tiny_unet, unet))
    own = batch.weights == 1
    assert 0 < int(own.sum()) < 8
    errors = (found - batch.target).square().mean((1, 2, 3))
    torch.testing.assert_close(losses.task.detach(), errors[own].sum() / 8)
    torch.testing.assert_close(losses.output.detach(), (found - taught).square().mean())


def trained(
    unet: Any, folder: Path, others: OtherCaptions | None, settings: DistillConfig = OFTEN, **more: Any
) -> dict[str, torch.Tensor]:
    setup = dataclasses.replace(setup_for(unet, validation_probe(), settings), others=others)
    (student,) = students_of(unet, folder, ("bk-small",))
    (recovery,) = distill_together(setup, [student], **more)
    assert recovery.status == "done"
    return load_file(student.folder / "distilled/model/diffusion_pytorch_model.safetensors")


@pytest.mark.long
def test_a_training_goes_on_bit_for_bit_and_only_with_the_same_captions(
    tiny_unet: Any, tmp_path: Path
) -> None:
    others = made_up_captions()
    whole = trained(tiny_unet, tmp_path / "whole", others)
    trained(tiny_unet, tmp_path / "parts", others, until=2, keep_checkpoint=True)
    with pytest.raises(RunError, match="captions='digest 9' instead of 'digest 8'"):
        trained(tiny_unet, tmp_path / "parts", made_up_captions(seed=8))
    assert same(trained(tiny_unet, tmp_path / "parts", others), whole)
    off = dataclasses.replace(OFTEN, random_conditioning=0.0)
    assert not same(trained(tiny_unet, tmp_path / "off", None, off), whole)


def test_captions_of_another_shape_are_refused(tiny_unet: Any, tmp_path: Path) -> None:
    others = dataclasses.replace(made_up_captions(), embeddings=torch.zeros(3, 5, 16))
    with pytest.raises(DataError, match="captions of 5 tokens of width 16, the training data have 7 and 16"):
        trained(tiny_unet, tmp_path, others)


def test_captions_are_encoded_once(tiny_pipeline: Any, tmp_path: Path) -> None:
    captions, path = ["a cat", "two dogs", "rain"], tmp_path / "captions.safetensors"
    first = other_captions(tiny_pipeline, captions, path)
    torch.testing.assert_close(first.embeddings, encode_captions(tiny_pipeline, captions)[0])
    stamp = path.stat().st_mtime_ns
    again = other_captions(tiny_pipeline, captions, path)
    assert path.stat().st_mtime_ns == stamp
    assert again.digest == first.digest
    assert torch.equal(again.embeddings, first.embeddings)
    changed = other_captions(tiny_pipeline, captions[:2], path)
    assert (len(changed), changed.digest == first.digest) == (2, False)
    with pytest.raises(DataError, match=r"distill\.captions"):
        other_captions(tiny_pipeline, [], path)


def test_a_run_leaves_the_captions_of_held_out_rows_out(
    small_run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small_run_config(distill={"random_conditioning": 0.5, "captions": str(tmp_path / "more.txt")})
    session = Session(start_run(config, tmp_path / "run"))
    held = [caption for caption in session.validation.captions if caption]
    assert held
    (tmp_path / "more.txt").write_text("\n".join(["a cat", held[0].upper(), "two dogs"]), encoding="utf-8")
    others = ensure_captions(session)
    torch.testing.assert_close(others.embeddings, encode_captions(session.pipeline, ["a cat", "two dogs"])[0])
    assert session.run.captions.is_file()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"random_conditioning": 1.5}, "at least 0 and at most 1"),
        ({"random_conditioning": -1.0}, "zero or more"),
        ({"random_conditioning": 0.5, "output_weight": 0.0, "feature_weight": 0.0}, "nothing is learnt"),
        ({"captions": ""}, "default, or a file"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DistillConfig(**settings)
