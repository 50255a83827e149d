"""What leaves a model in one form of a student: counted from the layout that is built, not from the blocks of a plan.

A removed block that stays and does nothing takes nothing along but the layers that a config can leave out of it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from prune_lab.blocks import Architecture
from prune_lab.counting import Macs
from prune_lab.families import Layout, meta_model


class Gone(NamedTuple):
    """Parameters, multiply-adds of one forward pass, and those of them in attention products."""

    params: int
    macs: int
    attention_macs: int


@functools.lru_cache(maxsize=8)
def _sizes(canonical: str) -> Mapping[str, int]:
    """Parameters right in each module, by its path; modules inside of it do not count."""
    model = meta_model(json.loads(canonical))
    return {
        path: sum(parameter.numel() for parameter in module.parameters(recurse=False))
        for path, module in model.named_modules()
    }


def _own_share(by_module: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Multiply-adds of each module without those of the modules inside of it."""
    shares = dict(by_module)
    for path, (macs, attention) in by_module.items():
        if path:
            parent = path.rpartition(".")[0]
            while parent and parent not in shares:
                parent = parent.rpartition(".")[0]
            if parent in shares:
                of_parent = shares[parent]
                shares[parent] = (of_parent[0] - macs, of_parent[1] - attention)
    return shares


def gone_by(architecture: Architecture, layout: Layout, count: Macs) -> Gone:
    """What is not there any more in the smaller model of ``layout``; ``count`` is that of the whole model."""
    sizes = _sizes(_canonical(architecture.config))
    shares = _own_share(count.by_module)
    gone = [path for path in sizes if path and layout.renamed(path) is None]
    macs = [shares.get(path, (0, 0)) for path in gone]
    return Gone(
        sum(sizes[path] for path in gone),
        sum(one for one, _ in macs),
        sum(attention for _, attention in macs),
    )


def _canonical(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True)
