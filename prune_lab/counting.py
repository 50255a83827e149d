"""Multiply-adds as fvcore counts them, with a formula for the attention products it leaves out.

Two conventions, always named. *Whole*: everything fvcore has a formula for, and the attention products QK^T and AV.
*Without attention*: the whole count less those products, which is what thop counts and what the figures of BK-SDM
(arXiv:2305.15798) are: 339.0 G for SD-v1.4. fvcore counts normalisation (five per element) and nearest-neighbour
upsampling (one per element), which torch's own counter, the oracle of the tests, does not; nothing else sets the two
apart.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from prune_lab.families import example_inputs, meta_model, plain_config, runs_on_meta

with warnings.catch_warnings():
    # Importing fvcore scripts a loss that is not used here, which torch 2.13 warns of.
    warnings.simplefilter("ignore", DeprecationWarning)
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import einsum_flop_jit, get_shape

ATTENTION = "attention_products"  # the name under which fvcore reports them
ANALYTIC_EXTRAS = (
    "group_norm",
    "layer_norm",
    "upsample_nearest2d",
)  # counted by fvcore, not by torch's counter

Handle = Callable[[list[Any], list[Any]], "Counter[str]"]


@dataclass(frozen=True, slots=True)
class Macs:
    """Multiply-adds of one forward pass over the whole batch; one fused multiply-add counts as one."""

    total: int
    attention: int  # the part in attention products, QK^T and AV
    uncounted: Mapping[str, int]  # operator -> calls that no formula covers; unknown, not zero
    by_operator: Mapping[str, int] = field(default_factory=dict, repr=False)
    by_module: Mapping[str, tuple[int, int]] = field(
        default_factory=dict, repr=False
    )  # path -> (whole, attention)
    uncounted_by_module: Mapping[str, Mapping[str, int]] = field(default_factory=dict, repr=False)
    own_by_module: Mapping[str, tuple[int, int]] = field(
        default_factory=dict, repr=False
    )  # the same without the modules inside

    @property
    def without_attention(self) -> int:
        """The paper's convention, thop's: attention products left out."""
        return self.total - self.attention


def _attention_products(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """QK^T and AV of ``aten::scaled_dot_product_attention``: (..., L, E), (..., S, E) and (..., S, V)."""
    query, key, value = (get_shape(each) for each in inputs[:3])
    *batch, length, width = query
    return Counter({ATTENTION: math.prod(batch) * length * key[-2] * (width + value[-1])})


def _einsum(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """One product for each set of places: of one tensor alone, which is laid out in another order, there is none."""
    shapes = [get_shape(operand) for operand in inputs[1].node().inputs()]
    if len(shapes) > 2:
        counted: Counter[str] = einsum_flop_jit(inputs, outputs)
        return counted
    terms = inputs[0].toIValue().replace(" ", "").split("->")[0].split(",")
    sides = {
        letter: side
        for term, shape in zip(terms, shapes, strict=True)
        for letter, side in zip(term, shape, strict=True)
    }
    return Counter({"einsum": math.prod(sides.values()) if len(shapes) == 2 else 0})


def _batched_product(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """One product of attention written out: ``bmm(a, b)`` or ``baddbmm(bias, a, b)``."""
    left, right = [shape for each in inputs if (shape := get_shape(each)) is not None][-2:]
    return Counter({ATTENTION: math.prod(left) * right[-1]})


# Linear layers reach the trace as `linear`, so products of batches of matrices are attention in these models.
HANDLES: Mapping[str, Handle] = MappingProxyType(
    {
        "aten::scaled_dot_product_attention": _attention_products,
        "aten::bmm": _batched_product,
        "aten::einsum": _einsum,
        "aten::baddbmm": _batched_product,
    }
)


# A trace on `meta` -----------------------------------------------------------------------------------------


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` as it is now, bypasses included, with its tensors on ``meta``: no weights are copied."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.to("meta")
    for part in module.modules():  # tensors that are no buffers: tables of angles
        for tensor in tree_leaves(list(vars(part).values())):
            if isinstance(tensor, Tensor):
                memo.setdefault(id(tensor), tensor.to("meta"))
    return copy.deepcopy(module, memo).eval()


_CONVOLUTIONS: Mapping[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}  # by number of sides


def _per_side(value: Any, sides: int) -> list[int]:
    return [value] * sides if isinstance(value, int) else list(value)


_TRANSPOSED: Mapping[Any, int] = {
    torch.conv_transpose1d: 1,
    torch.conv_transpose2d: 2,
    torch.conv_transpose3d: 3,
}


def _convolution(
    sides: int,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """``conv2d`` of these arguments, or its like with other ``sides``, as the operator that a trace records."""
    stride, padding, dilation = (_per_side(option, sides) for option in (stride, padding, dilation))
    form = (stride, padding, dilation, False, [0] * sides, groups)
    return torch._convolution(x, weight, bias, *form, False, False, False, False)


def _transposed(
    sides: int,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    """``conv_transpose2d`` or its like, as the operator that a trace records (samplers of K-diffusion)."""
    stride, padding, dilation, more = (
        _per_side(option, sides) for option in (stride, padding, dilation, output_padding)
    )
    return torch._convolution(
        x, weight, bias, stride, padding, dilation, True, more, groups, False, False, False, False
    )


class _AsTraced(TorchFunctionMode):
    """Calls every ``conv2d`` and its like as ``_convolution``, the operator that a trace records, and ``masked_fill``
    with a number: the tracer knows none that fills with true or false.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _TRANSPOSED:
            return _transposed(_TRANSPOSED[func], *args, **(kwargs or {}))
        sides = _CONVOLUTIONS.get(func)
        if func is Tensor.masked_fill and len(args) == 3 and isinstance(args[2], bool):
            return func(*args[:2], int(args[2]))
        if sides is None:
            return func(*args, **(kwargs or {}))
        return _convolution(sides, *args, **(kwargs or {}))


