"""Consistency distillation: its arithmetic is that of LCMScheduler and DDIM, it resumes, and diffusers draws by it."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_UNET, build_unet
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from distilling import (
    SCHEDULER,
    SETTINGS,
    made_up_data,
    same,
    setup_for,
    student_of,
    validation_probe,
    weights,
)
from typer.testing import CliRunner

import prune_lab.distill.consistency as consistency
from prune_lab.cli import app
from prune_lab.config import RunConfig
from prune_lab.distill import Consistency, DistillSetup, distill_consistency, draw_batch, lcm_scheduler
from prune_lab.distill.consistency import Trajectory, huber, teacher_step
from prune_lab.distill.setup import fresh_state
from prune_lab.errors import ConfigError, RunError, UnsupportedModelError
from prune_lab.families import known_conditions
from prune_lab.models import load_pipeline, resolve_model
from prune_lab.probes import schedule_of

BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
KINDS = {
    "epsilon": DDIMScheduler(**BETAS),
    "v_prediction": DDIMScheduler(**BETAS, prediction_type="v_prediction"),
    "zero snr": DDIMScheduler(
        **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "sample": DDIMScheduler(**BETAS, prediction_type="sample"),
}
HOW = Consistency(guidance=3.0, grid=50)


def rows(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


# Arithmetic -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("place", [0, 20, 49])
def test_an_answer_is_what_lcm_scheduler_makes_of_the_prediction(kind: str, place: int) -> None:
    trajectory = Trajectory.of(KINDS[kind], 50)
    timestep = trajectory.timesteps[place]
    scheduler = lcm_scheduler(KINDS[kind], 50)
    scheduler.set_timesteps(50)
    noisy, prediction = rows(1), rows(2)
    wanted = scheduler.step(prediction, timestep, noisy, generator=torch.Generator()).denoised
    found = trajectory.answer(prediction, noisy, timestep[None])
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_at_the_end_of_the_trajectory_the_answer_is_the_latents_themselves() -> None:
    trajectory = Trajectory.of(KINDS["epsilon"], 50)
    noisy = rows(1)
    assert torch.equal(trajectory.answer(rows(2), noisy, torch.tensor([0])), noisy)
    assert trajectory.timesteps.tolist() == list(range(19, 1000, 20))
    assert trajectory.next(torch.tensor([999, 39, 19])).tolist() == [979, 19, 0]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_step_of_the_teacher_is_guided_ddim(kind: str) -> None:
    scheduler, teacher, data = KINDS[kind], build_unet(TINY_UNET), made_up_data()
    trajectory = Trajectory.of(scheduler, 50)
    settings = dataclasses.replace(SETTINGS, caption_dropout=0.0)
    batch = draw_batch(data, scheduler, settings, 1, among=trajectory.timesteps[5:])
    assert set(batch.timesteps.tolist()) <= set(trajectory.timesteps.tolist())
    found = teacher_step(teacher, batch, data, trajectory, 3.0)
    for row, timestep in enumerate(batch.timesteps.tolist()):
        noisy = batch.noisy[row : row + 1]
        texts = torch.stack([data.empty_embedding, batch.embeddings[row]])
        with torch.no_grad():
            plain, told = teacher(noisy.expand(2, -1, -1, -1), timestep, texts).sample
        ddim = DDIMScheduler.from_config(scheduler.config)
        ddim.set_timesteps(50)  # a step is then 20 timesteps
        wanted = ddim.step((plain + 3.0 * (told - plain))[None], timestep, noisy).prev_sample
        assert torch.allclose(found[row : row + 1], wanted, rtol=1e-3, atol=1e-4)


def test_schedules_take_a_prediction_apart() -> None:
    for scheduler in KINDS.values():
        schedule = schedule_of(scheduler.config)
        latents, noise, timesteps = rows(1), rows(2), torch.tensor([600])
        noisy = schedule.add_noise(latents, noise, timesteps)
        found = schedule.parts(schedule.target(latents, noise, timesteps), noisy, timesteps)
        assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(found, (latents, noise), strict=True))


def test_noise_that_is_predicted_where_nothing_else_is_left_is_refused() -> None:
    schedule = schedule_of(DDIMScheduler(**BETAS, rescale_betas_zero_snr=True).config)
    with pytest.raises(UnsupportedModelError, match="nothing but noise"):
        schedule.parts(rows(1), rows(2), torch.tensor([999]))


def test_the_loss_is_zero_where_student_and_average_agree() -> None:
    assert float(huber(rows(1), rows(1))) == 0
    assert float(huber(rows(1), rows(1) + 1)) == pytest.approx(1, abs=1e-3)


# Training -------------------------------------------------------------------------------------------------------------


def trained(folder: Path, unet: Any, how: Consistency = HOW, **changes: Any) -> dict[str, torch.Tensor]:
    settings = dataclasses.replace(SETTINGS, **changes)
    setup = setup_for(unet, validation_probe(), settings)
    student, _ = student_of(unet, "bk-small")
    distill_consistency(setup, student, folder, how, {})
    return weights(student)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which six steps were taken without a stop, and the weights."""
    folder = tmp_path_factory.mktemp("whole")
    torch.save(trained(folder, build_unet(TINY_UNET)), folder / "weights.pt")
    return folder


