"""The order that an architecture gives its blocks before any training: a baseline for what training adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from prune_lab.blocks import BlockGroup
from prune_lab.errors import DataError
from prune_lab.families import format_of, meta_model
from prune_lab.importance.cache import ScoreCache
from prune_lab.importance.context import SampleScores, ScoringContext
from prune_lab.importance.outputs import output_mse
from prune_lab.models.silence import quiet
from prune_lab.prefix_sharing import ComputeCost
from prune_lab.runtime import device_of, generator_for, note

PRIOR_SEEDS = 3  # untrained models that are averaged


def _made(kind: Any, config: Mapping[str, Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(generator_for(seed, "untrained", 0).initial_seed())
        return kind.from_config(config).eval()


def untrained(config: Mapping[str, Any], seed: int) -> Any:
    """A model of ``config`` with the weights that training starts from, drawn from ``seed``, float32 on the CPU.

    torch's own generator stays as it was. Raises UnsupportedModelError for a config that diffusers cannot build.
    """
    return _made(type(meta_model(config)), config, seed)


def untrained_like(model: Any, seed: int) -> Any:
    """The same for the class and config of ``model``, on its device and in its number format."""
    made = _made(type(model), model.config, seed)
    with quiet():  # diffusers warns of any change of the format
        return made.to(device=device_of(model), dtype=format_of(model))


def architecture_prior(context: ScoringContext, groups: Sequence[BlockGroup]) -> SampleScores:
    """``output-mse`` of models of the same architecture with random weights, the mean of three seeds.

    Measures: how much of an order the wiring, the widths and the initial weights give, before anything is learnt.
    Reads as: a baseline; what a criterion knows beyond it was learnt in training.
    Misleads when: taken for a score of the trained model.
    Cost: three times that of ``output-mse``.
    Reference: scores of untrained networks as a control, as in sanity checks of pruning (arXiv:2009.11094).
    """
    values, compute = [], ComputeCost(forward_macs=context.architecture.total_macs)
    for place in range(PRIOR_SEEDS):
        note(f"architecture-prior: untrained model {place + 1} of {PRIOR_SEEDS}")
        model = untrained_like(context.model, context.seed + place)
        # a cache of its own: values of the trained model must not be taken for these
        found = output_mse(dataclasses.replace(context, model=model, cache=ScoreCache()), groups)
        total = float(found.scales.sum())
        if not total > 0:
            raise DataError(
                f"asked for the architecture-prior of a {type(context.model).__name__}, found that it predicts nothing "
                "before it is trained; choose another criterion"
            )
        values.append(found.values / total)
        compute.macs += found.compute.macs
        compute.naive_macs += found.compute.naive_macs
    rows = len(found.samples)
    return SampleScores(np.mean(values, axis=0), np.full(rows, 1 / rows), found.samples, compute)
