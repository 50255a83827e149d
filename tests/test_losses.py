"""The feature points and loss variants, against the official pairing and arithmetic by hand, and golden losses."""

from __future__ import annotations

import csv
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SHAPES, build_unet
from diffusers import DDPMScheduler
from distilling import SCHEDULER, SETTINGS, batch_losses, made_up_data, student_of
from hypothesis import given
from hypothesis import strategies as st

from prune_lab.blocks import architecture_of
from prune_lab.config import DistillConfig
from prune_lab.config.declaration import CHOICES
from prune_lab.distill import FEATURE_VARIANTS, draw_batch, feature_pairs
from prune_lab.distill.batches import min_snr_weights
from prune_lab.distill.joint import learning_rate_at
from prune_lab.distill.losses import masked_error, normalised_error, squared_error
from prune_lab.errors import ConfigError, DataError
from prune_lab.plans import parse_plan
from prune_lab.probes import schedule_of
from prune_lab.surgery import materialise

GOLDEN = Path(__file__).parent / "golden" / "distillation.csv"

# Hook points of the official code (teacher, student), as the fact sheet of the paper gives them.
EIGHT = [(f"{side}_blocks.{i}",) * 2 for side in ("down", "up") for i in range(4)]
OFFICIAL = {
    "bk-base": EIGHT,
    "bk-small": EIGHT,
    "bk-tiny": [
        ("down_blocks.0", "down_blocks.0"),
        ("down_blocks.1", "down_blocks.1"),
        ("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out"),
        ("up_blocks.1", "up_blocks.0"),
        ("up_blocks.2", "up_blocks.1"),
        ("up_blocks.3", "up_blocks.2"),
    ],
}


def hooked(unet: Any, batch: Any, paths: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(prediction, outputs at ``paths``) by hooks written out here; a down stage's first output counts."""
    found: dict[str, torch.Tensor] = {}
    modules = dict(unet.named_modules())
    hooks = [
        modules[path].register_forward_hook(
            lambda _m, _i, output, path=path: found.update(
                {path: output[0] if isinstance(output, tuple) else output}
            )
        )
        for path in set(paths)
    ]
    prediction = unet(batch.noisy, batch.timesteps, batch.embeddings).sample
    for hook in hooks:
        hook.remove()
    return prediction, found


# The official pairing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", list(OFFICIAL))
def test_the_official_pairing_term_by_term(tiny_unet: Any, plan: str) -> None:
    student, pairs = student_of(tiny_unet, plan)
    assert [(pair.teacher_path, pair.student_path) for pair in pairs] == OFFICIAL[plan]
    assert all(pair.weight == 1 for pair in pairs)
    batch = draw_batch(made_up_data(), SCHEDULER, SETTINGS, 3)
    _, wanted = hooked(tiny_unet, batch, [one for one, _ in OFFICIAL[plan]])
    _, found = hooked(student, batch, [one for _, one in OFFICIAL[plan]])
    terms = [float(F.mse_loss(found[own], wanted[theirs]).detach()) for theirs, own in OFFICIAL[plan]]
    assert min(terms) > 0
    for pair, term in zip(pairs, terms, strict=True):
        alone = float(batch_losses(tiny_unet, student, [pair], batch).feature.detach())
        assert alone == pytest.approx(term, rel=1e-6)
    assert float(batch_losses(tiny_unet, student, pairs, batch).feature.detach()) == pytest.approx(
        sum(terms), rel=1e-6
    )


# Points ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("points", ["blocks", "self-attention"])
def test_blocks_of_one_name_are_paired(shape: str, points: Any) -> None:
    unet = build_unet(SHAPES[shape])
    architecture = architecture_of(unet)
    plan = parse_plan("bk-base" if shape != "sdxl" else "-Dn2.R2 -Dn2.A2 -Up2.R2 -Up2.A2", architecture)
    student = materialise(unet, plan)
    pairs = feature_pairs(architecture, plan, points)
    survivors = [block for block in architecture.blocks if block.name not in plan.removed]
    if points == "blocks":
        assert [pair.teacher_path for pair in pairs] == [block.path for block in survivors]
    else:
        assert len(pairs) == sum(block.transformer_layers for block in survivors)
        assert all(pair.teacher_path.endswith("attn1") for pair in pairs)
    # a surviving block brings its weights along: equal weights at both ends prove the pairing
    for pair in pairs:
        theirs, own = (
            model.get_submodule(path).state_dict()
            for model, path in ((unet, pair.teacher_path), (student, pair.student_path))
        )
        assert theirs.keys() == own.keys()
        assert all(torch.equal(theirs[name], own[name]) for name in theirs)


def test_inverse_sensitivities_weigh_with_mean_one(tiny_unet: Any) -> None:
    architecture = architecture_of(tiny_unet)
    plan = parse_plan("bk-small", architecture)
    names = [block.name for block in architecture.blocks if block.name not in plan.removed]
    impacts = {name: 0.1 * (place + 1) for place, name in enumerate(names)}
    pairs = feature_pairs(architecture, plan, "blocks", sensitivities=impacts)
    weights = [pair.weight for pair in pairs]
    assert sum(weights) / len(weights) == pytest.approx(1)
    assert weights[0] / weights[4] == pytest.approx(impacts[names[4]] / impacts[names[0]])
    silent = feature_pairs(architecture, plan, "blocks", sensitivities={**impacts, names[0]: 0.0})
    floor = sorted([0.0, *list(impacts.values())[1:]])
    middle = (floor[len(floor) // 2] + floor[(len(floor) - 1) // 2]) / 2 / 100
    assert silent[0].weight / silent[1].weight == pytest.approx(impacts[names[1]] / middle)
    del impacts[names[2]]
    with pytest.raises(DataError, match=f"no score of {names[2]}"):
        feature_pairs(architecture, plan, "blocks", sensitivities=impacts)


# Terms -------------------------------------------------------------------------------------------------------------


@given(scale=st.floats(0.01, 100))
def test_the_normalised_term_does_not_know_scales(scale: float) -> None:
    wanted, found = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert float(normalised_error(scale * wanted, scale * found)) == pytest.approx(
        float(normalised_error(wanted, found)), rel=1e-4
    )
    assert float(squared_error(scale * wanted, scale * found)) == pytest.approx(
        scale**2 * float(squared_error(wanted, found)), rel=1e-4
    )
    assert float(normalised_error(wanted, torch.zeros_like(wanted))) == pytest.approx(1)


def test_outliers_of_either_model_are_masked() -> None:
    wanted = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 50.0]])
    found = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]], requires_grad=True)
    assert float(masked_error(wanted, found.detach())) == pytest.approx(
        1 / 9
    )  # nine ordinary entries, one is off by 1
    assert float(masked_error(found.detach(), wanted)) == pytest.approx(1 / 9)
    masked_error(wanted, found).backward()
    assert found.grad is not None
    assert found.grad[0, -1] == 0
    assert found.grad[0, 0] == pytest.approx(2 / 9)


