"""What torch-pruning knows of a model: which tensors hang together, how they are cut, how important channels are.

torch-pruning finds the tensors that must be cut together by following a forward pass. Here every such group is compared
with the site that it was asked for, and lies wholly inside the site's block. Its loop over a whole model is not used:
it cuts the same place out of every norm group, which changes the statistics of all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from prune_lab.errors import UnsupportedModelError
from prune_lab.families import Kept, Site, example_inputs, narrowed_sizes, plain_config


@contextlib.contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Inside, every number of ``model`` has a gradient; flags and modes are as they were on exit."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    try:
        for parameter in flags:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode


class _LayerNormsInOrder(torch_pruning.pruner.function.LayernormPruner):  # type: ignore[misc]
    """torch-pruning 1.6.1 keeps what stays of a LayerNorm in the order of a set of numbers, which is none from a few
    hundred on: its weights would then be those of other channels than the layers around it have.
    """

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """``layer`` without the channels ``idxs``, the others in their order."""
        norm: Any = layer
        assert len(norm.normalized_shape) == 1
        gone = set(idxs)
        kept = [place for place in range(norm.normalized_shape[0]) if place not in gone]
        for name in ("weight", "bias"):
            if getattr(norm, name, None) is not None:
                setattr(norm, name, self._prune_parameter_and_grad(getattr(norm, name), kept, 0))
        norm.normalized_shape = (len(kept),)
        return layer

    prune_in_channels = prune_out_channels


def dependency_graph(model: Any) -> Any:
    """torch-pruning's graph of ``model``, which is on the CPU, by a forward pass of one sample at its own size.

    Raises UnsupportedModelError where torch-pruning cannot follow the forward pass.
    """
    graph: Any = torch_pruning.DependencyGraph()
    inputs = example_inputs(plain_config(model), device=model.device, dtype=model.dtype)
    try:
        with _traceable(model):
            graph.build_dependency(
                model,
                example_inputs=inputs,
                output_transform=lambda out: out[0],
                customized_pruners={nn.LayerNorm: _LayerNormsInOrder()},
                verbose=False,
            )
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UnsupportedModelError(
            f"asked torch-pruning for the groups of a {type(model).__name__}, which it cannot follow ({said}); use "
            "another criterion, such as gate-fisher"
        ) from None
    return graph


def group_of(graph: Any, model: nn.Module, site: Site, units: Sequence[int]) -> Any:
    """torch-pruning's group of the channels of ``units`` of ``site``: to prune, or to score.

    It holds the members of the site and nothing else, so all of it lies in the site's block.
    """
    layer = model.get_submodule(site.narrow[0])
    kind = (
        torch_pruning.prune_conv_in_channels
        if isinstance(layer, nn.Conv2d)
        else torch_pruning.prune_linear_in_channels
    )
    group = graph.get_pruning_group(layer, kind, idxs=site.places(units))
    paths = {module: path for path, module in model.named_modules()}
    found: dict[tuple[str, str], set[int]] = {}
    for dependency, places in group:
        path = paths.get(dependency.layer)
        if path is None:
            continue  # an operation between layers
        norm = isinstance(dependency.layer, nn.GroupNorm)
        side = "out" if norm or graph.is_out_channel_pruning_fn(dependency.handler) else "in"
        found.setdefault((path, side), set()).update(places)
    wanted = {(member.path, member.side): set(site.places(units, member.parts)) for member in site.members}
    assert found == wanted, f"{site.name}: torch-pruning finds {sorted(found)}, the site has {sorted(wanted)}"
    assert all(path.startswith(f"{site.path}.") for path, _ in found), f"{site.name} reaches beyond its block"
    return group


def cut_in_memory(model: Any, kept: Kept) -> None:
    """Cut all units but ``kept`` out of ``model`` itself, by torch-pruning.

    Its config still describes the model as it was. Optimisers must be made afterwards: the parameters are new ones.
    """
    graph = dependency_graph(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for site, units in kept.items():
        gone = [unit for unit in range(site.count) if unit not in units]
        group = group_of(graph, model, site, gone)
        assert graph.check_pruning_group(group), f"{site.name} would keep nothing"
        sizes = narrowed_sizes(model, site, len(units))
        group.prune()
        for path, numbers in sizes.items():
            for name, number in numbers.items():
                setattr(
                    model.get_submodule(path), name, number
                )  # heads, groups of norms: not known to torch-pruning
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])


Estimator = Callable[[Any], Tensor]  # of torch-pruning: group -> a number for each channel of its root


def magnitude_estimator() -> Estimator:
    """torch-pruning's magnitude: the sum of the squares of all weights of a channel, comparable between groups."""
    found: Estimator = torch_pruning.importance.GroupMagnitudeImportance(
        p=2, group_reduction="sum", normalizer=None, target_types=[nn.modules.conv._ConvNd, nn.Linear]
    )
    return found


def taylor_estimator() -> Estimator:
    """torch-pruning's Taylor: the sum over all weights of a channel of the sizes of weight times gradient."""
    found: Estimator = torch_pruning.importance.GroupTaylorImportance(
        group_reduction="sum", normalizer=None, target_types=[nn.modules.conv._ConvNd, nn.Linear]
    )
    return found


def unit_importance(graph: Any, model: nn.Module, site: Site, estimator: Estimator) -> Tensor:
    """(units,) what ``estimator`` says of each unit of ``site``: the sum over its channels."""
    group = group_of(graph, model, site, range(site.count))
    return estimator(group).double().reshape(site.count, site.size).sum(1)
