"""A model of random weights written for a runtime, and a process that times it there when it is its turn."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prune_lab.errors import BackendError
from prune_lab.families import family_of, plain_config
from prune_lab.profiling.own_process import TimingProcess, Usage
from prune_lab.profiling.service import Service
from prune_lab.runtimes import RUNTIMES, Part, Runtime, Weights

_START = "from prune_lab.profiling.runtime_process import write; write()"
_INPUTS = "inputs.safetensors"
# What a number format means to a runtime: how weights are written, and what it computes in.
_FORMATS: dict[str, dict[str, tuple[Weights, str]]] = {
    "onnx": {"float32": ("float32", "f32")},
    "openvino": {
        "float32": ("float32", "f32"),
        "float16": ("float16", "f16"),
        "bfloat16": ("float32", "bf16"),
    },
    "executorch": {"float32": ("float32", "f32")},
}


def check_runtime(service: Service, config: Mapping[str, Any]) -> Runtime:
    """The runtime of ``service``. Raises BackendError where it is not installed, or does not do what is asked of a
    model of ``config``.
    """
    runtime = RUNTIMES[service.backend]
    runtime.check_installed()
    if family_of(config).frames:
        raise BackendError(
            f"asked for a model of films in {runtime.called}, where models of pictures are timed; give the backend "
            "eager"
        )
    if service.device != "cpu":
        raise BackendError(
            f"asked for {runtime.called} on {service.device}; it runs on the cpu here: give --device cpu, or the "
            "backend eager"
        )
    if service.dtype not in _FORMATS[runtime.name]:
        raise BackendError(
            f"asked for {runtime.called} in {service.dtype}; give one of {', '.join(_FORMATS[runtime.name])}"
        )
    return runtime


def write_for_runtime(configs: Mapping[Path, Mapping[str, Any]], service: Service, *, seed: int) -> None:
    """Write models with random weights, and inputs of the ``service``, into folders: by folder the config of its model.

    In a process of its own, which takes the memory that it needs for that along. Raises BackendError where it fails.
    """
    job = {
        "models": [(str(folder), plain_config(config)) for folder, config in configs.items()],
        "service": dataclasses.asdict(service),
        "seed": seed,
    }
    done = subprocess.run(
        [sys.executable, "-c", _START], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise BackendError(
            f"asked for a model in {RUNTIMES[service.backend].called}, which could not be written: {said:.300}; "
            "give a smaller size, or the backend eager"
        )


def write() -> None:
    """Do what ``write_for_runtime`` asks on the standard input."""
    job = json.loads(sys.stdin.read())
    service = Service(**job["service"])
    for folder, config in job["models"]:
        _write(config, service, Path(folder), job["seed"])


def _write(config: Mapping[str, Any], service: Service, folder: Path, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    from prune_lab.profiling.random_weights import random_model
    from prune_lab.runtimes import Writing, model_part

    runtime = RUNTIMES[service.backend]
    weights, _ = _FORMATS[runtime.name][service.dtype]
    model = random_model(config, device=torch.device("cpu"), dtype=torch.float32, seed=seed).eval()
    part = model_part(model, tokens=service.tokens)
    inputs = part.examples(service.batch, service.latent)
    path = runtime.file(folder, part)
    if runtime.name != "openvino" or not _traced(part, inputs, path, half=weights == "float16"):
        runtime.write(part, folder, Writing(weights=weights, side=service.latent, batch=service.batch))
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, folder / _INPUTS)


def _traced(part: Part, inputs: Mapping[str, Tensor], path: Path, *, half: bool) -> bool:
    """Write ``part`` for OpenVINO as torch.jit traces it on ``inputs``; False where that cannot be done.

    What an export writes goes through an ONNX graph, which takes five times as long to make and runs as fast: of the
    shipped reference model it took 39 s of processor time against 7, a pass of the traced one 1.002 times as long
    (median of 40 pairs, batch 1, float32, one thread, OpenVINO 2026.4), with answers that differ by 6e-9.
    """
    import openvino
    import torch

    from prune_lab.runtimes.exported import without_chatter

    try:
        with torch.no_grad(), without_chatter():
            given = tuple(inputs[name] for name in part.inputs)
            # not checked by tracing it again, a third of the time: what is timed has random weights, and draws nothing
            trace: Callable[..., Any] = torch.jit.trace
            traced = trace(part.module, given, check_trace=False, strict=False)
            model = openvino.convert_model(traced, example_input=given)
    except Exception:  # whatever the tracer or the converter raises
        return False
    if len(model.inputs) != len(part.inputs):  # then nobody knows which is which
        return False
    for port, name in zip(model.inputs, part.inputs, strict=True):
        port.get_tensor().set_names({name})
    openvino.save_model(model, path, compress_to_fp16=half)
    return True


class RuntimeProcess(TimingProcess):
    """A child process that runs what was written into a folder; it imports no prune_lab, and no torch itself."""

    def __init__(
        self, folder: Path, service: Service, *, warmup: int, keep: bool, threads: int, calls: int = 3
    ) -> None:
        from prune_lab.runtimes import MODEL

        runtime = RUNTIMES[service.backend]
        # -P: what lies beside the script has names of other packages, such as executorch
        self.command = ("-B", "-P", str(Path(runtime.engine_file).with_name("serving.py")))
        self._job = {
            "engine": str(runtime.engine_file),
            "file": str(folder / f"{MODEL}{runtime.ending}"),
            "inputs": str(folder / _INPUTS),
            "threads": threads,
            "precision": _FORMATS[runtime.name][service.dtype][1],
            "warmup": warmup,
            "calls": calls,
            "keep": keep,
        }
        self._child: subprocess.Popen[str] | None = None
        self.usage = Usage()