def _normed(x: Tensor, *statistics: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a norm of ``x`` answers on ``meta``: a tensor like it, and a mean and a spread of this shape."""
    return torch.empty_like(x), x.new_empty(statistics), x.new_empty(statistics)


def _group_normed(
    x: Tensor, _weight: Any, _bias: Any, rows: int, _channels: int, _size: int, groups: int, _eps: float
) -> Any:
    return _normed(x, rows, groups)


def _layer_normed(x: Tensor, sides: Any, *_rest: Any) -> Any:
    return _normed(x, *x.shape[: x.ndim - len(sides)], *[1] * len(sides))


def _projected(bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty((left.shape[0], right.shape[1]))


# Operators whose shapes torch works out in Python by all the steps of the computation, which takes most of a trace.
_SHAPES: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.native_group_norm.default: _group_normed,
    torch.ops.aten.native_layer_norm.default: _layer_normed,
    torch.ops.aten.addmm.default: _projected,
    torch.ops.aten._safe_softmax.default: lambda x, *_rest: torch.empty_like(x),
}


class _ConvolutionShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives a recorded ``_convolution`` on ``meta`` its output's shape."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._convolution.default:
            return torch.ops.aten.convolution.default(*args[:9])
        if func in _SHAPES and args[0].is_meta and not kwargs:
            return _SHAPES[func](*args)
        return func(*args, **(kwargs or {}))


@contextmanager
def _traceable_on_meta() -> Iterator[None]:
    """Inside, ``torch.jit`` can trace convolutions of ``meta`` tensors.

    Torch works out the shape of a convolution on ``meta`` in Python before the tracer has recorded it; while tracing,
    sizes are tensors there, and it stops with a TypeError (torch 2.13). Recorded first, as a real device does, the
    convolution is given its shape with tracing already suspended.
    """
    with runs_on_meta(), _ConvolutionShapes(), _AsTraced():  # type: ignore[no-untyped-call]
        yield


def _own_shares(by_module: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
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


class _ByPosition(nn.Module):
    """A module called with tensors by position and answering with tensors alone, which is all a trace takes."""

    def __init__(self, module: nn.Module, structure: TreeSpec) -> None:
        super().__init__()
        self.module = module
        self.structure = structure  # of the keyword arguments

    def forward(self, *leaves: Any) -> tuple[Tensor, ...]:
        """What the module and each of its layers answers: what a trace does not hand out, it leaves away, such as the
        text that the last block of a transformer writes for nobody.
        """
        written: list[Any] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            written.append(output)

        with contextlib.ExitStack() as hooks:
            for part in self.module.modules():
                if not list(part.children()) and list(part.parameters(recurse=False)):
                    hooks.enter_context(part.register_forward_hook(keep))
            written.append(self.module(**tree_unflatten(leaves, self.structure)))
        return tuple(leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor))


def count_call(module: nn.Module, inputs: Mapping[str, Any]) -> Macs:
    """Multiply-adds of ``module(**inputs)``, whatever the module, per operator and per module in it.

    ``inputs`` are tensors, or mappings of tensors, on the module's own device; ``meta`` (see ``meta_copy``) needs no
    weights and no memory.
    """
    leaves, structure = tree_flatten(dict(inputs))
    analysis = (
        FlopCountAnalysis(_ByPosition(module, structure), tuple(leaves))
        .set_op_handle(**HANDLES)
        .unsupported_ops_warnings(False)
        .uncalled_modules_warnings(False)
        .tracer_warnings("none")
    )
    with _traceable_on_meta():
        counts = analysis.by_module_and_operator()
    root = "module"
    by_module: dict[str, tuple[int, int]] = {}
    uncounted: dict[str, Mapping[str, int]] = {}
    for path, row in counts.items():
        if path:
            name = path.removeprefix(root).removeprefix(".")
            by_module[name] = (int(sum(row.values())), int(row[ATTENTION]))
            uncounted[name] = MappingProxyType(dict(analysis.unsupported_ops(path)))
    return Macs(
        *by_module[""],
        uncounted[""],
        MappingProxyType({operator: int(count) for operator, count in counts[root].items()}),
        MappingProxyType(by_module),
        MappingProxyType(uncounted),
        MappingProxyType(_own_shares(by_module)),
    )


@functools.lru_cache(maxsize=64)
def _count_config(
    config: str, batch: int, latent: int | None, tokens: int | None, frames: int | None
) -> Macs:
    model = meta_model(json.loads(config))
    sizes = {"batch": batch, "latent": latent, "tokens": tokens, "frames": frames}
    inputs = example_inputs(model.config, **sizes, device="meta")  # type: ignore[arg-type]
    return count_call(model, inputs)


def count_macs(
    source: ModelMixin | Mapping[str, Any],
    *,
    batch: int = 1,
    latent: int | None = None,
    tokens: int | None = None,
    frames: int | None = None,
) -> Macs:
    """Multiply-adds of one forward pass over ``batch`` samples, both conventions, per operator and per module.

    ``source`` is a model, counted as it is now (blocks may be bypassed), or a config. ``latent`` is the side of the
    square latent (None: the config's sample_size), ``tokens`` the length of the text (None: 77),
    ``frames`` those of the latent of a film (None: what the model is meant for). The trace runs on
    ``meta`` tensors: it needs no weights and leaves ``source`` untouched. Raises UnsupportedModelError for a
    conditioning this project has no inputs for.
    """
    if isinstance(source, Mapping):
        text = json.dumps(plain_config(source), sort_keys=True, separators=(",", ":"))
        return _count_config(text, batch, latent, tokens, frames)
    sizes = {"batch": batch, "latent": latent, "tokens": tokens, "frames": frames}
    inputs = example_inputs(source.config, **sizes, device="meta", dtype=source.dtype)  # type: ignore[arg-type]
    return count_call(meta_copy(source), inputs)
