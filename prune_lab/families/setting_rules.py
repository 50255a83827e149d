"""Rules for the settings of a config: types and bounds, looked at before anything is built from them.

diffusers takes whatever it is given: text for a number is split into its digits, a list that is too long is cut, and a
million layers are built one by one. What these rules let through, diffusers may still refuse.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from prune_lab.errors import UnsupportedModelError

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


def whole(least: int = 1, most: int = WIDEST) -> Rule:
    """A whole number from ``least`` to ``most``, both included."""
    # `type`, not `isinstance`: true is an int to Python, and no count to a reader
    return Rule(
        lambda value: type(value) is int and least <= value <= most,
        f"a whole number from {least} to {most:,}",
    )


def number(least: float, most: float, *, above: bool = False) -> Rule:
    """A number from ``least`` to ``most``, both included; ``above``: without ``least`` itself."""
    return Rule(
        lambda value: (
            type(value) in (int, float) and least <= value <= most and not (above and value == least)
        ),
        f"a number {'above' if above else 'from'} {least:g} {'and at most' if above else 'to'} {most:g}",
    )


def one_of(*names: str) -> Rule:
    """One of these names."""
    return Rule(lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}")


TRUTH = Rule(lambda value: type(value) is bool, "true or false")
TEXT = Rule(lambda value: isinstance(value, str) and 0 < len(value) < 100, "a name")
ODD = Rule(lambda value: type(value) is int and value in range(1, 32, 2), "an odd whole number from 1 to 31")
_LATENT = whole(most=LARGEST_LATENT)
SIZE = Rule(
    lambda value: (
        _LATENT.fits(value) or (isinstance(value, list) and len(value) == 2 and all(map(_LATENT.fits, value)))
    ),
    f"a whole number from 1 to {LARGEST_LATENT:,}, or two of them",
)

# Null is false to diffusers, and an older config has it so.
FLAG = TRUTH.or_null()
WIDTH = whole()

# What every class of U-Nets has
OF_UNETS: Mapping[str, Rule] = {
    "sample_size": SIZE.or_null(),
    "in_channels": WIDTH,
    "out_channels": WIDTH,
    "center_input_sample": FLAG,
    "flip_sin_to_cos": FLAG,
    "freq_shift": number(0, 1),
    "mid_block_type": TEXT.or_null(),
    "downsample_padding": whole(0, 1),
    "mid_block_scale_factor": number(0, 1e6, above=True),
    "dropout": number(0, 1),
    "act_fn": TEXT,
    "norm_num_groups": WIDTH.or_null(),
    "norm_eps": number(0, 1),
    "num_class_embeds": whole(1, 10**6).or_null(),
    "resnet_time_scale_shift": TEXT,
    "time_embedding_dim": WIDTH.or_null(),
}

# One value for each stage. Where true, one value may stand for all.
OF_STAGES: Mapping[str, tuple[Rule, bool]] = {
    "down_block_types": (TEXT, False),
    "up_block_types": (TEXT, False),
    "block_out_channels": (WIDTH, False),
}


def refuse(key: str, value: object, meaning: str) -> NoReturn:
    """Raise UnsupportedModelError: the setting ``key`` has this ``value``, and must be what ``meaning`` says."""
    shown = repr(value[:20] if isinstance(value, (str, list)) else value)
    shown = shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."
    raise UnsupportedModelError(f"asked for a model by its config, found {key} {shown}; it must be {meaning}")


def settings_of(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config, what it leaves out as in ``defaults``; tuples are lists."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in {**defaults, **config}.items()
    }


def check_each(settings: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raise UnsupportedModelError for the first setting that breaks its rule."""
    for name, one in rules.items():
        if not one.fits(settings[name]):
            refuse(name, settings[name], one.meaning)


def check_per_stage(settings: Mapping[str, Any], rules: Mapping[str, tuple[Rule, bool]], stages: int) -> None:
    """The same for settings with one value for each of ``stages``; where true, one value may stand for all."""
    for key, (rule, alone) in rules.items():
        value = settings[key]
        if isinstance(value, list):
            if len(value) != stages or not all(map(rule.fits, value)):
                refuse(key, value, f"a list of {stages}, one for each of down_block_types: {rule.meaning}")
        elif not alone:
            refuse(key, value, f"a list, one for each stage: {rule.meaning}")
        elif not rule.fits(value):
            refuse(key, value, f"{rule.meaning}, or a list of {stages} of them")


def stages_of(settings: Mapping[str, Any]) -> int:
    """Number of stages on the way down. Raises UnsupportedModelError where it makes no sense."""
    kinds = settings["down_block_types"]
    if not isinstance(kinds, list) or not 1 <= len(kinds) <= MOST_STAGES:
        refuse("down_block_types", kinds, f"a list of 1 to {MOST_STAGES} names, one for each stage")
    return len(kinds)


def check_groups(key: str, groups: int | None, widths: list[int]) -> None:
    """Raise UnsupportedModelError where groups of a norm do not divide all of ``widths``."""
    for width in widths:
        if groups is not None and width % groups:
            divisor = math.gcd(*widths)
            refuse(key, groups, f"a divisor of all block_out_channels, such as {divisor}")


def check_layers(total: int, layers_per_block: object) -> None:
    """Raise UnsupportedModelError where ``layers_per_block`` makes more layers in all than are built."""
    if total > MOST_LAYERS:
        rule = f"less: all layers together are {total:,}, at most {MOST_LAYERS} are built"
        refuse("layers_per_block", layers_per_block, rule)