@pytest.mark.long
def test_it_learns_and_leaves_the_teacher_alone(tiny_unet: Any, tmp_path: Path) -> None:
    before = weights(tiny_unet)
    changes = {"steps": 30, "learning_rate": 3e-3, "ema_decay": 0.5, "checkpoint_every": 100}
    student = trained(tmp_path, tiny_unet, **changes)
    assert same(before, weights(tiny_unet))
    assert not same(student, weights(student_of(tiny_unet, "bk-small")[0]))
    table = [line.split(",") for line in (tmp_path / "consistency.csv").read_text().split()]
    losses = [float(row[1]) for row in table[1:]]
    assert len(losses) == 30
    assert sum(losses[-10:]) < sum(losses[:10])


def test_stopped_and_gone_on_it_is_bit_for_bit_as_if_never_stopped(
    whole: Path, tiny_unet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = torch.load(whole / "weights.pt", weights_only=True)
    calls, real = [], consistency._losses

    def stopping(*given: Any) -> float:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(consistency, "_losses", stopping)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, tiny_unet)
    assert not (tmp_path / "model").exists()
    calls.clear()
    monkeypatch.setattr(consistency, "_losses", lambda *given: calls.append(1) or real(*given))
    assert same(trained(tmp_path, tiny_unet), wanted)
    assert len(calls) == 4  # of six, two were in the checkpoint


