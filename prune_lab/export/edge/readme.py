"""The README.md of an exported folder: what it is, what it needs, how it draws, and what was seen of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from prune_lab.export.card import licence_of_shipped, parents_card
from prune_lab.export.edge.proof import Proof
from prune_lab.models import ModelSource
from prune_lab.runtimes import Runtime, Weights
from prune_lab.version import __version__

PLATFORMS = {"darwin": "macOS"}  # by ``sys.platform``, in words


def _licence(source: ModelSource) -> str:
    if source.kind == "shipped":
        return licence_of_shipped(source.name)
    stated = parents_card(source)
    name = stated.get("license_name") or stated.get("license")
    if not name or name == "not-stated":
        return (
            f"Not known: {source.name} states none. This folder holds its weights, so its licence applies: find it out "
            "before you share this."
        )
    link = f" ({stated['license_link']})" if stated.get("license_link") else ""
    return f"That of {source.name}, as its card states it: {name}{link}."


def _drawing(told: Mapping[str, Any]) -> str:
    """How it draws, and which sizes."""
    height, width = (told["pixels"] * side for side in told["latent"][1:])
    if told["one_size"]:
        sizes = f"It draws pictures of {width} x {height} alone, one at a time."
    else:
        sizes = (
            f"Without `--size` a picture is {width} x {height}; `--size HEIGHT WIDTH` takes multiples of "
            f"{told['multiple']}. The model was made for the first size."
        )
    negative = "" if told["guided_inside"] else " `--negative TEXT` says what is not to be seen."
    return (
        '    python generate.py "a red apple" --out apple.png\n\n'
        f"{sizes} It takes {told['steps']} steps with guidance {told['guidance']:g} unless `--steps` and `--guidance` "
        f"say otherwise.{negative} `--seed N` gives another picture, the same number the same one. `python generate.py "
        "--help` lists all."
    )


def _check(runtime: Runtime, weights: Weights, proof: Proof | None) -> str:
    with_version = f"{runtime.called} {runtime.version}".strip()
    if proof is None:
        where = PLATFORMS.get(runtime.platform, runtime.platform)
        return (
            f"Not run where it was written: {runtime.called} runs on {where} alone. Its matrices were read back "
            f"({weights} weights) and are torch's; neither answers nor pictures were compared."
        )
    parts = "".join(f"| {name} | {value:.1e} |\n" for name, value in proof.differences.items())
    own = "of its own" if runtime.with_torch else "without torch"
    return (
        f"Before the folder got its name, by {with_version} on the CPU ({sys.platform}), {weights} weights:\n\n"
        f"| part | largest difference from torch, relative to its largest number |\n| --- | ---: |\n{parts}\n"
        f"`generate.py` drew in a process {own}, in {proof.steps} steps, the picture that diffusers draws from the "
        f"same noise: {proof.psnr:.0f} dB (120: equal in all 8 bits). That says "
        "nothing about how good its pictures are."
    )


def readme_text(
    runtime: Runtime, source: ModelSource, told: Mapping[str, Any], weights: Weights, proof: Proof | None
) -> str:
    """The README.md of the folder that was written of ``source``, in Markdown; ``told`` is its export.json."""
    graphs = ", ".join(f"`{part}{runtime.ending}`" for part in told["parts"])
    with_torch = f"\n\nTorch is in its process: {runtime.with_torch}." if runtime.with_torch else ""
    student = ""
    if source.model_folder is not None and (source.model_folder / "plan.json").is_file():
        student = " The model is a student: `plan.json` says what was removed of its teacher."
    parts = {
        f"{source.name} for {runtime.called}": (
            f"A pipeline that draws pictures of texts{'' if runtime.with_torch else ' without torch and diffusers'}: "
            f"graphs of text encoder, model and decoder ({graphs}), tokenizers, sampler and `generate.py`.{student} "
            "The folder can be moved as a whole."
        ),
        "Install": f"    pip install {runtime.runs_with} numpy tokenizers Pillow{with_torch}",
        "Draw": _drawing(told),
        "Check": _check(runtime, weights, proof),
        "Licence": _licence(source) + f"\n\nMade by prune-lab {__version__}.",
    }
    level = ["#", *["##"] * (len(parts) - 1)]
    return "\n".join(
        f"{mark} {title}\n\n{text}\n" for mark, (title, text) in zip(level, parts.items(), strict=True)
    )
