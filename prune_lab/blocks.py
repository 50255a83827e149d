"""The inventory of a model: every block that a plan can name, measured, and removable or not.

A *unit* is a block or a sampler; what a model's units are called and where they lie is said by its family
(``prune_lab.families``). What diffusers calls a block of a U-Net is a stage here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import pandas as pd
from torch import nn

from prune_lab.counting import Macs, count_macs
from prune_lab.errors import UnknownBlockError, UnsupportedModelError
from prune_lab.families import (
    Family,
    Outline,
    Site,
    Unit,
    family_of,
    meta_model,
    outline_of,
    plain_config,
    sites_of,
)
from prune_lab.runtime import printable
from prune_lab.schemas import BLOCK_COLUMNS

GroupKind = Literal["block", "pair", "triplet", "stage", "inner", "plan"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CountedUnit(Unit):
    """A block or sampler with what it costs.

    MACs are multiply-adds of one sample at the model's own latent size and the architecture's ``tokens``.
    """

    params: int
    count: Callable[[], Macs] = dataclasses.field(repr=False, compare=False)  # of the whole model
    count_without: Callable[[], Macs] | None = dataclasses.field(default=None, repr=False, compare=False)
    """Of the model without the unit, where others are less without it; its cost is the difference."""

    @property
    def macs(self) -> int:
        """Multiply-adds, attention products included."""
        if self.count_without is not None:
            return self.count().total - self.count_without().total
        return self.count().by_module[self.path][0]

    @property
    def attention_macs(self) -> int:
        """Multiply-adds in the attention products, QK^T and AV."""
        if self.count_without is not None:
            return self.count().attention - self.count_without().attention
        return self.count().by_module[self.path][1]


@dataclasses.dataclass(frozen=True, slots=True)
class BlockGroup:
    """Blocks that are removed together: one block, a residual-attention pair, or a stage."""

    name: str
    kind: GroupKind
    blocks: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Architecture:
    """A model without its weights: units in order of execution, totals, and the diffusers config.

    ``signature`` identifies the block structure (names, shapes, parameters), so that a plan made for one
    architecture is refused by another. MACs are those of one sample at the config's size with ``tokens``
    words of text; ``count`` traces the model once, when they are first asked for.
    """

    outline: Outline
    units: tuple[
        CountedUnit, ...
    ]  # blocks and samplers, which do not overlap; those that are gone keep their place
    blocks: tuple[CountedUnit, ...]
    layers: tuple[
        CountedUnit, ...
    ]  # what lies inside blocks and can be removed by itself; its cost is part of theirs
    named: tuple[CountedUnit, ...]  # blocks and layers in order of execution: all that a plan may name
    samplers: tuple[CountedUnit, ...]
    signature: str
    total_params: int
    tokens: int
    count: Callable[[], Macs] = dataclasses.field(repr=False)

    def layers_in(self, name: str) -> tuple[CountedUnit, ...]:
        """The layers inside the block called ``name``, in order of execution."""
        return tuple(layer for layer in self.layers if layer.inside == name)

    @property
    def total_macs(self) -> int:
        """Multiply-adds of one forward pass of the whole model, attention products included."""
        return self.count().total

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings that diffusers builds the model from, with the name of its class."""
        return self.outline.config

    @property
    def family(self) -> Family:
        """What is known about the model's class."""
        return family_of(self.config)

    @property
    def stem(self) -> str:
        """Path of the module that writes what the first unit reads."""
        return self.family.stem(self.config)

    @property
    def head(self) -> str:
        """Path of the module that writes the prediction."""
        return self.family.head(self.config)

    @property
    def stages(self) -> tuple[str, ...]:
        """Stage names in order of execution."""
        return tuple(stage.name for stage in self.outline.stages)

    def stage_blocks(self, stage: str) -> tuple[CountedUnit, ...]:
        """The blocks of ``stage`` in order of execution. Raises UnknownBlockError for an unknown stage."""
        if stage not in self.stages:
            raise UnknownBlockError(f"no stage is called {stage!r}; the stages are {', '.join(self.stages)}")
        return tuple(block for block in self.blocks if block.stage == stage)

    def block(self, name: str) -> CountedUnit:
        """The block or layer called ``name``. Raises UnknownBlockError with the nearest names."""
        for block in self.named:
            if block.name == name:
                return block
        names = [block.name for block in self.named]
        near = difflib.get_close_matches(name[:50], names, n=3, cutoff=0.5)
        blocks = self.blocks
        hint = (
            f"nearest: {', '.join(near)}"
            if near
            else f"blocks run from {blocks[0].name} to {blocks[-1].name}"
        )
        shown = repr(printable(name, 50))
        raise UnknownBlockError(f"no block is called {shown} among the {len(names)} of this model; {hint}")

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the blocks can be made narrower inside, in order of execution."""
        return _sites_of_config(_canonical(dict(self.config)))

    def outermost(self, names: Iterable[str]) -> frozenset[str]:
        """``names`` without layers of blocks that are named too: these leave with their block."""
        found = frozenset(names)
        return found - {layer.name for layer in self.layers if layer.inside in found}


_ATTACHED = {
    ".to_k_ip.": "an IP-Adapter is attached to it: take it off first (unload_ip_adapter of the pipeline)",
    ".lora_A.": "a LoRA is attached to it: merge it first (fuse_lora, then unload_lora_weights of the pipeline)",
}


def architecture_of(source: nn.Module | Mapping[str, Any], *, tokens: int | None = None) -> Architecture:
    """The architecture of a model, or of the model that a diffusers config describes (no weights needed).

    ``tokens`` is the length of the text that MACs are counted for (None: what the model is meant for);
    ``ModelSource.architecture`` knows it.
    Raises UnsupportedModelError when its class has no family, or it has parts of a type that is not known there.
    """
    config = plain_config(source)
    words = tokens or family_of(config).tokens(config)
    architecture = _architecture_of_config(_canonical(config), words)
    # The structure follows from the config alone; a model edited in place no longer does what its config says.
    if not isinstance(source, Mapping):
        found = sum(parameter.numel() for parameter in source.parameters())
        if found != architecture.total_params:
            names = [name for name, _ in source.named_parameters()]
            reasons = (reason for mark, reason in _ATTACHED.items() if any(mark in name for name in names))
            edited = "it was edited in place: load it from a folder whose config describes it"
            raise UnsupportedModelError(
                f"the model holds {found:,} parameters, its config describes {architecture.total_params:,}; "
                f"{next(reasons, edited)}"
            )
    return architecture


def block_groups(architecture: Architecture, kind: GroupKind) -> tuple[BlockGroup, ...]:
    """Groups of one kind, in order of execution; none where the family has no such kind.

    ``block`` lists every block, starred ones and the layers inside blocks too. ``stage`` is all that can be removed
    from a stage, where that is more than one block. Of a U-Net ``pair`` is a removable residual block with the
    attention block that follows it (``Dn1.R2+A2``), ``triplet`` such a pair and the residual block after it
    (``Md.R1+A1+R2``), ``inner`` the innermost stages together as far as they can be removed whole (``Md``,
    ``Dn4+Md+Up1``). Raises ValueError for ``plan``: any set of blocks.
    """
    known = [name for name in get_args(GroupKind) if name != "plan"]
    if kind not in known:
        raise ValueError(f"no groups of kind {kind!r}; use one of: {', '.join(known)}")
    found: Mapping[str, tuple[str, ...]] = {}
    if kind == "block":
        found = {block.name: (block.name,) for block in architecture.named}
    elif kind == "stage":
        members = {
            stage: tuple(block.name for block in architecture.stage_blocks(stage) if block.removable)
            for stage in architecture.stages
        }
        found = {stage: names for stage, names in members.items() if len(names) > 1}
    elif kind in architecture.family.groups:
        found = architecture.family.groups[kind](architecture.outline)
    return tuple(BlockGroup(name, kind, blocks) for name, blocks in found.items())


def blocks_frame(architecture: Architecture) -> pd.DataFrame:
    """One row per block in order of execution; columns BLOCK_COLUMNS. ``lane`` and ``row`` say where a map draws it.

    Layers inside blocks follow their block (``Up1.A2.T7``); their costs are part of its costs.
    """
    places = {stage.name: stage for stage in architecture.outline.stages}
    rows = []
    for block in architecture.named:
        place = places[block.stage]
        known = {"tokens": architecture.tokens, "lane": place.lane, "row": place.row}
        rows.append([known[name] if name in known else getattr(block, name) for name in BLOCK_COLUMNS])
    return pd.DataFrame(rows, columns=list(BLOCK_COLUMNS))


def cost_notes(architecture: Architecture) -> tuple[str, ...]:
    """A line for each block without which others hold less: its costs are what the whole model lacks then. And one for
    each that keeps a part of it where it is removed.
    """
    odd = [block for block in architecture.blocks if block.changes_others or block.keeps]
    model: Any = meta_model(architecture.config) if odd else None
    notes = []
    for block in odd:
        parts = ("", *(f".{path}" for path in block.keeps))
        own, *kept = (
            sum(parameter.numel() for parameter in model.get_submodule(f"{block.path}{part}").parameters())
            for part in parts
        )
        if block.keeps:
            notes.append(
                f"of the {own:,} parameters of {block.name}, {sum(kept):,} ({', '.join(block.keeps)}) stay where it is "
                "removed, since others read them"
            )
            continue
        notes.append(
            f"parameters and multiply-adds of {block.name} are what the model lacks without it: {block.params:,} "
            f"parameters, of which {own:,} are its own; the block that becomes the last loses the others"
        )
    return tuple(notes)


UNKNOWN_LATENT = 64  # side for which MACs are counted where the config has no sample_size


# Reading the structure ---------------------------------------------------------------------------------------------


def _canonical(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


@functools.lru_cache(maxsize=64)
def _sites_of_config(canonical: str) -> tuple[Site, ...]:
    return sites_of(meta_model(json.loads(canonical)))


@functools.lru_cache(maxsize=64)
def _architecture_of_config(canonical: str, tokens: int) -> Architecture:
    model = meta_model(json.loads(canonical))
    outline = outline_of(model)
    latent = UNKNOWN_LATENT if outline.config.get("sample_size", "its own") is None else None
    count = functools.cache(functools.partial(count_macs, outline.config, latent=latent, tokens=tokens))
    params = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in model.named_modules()
    }

    def counted(unit: Unit) -> CountedUnit:
        fields = {field.name: getattr(unit, field.name) for field in dataclasses.fields(unit)}
        if not unit.changes_others:
            return CountedUnit(**fields, params=params[unit.path], count=count)
        without = family_of(outline.config).layout(outline, frozenset({unit.name})).config
        left = sum(parameter.numel() for parameter in meta_model(without).parameters())
        macs = functools.cache(functools.partial(count_macs, without, latent=latent, tokens=tokens))
        return CountedUnit(**fields, params=params[""] - left, count=count, count_without=macs)

    found = tuple(counted(unit) for unit in outline.units)
    units = tuple(unit for unit in found if not unit.inside)
    blocks = tuple(unit for unit in units if unit.kind != "sampler" and not unit.gone)
    shape = [
        (b.name, b.path, b.in_channels, b.out_channels, b.skip_channels, b.transformer_layers, b.params)
        for b in blocks
    ]
    return Architecture(
        outline=outline,
        units=units,
        blocks=blocks,
        layers=tuple(unit for unit in found if unit.inside and not unit.gone),
        named=tuple(unit for unit in found if unit.kind != "sampler" and not unit.gone),
        samplers=tuple(unit for unit in units if unit.kind == "sampler" and not unit.gone),
        signature=hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:12],
        total_params=params[""],
        tokens=tokens,
        count=count,
    )
