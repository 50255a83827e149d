"""Transformers as chains of blocks: what each family says of a class, against the class itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from discovery import Site, discover, without
from tiny_models import TINY_TRANSFORMERS, random_inputs, tiny_config, tiny_model
from torch import Tensor

from prune_lab.blocks import architecture_of
from prune_lab.families import FAMILIES, outline_of
from prune_lab.plans import PruningPlan, is_native, plan_of
from prune_lab.surgery import bypassed, materialise
from prune_lab.surgery.building import predicted_shapes

CLASSES = sorted(TINY_TRANSFORMERS)


def answer(model: Any, inputs: Any) -> Tensor:
    with torch.no_grad():
        found = model(**inputs, return_dict=False)[0]
    return found if isinstance(found, Tensor) else torch.stack(list(found))


def sites_of(model: Any, inputs: Any) -> list[Site]:
    with torch.no_grad():
        return discover(model, [unit.path for unit in outline_of(model).units], lambda: model(**inputs))


def naively(model: Any, inputs: Any, sites: Sequence[Site]) -> Tensor:
    with without(model, sites):
        return answer(model, inputs)


def test_every_transformer_has_a_tiny_model() -> None:
    known = {name for name, family in FAMILIES.items() if family.component != "unet"}
    assert known == set(TINY_TRANSFORMERS)


@pytest.mark.parametrize("name", CLASSES)
def test_a_family_says_what_its_class_does(name: str) -> None:
    model = tiny_model(name)
    units = outline_of(model).units
    found = sites_of(model, random_inputs(model))
    assert [Site(unit.path, unit.hands_on, unit.in_tuple) for unit in units] == found


def drawn_plans(name: str, count: int, seed: int = 0) -> list[tuple[dict[str, Any], PruningPlan]]:
    """Random plans, each of a model of random depth."""
    generator = random.Random(f"{name} {seed}")
    drawn = []
    for _ in range(count):
        config = tiny_config(name)
        for key in [
            key
            for key in config
            if key
            in ("num_layers", "n_layers", "num_single_layers", "num_mmdit_layers", "num_single_dit_layers")
        ]:
            config[key] = generator.randint(1, 5)
        architecture = architecture_of(config)
        names = [block.name for block in architecture.blocks]
        plan = plan_of(architecture, generator.sample(names, generator.randint(1, len(names))))
        drawn.append((config, plan))
    return drawn


def check(name: str, config: dict[str, Any], plan: PruningPlan, seed: int) -> bool:
    """Whether the plan is native; where it is, the student is the teacher without its blocks, bit for bit."""
    settings = {key: value for key, value in config.items() if key != "_class_name"}
    model = tiny_model(name, seed, **settings)
    architecture = architecture_of(model)
    inputs = random_inputs(model, seed)
    gone = [
        site
        for site in sites_of(model, inputs)
        if site.path in {architecture.block(n).path for n in plan.removed}
    ]
    wanted = naively(model, inputs, gone)
    with bypassed(model, plan):
        assert torch.equal(answer(model, inputs), wanted)
    if not is_native(architecture, plan):
        return False
    student = materialise(model, plan)
    assert torch.equal(answer(student, inputs), wanted)
    assert predicted_shapes(config, plan) == {
        key: tuple(value.shape) for key, value in student.state_dict().items()
    }
    assert type(student) is type(model)
    return True


@pytest.mark.parametrize("name", CLASSES)
def test_a_student_is_the_teacher_without_its_blocks(name: str) -> None:
    for seed, (config, plan) in enumerate(drawn_plans(name, 3)):
        check(name, config, plan, seed)
