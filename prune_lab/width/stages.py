"""Stage widths: a U-Net whose whole stages have fewer channels, which a plain config of fewer channels describes.

All of a level gets narrower together: what its blocks hand on, in the down stage, the skips and the up stage, and what
is inside of them, in the proportion that the plain config prescribes. torch-pruning finds the tensors that hang
together and cuts them. What is left equals no masked original: the statistics of its norms are those of fewer channels.
Each group of a norm gives up the same places, as the config keeps their number (Fang et al., arXiv:2305.10924, prune
diffusion models so), but for the norms of up blocks that read two states one behind the other: their groups become
others where these shrink unequally. Heads give up the same places where their number stays, else whole heads leave.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch_pruning
from diffusers import ModelMixin
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from prune_lab.errors import UnsupportedModelError
from prune_lab.families import CLASS_NAME, family_of, meta_model, plain_config
from prune_lab.families.stage_widths import attentions_of, narrower_config
from prune_lab.width.graph import Estimator, dependency_graph

_TIMESTEPS = 1000  # over which the features of the time are fitted: the length of nearly all schedules

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


def _inner_cuts(model: Any, wanted: Mapping[str, Any]) -> Iterator[tuple[str, int, bool]]:
    """(path of the layer that reads it, equal runs, whether whole runs leave) of what is inside of blocks."""
    heads = {}
    for path, module in attentions_of(model).items():
        like = wanted[path]
        if like.heads != module.heads and like.inner_dim // like.heads != module.inner_dim // module.heads:
            raise UnsupportedModelError(
                f"asked to make stages narrower, found that {path} would have {like.heads} heads instead of "
                f"{module.heads}, and of another width: which of them stay cannot be told"
            )
        heads[f"{path}.to_out.0"] = module.heads, like.heads != module.heads
    for path in wanted:
        if path.endswith(".conv2"):
            yield path, model.config["norm_num_groups"], False
        elif path in heads:
            runs, whole = heads[path]
            yield path, runs, whole
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
    now = attentions_of(target)
    for path, module in attentions_of(model).items():
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
