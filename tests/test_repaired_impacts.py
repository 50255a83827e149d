"""The impact of plans after their repair, shared among many plans: the number that each has by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_UNET, build_unet
from tiny_models import tiny_model

from prune_lab.blocks import architecture_of
from prune_lab.errors import ConfigError
from prune_lab.plans import plan_of
from prune_lab.probes import random_probe
from prune_lab.repair import RepairKind, SharedRepair, repair
from prune_lab.surgery import materialise


def teacher_of(kind: str) -> Any:
    if kind == "unet":
        return build_unet(TINY_UNET)
    return tiny_model({"transformer": "PixArtTransformer2DModel", "joint": "SD3Transformer2DModel"}[kind])


PLANS = {
    "unet": (
        "Dn4.R2 Md.R1 Md.A1 Md.R2 Up1.R2",
        "Dn4.R2 Up1.R2",
        "Dn1.R2 Dn1.A2 Dn4.R2 Up1.R2 Up4.R2 Up4.A2",
    ),
    "transformer": ("B2", "B2 B4", "B3 B4", "B1 B3", "B2 B3"),
    "joint": ("B1", "B1 B2"),  # blocks of text and picture
}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("unet", "shift"),
        pytest.param("unet", "linear", marks=pytest.mark.long),
        pytest.param("unet", "best", marks=pytest.mark.long),
        ("transformer", "shift"),
        ("transformer", "refit"),
        ("joint", "shift"),
    ],
)
def test_the_shared_number_is_that_of_the_repair_from_scratch(family: str, kind: RepairKind) -> None:
    teacher = teacher_of(family)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    architecture, probe = (
        architecture_of(teacher),
        random_probe(teacher.config, samples=12, seed=0, timesteps=6),
    )
    plans = [plan_of(architecture, text.split()) for text in PLANS[family]]
    shared = SharedRepair(teacher, probe, kind=kind, batch=5)
    found = shared.impact_of([frozenset(plan.removed) for plan in plans])
    reports = [repair(materialise(teacher, plan), teacher, plan, probe, kind=kind) for plan in plans]
    assert found.tolist() == pytest.approx([report.impact_after for report in reports], rel=1e-4)
    assert any(report.applied for report in reports)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module._forward_hooks for module in teacher.modules())


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param("unet", "linear", marks=pytest.mark.long),
        pytest.param("unet", "best", marks=pytest.mark.long),
        ("transformer", "best"),
    ],
)
def test_a_student_is_repaired_as_from_scratch(family: str, kind: RepairKind) -> None:
    teacher = teacher_of(family)
    architecture, probe = (
        architecture_of(teacher),
        random_probe(teacher.config, samples=12, seed=0, timesteps=6),
    )
    shared = SharedRepair(teacher, probe, kind=kind, batch=5)
    for text in PLANS[family][-2:]:
        plan = plan_of(architecture, text.split())
        ours, theirs = materialise(teacher, plan), materialise(teacher, plan)
        found, wanted = shared.repair(ours, plan), repair(theirs, teacher, plan, probe, kind=kind)
        columns = ["cut", "kind", "side", "unit", "folds", "applied", "reason"]
        assert found.frame()[columns].equals(wanted.frame()[columns])
        for column in ("cut_error_before", "cut_error_after", "impact_before", "impact_after"):
            numbers = (one.frame()[column].to_numpy(dtype=float) for one in (found, wanted))
            np.testing.assert_allclose(*numbers, rtol=1e-3)
        assert found.applied
        theirs_weights = theirs.state_dict()
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, theirs_weights[name], rtol=1e-3, atol=1e-4)


def test_what_plans_have_in_common_is_computed_once() -> None:
    teacher = teacher_of("unet")
    probe = random_probe(teacher.config, samples=12, seed=0, timesteps=6)
    late = [
        frozenset(["Dn1.R2", "Dn1.A2", "Up4.R2", "Up4.A2"]),
        frozenset(["Dn1.R2", "Dn1.A2", "Up4.R3", "Up4.A3"]),
    ]
    together = SharedRepair(teacher, probe, kind="shift")
    together.impact_of(late)
    alone = [SharedRepair(teacher, probe, kind="shift") for _ in late]
    for one, removed in zip(alone, late, strict=True):
        one.impact_of([removed])
    assert 0 < together.forwards < 0.8 * sum(one.forwards for one in alone)
    before = together.forwards
    together.impact_of(late[:1])
    assert together.forwards - before < 0.2  # all that is left is what lies around the units


def test_an_unknown_kind_is_named() -> None:
    teacher = teacher_of("unet")
    with pytest.raises(ConfigError, match="kind 'magic'; known kinds are"):
        SharedRepair(teacher, random_probe(teacher.config, samples=6, seed=0, timesteps=6), kind="magic")  # type: ignore[arg-type]
