"""Folding a correction at a cut into the weights of a unit beside it, exactly; and why some corrections do not fold.

Let h (C channels) be the output of a unit, and ``A h + b`` the corrected tensor.

- Convolutions (the first one, down- and upsamplers) compute ``h = K x + k``: the weights become ``A K``, ``A k + b``.
- A residual block with a shortcut convolution computes ``h = (S x + s + K u + k) / f``: the weights become ``A S``,
  ``A s``, ``A K`` and ``A k + f b``. All residual blocks of up stages and those that change the width are of this kind.
- A residual block without a shortcut convolution, and an attention block, compute ``h = (x + K u + k) / f``: a shift
  folds as ``k + f b``. ``A`` would have to change x too, but the block's own group norm reads x, and ``A`` cannot be
  moved through a group norm.
- A block of a transformer computes ``h = x + g * (K u + k)`` with a gate g per channel and timestep, or without one: a
  shift folds into k. It is fitted through the gate (``activations``), so that it is the k that the block wants.
- What cuts a picture into patches computes ``h = K x + k + p`` with p by place: a shift folds into k. ``A`` would have
  to change p too.
- A sampler behind the cut applies a convolution ``K`` to h, after padding with zeros or repeating pixels. ``A`` can be
  moved through both: the weights become ``K A``. A shift cannot be moved through the padding.

A *refit* changes only K and k of the unit's last layer. It is fitted on that layer's own input u, so it needs no fold.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prune_lab.families.endings import Layer, ending_of, known_ending
from prune_lab.repair.fitting import Correction

CorrectionKind = Literal["shift", "scale-shift", "linear", "refit"]
Side = Literal["before", "after"]

# Per channel of a refit; the sums of every fold take 8 bytes times the square of this number.
MOST_UNKNOWNS = 6000


def layer_features(layer: Layer, inputs: Tensor) -> Tensor:
    """(B, P, F) the inputs of ``layer`` for each output pixel, in the order of its flattened weight."""
    if isinstance(layer, nn.Linear):
        return inputs
    settings = {name: getattr(layer, name) for name in ("kernel_size", "dilation", "padding", "stride")}
    return F.unfold(inputs, **settings).transpose(1, 2)


def why_not(kind: CorrectionKind, side: Side, unit: nn.Module | None, name: str) -> str:
    """The reason why a correction of ``kind`` has no exact fold into ``unit``, called ``name``; empty when it has one.

    ``side`` is the side of the cut on which the unit is. ``unit`` is None for the model's last norm and layer.
    """
    ending = None if unit is None else ending_of(unit)
    if unit is not None and ending is None:
        return f"how {name}, a {type(unit).__name__}, writes its output is not known: nothing folds into it"
    if side == "after":
        if ending is not None and ending.linear:
            folds = kind in ("scale-shift", "linear")
            return "" if folds else f"a {kind} does not go through {name}'s padding"
        reading = f"{ending.norm} of {name}" if ending is not None else f"the norm ahead of {name}"
        return f"{reading} reads it: no map goes through a group norm"
    assert ending is not None
    if kind == "refit":
        unknowns = ending.last.weight[0].numel()
        if unknowns <= MOST_UNKNOWNS:
            return ""
        return f"the last layer of {name} has {unknowns:,} inputs; at most {MOST_UNKNOWNS:,} can be fitted"
    if kind != "shift" and ending.adds_positions:
        return f"{name} adds the embedding of positions: only a shift and a refit fold into it"
    if kind == "shift" or not ending.adds_input or ending.shortcut is not None:
        return ""
    return f"{name} adds its own input, which its {ending.norm} reads as well: only a shift folds into it"


def _map_output(layer: Layer, weight: Tensor, bias: Tensor) -> None:
    """Change ``layer`` so that its output becomes ``weight @ output + bias``."""
    old, old_bias = layer.weight.double(), cast("Tensor", layer.bias)
    layer.weight.copy_((weight @ old.flatten(1)).view_as(old))
    old_bias.copy_(weight @ old_bias.double() + bias)


@torch.no_grad()
def fold(unit: nn.Module, kind: CorrectionKind, side: Side, correction: Correction) -> None:
    """Fold ``correction`` into the weights of ``unit``, in place, computed in float64 by the rules of this module.

    Only for corrections for which ``why_not`` gives no reason.
    """
    ending = known_ending(unit)
    layer, bias = ending.last, ending.divisor * correction.bias
    old = layer.weight.double()
    if side == "after":
        # The weight is (out, in, k, k), and the map acts on the input channels.
        layer.weight.copy_(torch.einsum("oikl,ij->ojkl", old, correction.map))
    elif kind == "refit":
        layer.weight.copy_(old + ending.divisor * correction.weight.view_as(old))
        cast("Tensor", layer.bias).add_(bias)
    elif kind == "shift":
        cast("Tensor", layer.bias).add_(bias)
    else:
        _map_output(layer, correction.map, bias)
        if ending.shortcut is not None:
            _map_output(ending.shortcut, correction.map, torch.zeros_like(correction.bias))


@torch.no_grad()
def refit_layer(layer: Layer, correction: Correction) -> None:
    """Add ``correction``, of the layer's own inputs, to its weights in place, computed in float64."""
    layer.weight.copy_(layer.weight.double() + correction.weight.view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.add_(correction.bias)


def folded_parameters(unit: nn.Module) -> list[nn.Parameter]:
    """The parameters that ``fold`` may change."""
    ending = known_ending(unit)
    layers = (ending.last, ending.shortcut)
    return [parameter for layer in layers if layer is not None for parameter in layer.parameters()]
