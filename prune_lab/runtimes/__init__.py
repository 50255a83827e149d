"""Other programs that run a model: onnxruntime, OpenVINO; a part of a pipeline is written for them, and run by them."""

from __future__ import annotations

from prune_lab.runtimes.backends import RUNTIMES, Runner, Runtime, Weights, Writing
from prune_lab.runtimes.part import MODEL, Part, model_part, sizes_of

__all__ = ["MODEL", "RUNTIMES", "Part", "Runner", "Runtime", "Weights", "Writing", "model_part", "sizes_of"]
