"""The proof of an exported pipeline: its parts beside torch's, and its picture beside diffusers'."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prune_lab.errors import ProofError
from prune_lab.families import latent_form, model_of
from prune_lab.families.drawing import asked
from prune_lab.models.components import reason_of
from prune_lab.models.silence import quiet
from prune_lab.probes.latents import pixels_per_latent
from prune_lab.runtime import seeded
from prune_lab.runtimes import Part, Runner, Runtime, Weights

LIMITS: Mapping[Weights, float] = {"float32": 1e-5, "float16": 2e-2, "int8": 2e-1}
"""By format of the weights: the largest difference that a part may have, relative to its largest number."""
LEAST_PSNR: Mapping[Weights, float] = {"float32": 40.0, "float16": 20.0, "int8": 10.0}  # dB
_MOST_PSNR = 120.0  # what two equal pictures are given
_PROMPT = "a red apple on a table"
_STEPS = 4
_SECONDS = 1800
_FORBIDDEN = frozenset(("torch", "diffusers", "transformers", "prune_lab"))
# The script is run as it will be, with what it imported looked at behind it.
_RUN = """
import json, runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0] or "."
runpy.run_path(sys.argv[0], run_name="__main__")
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was seen of an exported pipeline."""

    differences: Mapping[str, float]  # by part: the largest from torch, relative to the largest number
    psnr: float  # dB, of its picture and diffusers' from the same noise
    steps: int

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)


# Parts -------------------------------------------------------------------------------------------------------------


def difference(part: Part, runner: Runner, inputs: Mapping[str, Tensor]) -> float:
    """The largest difference of what ``runner`` and torch answer, relative to the largest number of torch's answer."""
    wanted = part.answers(inputs)
    found = runner({name: tensor.numpy() for name, tensor in inputs.items()})
    worst = 0.0
    for want, got in zip(wanted, found, strict=True):
        if want.shape != got.shape or not np.isfinite(got).all():
            return math.inf
        scale = float(want.abs().max()) or 1.0
        worst = max(worst, float(np.abs(got - want.numpy()).max()) / scale)
    return worst


def _differences(
    runtime: Runtime, parts: Mapping[str, Part], folder: Path, weights: Weights
) -> dict[str, float]:
    found = {}
    for name, part in parts.items():
        runner = runtime.load(runtime.file(folder, part))
        cases = part.examples(1, None), part.elsewhere()
        try:
            found[name] = max(difference(part, runner, inputs) for inputs in cases)
        except Exception as error:  # whatever the runtime raises
            raise ProofError(
                f"asked to export for {runtime.called}, found that its {name} fails there ({reason_of(error)}); "
                "nothing was written: use another runtime"
            ) from None
        if not found[name] <= LIMITS[weights]:
            raise ProofError(
                f"asked to export for {runtime.called}, found that its {name} answers otherwise than torch: "
                f"{found[name]:.1e} of its largest number ({weights} weights), at most {LIMITS[weights]:g} is allowed; "
                "nothing was written: use another --weights, or another runtime"
            )
    return found


# The picture -------------------------------------------------------------------------------------------------------


def psnr(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Peak signal to noise of two pictures of whole numbers to 255, in dB; at most 120, which equal ones have."""
    error = float(((first.astype(np.float64) - second.astype(np.float64)) ** 2).mean())
    return _MOST_PSNR if error == 0 else min(_MOST_PSNR, 10 * math.log10(255**2 / error))


def _as_diffusers_draws(pipeline: Any, noise: Tensor) -> NDArray[np.uint8]:
    side = noise.shape[-1] * pixels_per_latent(pipeline)
    given = asked(pipeline, [_PROMPT], side=None) | {
        "height": noise.shape[-2] * side // noise.shape[-1],
        "width": side,
    }
    if hasattr(pipeline, "_pack_latents"):
        noise = pipeline._pack_latents(noise, *noise.shape)
    with torch.inference_mode(), quiet():
        answer = pipeline(**given, latents=noise, num_inference_steps=_STEPS, output_type="np")
    found: NDArray[np.uint8] = (answer.images[0] * 255).round().astype(np.uint8)
    return found


def _as_it_draws(runtime: Runtime, folder: Path, noise: Tensor) -> NDArray[np.uint8]:
    """The picture that generate.py in ``folder`` draws in a fresh process. Raises ProofError where that fails."""
    forbidden = _FORBIDDEN - ({"torch"} if runtime.with_torch else set())
    with tempfile.TemporaryDirectory() as inner:
        given, out = Path(inner) / "noise.npy", Path(inner) / "picture.png"
        np.save(given, noise.numpy())
        script = [
            str(folder / "generate.py"),
            _PROMPT,
            "--steps",
            str(_STEPS),
            "--noise",
            str(given),
            "--out",
            str(out),
        ]
        done = subprocess.run(
            [sys.executable, "-B", "-c", _RUN, *script],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        if done.returncode or not out.is_file():
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ProofError(
                f"asked to draw with the exported generate.py, it failed ({said:.200}); nothing was written: "
                "install the versions of the runtime that prune-lab was tested with"
            )
        imported = set(json.loads(done.stdout.strip().splitlines()[-1])) & forbidden
        if imported:
            raise ProofError(
                f"asked for a generate.py without {', '.join(sorted(forbidden))}, found that it imports "
                f"{', '.join(sorted(imported))}; nothing was written: another version of the runtime does not"
            )
        with Image.open(out) as picture:
            return np.asarray(picture.convert("RGB"))


def prove(
    pipeline: Any, runtime: Runtime, parts: Mapping[str, Part], folder: Path, weights: Weights
) -> Proof:
    """What was seen of ``parts`` in ``folder``. Raises ProofError where a part or the picture is another."""
    form = latent_form(model_of(pipeline))
    differences = _differences(runtime, parts, folder, weights)
    noise = torch.randn(1, *form, generator=seeded(0))
    near = psnr(_as_diffusers_draws(pipeline, noise), _as_it_draws(runtime, folder, noise))
    if not near >= LEAST_PSNR[weights]:
        raise ProofError(
            f"asked to export for {runtime.called}, found that generate.py draws another picture than diffusers from "
            f"the same noise ({near:.0f} dB, at least {LEAST_PSNR[weights]:g} is needed); nothing was written: use "
            "another --weights, or another scheduler"
        )
    return Proof(differences, near, _STEPS)
