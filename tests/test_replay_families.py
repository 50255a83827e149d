"""Tiny models of every transformer family: a replay is a naive loop's answer, bit for bit, and wide within 5e-5."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import discovery
import pytest
import tiny_models
import torch
from torch import Tensor

from prune_lab.blocks import architecture_of
from prune_lab.families import conditions_of, plain_config
from prune_lab.prefix_sharing import growth, predict_without, replayed
from prune_lab.probes import predict, random_probe
from prune_lab.surgery import bypassed


def stacked(answer: Any) -> Tensor:
    return answer if isinstance(answer, Tensor) else torch.stack(list(answer))


def alike(model: Any, batch: int) -> Any:
    """Inputs of ``batch`` equal rows, which have the same values for every number of rows."""

    def fitted(many: Any, one: Any) -> Any:
        if isinstance(many, dict):
            return {name: fitted(value, one[name]) for name, value in many.items()}
        if isinstance(many, list):
            return [fitted(value, one[place % len(one)]) for place, value in enumerate(many)]
        if not isinstance(many, Tensor):
            return many
        times = [large // small for large, small in zip(many.shape, one.shape, strict=True)]
        return one.repeat(times)

    return fitted(*(tiny_models.random_inputs(model, batch=rows) for rows in (batch, 1)))


@pytest.mark.parametrize("name", tiny_models.others_long(sorted(tiny_models.TINY_TRANSFORMERS)))
def test_each_block_and_random_plans_of_a_transformer(name: str) -> None:
    model = tiny_models.tiny_model(name)
    architecture = architecture_of(model)
    units = architecture.outline.units
    with torch.no_grad():
        sites = discovery.discover(model, [unit.path for unit in units], lambda: model(**alike(model, 1)))
    by_name = {unit.name: site for unit, site in zip(units, sites, strict=True)}
    names, draw = list(by_name), random.Random(name)
    sets = [frozenset[str](), *(frozenset({one}) for one in names)]
    sets += [frozenset(draw.sample(names, draw.randint(0, len(names)))) for _ in range(12)]
    ran = 0

    def computed(unit: Any, lanes: int) -> None:
        nonlocal ran
        ran += lanes

    def answer(copies: int) -> Tensor:
        return stacked(model(**alike(model, copies), return_dict=False)[0])

    def answers(width: int) -> dict[int, Tensor]:
        found = replayed(
            model,
            architecture,
            answer,
            sets,
            width=width,
            growth=lambda: growth(model, architecture, lambda copies: alike(model, copies)),
            computed=computed,
        )
        with torch.no_grad():
            return {number: answer for numbers, answer in found for number in numbers}

    alone = answers(1)
    assert ran < 0.7 * len(set(sets)) * len(names)
    wide = answers(5)
    for number, gone in enumerate(sets):
        with torch.no_grad(), discovery.without(model, [by_name[name] for name in gone]):
            wanted = answer(1)
        assert torch.equal(alone[number], wanted), sorted(gone)
        assert float((wide[number] - wanted).abs().max() / wanted.abs().max()) < 5e-5, sorted(gone)


ONE_LENGTH = (
    "Lumina2Transformer2DModel",
    "ZImageTransformer2DModel",
)  # whose blocks get no mask for texts of one


@pytest.mark.parametrize(
    "name",
    [
        name if name in ONE_LENGTH else pytest.param(name, marks=pytest.mark.long)
        for name in sorted(tiny_models.TINY_TRANSFORMERS)
        if any(condition.words for condition in conditions_of(tiny_models.tiny_config(name)))
    ],
)
def test_texts_of_other_lengths_go_in_one_pass(name: str) -> None:
    model = tiny_models.tiny_model(name)
    probe = random_probe(plain_config(model), samples=3, seed=0, timesteps=3, latent=8)
    added = {key: rows.clone() for key, rows in probe.added.items()}
    masks = [condition.name for condition in conditions_of(model) if condition.words]
    for mask in masks:
        words = added[mask].shape[1]
        for row, length in enumerate((words // 3, words, words // 2)):
            added[mask][row, length:] = 0
    probe = dataclasses.replace(probe, added=added)
    names = [block.name for block in architecture_of(model).blocks if block.removable]
    sets = [frozenset[str](), frozenset(names[:1]), frozenset(names[1:2]), frozenset(names[::2])]
    for width in (1, 4):
        ((_, answers),) = predict_without(model, probe, sets, batch=3, width=width)
        for gone, found in zip(sets, answers, strict=True):
            with bypassed(model, gone):
                wanted = predict(model, probe, batch=3)
            off = float((found - wanted).abs().max() / wanted.abs().max())
            assert off == 0 if width == 1 else off < 5e-5, (width, sorted(gone))
