"""Other programs that run a model: onnxruntime, OpenVINO, ExecuTorch, Core ML; a part is written for them, and run."""

from __future__ import annotations

from prune_lab.runtimes.backends import Runner, Runtime, Weights, Writing
from prune_lab.runtimes.known import RUNTIMES
from prune_lab.runtimes.part import MODEL, Part, model_part, sizes_of

__all__ = ["MODEL", "RUNTIMES", "Part", "Runner", "Runtime", "Weights", "Writing", "model_part", "sizes_of"]
