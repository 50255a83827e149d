"""Stage widths of U-Nets, as their plain configs have them: the levels, and how many channels each may have."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from prune_lab.errors import PlanError, UnsupportedModelError
from prune_lab.families.building import meta_model
from prune_lab.families.family import CLASS_NAME, plain_config
from prune_lab.families.known import family_of
from prune_lab.families.own_code import is_own

CHANNELS = "block_out_channels"


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    """Stages of one width: ``channels`` now, which can become any smaller multiple of ``step``."""

    places: tuple[int, ...]
    """Which numbers of ``block_out_channels`` these are; several where one stage hands its state on to the next
    without a layer between, so that they stay equal."""
    stages: tuple[str, ...]
    channels: int
    step: int

    @property
    def choices(self) -> tuple[int, ...]:
        """How many channels there can be, all that there are first."""
        return tuple(range(self.channels, 0, -self.step))


def attentions_of(model: nn.Module) -> dict[str, Any]:
    """By path: the attentions of ``model``."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "to_q")}


def _steps_of(model: Any, wider: nn.Module, widths: Mapping[str, int]) -> dict[int, int]:
    """By place in ``widths``, of paths of stages: what its number of channels must be a multiple of, for its norms and
    its heads. ``wider`` is the model of twice as many channels: what keeps its number of heads there has narrower ones
    in a narrower model, and else there are fewer of them.
    """
    steps = dict.fromkeys(widths.values(), 1)
    for path, module in model.named_modules():
        place = next((widths[one] for one in widths if path.startswith(f"{one}.")), None)
        if place is None:
            continue
        if isinstance(module, nn.GroupNorm):
            steps[place] = math.lcm(steps[place], module.num_groups)
        elif hasattr(module, "to_q"):
            stay = wider.get_submodule(path).heads == module.heads
            steps[place] = math.lcm(steps[place], module.heads if stay else module.inner_dim // module.heads)
    return steps


def levels_of(config: Mapping[str, Any]) -> tuple[Level, ...]:
    """The levels of the U-Net of ``config``, outermost first. Raises UnsupportedModelError for another model."""
    name = config[CLASS_NAME]
    if CHANNELS not in config or "UNet" not in name:
        raise UnsupportedModelError(
            f"asked for the stage widths of a {name}, which are known of U-Nets; of this model see "
            "prune-lab search --axes depth,width"
        )
    if is_own(config):
        raise UnsupportedModelError(
            f"asked for the stage widths of a {name}, a model with code of its own; make stages of its parent narrower "
            "first, and prune the result"
        )
    model: Any = meta_model(config)
    channels = list(config[CHANNELS])
    sides: list[list[str]] = [[f"down_blocks.{place}"] for place in range(len(channels))]
    for place in range(len(channels)):
        sides[len(channels) - 1 - place].append(f"up_blocks.{place}")
    sides[-1].append("mid_block")
    wider = meta_model({**plain_config(config), CHANNELS: [2 * one for one in channels]})
    steps = _steps_of(model, wider, {path: place for place, paths in enumerate(sides) for path in paths})
    called = {stage.path: stage.name for stage in family_of(config).outline(model).stages}
    rows: list[list[int]] = []
    for place, width in enumerate(channels):
        if rows and channels[rows[-1][-1]] == width:
            rows[-1].append(place)
        else:
            rows.append([place])
    found = []
    for row in rows:
        paths = [path for place in row for path in sides[place]]
        step = math.lcm(*(steps[place] for place in row))
        if row[0] == 0 and config.get("time_embedding_type", "positional") != "positional":
            step = channels[0]  # features of the time that were learnt are not made anew
        names = tuple(called[path] for path in paths if path in called)
        found.append(Level(tuple(row), names, channels[row[0]], step))
    return tuple(found)


def checked_channels(config: Mapping[str, Any], channels: Sequence[int]) -> tuple[int, ...]:
    """``channels`` for the levels of ``config``: one number for each stage, as ``block_out_channels`` has them.

    Raises PlanError, which says what would do, for numbers that no plain config of the same layers has.
    """
    was = tuple(config.get(CHANNELS, ()))
    levels = levels_of(config)
    written = ",".join(map(str, was))
    if len(channels) != len(was):
        raise PlanError(
            f"asked for channels {','.join(map(str, channels))}; the model has {len(was)} stages of {written}: give "
            f"{len(was)} numbers"
        )
    for level in levels:
        asked = {channels[place] for place in level.places}
        names = ", ".join(level.stages)
        if len(asked) > 1:
            raise PlanError(
                f"asked for {' and '.join(str(channels[place]) for place in level.places)} channels in {names}, which "
                "hand their state on unchanged and stay equal; give one number for them"
            )
        if not asked <= set(level.choices):
            listed = (
                level.choices if len(level.choices) < 9 else (*level.choices[:7], "...", level.choices[-1])
            )
            raise PlanError(
                f"asked for {asked.pop()} channels in {names}, which have {level.channels}; their norms and heads "
                f"allow {', '.join(map(str, listed))}"
            )
    if tuple(channels) == was:
        raise PlanError(f"asked for channels {written}, which the model has; give fewer in some stage")
    for before, after, one, two in zip(was, was[1:], channels, channels[1:], strict=False):
        if before != after and one == two:
            raise PlanError(
                f"asked for {one} channels in two stages that have {before} and {after}: a plain model of equal ones "
                "has no layer between them, and this one has; give different numbers"
            )
    return tuple(channels)


def narrower_config(config: Mapping[str, Any], channels: Sequence[int]) -> dict[str, Any]:
    """The plain config of the model with ``channels`` in its stages. Raises PlanError as ``checked_channels``, and
    where such a model has other layers.
    """
    made = {**plain_config(config), CHANNELS: list(checked_channels(config, channels))}
    if meta_model(made).state_dict().keys() != meta_model(config).state_dict().keys():
        raise PlanError(
            f"asked for channels {','.join(map(str, channels))}, with which a plain {config[CLASS_NAME]} has other "
            "layers than this model; give other numbers"
        )
    return made
