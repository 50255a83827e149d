"""What the settings of a U-Net may be: their types and bounds, looked at before anything is built from them.

diffusers takes whatever it is given: text for a number is split into its digits, a list that is too long is cut, and a
million layers are built one by one. What these rules let through, diffusers may still refuse.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from prune_lab.errors import UnsupportedModelError
from prune_lab.families import unet_conditions

MOST_STAGES = 16  # each halves the latent
MOST_LAYERS = 256  # residual and transformer layers of the whole; Stable Diffusion XL has 83
WIDEST = 65_536
LARGEST_LATENT = 4096  # latent pixels of a side
_MOST_SHOWN = 60  # characters of a value in a message


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """What a setting may be: whether a value fits, and what to write where it does not."""

    fits: Callable[[Any], bool]
    meaning: str

    def or_null(self) -> Rule:
        """The same, or nothing."""
        return Rule(lambda value: value is None or self.fits(value), f"{self.meaning}, or null")


def _whole(least: int = 1, most: int = WIDEST) -> Rule:
    # `type`, not `isinstance`: true is an int to Python, and no count to a reader
    return Rule(
        lambda value: type(value) is int and least <= value <= most,
        f"a whole number from {least} to {most:,}",
    )


def _number(least: float, most: float, *, above: bool = False) -> Rule:
    return Rule(
        lambda value: (
            type(value) in (int, float) and least <= value <= most and not (above and value == least)
        ),
        f"a number {'above' if above else 'from'} {least:g} {'and at most' if above else 'to'} {most:g}",
    )


def _one_of(*names: str) -> Rule:
    return Rule(lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}")


_TRUTH = Rule(lambda value: type(value) is bool, "true or false")
_TEXT = Rule(lambda value: isinstance(value, str) and 0 < len(value) < 100, "a name")
_ODD = Rule(lambda value: type(value) is int and value in range(1, 32, 2), "an odd whole number from 1 to 31")
_LATENT = _whole(most=LARGEST_LATENT)
_SIZE = Rule(
    lambda value: (
        _LATENT.fits(value) or (isinstance(value, list) and len(value) == 2 and all(map(_LATENT.fits, value)))
    ),
    f"a whole number from 1 to {LARGEST_LATENT:,}, or two of them",
)

# Null is false to diffusers, and an older config has it so.
_FLAG = _TRUTH.or_null()
_WIDTH = _whole()
_RULES: Mapping[str, Rule] = {
    "sample_size": _SIZE.or_null(),
    "in_channels": _WIDTH,
    "out_channels": _WIDTH,
    "center_input_sample": _FLAG,
    "flip_sin_to_cos": _FLAG,
    "freq_shift": _number(0, 1),
    "mid_block_type": _TEXT.or_null(),
    "downsample_padding": _whole(0, 1),
    "mid_block_scale_factor": _number(0, 1e6, above=True),
    "dropout": _number(0, 1),
    "act_fn": _TEXT,
    "norm_num_groups": _WIDTH,
    "norm_eps": _number(0, 1),
    "encoder_hid_dim": _WIDTH.or_null(),
    "encoder_hid_dim_type": _TEXT.or_null(),
    "dual_cross_attention": _FLAG,
    "use_linear_projection": _FLAG,
    "class_embed_type": _one_of("timestep", "identity", "projection", "simple_projection").or_null(),
    "addition_embed_type": _TEXT.or_null(),
    "addition_time_embed_dim": _WIDTH.or_null(),
    "num_class_embeds": _whole(1, 10**6).or_null(),
    "upcast_attention": _FLAG,
    "resnet_time_scale_shift": _TEXT,
    "resnet_skip_time_act": _FLAG,
    "resnet_out_scale_factor": _number(0, 1e6, above=True),
    "time_embedding_type": _TEXT,
    "time_embedding_dim": _WIDTH.or_null(),
    "time_embedding_act_fn": _TEXT.or_null(),
    "timestep_post_act": _TEXT.or_null(),
    "time_cond_proj_dim": _WIDTH.or_null(),
    "conv_in_kernel": _ODD,
    "conv_out_kernel": _ODD,
    "projection_class_embeddings_input_dim": _whole(1, 10**6).or_null(),
    "attention_type": _one_of("default", "gated", "gated-text-image"),
    "class_embeddings_concat": _FLAG,
    "mid_block_only_cross_attention": _FLAG,
    "cross_attention_norm": _one_of("layer_norm", "group_norm").or_null(),
    "addition_embed_type_num_heads": _WIDTH,
}

# One value for each stage. Where true, one value may stand for all.
_PER_STAGE: Mapping[str, tuple[Rule, bool]] = {
    "down_block_types": (_TEXT, False),
    "up_block_types": (_TEXT, False),
    "block_out_channels": (_WIDTH, False),
    "layers_per_block": (_whole(0, MOST_LAYERS), True),
    "attention_head_dim": (_WIDTH, True),
    "cross_attention_dim": (_WIDTH, True),
    "only_cross_attention": (_TRUTH, True),
}
_ATTENDS = "CrossAttn"  # is part of the names of stages with attention
_DEPTH = _whole(0, MOST_LAYERS)  # transformer layers of a block; each block of a stage may have its own


def _refuse(key: str, value: object, meaning: str) -> NoReturn:
    shown = repr(value[:20] if isinstance(value, (str, list)) else value)
    shown = shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."
    raise UnsupportedModelError(f"asked for a U-Net by its config, found {key} {shown}; it must be {meaning}")


def _check_per_stage(settings: Mapping[str, Any], stages: int) -> None:
    for key, (rule, alone) in _PER_STAGE.items():
        value = settings[key]
        if isinstance(value, list):
            if len(value) != stages or not all(map(rule.fits, value)):
                _refuse(key, value, f"a list of {stages}, one for each of down_block_types: {rule.meaning}")
        elif not alone:
            _refuse(key, value, f"a list, one for each stage: {rule.meaning}")
        elif not rule.fits(value):
            _refuse(key, value, f"{rule.meaning}, or a list of {stages} of them")


def _check_depths(key: str, value: object, kinds: Sequence[str], layers: Sequence[int]) -> int:
    """Transformer layers of all blocks of the stages ``kinds``, which have as many ``layers``, as ``value`` says."""
    each: Sequence[Any] = value if isinstance(value, list) else [value] * len(layers)
    usable, total = len(each) == len(layers), 0
    for kind, own, count in zip(kinds, each, layers, strict=False):
        depths = own if isinstance(own, list) else [own] * count
        as_many = len(depths) == count or _ATTENDS not in kind
        usable = usable and as_many and all(map(_DEPTH.fits, own if isinstance(own, list) else [own]))
        total += sum(depths) if usable and _ATTENDS in kind else 0
    if not usable:
        _refuse(
            key,
            value,
            f"{_DEPTH.meaning}, or a list of {len(layers)} such, one for each stage; where the layers of a stage "
            "differ, one for each layer",
        )
    return total


def _spread(value: Any, stages: int) -> list[Any]:
    return list(value) if isinstance(value, list) else [value] * stages


def _attention_widths(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """(width, heads) of every stage with attention."""
    widths = settings["block_out_channels"]
    heads = _spread(settings["attention_head_dim"], len(widths))
    pairs = list(zip(widths, heads, strict=True))
    for kinds, own in (
        (settings["down_block_types"], pairs),
        (settings["up_block_types"], list(reversed(pairs))),
        ([settings["mid_block_type"] or ""], pairs[-1:]),
    ):
        yield from (pair for kind, pair in zip(kinds, own, strict=True) if _ATTENDS in kind)


def check_settings(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError, which names it, for a setting of another type or out of bounds.

    What ``config`` leaves out is as in ``defaults``, those of the class.
    """
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in {**defaults, **config}.items()
    }
    for name, one in _RULES.items():
        if not one.fits(settings[name]):
            _refuse(name, settings[name], one.meaning)
    if settings["num_attention_heads"] is not None:
        _refuse(
            "num_attention_heads",
            settings["num_attention_heads"],
            "null, since diffusers reads the number of heads from attention_head_dim: leave num_attention_heads out",
        )
    kinds = settings["down_block_types"]
    if not isinstance(kinds, list) or not 1 <= len(kinds) <= MOST_STAGES:
        _refuse("down_block_types", kinds, f"a list of 1 to {MOST_STAGES} names, one for each stage")
    stages = len(kinds)
    _check_per_stage(settings, stages)
    layers = _spread(settings["layers_per_block"], stages)
    key, reverse = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    total = sum(2 * count + 1 for count in layers) + _check_depths(key, settings[key], kinds, layers)
    if settings[reverse] is not None:
        more = [count + 1 for count in reversed(layers)]
        total += _check_depths(reverse, settings[reverse], settings["up_block_types"], more)
    if total > MOST_LAYERS:
        rule = f"less: all layers together are {total:,}, at most {MOST_LAYERS} are built"
        _refuse("layers_per_block", settings["layers_per_block"], rule)
    for width, heads in _attention_widths(settings):
        if width % heads:
            _refuse(
                "attention_head_dim",
                settings["attention_head_dim"],
                f"a number of heads that divides the width of its stage, {width} here",
            )
    groups = settings["norm_num_groups"]
    for width in settings["block_out_channels"]:
        if width % groups:
            divisor = math.gcd(*settings["block_out_channels"])
            _refuse("norm_num_groups", groups, f"a divisor of all block_out_channels, such as {divisor}")
    unet_conditions.conditions(settings)  # raises where one of them needs a setting that is not there
