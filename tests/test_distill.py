"""Distillation: pairs, losses, data order, the optimiser's arithmetic, and resuming bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from distilling import (
    SCHEDULER,
    SETTINGS,
    batch_losses,
    distill,
    made_up_data,
    same,
    student_of,
    validation_probe,
    weights,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import prune_lab.distill.loop as loop
from prune_lab.blocks import architecture_of
from prune_lab.config import DistillConfig
from prune_lab.distill import (
    LatentData,
    Recovery,
    cached_data,
    draw_batch,
    encode_data,
    feature_pairs,
    load_recovery,
)
from prune_lab.distill.batches import batch_rows
from prune_lab.distill.features import FeaturePair, tapped
from prune_lab.errors import DataError, DeviceError, NonNativePlanError, RunError
from prune_lab.forms import layout_of
from prune_lab.models import load_pipeline, resolve_model
from prune_lab.plans import native_choices, parse_plan, plan_of
from prune_lab.probes import Probe
from prune_lab.repair.cuts import find_cuts, teacher_paths
from prune_lab.schemas import RECOVERY_COLUMNS
from prune_lab.surgery import materialise


@pytest.fixture
def validation() -> Probe:
    return validation_probe()


@pytest.fixture
def whole(distilled_alone: Path) -> Path:
    """``bk-small`` trained with ``SETTINGS`` and never stopped; copy it to change it."""
    return distilled_alone / "bk-small"


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "distilled" / "model" / "diffusion_pytorch_model.safetensors")


# Pairs -----------------------------------------------------------------------------------------------------------

EIGHT = [f"{side}_blocks.{stage}" for side in ("down", "up") for stage in range(4)]


@pytest.mark.parametrize("name", ["bk-base", "bk-small", "teacher"])
def test_pairs_of_base_and_small_are_the_eight_of_the_official_code(tiny_unet: Any, name: str) -> None:
    architecture = architecture_of(tiny_unet)
    pairs = feature_pairs(architecture, parse_plan(name, architecture))
    assert [(pair.teacher_path, pair.student_path) for pair in pairs] == [(path, path) for path in EIGHT]


def test_pairs_of_tiny_are_the_six_of_the_official_code(tiny_unet: Any) -> None:
    architecture = architecture_of(tiny_unet)
    pairs = feature_pairs(architecture, parse_plan("bk-tiny", architecture))
    assert [(pair.teacher_path, pair.student_path) for pair in pairs] == [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.1"),
        ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out"),
        ("up_blocks.1", "up_blocks.0"),
        ("up_blocks.2", "up_blocks.1"),
        ("up_blocks.3", "up_blocks.2"),
    ]


def test_an_attention_free_last_stage_is_compared_after_its_last_residual_block(tiny_unet: Any) -> None:
    architecture = architecture_of(tiny_unet)
    plan = parse_plan("bk-tiny -Dn3.A1 -Up2.A1 -Up2.A3", architecture)
    pairs = feature_pairs(architecture, plan)
    assert pairs[2] == FeaturePair("down_blocks.2.resnets.1", "down_blocks.2.resnets.0")
    assert len(pairs) == 6


def test_a_plan_without_a_native_form_has_no_pairs(tiny_unet: Any) -> None:
    architecture = architecture_of(tiny_unet)
    with pytest.raises(NonNativePlanError):
        feature_pairs(architecture, parse_plan("-Dn1.A1", architecture))


@settings(max_examples=60)
@given(chosen=st.data())
@pytest.mark.parametrize("model", ["transformer", "flux-dev"])
def test_a_feature_of_a_chain_is_what_the_next_block_reads(model: str, chosen: st.DataObject) -> None:
    """What a repair of the cut aims at, as the walk of ``find_cuts`` has it, and where no cut is the block's own."""
    architecture = resolve_model(model).architecture
    names = [block.name for block in architecture.blocks]
    # where one list ends and another begins blocks stay: no feature of one reaches over into the other
    ends = {
        names[place + step]
        for step in (0, 1)
        for place in range(len(names) - 1)
        if names[place][0] != names[place + 1][0]
    }
    removable = [name for name in names if name not in ends]
    plan = plan_of(
        architecture, chosen.draw(st.frozensets(st.sampled_from(removable), max_size=len(names) - 1))
    )
    paths = teacher_paths(architecture)
    read = {paths[cut.before]: paths[cut.main.teacher_source] for cut in find_cuts(architecture, plan)}
    layout = layout_of(architecture, plan)
    own = {layout.renamed(path): path for path in paths.values()}
    pairs = feature_pairs(architecture, plan)
    assert pairs
    for pair in pairs:
        writer = own[pair.student_path]
        assert pair.teacher_path == read.get(writer, writer)


