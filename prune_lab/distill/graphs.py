"""The passes of a step as one CUDA graph: for small models, whose kernels are shorter than their launches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prune_lab.distill.batches import Batch
from prune_lab.distill.setup import DistillSetup, StudentRun
from prune_lab.errors import ConfigError

# (set-up, students, batch, samples at a time) -> losses (students, 3); leaves gradients in the students.
Passes = Callable[[DistillSetup, Sequence[StudentRun], Batch, int], Tensor]
_WARM = 3  # steps before the capture, in which libraries choose their kernels


def check_graphs(setup: DistillSetup, *, processes: int, draws: bool) -> None:
    """Raise ConfigError where the passes of ``setup`` cannot be captured.

    ``draws`` says that a student leaves parts out at random.
    """
    found = ""
    if torch.device(setup.device).type != "cuda":
        found = f"the device {setup.device}; a CUDA graph needs a GPU"
    elif processes > 1:
        found = f"{processes} processes, which share gradients between the passes"
    elif draws:
        found = "a student that leaves parts out at random, each step others"
    elif setup.settings.compile:
        found = "distill.compile, which captures graphs of its own"
    if found:
        raise ConfigError(f"asked for distill.cuda_graphs, found {found}; set distill.cuda_graphs = false")


class GraphedPasses:
    """``passes`` captured once for the same students and sizes, and replayed for every further batch.

    The replay runs the same kernels on the same numbers, without the time that Python takes to launch them.
    """

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._key: tuple[object, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch | None = None
        self._losses = torch.empty(0)

    def __call__(self, setup: DistillSetup, runs: Sequence[StudentRun], batch: Batch, micro: int) -> Tensor:
        """Losses of every student, (students, 3) float32, as those of the plain passes."""
        tensors = _tensors(batch)
        key = (*map(id, runs), micro, *((name, one.shape, one.dtype) for name, one in tensors.items()))
        if self._graph is None or self._batch is None or key != self._key:
            self._capture(setup, runs, batch, micro)
            self._key = key
        assert self._graph is not None
        assert self._batch is not None
        for name, tensor in _tensors(self._batch).items():
            tensor.copy_(tensors[name])
        self._graph.replay()
        return self._losses.clone()

    def _capture(self, setup: DistillSetup, runs: Sequence[StudentRun], batch: Batch, micro: int) -> None:
        self._graph, self._batch = None, _cloned(batch)  # what was captured before gives its memory back
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM):
                self._passes(setup, runs, self._batch, micro)
        torch.cuda.current_stream().wait_stream(aside)
        for run in runs:
            run.state.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._losses = self._passes(setup, runs, self._batch, micro)
        self._graph = graph


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """All tensors of ``batch`` by name."""
    own = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    added = own.pop("added")
    return own | {f"added {name}": tensor for name, tensor in added.items()}


def _cloned(batch: Batch) -> Batch:
    added = {name: tensor.clone() for name, tensor in batch.added.items()}
    names = [field.name for field in dataclasses.fields(batch) if field.name != "added"]
    return Batch(**{name: getattr(batch, name).clone() for name in names}, added=added)