def test_the_table_of_variants_is_that_of_the_settings() -> None:
    assert tuple(FEATURE_VARIANTS) == CHOICES["distill.loss_variant"]
    assert (FEATURE_VARIANTS["raw"].points, FEATURE_VARIANTS["raw"].term) == ("stages", squared_error)
    with pytest.raises(ConfigError, match="raw, normalised"):
        DistillConfig(loss_variant="unheard-of")


@pytest.mark.parametrize("variant", FEATURE_VARIANTS)
def test_every_variant_teaches(tiny_unet: Any, variant: str) -> None:
    architecture = architecture_of(tiny_unet)
    plan = parse_plan("bk-small", architecture)
    chosen = FEATURE_VARIANTS[variant]
    impacts = {block.name: 1.0 for block in architecture.blocks} if chosen.by_sensitivity else None
    pairs = feature_pairs(architecture, plan, chosen.points, sensitivities=impacts)
    student = materialise(tiny_unet, plan)
    batch = draw_batch(made_up_data(), SCHEDULER, SETTINGS, 1)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    seen = []
    for _ in range(4):
        feature = batch_losses(tiny_unet, student, pairs, batch, variant=variant).feature
        optimizer.zero_grad()
        feature.backward()
        optimizer.step()
        seen.append(float(feature.detach()))
    assert seen[-1] < seen[0]


# The task loss -----------------------------------------------------------------------------------------------------


def test_min_snr_weights_by_hand() -> None:
    schedule = schedule_of(SCHEDULER.config)
    timesteps = torch.tensor([0, 300, 999])
    kept = SCHEDULER.alphas_cumprod[timesteps].double()
    ratio = kept / (1 - kept)
    assert ratio[0] > 5 > ratio[2]
    expected = torch.minimum(ratio, torch.tensor(5.0)) / ratio
    torch.testing.assert_close(
        min_snr_weights(schedule, timesteps, 5.0).double(), expected, rtol=1e-5, atol=0
    )
    velocity = schedule_of(DDPMScheduler.from_config(SCHEDULER.config, prediction_type="v_prediction").config)
    expected = torch.minimum(ratio, torch.tensor(5.0)) / (ratio + 1)
    torch.testing.assert_close(
        min_snr_weights(velocity, timesteps, 5.0).double(), expected, rtol=1e-5, atol=0
    )
    assert torch.equal(min_snr_weights(schedule, timesteps, 0.0), torch.ones(3))