@settings(max_examples=8)
@given(chosen=st.data())
def test_paired_features_have_equal_shapes_for_any_native_plan(
    tiny_unet_shared: Any, chosen: st.DataObject
) -> None:
    architecture = architecture_of(tiny_unet_shared)
    removed = [chosen.draw(st.sampled_from(options)) for options in native_choices(architecture)]
    plan = plan_of(architecture, frozenset().union(*removed))
    pairs = feature_pairs(architecture, plan)
    student = materialise(tiny_unet_shared, plan)
    inputs = (torch.randn(1, 4, 16, 16), 7, torch.randn(1, 3, 16))
    with (
        torch.no_grad(),
        tapped(tiny_unet_shared, [pair.teacher_path for pair in pairs]) as wanted,
        tapped(student, [pair.student_path for pair in pairs]) as found,
    ):
        tiny_unet_shared(*inputs)
        student(*inputs)
        for pair in pairs:
            assert wanted[pair.teacher_path].shape == found[pair.student_path].shape


def test_taps_are_gone_even_when_the_body_raises(tiny_unet: Any) -> None:
    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in tiny_unet.modules())

    def body() -> None:
        with tapped(tiny_unet, ["down_blocks.0", "up_blocks.3"]):
            assert hooks() == 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert hooks() == 0
    with pytest.raises(AttributeError), tapped(tiny_unet, ["down_blocks.0", "no_such_module"]):
        pass
    assert hooks() == 0


# Losses ----------------------------------------------------------------------------------------------------------


def inner_states(unet: Any, batch: Any) -> dict[str, torch.Tensor]:
    """Hidden states after every stage, by running the stages one after the other without any hook."""
    time = unet.time_embedding(unet.time_proj(batch.timesteps))
    state = unet.conv_in(batch.noisy)
    skips = [state]
    found = {}
    for i, stage in enumerate(unet.down_blocks):
        more = {"encoder_hidden_states": batch.embeddings} if hasattr(stage, "attentions") else {}
        state, residuals = stage(hidden_states=state, temb=time, **more)
        skips += residuals
        found[f"down_blocks.{i}"] = state
    if unet.mid_block is not None:
        state = unet.mid_block(state, time, encoder_hidden_states=batch.embeddings)
    for i, stage in enumerate(unet.up_blocks):
        count = len(stage.resnets)
        own, skips = tuple(skips[-count:]), skips[:-count]
        more = {"encoder_hidden_states": batch.embeddings} if hasattr(stage, "attentions") else {}
        state = stage(hidden_states=state, temb=time, res_hidden_states_tuple=own, **more)
        found[f"up_blocks.{i}"] = state
    found["output"] = unet.conv_out(unet.conv_act(unet.conv_norm_out(state)))
    return found


@pytest.mark.parametrize("plan", ["bk-base", "bk-small"])
def test_losses_equal_a_computation_without_hooks(tiny_unet: Any, plan: str) -> None:
    student, pairs = student_of(tiny_unet, plan)
    batch = draw_batch(made_up_data(), SCHEDULER, SETTINGS, 1)
    losses = batch_losses(tiny_unet, student, pairs, batch)
    wanted, found = inner_states(tiny_unet, batch), inner_states(student, batch)
    torch.testing.assert_close(losses.task, (found["output"] - batch.target).square().mean())
    torch.testing.assert_close(losses.output, (found["output"] - wanted["output"]).square().mean())
    terms = [(found[path] - wanted[path]).square().mean() for path in EIGHT]
    torch.testing.assert_close(losses.feature, torch.stack(terms).sum())
    weighted = dataclasses.replace(SETTINGS, task_weight=2.0, output_weight=0.5, feature_weight=0.25)
    expected = 2 * losses.task + 0.5 * losses.output + 0.25 * losses.feature
    torch.testing.assert_close(losses.total(weighted), expected)