def test_samples_a_few_at_a_time_give_the_same_gradients(tiny_unet: Any) -> None:
    found = []
    for micro in (0, 1):
        setup = setup_for(tiny_unet, validation_probe(), dataclasses.replace(SETTINGS, micro_batch=micro))
        student, _ = student_of(tiny_unet, "bk-small")
        state, trajectory = fresh_state(student, setup.settings), Trajectory.of(SCHEDULER, 50)
        batch = draw_batch(setup.data, SCHEDULER, setup.settings, 1, among=trajectory.timesteps)
        loss = consistency._losses(setup, state, batch, trajectory, 3.0)
        found.append((loss, [parameter.grad.clone() for parameter in student.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for whole_one, summed in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(whole_one, summed, rtol=1e-2, atol=1e-5 * float(whole_one.abs().max() + 1))


@pytest.mark.parametrize(
    ("how", "changes", "said"),
    [
        (Consistency(guidance=4.0), {}, "guidance=3.0 instead of 4.0"),
        (HOW, {"learning_rate": 1e-4}, "learning_rate"),
        (HOW, {"steps": 3}, "found 6 taken"),
    ],
)
def test_a_folder_with_other_work_is_refused(
    whole: Path, tiny_unet: Any, tmp_path: Path, how: Consistency, changes: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    with pytest.raises(RunError, match=said):
        trained(folder, tiny_unet, how, **changes)


def test_numbers_that_are_not_finite_end_it_and_keep_the_state(tiny_unet: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no longer finite at step"):
        trained(tmp_path, tiny_unet, learning_rate=1e9, clip_norm=0.0, warmup=0)
    assert (tmp_path / "checkpoint.safetensors").is_file()
    assert not (tmp_path / "model").exists()


# What cannot be done --------------------------------------------------------------------------------------------------


def test_flow_matching_is_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedModelError, match="FlowMatchEulerDiscreteScheduler, which goes by flow matching"
    ):
        lcm_scheduler(FlowMatchEulerDiscreteScheduler(), 50)


def test_a_model_that_is_told_its_guidance_is_refused(tiny_unet: Any) -> None:
    told = build_unet({**TINY_UNET, "time_cond_proj_dim": 8})
    assert any(one.place == "timestep_cond" for one in known_conditions(told))
    setup: DistillSetup = setup_for(tiny_unet, validation_probe())
    with pytest.raises(UnsupportedModelError, match="is told its guidance"):
        consistency.check_consistency(setup, told, HOW)


@pytest.mark.parametrize(
    "changes", [{"loss_variant": "normalised"}, {"precision": "bfloat16"}, {"gradient_checkpointing": True}]
)
def test_settings_that_mean_nothing_here_are_refused(tiny_unet: Any, changes: dict[str, Any]) -> None:
    setup = setup_for(tiny_unet, validation_probe(), dataclasses.replace(SETTINGS, **changes))
    with pytest.raises(ConfigError, match=f"distill.{next(iter(changes))} = .* does not have; leave it out"):
        consistency.check_consistency(setup, tiny_unet, HOW)


def test_a_teacher_in_half_precision_teaches_a_student_in_float32(tiny_unet: Any) -> None:
    setup = setup_for(tiny_unet.to(torch.bfloat16), validation_probe())
    student, _ = student_of(build_unet(TINY_UNET), "bk-small")
    state, trajectory = fresh_state(student, setup.settings), Trajectory.of(SCHEDULER, 50)
    batch = draw_batch(setup.data, SCHEDULER, setup.settings, 1, among=trajectory.timesteps)
    assert consistency._losses(setup, state, batch, trajectory, 3.0) > 0
    assert all(parameter.grad.dtype == torch.float32 for parameter in student.parameters())


@pytest.mark.parametrize("values", [{"guidance": 0.5}, {"guidance": float("nan")}, {"grid": 3}])
def test_numbers_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RunError, match="consistency distillation with guidance"):
        Consistency(**values)


# To its end -----------------------------------------------------------------------------------------------------------

DRAW = """
import sys, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipeline.scheduler).__name__ == "LCMScheduler"
pictures = pipeline(
    ["a red cat"], num_inference_steps=4, guidance_scale=1.0, generator=[torch.Generator().manual_seed(7)],
    output_type="pt",
).images
torch.save(pictures, sys.argv[2])
"""


@pytest.mark.long
def test_the_verb_writes_a_pipeline_that_plain_diffusers_draws_with(
    tiny_pipeline_folder: Path, small_run_config: Any, tmp_path: Path, one_thread: None
) -> None:
    config: RunConfig = small_run_config()
    out = tmp_path / "few"
    args = [
        *(
            "distill-steps",
            str(tiny_pipeline_folder),
            "--steps",
            "2",
            "--batch",
            "2",
            "--out",
            str(out),
            "--json",
        ),
        *("--data", "shipped", "--set", "distill.pictures=4", "--set", "probe.samples=4", "--device", "cpu"),
        *("--set", "distill.trackers=[]", "--set", f"evaluate.scorer={config.evaluate.scorer}"),
    ]
    found = CliRunner().invoke(app, args)
    assert found.exit_code == 0, found.output
    row = json.loads(found.stdout)[0]
    assert (row["steps"], row["guidance"], row["grid"]) == (2, 7.5, 50)
    assert "2 steps of consistency distillation are few" in found.stderr
    provenance = json.loads((out / "unet" / "provenance.json").read_text())
    assert provenance["consistency"]["steps"] == 2
    drawn = tmp_path / "drawn.pt"
    subprocess.run([sys.executable, "-c", DRAW, str(out), str(drawn)], check=True, timeout=120)
    pipeline = load_pipeline(resolve_model(str(out)))
    assert isinstance(pipeline.scheduler, LCMScheduler)
    ours = pipeline(
        ["a red cat"],
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(7)],
        output_type="pt",
    ).images
    assert torch.equal(ours, torch.load(drawn, weights_only=True))
    before = copy.deepcopy(pipeline.unet.state_dict())
    plain = load_pipeline(resolve_model(str(tiny_pipeline_folder)))
    assert not same(before, plain.unet.state_dict())
    again = CliRunner().invoke(app, args)
    assert again.exit_code == 2
    assert "--force" in again.output
