"""Where blocks can be made narrower inside: sites, each a row of equal units that leave alone.

What a block reads and writes stays as wide as it is: a site lies wholly inside one block. Its units are such that a
model without some of them computes what it computes with these set to 0 at the *narrow point*, which is the input of
the layers that read the site: whole groups of a norm, since the statistics of a group are those of all its channels;
whole heads, since their width is in the scale of attention; channels of a feed-forward in eights, which devices like.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from prune_lab.families.family import Outline, Unit

SiteKind = Literal["hidden", "heads", "cross", "ff"]
CHANNELS_IN_A_UNIT = 8  # of a feed-forward

# Ways of attention that treat each head alone, by the names of their classes. Those with added keys and values
# (``AttnAddedKVProcessor2_0``) are none: they lay out what the heads answer by the width of the block.
_BY_HEAD = ("AttnProcessor", "AttnProcessor2_0", "JointAttnProcessor2_0")
# Activations of a feed-forward that take each channel alone, and how many parts of the projection make one channel.
_PARTS = {"GELU": 1, "ApproximateGELU": 1, "LinearActivation": 1, "GEGLU": 2, "SwiGLU": 2}


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A layer, and on which side of it the units of a site lie."""

    path: str
    side: Literal["out", "in"]
    parts: int = 1
    """How many times all units lie there, one time after the other: both halves of a GEGLU."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A narrow point inside of one block: ``count`` units of ``size`` channels each, any of which can leave."""

    name: str
    block: str
    """The block or layer that it lies in, by name."""
    kind: SiteKind
    path: str  # of the module that all members lie in
    count: int
    size: int  # channels of a unit
    step: int = 1
    """What a person counts in one unit: 1 group or head, or 8 channels."""
    narrow: tuple[str, ...]
    """Paths of the layers whose input is the narrow point."""
    members: tuple[Member, ...]
    numbers: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict, hash=False)
    """By path of a module: what it says of the site beside the sizes of layers, as numbers for one unit."""

    @property
    def channels(self) -> int:
        """Channels of all units at the narrow point."""
        return self.count * self.size

    def places(self, units: Sequence[int], parts: int = 1) -> list[int]:
        """The channels of ``units``, in a layer where all units lie ``parts`` times."""
        return [
            part * self.channels + unit * self.size + channel
            for part in range(parts)
            for unit in units
            for channel in range(self.size)
        ]


# The sites of each kind of module ------------------------------------------------------------------------------------


def _hidden(module: ResnetBlock2D, path: str) -> dict[str, Any] | None:
    """The width between the two convolutions of a residual block, in groups of the norm that lies there."""
    norm = module.norm2
    if type(norm) is not nn.GroupNorm or norm.num_groups < 2:
        return None
    members = [Member(f"{path}.conv1", "out"), Member(f"{path}.norm2", "out"), Member(f"{path}.conv2", "in")]
    if module.time_emb_proj is not None:
        parts = 2 if module.time_embedding_norm == "scale_shift" else 1
        members.insert(1, Member(f"{path}.time_emb_proj", "out", parts))
    return {
        "count": norm.num_groups,
        "size": norm.num_channels // norm.num_groups,
        "narrow": (f"{path}.conv2",),
        "members": tuple(members),
        "numbers": {f"{path}.norm2": {"num_groups": 1}},
    }


