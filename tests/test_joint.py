"""Many students on one teacher pass: equal to training alone, killed and resumed, short of memory, diverging."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_UNET, build_unet
from distilling import (
    SCHEDULER,
    SETTINGS,
    batch_losses,
    made_up_data,
    same,
    setup_for,
    students_of,
    validation_probe,
    weights,
)
from hypothesis import given
from hypothesis import strategies as st
from killed_distillation import PLANS
from safetensors.torch import load_file

import prune_lab.distill.joint as joint
from prune_lab.distill import distill_together, draw_batch, load_heldout, load_recovery
from prune_lab.distill.joint import compiled_blocks
from prune_lab.distill.losses import teacher_output
from prune_lab.distill.memory import TrainingMemory, pass_bytes
from prune_lab.errors import ConfigError, DeviceError
from prune_lab.families import example_inputs
from prune_lab.probes import Probe
from prune_lab.profiling import LiveBytes
from prune_lab.schemas import RECOVERY_COLUMNS

THREE = ("bk-base", "bk-small", "bk-tiny")
TIMELESS = [name for name in RECOVERY_COLUMNS if name != "seconds"]


@pytest.fixture
def validation() -> Probe:
    return validation_probe()


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "distilled" / "model" / "diffusion_pytorch_model.safetensors")


def assert_equal(one: Path, other: Path) -> None:
    """Final weights, loss curves and held-out losses are equal to the last bit."""
    assert same(weights_in(one), weights_in(other))
    left, right = load_recovery(one), load_recovery(other)
    assert left is not None
    assert right is not None
    assert left.frame()[TIMELESS].equals(right.frame()[TIMELESS])
    assert load_heldout(one).equals(load_heldout(other))


# Together ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_together_equals_alone_and_taking_turns(
    tiny_unet: Any, tmp_path: Path, validation: Probe, distilled_alone: Path
) -> None:
    passes = []
    tiny_unet.register_forward_hook(lambda *_: passes.append(1))
    setup = setup_for(tiny_unet, validation)
    found = distill_together(setup, students_of(tiny_unet, tmp_path / "together", THREE))
    assert len(passes) == SETTINGS.steps  # one teacher pass a step, whoever learns from it
    assert [recovery.plan_id for recovery in found] == list(THREE)
    turns = dataclasses.replace(setup, settings=dataclasses.replace(SETTINGS, together=2))
    distill_together(turns, students_of(tiny_unet, tmp_path / "turns", THREE))
    for plan in THREE:
        assert_equal(tmp_path / "together" / plan, distilled_alone / plan)
        assert_equal(tmp_path / "turns" / plan, distilled_alone / plan)


@pytest.mark.long
def test_rungs_go_on_from_where_they_were(
    tiny_unet: Any, tmp_path: Path, validation: Probe, distilled_alone: Path
) -> None:
    setup = setup_for(tiny_unet, validation)
    distill_together(setup, students_of(tiny_unet, tmp_path / "rungs", THREE), until=3, keep_checkpoint=True)
    early = load_heldout(tmp_path / "rungs" / "bk-base")
    assert early.index.tolist() == [0, 3]
    distill_together(setup, students_of(tiny_unet, tmp_path / "rungs", THREE[:2]))
    for plan in THREE[:2]:
        assert_equal(distilled_alone / plan, tmp_path / "rungs" / plan)
    assert load_heldout(tmp_path / "rungs" / "bk-tiny").index.tolist() == [0, 3]


def test_held_out_losses_are_those_of_the_averaged_weights(distilled_alone: Path, validation: Probe) -> None:
    from diffusers import UNet2DConditionModel

    losses = load_heldout(distilled_alone / "bk-tiny")
    assert losses.index.tolist() == [0, 3, 6]
    student = UNet2DConditionModel.from_pretrained(distilled_alone / "bk-tiny" / "distilled" / "model").eval()
    with torch.no_grad():
        found = student(validation.noisy, validation.timesteps, validation.embeddings).sample
    rows = (found - validation.target).square().flatten(1).mean(dim=1)
    assert losses.loc[6].tolist() == pytest.approx(rows.tolist(), rel=1e-6)
    recovery = load_recovery(distilled_alone / "bk-tiny")
    assert recovery is not None
    assert recovery.after == pytest.approx(losses.loc[6].mean(), rel=1e-6)


def test_one_that_fails_does_not_stop_the_others(
    tiny_unet: Any, tmp_path: Path, validation: Probe, distilled_alone: Path
) -> None:
    setup = setup_for(tiny_unet, validation)
    first, second = students_of(tiny_unet, tmp_path / "together", ("bk-base", "bk-tiny"))

    def broken() -> Any:
        unet: Any = second.load()
        with torch.no_grad():
            unet.conv_in.weight[0, 0, 0, 0] = math.nan
        return unet

    found = distill_together(setup, [first, dataclasses.replace(second, load=broken)])
    assert [recovery.status for recovery in found] == ["done", "failed"]
    assert "step 1" in found[1].reason
    assert_equal(tmp_path / "together" / "bk-base", distilled_alone / "bk-base")


def test_divergence_is_a_verdict(tiny_unet: Any, tmp_path: Path, validation: Probe) -> None:
    wild = dataclasses.replace(
        SETTINGS, learning_rate=3.0, clip_norm=0.0, warmup=0, ema_decay=0.0, validate_every=1
    )
    (found,) = distill_together(
        setup_for(tiny_unet, validation, wild), students_of(tiny_unet, tmp_path, ("bk-small",))
    )
    assert found.status == "failed"
    assert "the held-out loss rose from" in found.reason or "finite" in found.reason
    assert found.steps < wild.steps
    assert not (tmp_path / "bk-small" / "distilled" / "model").exists()
    assert (tmp_path / "bk-small" / "distilled" / "checkpoint.safetensors").exists()
    patient = dataclasses.replace(wild, learning_rate=1e-3)
    (other,) = distill_together(
        setup_for(tiny_unet, validation, patient), students_of(tiny_unet, tmp_path / "2", ("bk-small",))
    )
    assert other.status == "done"


# Killed ------------------------------------------------------------------------------------------------------------


def run_killed(folder: Path, kill_at: int) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILL_AT": str(kill_at)}
    script = Path(__file__).parent / "killed_distillation.py"
    return subprocess.run([sys.executable, script, folder], env=environment, check=False).returncode


@pytest.mark.long
def test_killed_at_random_steps_it_ends_as_if_never_stopped(tmp_path: Path, distilled_alone: Path) -> None:
    seed = 0 if os.environ.get("CI") else os.urandom(8)
    steps = sorted(random.Random(seed).sample(range(1, SETTINGS.steps + 1), 2))
    for step in steps:
        assert run_killed(tmp_path / "parts", step) == -9, steps
        assert not (tmp_path / "parts" / PLANS[0] / "distilled" / "recovery.json").exists()
    assert run_killed(tmp_path / "parts", 0) == 0
    for plan in PLANS:
        assert_equal(distilled_alone / plan, tmp_path / "parts" / plan)


# Memory ------------------------------------------------------------------------------------------------------------


def test_micro_batches_add_up(tiny_unet: Any, tmp_path: Path, validation: Probe) -> None:
    for name, size in (("whole", 0), ("micro", 1)):
        settings = dataclasses.replace(SETTINGS, batch=3, micro_batch=size, steps=2)
        distill_together(
            setup_for(tiny_unet, validation, settings), students_of(tiny_unet, tmp_path / name, ("bk-base",))
        )
    one, other = (load_recovery(tmp_path / name / "bk-base") for name in ("whole", "micro"))
    assert one is not None
    assert other is not None
    for left, right in zip(one.rows, other.rows, strict=True):
        assert left[:6] == pytest.approx(right[:6], rel=1e-4, nan_ok=True)


@pytest.mark.long
def test_out_of_memory_halves_the_micro_batch_and_says_so(
    tiny_unet: Any, tmp_path: Path, validation: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SETTINGS, batch=4, steps=3)
    tried, told = [], []

    def scarce(teacher: Any, paths: Any, chunk: Any, precision: Any) -> Any:
        tried.append(len(chunk.timesteps))
        if tried[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return teacher_output(teacher, paths, chunk, precision)

    monkeypatch.setattr(joint, "teacher_output", scarce)
    monkeypatch.setattr(joint, "note", told.append)
    distill_together(
        setup_for(tiny_unet, validation, settings), students_of(tiny_unet, tmp_path / "oom", THREE[:2])
    )
    assert tried[:3] == [4, 2, 1]
    assert tried.count(1) == 4 * settings.steps  # the effective batch stays, and nothing is tried twice
    assert told == [
        "out of memory: going on with 2 samples at a time, 4 a step as before",
        "out of memory: going on with 1 samples at a time, 4 a step as before",
    ]
    small = dataclasses.replace(settings, micro_batch=1)
    distill_together(
        setup_for(tiny_unet, validation, small), students_of(tiny_unet, tmp_path / "one", THREE[:2])
    )
    for plan in THREE[:2]:
        assert_equal(tmp_path / "oom" / plan, tmp_path / "one" / plan)


def test_no_memory_for_one_sample_is_an_error(
    tiny_unet: Any, tmp_path: Path, validation: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(joint, "teacher_output", scarce)
    with pytest.raises(DeviceError, match=r"distill\.together or distill\.micro_batch lower"):
        distill_together(setup_for(tiny_unet, validation), students_of(tiny_unet, tmp_path, ("bk-base",)))
    monkeypatch.setattr(joint, "teacher_output", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        distill_together(setup_for(tiny_unet, validation), students_of(tiny_unet, tmp_path, ("bk-base",)))


def test_estimated_activations_are_those_of_a_real_pass(tiny_unet: Any) -> None:
    inputs = example_inputs(tiny_unet.config, tokens=7, device="cpu", dtype=torch.float32)
    for parameter in tiny_unet.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    for training in (False, True):
        expected = pass_bytes(tiny_unet.config, tokens=7, training=training)
        with LiveBytes(tiny_unet) as watch, torch.set_grad_enabled(training):
            prediction = tiny_unet(**inputs, return_dict=False)[0]
            if training:
                prediction.square().mean().backward()
        # kernels of the CPU keep statistics and scratch that meta tensors do not have, and the reverse
        assert expected == pytest.approx(watch.peak, rel=0.25)
    whole = pass_bytes(tiny_unet.config, tokens=7, training=True)
    assert pass_bytes(tiny_unet.config, tokens=7, training=True, checkpointing=True) < 0.8 * whole
    assert pass_bytes(tiny_unet.config, tokens=7, training=False) < 0.3 * whole


def test_what_autograd_saves_is_in_the_estimate() -> None:
    """With far more weights than activations, where gradients of the weights would hide what is saved."""
    unet = build_unet({**TINY_UNET, "block_out_channels": [16, 64, 128, 128]})
    inputs = example_inputs(unet.config, tokens=7, device="cpu", dtype=torch.float32)
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = unet(**inputs, return_dict=False)[0]
    assert prediction.requires_grad
    estimate = pass_bytes(unet.config, tokens=7, training=True)
    assert sum(parameter.numel() for parameter in unet.parameters()) * 4 > 2 * estimate
    assert sum(saved.values()) <= 1.1 * estimate
    assert estimate <= 2 * sum(saved.values())


@given(
    free=st.integers(0, 10**6),
    students=st.integers(1, 12),
    samples=st.integers(1, 64),
    sizes=st.tuples(*[st.integers(1, 10**4)] * 4),
)
def test_what_is_planned_fits(
    free: int, students: int, samples: int, sizes: tuple[int, int, int, int]
) -> None:
    memory = TrainingMemory(*sizes, free)
    together, micro = memory.fit(students, samples)
    assert 1 <= together <= students
    assert 1 <= micro <= samples
    assert memory.needed(together, micro) <= 0.85 * free or (together, micro) == (1, 1)
    if memory.needed(students, samples) <= 0.85 * free:
        assert (together, micro) == (students, samples)
    assert f"{together} x" in memory.describe(together, micro)


def test_gradient_checkpointing_changes_no_step(tiny_unet: Any, tmp_path: Path, validation: Probe) -> None:
    for name, asked in (("plain", False), ("checkpointed", True)):
        settings = dataclasses.replace(SETTINGS, gradient_checkpointing=asked, steps=3)
        distill_together(
            setup_for(tiny_unet, validation, settings),
            students_of(tiny_unet, tmp_path / name, ("bk-small",)),
        )
    assert_equal(tmp_path / "plain" / "bk-small", tmp_path / "checkpointed" / "bk-small")


# What watches ------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of dynamo, which looks at inner tensors
def test_taps_survive_compiled_blocks(tiny_unet: Any, tmp_path: Path) -> None:
    (student,) = students_of(tiny_unet, tmp_path, ("bk-small",))
    unet, batch = student.load(), draw_batch(made_up_data(), SCHEDULER, SETTINGS, 1)
    plain = batch_losses(tiny_unet, unet, student.pairs, batch)
    graphs: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(len(list(graph.graph.nodes)))
        return graph.forward

    with (
        compiled_blocks(tiny_unet, [pair.teacher_path for pair in student.pairs], backend=backend),
        compiled_blocks(unet, [pair.student_path for pair in student.pairs], backend=backend),
    ):
        compiled = batch_losses(tiny_unet, unet, student.pairs, batch)
        compiled.total(SETTINGS).backward()
    assert graphs  # dynamo did take blocks over
    for name in ("task", "output", "feature"):
        assert float(getattr(compiled, name).detach()) == pytest.approx(
            float(getattr(plain, name).detach()), rel=1e-5
        )
    assert all(parameter.grad is not None for parameter in unet.parameters())
    assert not any("forward" in vars(module) for model in (tiny_unet, unet) for module in model.modules())


def test_trackers_show_what_the_table_says(tiny_unet: Any, tmp_path: Path, validation: Probe) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = dataclasses.replace(SETTINGS, trackers=("tensorboard",))
    setup = dataclasses.replace(setup_for(tiny_unet, validation, settings), logs=tmp_path / "curves")
    distill_together(setup, students_of(tiny_unet, tmp_path, THREE[:2]))
    events = EventAccumulator(str(tmp_path / "curves" / "distillation")).Reload()
    recovery = load_recovery(tmp_path / "bk-base")
    assert recovery is not None
    frame = recovery.frame().set_index("step")
    for name in ("task", "feature", "total"):
        shown = events.Scalars(f"bk-base/{name}")
        assert [event.step for event in shown] == list(range(1, 7))
        assert [event.value for event in shown] == pytest.approx(frame[name].iloc[1:].tolist(), rel=1e-5)
    heldout = events.Scalars("bk-small/heldout")
    assert [event.step for event in heldout] == [3, 6]


def test_unknown_and_missing_trackers_are_named(tiny_unet: Any, tmp_path: Path, validation: Probe) -> None:
    for tracker, words in (("unheard-of", "accelerate knows"), ("wandb", "not installed")):
        settings = dataclasses.replace(SETTINGS, trackers=(tracker,))
        with pytest.raises(ConfigError, match=words):
            distill_together(
                setup_for(tiny_unet, validation, settings), students_of(tiny_unet, tmp_path, ("bk-base",))
            )


def test_grids_are_drawn_with_the_averaged_weights(tiny_unet: Any, tmp_path: Path, validation: Probe) -> None:
    drawn: dict[str, dict[str, torch.Tensor]] = {}
    settings = dataclasses.replace(SETTINGS, grid_every=4)
    setup = dataclasses.replace(
        setup_for(tiny_unet, validation, settings),
        draw=lambda unet, path: drawn.update({path.name: weights(unet)}),
    )
    distill_together(setup, students_of(tiny_unet, tmp_path, ("bk-base",)))
    assert list(drawn) == ["step-000004.png", "step-000006.png"]
    assert same(drawn["step-000006.png"], weights_in(tmp_path / "bk-base"))


def test_bfloat16_passes_train_float32_weights(tiny_unet: Any, tmp_path: Path, validation: Probe) -> None:
    for name in ("float32", "bfloat16"):
        settings = dataclasses.replace(SETTINGS, precision=name, steps=2)
        distill_together(
            setup_for(tiny_unet, validation, settings), students_of(tiny_unet, tmp_path / name, ("bk-base",))
        )
    exact, rough = (load_recovery(tmp_path / name / "bk-base") for name in ("float32", "bfloat16"))
    assert exact is not None
    assert rough is not None
    assert rough.rows[1][1:4] != exact.rows[1][1:4]
    assert rough.rows[1][1:4] == pytest.approx(exact.rows[1][1:4], rel=0.1)
    assert {tensor.dtype for tensor in weights_in(tmp_path / "bfloat16" / "bk-base").values()} == {
        torch.float32
    }