def test_the_third_pair_of_tiny_is_before_the_outer_residual(tiny_unet: Any) -> None:
    student, pairs = student_of(tiny_unet, "bk-tiny")
    batch = draw_batch(made_up_data(), SCHEDULER, SETTINGS, 1)
    only = batch_losses(tiny_unet, student, pairs[2:3], batch).feature
    last = [model.down_blocks[2].attentions[-1] for model in (tiny_unet, student)]
    outer = []
    for model, attention in zip((tiny_unet, student), last, strict=True):
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            attention.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.update(before=inputs[0])),
            attention.register_forward_hook(lambda _, __, output, seen=seen: seen.update(after=output[0])),
        ]
        model(batch.noisy, batch.timesteps, batch.embeddings)
        for hook in hooks:
            hook.remove()
        outer.append(seen["after"] - seen["before"])
    torch.testing.assert_close(only, F.mse_loss(*outer), rtol=1e-4, atol=1e-6)


def test_the_losses_of_an_unpruned_student_are_zero_but_for_the_task(tiny_unet: Any) -> None:
    student, pairs = student_of(tiny_unet, "teacher")
    losses = batch_losses(tiny_unet, student, pairs, draw_batch(made_up_data(), SCHEDULER, SETTINGS, 1))
    assert losses.output.item() == losses.feature.item() == 0.0
    assert losses.task.item() > 0.1
    assert tiny_unet.conv_in.weight.grad is None


