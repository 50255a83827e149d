"""A model of every family is scored, searched and cut: impacts by hand, a budget met, a student of that size."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import unet_kinds
from discovery import discover, without
from families_seen import Seen
from test_transformers import NEVER_NATIVE
from tiny_models import FEW, TINY_TRANSFORMERS, random_inputs, tiny_model
from unet_kinds import KINDS, built

from prune_lab.blocks import architecture_of, block_groups
from prune_lab.counting import count_macs
from prune_lab.importance import ScoringContext, score
from prune_lab.probes import predict, random_probe
from prune_lab.profiling import cost_table
from prune_lab.search import Constraints, parse_budget, search_plans
from prune_lab.search.effects import Effects
from prune_lab.surgery import materialise

MODELS = (*TINY_TRANSFORMERS, "unet2d", "xl")
QUICK = ("PixArtTransformer2DModel", "FluxTransformer2DModel", "unet2d")
assert set(QUICK) <= {*FEW, *KINDS}


def model_of(name: str) -> Any:
    return built(KINDS[name](random.Random(3))) if name in KINDS else tiny_model(name)


@contextlib.contextmanager
def by_hand(model: Any, name: str, block: str, paths: list[str]) -> Iterator[None]:
    """The model without a block, by what it was seen to do."""
    if name in KINDS:
        with unet_kinds.without(model, [block]):
            yield
        return
    with torch.no_grad():
        sites = discover(model, paths, lambda: model(**random_inputs(model)))
    path = architecture_of(model).block(block).path
    with without(model, [site for site in sites if site.path == path]):
        yield


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in MODELS]
)
def test_a_model_of_every_family_is_scored_searched_and_cut(name: str, seen: Seen) -> None:
    model = model_of(name)
    architecture = architecture_of(model)
    probe = random_probe(model.config, samples=3, seed=0, timesteps=3, latent=8)
    table = score(ScoringContext(model, probe, batch=3), block_groups(architecture, "block"), bootstrap=10)
    impacts = table.block_impacts()
    assert list(impacts) == [block.name for block in architecture.named]

    whole = predict(model, probe).double()
    block = next(block for block in reversed(architecture.blocks) if block.removable)
    with by_hand(model, name, block.name, [unit.path for unit in architecture.outline.units]):
        change = predict(model, probe).double() - whole
    assert impacts[block.name] == pytest.approx(float(change.square().sum() / whole.square().sum()), rel=1e-3)
    seen(model, "score")

    costs = cost_table(architecture)
    budget = parse_budget("params<=98.5%", architecture, costs)
    native = name not in NEVER_NATIVE
    rules = Constraints(form="native" if native else "own")
    (plan,) = search_plans(architecture, Effects(impacts), costs, [budget], constraints=rules)
    assert plan.removed
    assert costs.of(plan).params <= 0.985 * architecture.total_params
    if native:
        student = materialise(model, plan)
        assert sum(parameter.numel() for parameter in student.parameters()) == costs.of(plan).params
        assert count_macs(student.config, tokens=architecture.tokens).total == costs.of(plan).macs
    seen(model, "search")