def test_the_weights_reach_the_task_loss_alone(tiny_unet: Any) -> None:
    student, pairs = student_of(tiny_unet, "bk-base")
    settings = dataclasses.replace(SETTINGS, min_snr=0.01)
    batch, plain = (draw_batch(made_up_data(), SCHEDULER, config, 2) for config in (settings, SETTINGS))
    assert torch.equal(batch.noisy, plain.noisy)
    assert batch.weights.min() < 1
    weighted, unweighted = (batch_losses(tiny_unet, student, pairs, one) for one in (batch, plain))
    assert torch.equal(weighted.output, unweighted.output)
    assert torch.equal(weighted.feature, unweighted.feature)
    prediction = student(batch.noisy, batch.timesteps, batch.embeddings).sample
    by_hand = sum(
        float(batch.weights[row]) * float((prediction[row] - batch.target[row]).square().mean().detach())
        for row in range(2)
    )
    assert float(weighted.task.detach()) == pytest.approx(by_hand / 2, rel=1e-5)


def test_offset_noise_shifts_whole_channels() -> None:
    plain = draw_batch(made_up_data(), SCHEDULER, SETTINGS, 1)
    shifted = draw_batch(made_up_data(), SCHEDULER, dataclasses.replace(SETTINGS, noise_offset=0.5), 1)
    shift = shifted.target - plain.target  # the scheduler's model predicts the noise
    assert shift.flatten(2).std(dim=2).max() < 1e-6
    assert shift.flatten(2).mean(dim=2).abs().min() > 1e-3
    many = draw_batch(
        made_up_data(), SCHEDULER, dataclasses.replace(SETTINGS, noise_offset=0.5, batch=500), 1
    )
    same = draw_batch(made_up_data(), SCHEDULER, dataclasses.replace(SETTINGS, batch=500), 1)
    assert float((many.target - same.target).flatten(2).mean(dim=2).std()) == pytest.approx(0.5, rel=0.1)


def test_schedules_of_the_learning_rate() -> None:
    settings = DistillConfig(steps=110, warmup=10, learning_rate=1.0)
    for name, middle in (("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)):
        one = dataclasses.replace(settings, schedule=name)
        assert learning_rate_at(one, 5) == pytest.approx(0.5)
        assert learning_rate_at(one, 10) == pytest.approx(1)
        assert learning_rate_at(one, 60) == pytest.approx(middle)
        assert learning_rate_at(one, 110) == pytest.approx(1.0 if name == "constant" else 0.0, abs=1e-9)
    assert learning_rate_at(dataclasses.replace(settings, schedule="cosine"), 35) == pytest.approx(
        0.853553, rel=1e-5
    )
    assert learning_rate_at(dataclasses.replace(settings, warmup=0), 1) == 1.0


# Golden losses -----------------------------------------------------------------------------------------------------


def ten_steps(unet: Any, variant: str, plan: str) -> list[tuple[float, float, float]]:
    """Losses of ten plain AdamW steps at a fixed seed."""
    architecture = architecture_of(unet)
    parsed, chosen = parse_plan(plan, architecture), FEATURE_VARIANTS[variant]
    impacts = (
        {block.name: 0.01 * (place + 1) for place, block in enumerate(architecture.blocks)}
        if chosen.by_sensitivity
        else None
    )
    pairs = feature_pairs(architecture, parsed, chosen.points, sensitivities=impacts)
    student = materialise(unet, parsed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    rows = []
    for step in range(1, 11):
        losses = batch_losses(
            unet, student, pairs, draw_batch(made_up_data(), SCHEDULER, SETTINGS, step), variant=variant
        )
        optimizer.zero_grad()
        losses.total(SETTINGS).backward()
        optimizer.step()
        rows.append(tuple(float(one.detach()) for one in (losses.task, losses.output, losses.feature)))
    return rows


@pytest.mark.long
def test_golden_losses(tiny_unet_shared: Any) -> None:
    cases = [("raw", plan) for plan in OFFICIAL] + [(name, "bk-small") for name in list(FEATURE_VARIANTS)[1:]]
    found = {
        (variant, plan, str(step)): row
        for variant, plan in cases
        for step, row in enumerate(ten_steps(tiny_unet_shared, variant, plan), start=1)
    }
    if os.environ.get("UPDATE_GOLDEN"):
        with GOLDEN.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["variant", "plan", "step", "task", "output", "feature"])
            writer.writerows([*key, *(f"{value:.7g}" for value in row)] for key, row in found.items())
    with GOLDEN.open() as file:
        golden = {
            (row["variant"], row["plan"], row["step"]): tuple(
                float(row[name]) for name in ("task", "output", "feature")
            )
            for row in csv.DictReader(file)
        }
    assert golden.keys() == found.keys()
    for key, row in found.items():
        # other processors round otherwise, and ten steps of AdamW carry that on
        assert row == pytest.approx(golden[key], rel=2e-3), key