def test_only_the_student_gets_gradients(tiny_unet: Any) -> None:
    student, pairs = student_of(tiny_unet, "bk-small")
    losses = batch_losses(tiny_unet, student, pairs, draw_batch(made_up_data(), SCHEDULER, SETTINGS, 1))
    losses.total(SETTINGS).backward()
    assert all(parameter.grad is None for parameter in tiny_unet.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


# Data ------------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 40), batch=st.integers(1, 17), seed=st.integers(0, 3), epochs=st.integers(1, 4))
def test_every_epoch_uses_every_picture_once(count: int, batch: int, seed: int, epochs: int) -> None:
    steps = math.ceil(count * epochs / batch)
    rows = [row for step in range(1, steps + 1) for row in batch_rows(count, batch, seed, step)]
    for epoch in range(epochs):
        assert sorted(rows[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_a_batch_follows_from_seed_and_step_alone() -> None:
    data = made_up_data()
    torch.manual_seed(0)
    first = draw_batch(data, SCHEDULER, SETTINGS, 4)
    torch.manual_seed(99)
    draw_batch(data, SCHEDULER, SETTINGS, 5)
    again = draw_batch(data, SCHEDULER, SETTINGS, 4)
    other_step = draw_batch(data, SCHEDULER, SETTINGS, 5)
    other_seed = draw_batch(data, SCHEDULER, dataclasses.replace(SETTINGS, seed=1), 4)
    for name in ("noisy", "target", "timesteps", "embeddings"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.target, other_step.target)
    assert not torch.equal(first.target, other_seed.target)


def test_a_batch_does_not_keep_the_layout_of_the_data() -> None:
    data = made_up_data()
    latents = data.latents.contiguous(memory_format=torch.channels_last)
    laid_out = dataclasses.replace(data, latents=latents)
    for one in (data, laid_out):
        batch = draw_batch(one, SCHEDULER, SETTINGS, 1)
        assert batch.noisy.is_contiguous()
        assert batch.target.is_contiguous()


def test_noisy_latents_follow_the_diffusion_equation() -> None:
    data = made_up_data(rows=1)
    batch = draw_batch(data, SCHEDULER, dataclasses.replace(SETTINGS, batch=3), 1)
    kept = SCHEDULER.alphas_cumprod[batch.timesteps].reshape(-1, 1, 1, 1)
    expected = kept.sqrt() * data.latents + (1 - kept).sqrt() * batch.target
    torch.testing.assert_close(batch.noisy, expected)


def test_a_velocity_model_is_trained_on_the_velocity() -> None:
    data = made_up_data(rows=1)
    config = dataclasses.replace(SETTINGS, batch=3)
    noise = draw_batch(data, SCHEDULER, config, 1)
    scheduler = DDPMScheduler.from_config(SCHEDULER.config, prediction_type="v_prediction")
    velocity = draw_batch(data, scheduler, config, 1)
    kept = SCHEDULER.alphas_cumprod[noise.timesteps].reshape(-1, 1, 1, 1)
    assert torch.equal(velocity.noisy, noise.noisy)
    torch.testing.assert_close(velocity.target, kept.sqrt() * noise.target - (1 - kept).sqrt() * data.latents)


def test_timesteps_are_uniform_and_captions_drop_at_their_rate() -> None:
    data = made_up_data()
    batch = draw_batch(data, SCHEDULER, dataclasses.replace(SETTINGS, batch=4000, caption_dropout=0.1), 1)
    counts = torch.bincount(batch.timesteps // 100, minlength=10)
    assert len(counts) == 10
    assert (counts - 400).abs().max() < 5 * math.sqrt(360)  # five standard deviations
    dropped = (batch.embeddings == data.empty_embedding).flatten(1).all(dim=1)
    assert abs(int(dropped.sum()) - 400) < 5 * math.sqrt(360)
    whole = draw_batch(data, SCHEDULER, dataclasses.replace(SETTINGS, batch=50, caption_dropout=0.0), 1)
    assert not (whole.embeddings == data.empty_embedding).flatten(1).all(dim=1).any()


def test_dropping_a_caption_of_sdxl_drops_its_pooled_text_too() -> None:
    data = dataclasses.replace(
        made_up_data(),
        added={"text_embeds": torch.ones(5, 3), "time_ids": torch.full((5, 6), 2.0)},
        empty_added={"text_embeds": torch.zeros(3)},
    )
    batch = draw_batch(data, SCHEDULER, dataclasses.replace(SETTINGS, batch=40, caption_dropout=0.5), 1)
    dropped = (batch.embeddings == data.empty_embedding).flatten(1).all(dim=1)
    assert 0 < int(dropped.sum()) < 40
    assert torch.equal(batch.added["text_embeds"], (~dropped).float()[:, None].expand(40, 3))
    assert bool((batch.added["time_ids"] == 2).all())
    assert bool((data.added["text_embeds"] == 1).all())


def test_data_are_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    data = dataclasses.replace(made_up_data(), key="abc", added={"text_embeds": torch.rand(5, 3)})
    data.save(tmp_path / "data.safetensors")
    loaded = LatentData.load(tmp_path / "data.safetensors")
    assert (loaded.captions, loaded.key, loaded.digest) == (data.captions, data.key, data.digest)
    (tmp_path / "data.safetensors").write_bytes((tmp_path / "data.safetensors").read_bytes()[:-9])
    with pytest.raises(DataError, match="remove it"):
        LatentData.load(tmp_path / "data.safetensors")
    with pytest.raises(DataError, match="one caption per image"):
        dataclasses.replace(data, captions=("one",))


def test_encoding_equals_the_vae_and_text_encoder_by_hand(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(resolve_model(str(tiny_pipeline_folder)))
    pictures = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    captions = ("a cat", "a dog, smiling", "")
    data = encode_data(pipeline, pictures, captions, batch=2)
    with torch.no_grad():
        mean = pipeline.vae.encode(pictures.float() / 127.5 - 1).latent_dist.mean
        tokens = pipeline.tokenizer(
            ["a dog, smiling"], padding="max_length", max_length=16, return_tensors="pt"
        )
        text = pipeline.text_encoder(tokens.input_ids)[0]
    torch.testing.assert_close(data.latents, mean * pipeline.vae.config.scaling_factor)
    torch.testing.assert_close(data.embeddings[1:2], text)
    torch.testing.assert_close(data.empty_embedding, data.embeddings[2])

    path = tmp_path / "data.safetensors"
    first = cached_data(path, pipeline, pictures, captions)
    stamp = path.stat().st_mtime_ns
    assert cached_data(path, pipeline, pictures, captions).digest == first.digest
    assert path.stat().st_mtime_ns == stamp
    other = cached_data(path, pipeline, pictures.flip(0), captions)
    torch.testing.assert_close(other.latents, first.latents.flip(0))
    assert path.stat().st_mtime_ns != stamp
    with pytest.raises(DataError, match="3 images with 1 captions"):
        encode_data(pipeline, pictures, ["only one"])


# The loop --------------------------------------------------------------------------------------------------------


def run(
    unet: Any,
    folder: Path,
    validation: Probe,
    config: DistillConfig = SETTINGS,
    plan: str = "bk-small",
    **more: Any,
) -> tuple[Recovery, UNet2DConditionModel]:
    student, pairs = student_of(unet, plan)
    recovery = distill(unet, student, pairs, made_up_data(), config, folder, validation, **more)
    return recovery, student


def test_steps_equal_plain_torch_written_out(tiny_unet: Any, whole: Path) -> None:
    student, pairs = student_of(tiny_unet, "bk-small")
    names, parameters = zip(*student.named_parameters(), strict=True)
    first = [torch.zeros_like(parameter) for parameter in parameters]
    second = [torch.zeros_like(parameter) for parameter in parameters]
    averages = [parameter.detach().clone() for parameter in parameters]
    for step in range(1, 7):
        batch = draw_batch(made_up_data(), SCHEDULER, SETTINGS, step)
        losses = batch_losses(tiny_unet, student, pairs, batch)
        gradients = torch.autograd.grad(losses.task + losses.output + losses.feature, parameters)
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        rate = 1e-3 * min(1, step / 3)
        decay = 0.0 if step == 1 else min(0.9, step / (9 + step))
        with torch.no_grad():
            for i, parameter in enumerate(parameters):
                gradient = gradients[i] * min(1.0, 1.0 / (norm + 1e-6))
                first[i] = 0.9 * first[i] + 0.1 * gradient
                second[i] = 0.999 * second[i] + 0.001 * gradient.square()
                parameter.mul_(1 - rate * 1e-2)
                corrected = first[i] / (1 - 0.9**step)
                parameter.sub_(rate * corrected / ((second[i] / (1 - 0.999**step)).sqrt() + 1e-8))
                averages[i] = decay * averages[i] + (1 - decay) * parameter
    trained = trained_weights(whole)
    assert trained.keys() == set(names)
    for average, name in zip(averages, names, strict=True):
        torch.testing.assert_close(trained[name], average, rtol=1e-3, atol=2e-5)


def test_the_result_on_disk_is_the_averaged_student(
    tiny_unet: Any, tmp_path: Path, validation: Probe
) -> None:
    before = weights(tiny_unet)
    tiny_unet.train()
    recovery, student = run(tiny_unet, tmp_path / "candidate", validation)
    folder = tmp_path / "candidate"
    assert recovery.status == "done"
    assert (recovery.plan_id, recovery.steps, recovery.reason) == ("candidate", 6, "")
    loaded = UNet2DConditionModel.from_pretrained(folder / "distilled" / "model")
    assert same(weights(loaded), weights(student))
    assert same(weights(tiny_unet), before)
    assert all(module.training for module in tiny_unet.modules())
    assert not any(module.training for module in student.modules())
    with torch.no_grad():
        found = loaded.eval()(validation.noisy, validation.timesteps, validation.embeddings).sample
    assert recovery.after == pytest.approx(float((found - validation.target).square().mean()), rel=1e-6)
    untrained, _ = student_of(tiny_unet, "bk-small")
    with torch.no_grad():
        found = untrained(validation.noisy, validation.timesteps, validation.embeddings).sample
    assert recovery.before == pytest.approx(float((found - validation.target).square().mean()), rel=1e-6)
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "heldout.csv",
        "provenance.json",
        "recovery.csv",
        "recovery.json",
    ]


def test_the_recovery_table(tiny_unet: Any, tmp_path: Path, validation: Probe) -> None:
    recovery, _ = run(tiny_unet, tmp_path, validation)
    frame = recovery.frame()
    assert tuple(frame.columns) == RECOVERY_COLUMNS
    assert " ".join(RECOVERY_COLUMNS) == "step task output feature total validation learning_rate seconds"
    assert frame["step"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert frame["validation"].notna().tolist() == [True, False, False, True, False, False, True]
    assert frame["learning_rate"].tolist() == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-3, 1e-3])
    assert (
        frame["total"] - frame[["task", "output", "feature"]].sum(axis=1, skipna=False)
    ).abs().max() < 1e-6
    assert frame["seconds"].is_monotonic_increasing
    read = load_recovery(tmp_path)
    assert read is not None
    assert read.frame().equals(frame)
    assert (read.before, read.after, read.seconds) == (recovery.before, recovery.after, recovery.seconds)
    assert load_recovery(tmp_path / "nothing") is None


def test_losses_fall(tiny_unet: Any, tmp_path: Path, validation: Probe) -> None:
    config = dataclasses.replace(SETTINGS, steps=24, learning_rate=3e-3, task_weight=0.0, validate_every=24)
    recovery, _ = run(tiny_unet, tmp_path, validation, config, plan="bk-base")
    frame = recovery.frame().iloc[1:]
    assert frame["total"].tail(6).mean() < 0.8 * frame["total"].head(6).mean()


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("stop", [pytest.param(2, marks=pytest.mark.long), 3, 6])
def test_resuming_equals_never_stopping(
    tiny_unet: Any,
    whole: Path,
    tmp_path: Path,
    validation: Probe,
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
) -> None:
    never_stopped = load_recovery(whole)
    assert never_stopped is not None

    def failing(data: Any, scheduler: Any, config: Any, step: int, device: Any, **part: Any) -> Any:
        if step == stop:
            raise InterruptionError
        return draw_batch(data, scheduler, config, step, device, **part)

    monkeypatch.setattr(loop, "draw_batch", failing)
    with pytest.raises(InterruptionError):
        run(tiny_unet, tmp_path / "parts", validation)
    steps = []
    monkeypatch.setattr(
        loop, "draw_batch", lambda *given, **part: steps.append(given[3]) or draw_batch(*given, **part)
    )
    parts, resumed = run(tiny_unet, tmp_path / "parts", validation)
    assert steps == list(range((stop - 1) // 2 * 2 + 1, 7))  # from the last checkpoint on
    assert same(weights(resumed), trained_weights(whole))
    without_time = [name for name in RECOVERY_COLUMNS if name != "seconds"]
    assert parts.frame()[without_time].equals(never_stopped.frame()[without_time])
    assert (parts.before, parts.after) == (never_stopped.before, never_stopped.after)
    assert not (tmp_path / "parts" / "distilled" / "checkpoint.safetensors").exists()


def test_a_longer_distillation_goes_on_from_a_kept_checkpoint(
    tiny_unet: Any, whole: Path, tmp_path: Path, validation: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(
        tiny_unet,
        tmp_path / "parts",
        validation,
        dataclasses.replace(SETTINGS, steps=4),
        keep_checkpoint=True,
    )
    steps = []
    monkeypatch.setattr(
        loop, "draw_batch", lambda *given, **part: steps.append(given[3]) or draw_batch(*given, **part)
    )
    longer, resumed = run(tiny_unet, tmp_path / "parts", validation)
    assert steps == [5, 6]
    assert same(weights(resumed), trained_weights(whole))
    assert longer.steps == 6
    with pytest.raises(RunError, match="6 steps taken"):
        run(tiny_unet, tmp_path / "parts", validation, dataclasses.replace(SETTINGS, steps=4))


def test_what_is_finished_is_not_done_again(
    tiny_unet: Any, whole: Path, tmp_path: Path, validation: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    first = load_recovery(tmp_path)
    assert first is not None
    monkeypatch.setattr(loop, "draw_batch", None)
    again, _ = run(tiny_unet, tmp_path, validation)
    assert again.frame().equals(first.frame())
    other = dataclasses.replace(SETTINGS, learning_rate=2e-3)
    with pytest.raises(RunError, match=r"learning_rate=0.001 instead of 0.002.*--force"):
        run(tiny_unet, tmp_path, validation, other)
    monkeypatch.setattr(loop, "draw_batch", draw_batch)
    forced, _ = run(tiny_unet, tmp_path, validation, other, force=True)
    assert forced.frame()["learning_rate"].max() == 2e-3


def test_a_damaged_checkpoint_is_named(
    tiny_unet: Any, tmp_path: Path, validation: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_unet, tmp_path, validation, dataclasses.replace(SETTINGS, steps=2), keep_checkpoint=True)
    checkpoint = tmp_path / "distilled" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"checkpoint\.safetensors.*remove it"):
        run(tiny_unet, tmp_path, validation)


def test_a_loss_that_is_not_finite_ends_it_with_a_verdict(
    tiny_unet: Any, tmp_path: Path, validation: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, _ = run(
        tiny_unet, tmp_path / "good", validation, dataclasses.replace(SETTINGS, steps=3), keep_checkpoint=True
    )

    def poisoned(data: Any, scheduler: Any, config: Any, step: int, device: Any, **part: Any) -> Any:
        batch = draw_batch(data, scheduler, config, step, device, **part)
        return dataclasses.replace(batch, target=batch.target * math.nan) if step == 4 else batch

    monkeypatch.setattr(loop, "draw_batch", poisoned)
    failed, _ = run(tiny_unet, tmp_path / "bad", validation)
    assert (failed.status, failed.steps) == ("failed", 3)
    assert "step 4" in failed.reason
    assert "learning_rate" in failed.reason
    assert math.isnan(failed.after)
    assert failed.before == good.before
    assert not (tmp_path / "bad" / "distilled" / "model").exists()
    record = json.loads((tmp_path / "bad" / "distilled" / "recovery.json").read_text())
    assert (record["status"], record["after"]) == ("failed", None)
    kept = [(tmp_path / name / "distilled" / "checkpoint.safetensors") for name in ("good", "bad")]
    states = [{name: value for name, value in load_file(path).items() if name != "history"} for path in kept]
    assert same(*states)
    again, _ = run(tiny_unet, tmp_path / "bad", validation)
    assert again.reason == failed.reason


def test_every_candidate_sees_the_same_batches(
    tiny_unet: Any, tmp_path: Path, validation: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {"bk-base": [], "bk-tiny": []}
    for plan, batches in seen.items():

        def watching(*given: Any, batches: list[torch.Tensor] = batches, **part: Any) -> Any:
            batch = draw_batch(*given, **part)
            batches.append(
                torch.cat([batch.noisy.flatten(), batch.target.flatten(), batch.embeddings.flatten()])
            )
            return batch

        monkeypatch.setattr(loop, "draw_batch", watching)
        run(tiny_unet, tmp_path / plan, validation, plan=plan)
    assert len(seen["bk-base"]) == 6
    assert all(map(torch.equal, seen["bk-base"], seen["bk-tiny"]))


def test_what_does_not_fit_is_refused(tiny_unet: Any, tmp_path: Path, validation: Probe) -> None:
    student, pairs = student_of(tiny_unet, "bk-small")
    narrow = dataclasses.replace(
        made_up_data(), embeddings=torch.zeros(5, 7, 12), empty_embedding=torch.zeros(7, 12)
    )
    with pytest.raises(DataError, match=r"text of width 16.* have 4 and 12"):
        distill(tiny_unet, student, pairs, narrow, SETTINGS, tmp_path, validation)
    half = copy.deepcopy(tiny_unet).half()
    with pytest.raises(DeviceError, match="bfloat16"):
        distill(half, student, pairs, made_up_data(), SETTINGS, tmp_path, validation)
    assert not any(tmp_path.iterdir())


def test_a_teacher_in_bfloat16_teaches_a_student_in_float32(
    tiny_unet: Any, tmp_path: Path, validation: Probe
) -> None:
    student, pairs = student_of(tiny_unet, "bk-small")
    teacher = copy.deepcopy(tiny_unet).to(torch.bfloat16)
    batch = draw_batch(made_up_data(), SCHEDULER, SETTINGS, 1)
    exact = batch_losses(tiny_unet, student, pairs, batch)
    rough = batch_losses(teacher, student, pairs, batch)
    assert rough.feature.dtype == torch.float32
    for name in ("task", "output", "feature"):
        assert getattr(rough, name).item() == pytest.approx(getattr(exact, name).item(), rel=0.1)
    config = dataclasses.replace(SETTINGS, steps=1)
    distill(teacher, student, pairs, made_up_data(), config, tmp_path, validation)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
