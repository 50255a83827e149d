"""Stage widths: a U-Net whose whole stages have fewer channels, which a plain config of fewer channels describes.

All of a level gets narrower together: what its blocks hand on, in the down stage, the skips and the up stage, and what
is inside of them, in the proportion that the plain config prescribes. torch-pruning finds the tensors that hang
together and cuts them. What is left equals no masked original: the statistics of its norms are those of fewer channels.
Each group of a norm and each head gives up the same places, as the config keeps their number (``Fang et al.,
arXiv:2305.10924`` prunes diffusion models so).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch_pruning
from diffusers import ModelMixin
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from prune_lab.errors import PlanError, UnsupportedModelError
from prune_lab.families import CLASS_NAME, family_of, is_own, meta_model, outline_of, plain_config
from prune_lab.width.graph import Estimator, dependency_graph

CHANNELS = "block_out_channels"
_TIMESTEPS = 1000  # over which the features of the time are fitted: the length of nearly all schedules


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


def _attentions(model: nn.Module) -> dict[str, Any]:
    """By path: the attentions of ``model``."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "to_q")}


def _steps_of(model: nn.Module, widths: Mapping[str, int]) -> dict[str, int]:
    """By name of a stage: what its number of channels must be a multiple of, for its norms and its heads."""
    steps = dict.fromkeys(widths, 1)
    for path, module in model.named_modules():
        stage = next((one for one in widths if path.startswith(f"{one}.")), None)
        if stage is None:
            continue
        if isinstance(module, nn.GroupNorm):
            steps[stage] = math.lcm(steps[stage], module.num_groups)
        elif hasattr(module, "to_q"):
            heads = _heads_stay(model)
            steps[stage] = math.lcm(steps[stage], module.heads if heads else module.inner_dim // module.heads)
    return steps


def _heads_stay(model: Any) -> bool:
    """Whether a config of fewer channels has as many heads, each narrower; else it has fewer heads."""
    return type(model).__name__ != "UNet2DModel"


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
    steps = _steps_of(model, {path: place for place, paths in enumerate(sides) for path in paths})
    called = {stage.path: stage.name for stage in outline_of(model).stages}
    rows: list[list[int]] = []
    for place, width in enumerate(channels):
        if rows and channels[rows[-1][-1]] == width:
            rows[-1].append(place)
        else:
            rows.append([place])
    found = []
    for row in rows:
        paths = [path for place in row for path in sides[place]]
        step = math.lcm(*(steps[path] for path in paths))
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


# The cut -------------------------------------------------------------------------------------------------------------


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a layer with weights; (0, 0) of another module."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return 0, 0


def _leaving(scores: Tensor, keep: int, runs: int, *, whole: bool) -> list[int]:
    """The places that leave, ``keep`` stay: the same ones of each of ``runs`` equal runs, or ``whole`` runs.

    Of equal scores the first stay.
    """
    rows = scores.double().reshape(runs, -1)
    size = rows.shape[1]
    totals = rows.sum(1 if whole else 0).tolist()
    stay = sorted(range(len(totals)), key=lambda one: (-totals[one], one))[
        : keep // (size if whole else runs)
    ]
    kept = set(stay)
    return [
        run * size + place
        for run in range(runs)
        for place in range(size)
        if (run if whole else place) not in kept
    ]


def _cut(
    graph: Any, layer: nn.Module, side: str, keep: int, runs: int, estimator: Estimator, whole: bool
) -> None:
    of_convolution = isinstance(layer, nn.Conv2d)
    kinds = {
        ("in", True): torch_pruning.prune_conv_in_channels,
        ("in", False): torch_pruning.prune_linear_in_channels,
        ("out", True): torch_pruning.prune_conv_out_channels,
        ("out", False): torch_pruning.prune_linear_out_channels,
    }
    kind = kinds[side, of_convolution]
    everything = list(range(_sizes(layer)[0 if side == "in" else 1]))
    scores = estimator(graph.get_pruning_group(layer, kind, idxs=everything))
    group = graph.get_pruning_group(layer, kind, idxs=_leaving(scores, keep, runs, whole=whole))
    assert graph.check_pruning_group(group)
    group.prune()


def _inner_cuts(model: Any, wanted: Mapping[str, nn.Module]) -> Iterator[tuple[str, int, bool]]:
    """(path of the layer that reads it, equal runs, whether whole runs leave) of what is inside of blocks."""
    heads = {f"{path}.to_out.0": module.heads for path, module in _attentions(model).items()}
    for path in wanted:
        if path.endswith(".conv2"):
            yield path, model.config["norm_num_groups"], False
        elif path in heads:
            yield path, heads[path], not _heads_stay(model)
        elif path.endswith(".ff.net.2"):
            yield path, 1, False


def _cut_all(model: Any, target: nn.Module, estimator: Estimator) -> None:
    """Cut ``model`` until its layers have the sizes of those of ``target``; what the time is told by stays as it is."""
    graph, wanted = dependency_graph(model), dict(target.named_modules())
    for path, runs, whole in _inner_cuts(model, wanted):
        layer, keep = model.get_submodule(path), _sizes(wanted[path])[0]
        if _sizes(layer)[0] != keep:
            _cut(graph, layer, "in", keep, runs, estimator, whole)
    groups = model.config["norm_num_groups"]
    for path, like in wanted.items():
        layer, keep = model.get_submodule(path), _sizes(like)[1]
        if _sizes(layer)[1] != keep:
            # what a norm of groups reads leaves in equal parts of each; texts and the time have no groups
            runs = 1 if path.endswith(("proj_in", ".linear_1", ".linear_2")) else groups
            _cut(graph, layer, "out", keep, runs, estimator, whole=False)


# What is not cut but made anew ---------------------------------------------------------------------------------------


def _time_features(config: Mapping[str, Any], channels: int) -> Tensor:
    """(timesteps, channels) float64: what a U-Net is told of each timestep by sines and cosines."""
    timesteps, how = torch.arange(_TIMESTEPS), config["flip_sin_to_cos"]
    features: Tensor = get_timestep_embedding(
        timesteps, channels, flip_sin_to_cos=how, downscale_freq_shift=config["freq_shift"]
    )
    return features.double()


def _fitted_to_the_time(weight: Tensor, config: Mapping[str, Any], channels: int) -> Tensor:
    """(O, channels): weights that answer to ``channels`` features of the time as ``weight`` (O, C) does to C, over all
    timesteps, by least squares. Fewer features are others: their frequencies depend on how many there are.
    """
    before, after = (_time_features(config, one) for one in (weight.shape[1], channels))
    wanted = before @ weight.double().cpu().T
    found: Tensor = torch.linalg.lstsq(after, wanted, driver="gelsd").solution
    return found.T.to(weight.device, weight.dtype)


def _keep_the_scale_of_attention(state: dict[str, Tensor], model: nn.Module, target: nn.Module) -> None:
    """Queries of narrower heads, so that they are compared with keys on the scale that the heads had."""
    now = _attentions(target)
    for path, module in _attentions(model).items():
        ratio = module.scale / now[path].scale
        for name in ("weight", "bias"):
            key = f"{path}.to_q.{name}"
            if key in state and ratio != 1:
                state[key] = state[key] * ratio


def _with_gradients(model: Any) -> Any:
    """A copy of ``model``, gradients included, which ``copy.deepcopy`` leaves out."""
    made = copy.deepcopy(model)
    for ours, theirs in zip(made.parameters(), model.parameters(), strict=True):
        if theirs.grad is not None:
            ours.requires_grad_(True)
            ours.grad = theirs.grad.clone()
    return made.eval()


def narrowed_stages(model: ModelMixin, channels: Sequence[int], estimator: Estimator) -> ModelMixin:
    """A plain model with ``channels`` in its stages, of the weights of ``model``, which stays as it is.

    What stays is what ``estimator`` scores highest, of each group of tensors that hang together. For Taylor the weights
    of ``model`` carry gradients. Inside of blocks units leave first, then what blocks hand on; queries of narrower
    heads are rescaled, and the layer that reads the features of the time is fitted to fewer of them.

    Raises PlanError as ``narrower_config``, UnsupportedModelError where torch-pruning cannot follow the model or leaves
    what no plain config describes.
    """
    source: Any = model
    was = plain_config(source)
    config = narrower_config(was, channels)
    target: Any = meta_model(config)
    cut = _with_gradients(source)
    _cut_all(cut, target, estimator)
    state = {name: tensor.detach() for name, tensor in cut.state_dict().items()}
    _keep_the_scale_of_attention(state, source, target)
    first = "time_embedding.linear_1.weight"
    if state[first].shape != target.state_dict()[first].shape:
        state[first] = _fitted_to_the_time(state[first], source.config, channels[0])
    shapes = {name: tuple(tensor.shape) for name, tensor in target.state_dict().items()}
    wrong = [name for name, shape in shapes.items() if tuple(state[name].shape) != shape]
    if wrong or state.keys() != shapes.keys():
        name = wrong[0] if wrong else sorted(state.keys() ^ shapes.keys())[0]
        raise UnsupportedModelError(
            f"asked for channels {','.join(map(str, channels))}; cut so, {name} is none of a plain "
            f"{config[CLASS_NAME]}: this kind of U-Net cannot be made narrower"
        )
    made: Any = family_of(config).model_class().from_config(config)
    nn.Module.to(made, source.device, source.dtype).load_state_dict(state)
    found: ModelMixin = made.eval()
    return found
