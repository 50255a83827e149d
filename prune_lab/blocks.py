"""The inventory of a U-Net: every residual and attention block, named, measured, and removable or not.

Names follow BK-SDM (arXiv:2305.15798): ``Dn1 ... Dn4``, ``Md``, ``Up1 ... Up4`` are stages (``Dn1`` outermost, ``Up1``
innermost), ``R1, R2, ...`` residual and ``A1, A2, ...`` attention blocks in order of execution, so ``Dn2.A1`` is
``down_blocks.1.attentions.0``. What diffusers calls a block is a stage here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, get_args

import pandas as pd
from diffusers import UNet2DConditionModel

from prune_lab.counting import count_on_meta
from prune_lab.errors import UnknownBlockError, UnsupportedModelError
from prune_lab.families import meta_unet
from prune_lab.schemas import BLOCK_COLUMNS

Kind = Literal["resnet", "attention"]
GroupKind = Literal["block", "pair", "triplet", "stage", "inner", "plan"]

SUPPORTED_STAGES = (
    "CrossAttnDownBlock2D",
    "DownBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UNetMidBlock2D",
    "CrossAttnUpBlock2D",
    "UpBlock2D",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """One residual or attention block: where it is, what it costs, and whether the network closes without it.

    ``macs`` counts multiply-adds of one sample at the model's own latent size, attention products included;
    ``attention_macs`` is the part in the attention products (QK^T and AV).
    """

    name: str
    path: str
    kind: Kind
    stage: str
    in_channels: int
    out_channels: int
    skip_channels: int  # part of in_channels that arrives by a skip connection
    params: int
    macs: int
    attention_macs: int
    transformer_layers: int  # 0 for a residual block

    @property
    def removable(self) -> bool:
        """Whether the main path keeps its width when this block is gone."""
        return self.in_channels - self.skip_channels == self.out_channels

    @property
    def starred(self) -> bool:
        """Whether the block can only be scored through a channel-interpolation stand-in (a star in the paper)."""
        return not self.removable

    @property
    def reason(self) -> str:
        """Why the block cannot be removed; empty when it can."""
        if self.removable:
            return ""
        main = self.in_channels - self.skip_channels
        return f"changes the width of the main path from {main} to {self.out_channels} channels"


@dataclasses.dataclass(frozen=True, slots=True)
class Sampler:
    """A down- or up-sampler; it leaves the network only together with everything further in."""

    name: str
    path: str
    stage: str
    params: int
    macs: int
    leaves_with: tuple[str, ...]
    """Blocks that must all be gone for the sampler to leave: everything further in, in order of execution."""


@dataclasses.dataclass(frozen=True, slots=True)
class BlockGroup:
    """Blocks that are removed together: one block, a residual-attention pair, or a stage."""

    name: str
    kind: GroupKind
    blocks: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Architecture:
    """A U-Net without its weights: blocks and samplers in order of execution, totals, and the diffusers config.

    ``signature`` identifies the block structure (names, shapes, parameters), so that a plan made for one
    architecture is refused by another. MACs are those of one sample at the config's ``sample_size``.
    """

    blocks: tuple[Block, ...]
    samplers: tuple[Sampler, ...]
    config: Mapping[str, Any]
    signature: str
    total_params: int
    total_macs: int
    total_attention_macs: int

    @property
    def stages(self) -> tuple[str, ...]:
        """Stage names in order of execution; ``Md`` only when the U-Net has a mid stage."""
        downs = [f"Dn{i + 1}" for i in range(len(self.config["down_block_types"]))]
        ups = [f"Up{i + 1}" for i in range(len(self.config["up_block_types"]))]
        return (*downs, *(["Md"] if self.config["mid_block_type"] else []), *ups)

    def stage_blocks(self, stage: str) -> tuple[Block, ...]:
        """The blocks of ``stage`` in order of execution. Raises UnknownBlockError for an unknown stage."""
        if stage not in self.stages:
            raise UnknownBlockError(f"no stage is called {stage!r}; the stages are {', '.join(self.stages)}")
        return tuple(block for block in self.blocks if block.stage == stage)

    def block(self, name: str) -> Block:
        """The block called ``name``. Raises UnknownBlockError with the nearest names."""
        for block in self.blocks:
            if block.name == name:
                return block
        names = [block.name for block in self.blocks]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else f"blocks run from {names[0]} to {names[-1]}"
        raise UnknownBlockError(f"no block is called {name!r} among the {len(names)} of this U-Net; {hint}")


def architecture_of(source: UNet2DConditionModel | Mapping[str, Any]) -> Architecture:
    """The architecture of a U-Net, or of the U-Net that a diffusers config describes (no weights needed).

    Raises UnsupportedModelError when the model is not a ``UNet2DConditionModel`` or has stages of a type
    that is not known here.
    """
    if isinstance(source, Mapping):
        return _architecture_of_config(_canonical(source))
    if not isinstance(source, UNet2DConditionModel):
        raise UnsupportedModelError(
            f"asked for the blocks of a {type(source).__name__}; only UNet2DConditionModel has them"
        )
    # The structure follows from the config alone; a model edited in place no longer does what its config says.
    architecture = _architecture_of_config(_canonical(source.config))
    found = sum(parameter.numel() for parameter in source.parameters())
    if found != architecture.total_params:
        raise UnsupportedModelError(
            f"the U-Net holds {found:,} parameters, its config describes {architecture.total_params:,}; "
            "it was edited in place: load it from a folder whose config describes it"
        )
    return architecture


def find_blocks(unet: UNet2DConditionModel) -> tuple[Block, ...]:
    """All residual and attention blocks of ``unet`` in order of execution; SD-v1.4 has 22 and 16.

    Raises UnsupportedModelError as ``architecture_of`` does.
    """
    return architecture_of(unet).blocks


def block_groups(architecture: Architecture, kind: GroupKind) -> tuple[BlockGroup, ...]:
    """Groups of one kind, in order of execution.

    ``block`` lists every block, starred ones too. ``pair`` is a removable residual block with the attention block that
    follows it (``Dn1.R2+A2``), ``triplet`` such a pair and the residual block after it (``Md.R1+A1+R2``). ``stage`` is
    all that can be removed from a stage, where that is more than one block, ``inner`` the innermost stages together as
    far as they can be removed whole (``Md``, ``Dn4+Md+Up1``). Raises ValueError for ``plan``: any set of blocks.
    """
    if kind == "block":
        return tuple(BlockGroup(block.name, "block", (block.name,)) for block in architecture.blocks)
    if kind == "stage":
        members = {
            stage: tuple(block.name for block in architecture.stage_blocks(stage) if block.removable)
            for stage in architecture.stages
        }
        return tuple(BlockGroup(stage, "stage", names) for stage, names in members.items() if len(names) > 1)
    if kind == "inner":
        return _inner_groups(architecture)
    if kind not in ("pair", "triplet"):
        named = [name for name in get_args(GroupKind) if name != "plan"]
        raise ValueError(f"no groups of kind {kind!r}; use one of: {', '.join(named)}")
    pattern = ("resnet", "attention", "resnet")[: 2 if kind == "pair" else 3]
    runs = zip(*(architecture.blocks[start:] for start in range(len(pattern))), strict=False)
    return tuple(
        BlockGroup(
            "+".join([run[0].name, *(b.name.split(".")[1] for b in run[1:])]),
            kind,
            tuple(b.name for b in run),
        )
        for run in runs
        if tuple(block.kind for block in run) == pattern
        and len({block.stage for block in run}) == 1
        and all(block.removable for block in run)
    )


def _inner_groups(architecture: Architecture) -> tuple[BlockGroup, ...]:
    """The mid stage, then with the stages around it, as long as every block of them can be removed."""
    down = [stage for stage in architecture.stages if stage.startswith("Dn")]
    up = [stage for stage in architecture.stages if stage.startswith("Up")]
    rings = [[stage for stage in architecture.stages if stage == "Md"]]
    for before, after in zip(reversed(down), up, strict=False):
        rings.append([before, *rings[-1], after])
    groups = []
    for ring in filter(None, rings):
        members = [block for stage in ring for block in architecture.stage_blocks(stage)]
        if not all(block.removable for block in members):
            break
        groups.append(BlockGroup("+".join(ring), "inner", tuple(block.name for block in members)))
    return tuple(groups)


def blocks_frame(architecture: Architecture) -> pd.DataFrame:
    """One row per block in order of execution: name, path, stage, kind, in_channels, out_channels, skip_channels,
    transformer_layers, params, macs, attention_macs, removable, reason.
    """
    rows = [[getattr(block, column) for column in BLOCK_COLUMNS] for block in architecture.blocks]
    return pd.DataFrame(rows, columns=list(BLOCK_COLUMNS))


# Reading the structure ---------------------------------------------------------------------------------------------


def _canonical(config: Mapping[str, Any]) -> str:
    # Private keys are notes of diffusers (version, path); they say nothing about the structure.
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    return json.dumps(kept, sort_keys=True)


@functools.lru_cache(maxsize=64)
def _architecture_of_config(canonical: str) -> Architecture:
    unet = meta_unet(json.loads(canonical))
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    count = count_on_meta(config)
    params = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in unet.named_modules()
    }
    blocks = tuple(
        Block(
            name=name,
            path=path,
            kind="resnet" if ".resnets." in path else "attention",
            stage=name.split(".")[0],
            in_channels=channels[0],
            out_channels=channels[1],
            skip_channels=channels[2],
            params=params[path],
            macs=count.by_module[path][0],
            attention_macs=count.by_module[path][1],
            transformer_layers=channels[3],
        )
        for name, path, channels in _walk_blocks(unet)
    )
    samplers = tuple(
        Sampler(
            name,
            path,
            name.split(".")[0],
            params[path],
            count.by_module[path][0],
            leaves_with=_further_in(name, len(unet.down_blocks), [block.name for block in blocks]),
        )
        for name, path in _walk_samplers(unet)
    )
    shape = [
        (b.name, b.path, b.in_channels, b.out_channels, b.skip_channels, b.transformer_layers, b.params)
        for b in blocks
    ]
    signature = hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:12]
    return Architecture(
        blocks=blocks,
        samplers=samplers,
        config=MappingProxyType(config),
        signature=signature,
        total_params=params[""],
        total_macs=count.total,
        total_attention_macs=count.attention,
    )


def _stages(unet: UNet2DConditionModel) -> Iterator[tuple[str, str, Any]]:
    """(stage name, module path, module) in order of execution."""
    for i, module in enumerate(unet.down_blocks):
        yield f"Dn{i + 1}", f"down_blocks.{i}", module
    if unet.mid_block is not None:
        yield "Md", "mid_block", unet.mid_block
    for i, module in enumerate(unet.up_blocks):
        yield f"Up{i + 1}", f"up_blocks.{i}", module


def _walk_blocks(unet: UNet2DConditionModel) -> Iterator[tuple[str, str, tuple[int, int, int, int]]]:
    """(name, path, (in, out, skip channels, transformer layers)) of every block in order of execution."""
    width = unet.conv_in.out_channels
    for stage, path, module in _stages(unet):
        if type(module).__name__ not in SUPPORTED_STAGES:
            raise UnsupportedModelError(
                f"stage {stage} is a {type(module).__name__}; stages known here: {', '.join(SUPPORTED_STAGES)}"
            )
        resnets: list[Any] = list(module.resnets)
        attentions: list[Any] = list(getattr(module, "attentions", None) or [])
        for i in range(max(len(resnets), len(attentions))):
            if i < len(resnets):
                resnet = resnets[i]
                skip = resnet.in_channels - width if stage.startswith("Up") else 0
                yield (
                    f"{stage}.R{i + 1}",
                    f"{path}.resnets.{i}",
                    (resnet.in_channels, resnet.out_channels, skip, 0),
                )
                width = resnet.out_channels
            if i < len(attentions):
                layers = len(attentions[i].transformer_blocks)
                yield f"{stage}.A{i + 1}", f"{path}.attentions.{i}", (width, width, 0, layers)


def _further_in(sampler: str, depth: int, blocks: Sequence[str]) -> tuple[str, ...]:
    """The blocks between a down-sampler and the up-sampler of the same level, for either of the two."""
    side, number = sampler[:2], int(sampler.split(".", maxsplit=1)[0][2:])
    level = number if side == "Dn" else depth - number  # the last stage outside
    stages = {
        "Md",
        *(f"Dn{i}" for i in range(level + 1, depth + 1)),
        *(f"Up{i}" for i in range(1, depth - level + 1)),
    }
    return tuple(name for name in blocks if name.split(".")[0] in stages)


def _walk_samplers(unet: UNet2DConditionModel) -> Iterator[tuple[str, str]]:
    for stage, path, module in _stages(unet):
        if getattr(module, "downsamplers", None) is not None:
            yield f"{stage}.down", f"{path}.downsamplers.0"
        if getattr(module, "upsamplers", None) is not None:
            yield f"{stage}.up", f"{path}.upsamplers.0"