def _treats_heads_alone(module: Any) -> bool:
    width = module.inner_dim // module.heads
    norms = [getattr(module, name, None) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    numbers = [weight.numel() for norm in norms if norm is not None for weight in norm.parameters()]
    return (
        type(module.processor).__name__ in _BY_HEAD
        and module.heads > 1
        and module.inner_dim == module.inner_kv_dim == width * module.heads
        and not module.fused_projections
        and all(number == width for number in numbers)
    )


def _heads(module: Any, path: str) -> dict[str, Any] | None:
    """The heads of an attention, where each is alone until the last layer."""
    if not _treats_heads_alone(module):
        return None
    projections = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    made = [name for name in projections if getattr(module, name, None) is not None]
    read = [f"{path}.to_out.0"] if module.to_out is not None else []
    read += [f"{path}.to_add_out"] if getattr(module, "to_add_out", None) is not None else []
    size = module.inner_dim // module.heads
    return (
        {
            "count": module.heads,
            "size": size,
            "narrow": tuple(read),
            "members": (
                *(Member(f"{path}.{name}", "out") for name in made),
                *(Member(name, "in") for name in read),
            ),
            "numbers": {
                path: {"heads": 1, "sliceable_head_dim": 1, "inner_dim": size, "inner_kv_dim": size},
            },
        }
        if read
        else None
    )


def _feed_forward(module: FeedForward, path: str) -> dict[str, Any] | None:
    """The channels between the two layers of a feed-forward."""
    parts = _PARTS.get(type(module.net[0]).__name__)
    inner = module.net[2].in_features
    if parts is None or inner % CHANNELS_IN_A_UNIT or inner == CHANNELS_IN_A_UNIT:
        return None
    return {
        "count": inner // CHANNELS_IN_A_UNIT,
        "size": CHANNELS_IN_A_UNIT,
        "step": CHANNELS_IN_A_UNIT,
        "narrow": (f"{path}.net.2",),
        "members": (Member(f"{path}.net.0.proj", "out", parts), Member(f"{path}.net.2", "in")),
    }


def _found(module: nn.Module, path: str) -> tuple[SiteKind, dict[str, Any] | None] | None:
    """The kind of site that a module is, and what there is to say of it; None for a module of another kind."""
    if type(module) is ResnetBlock2D:
        return "hidden", _hidden(module, path)
    if type(module) is Attention:
        return "cross" if module.is_cross_attention else "heads", _heads(module, path)
    if type(module) is FeedForward:
        return "ff", _feed_forward(module, path)
    return None


# The sites of a model ------------------------------------------------------------------------------------------------


def _sites_in(model: nn.Module, unit: Unit, inner: Sequence[str]) -> Iterator[Site]:
    seen: dict[str, int] = {}
    for inside, module in model.get_submodule(unit.path).named_modules():
        path = f"{unit.path}.{inside}" if inside else unit.path
        found = _found(module, path)
        if found is None or any(path == one or path.startswith(f"{one}.") for one in inner):
            continue
        kind, facts = found
        seen[kind] = seen.get(kind, 0) + 1  # one that cannot be cut keeps its number
        if facts is not None:
            number = seen[kind] if seen[kind] > 1 else ""
            yield Site(name=f"{unit.name}.{kind}{number}", block=unit.name, kind=kind, path=path, **facts)


def sites_of(model: nn.Module, outline: Outline) -> tuple[Site, ...]:
    """The sites of ``model``, which may be on ``meta``, in the order of its blocks; those of a layer belong to it."""
    found: list[Site] = []
    for unit in outline.present:
        if unit.kind != "sampler":
            inner = [layer.path for layer in outline.inner(unit.name)]
            found += _sites_in(model, unit, inner)
    return tuple(found)


# What is left of them ------------------------------------------------------------------------------------------------

Kept = Mapping[Site, tuple[int, ...]]  # the units that stay of each site
Sizes = dict[str, dict[str, int]]  # by path of a module: attributes of it
Conversion = Callable[[Tensor], Tensor]


class _Cut(Protocol):
    """Makes a tensor of the whole one, of which ``places`` stay along ``side``."""

    def __call__(self, tensor: Tensor, side: int, places: tuple[int, ...]) -> Tensor: ...


def narrowed_sizes(model: nn.Module, site: Site, count: int) -> Sizes:
    """By path of a module in ``model``: the attributes that are others where ``count`` units of ``site`` are left."""
    sizes: Sizes = {}
    for member in site.members:
        layer = model.get_submodule(member.path)
        name = {nn.Linear: "features", nn.Conv2d: "channels"}.get(type(layer))
        attribute = "num_channels" if name is None else f"{member.side}_{name}"
        sizes.setdefault(member.path, {})[attribute] = member.parts * count * site.size
    for path, numbers in site.numbers.items():
        sizes.setdefault(path, {}).update({name: number * count for name, number in numbers.items()})
    return sizes


def cut_tensors(model: nn.Module, site: Site) -> dict[str, tuple[int, int]]:
    """By name of a tensor of ``model``: the side that ``site`` lies on, and how many times all units lie there."""
    found: dict[str, tuple[int, int]] = {}
    for member in site.members:
        for name, _ in model.get_submodule(member.path).named_parameters(recurse=False):
            if member.side == "out":
                found[f"{member.path}.{name}"] = (0, member.parts)
            elif name == "weight":
                found[f"{member.path}.{name}"] = (1, member.parts)
    return found


def _taken(tensor: Tensor, side: int, places: tuple[int, ...]) -> Tensor:
    return tensor.index_select(side, torch.tensor(places, device=tensor.device))


def _emptied(tensor: Tensor, side: int, places: tuple[int, ...]) -> Tensor:
    kept = torch.zeros(tensor.shape[side], dtype=torch.bool, device=tensor.device)
    kept[list(places)] = True
    form = [1] * tensor.ndim
    form[side] = -1
    return torch.where(kept.reshape(form), tensor, tensor.new_zeros(()))


def _made(model: nn.Module, kept: Kept, how: _Cut) -> dict[str, Conversion]:
    """By name of a tensor: what makes it of the whole one. No tensor is of two sites."""
    found: dict[str, Conversion] = {}
    for site, units in kept.items():
        for name, (side, parts) in cut_tensors(model, site).items():
            assert name not in found, f"{name} is of two sites, one of them {site.name}"
            found[name] = functools.partial(how, side=side, places=tuple(site.places(units, parts)))
    return found


def narrowed(model: nn.Module, kept: Kept) -> tuple[Sizes, dict[str, Conversion]]:
    """The attributes of the modules of ``model`` (on ``meta``) that are others with the units ``kept`` alone, and what
    makes the tensors.
    """
    sizes: Sizes = {}
    for site, units in kept.items():
        for path, numbers in narrowed_sizes(model, site, len(units)).items():
            sizes.setdefault(path, {}).update(numbers)
    return sizes, _made(model, kept, _taken)


def emptied(model: nn.Module, kept: Kept) -> dict[str, Conversion]:
    """By name of a tensor of ``model``: what sets to 0 all that is not of the units ``kept``. Both sides of a narrow
    point are 0 then, and so are the derivatives of both: it stays as narrow when it is trained.
    """
    return _made(model, kept, _emptied)
