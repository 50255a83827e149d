"""A pipeline as a folder that draws by itself: its parts for another runtime, tokenizers, sampler, and what runs them.

The folder gets its name only after the proof: every part answers as torch does, and a fresh process draws the picture
that diffusers draws from the same noise, without torch where the runtime needs none. What cannot run here says so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined

from prune_lab.errors import BackendError, UnsupportedModelError
from prune_lab.export.edge import sampler
from prune_lab.export.edge.parts import DECODER, Drawing, drawing_of
from prune_lab.export.edge.proof import Proof, prove
from prune_lab.export.edge.readme import PLATFORMS, readme_text
from prune_lab.export.single_file import NATIVE, Exported
from prune_lab.families.drawing import latents_per_patch
from prune_lab.models import ModelSource, load_pipeline, usual_drawing
from prune_lab.models.protection import check_folder
from prune_lab.runtime import names_alone, output_folder, read_json, read_text, track, write_json, write_text
from prune_lab.runtimes import MODEL, RUNTIMES, Part, Runtime, Weights, Writing
from prune_lab.version import __version__

_HERE = Path(__file__).resolve().parent
_WEIGHTS: dict[torch.dtype, Weights] = {torch.float32: "float32", torch.float16: "float16"}


def _weights(runtime: Runtime, dtype: torch.dtype | None, asked: str) -> Weights:
    """The format of the weights by what was ``asked``. Raises UnsupportedModelError for one that is not written."""
    wanted = asked or _WEIGHTS.get(dtype or torch.float32, str(dtype).removeprefix("torch."))
    found = next((one for one in runtime.weights if one == wanted), None)
    if found is None or (asked and dtype is not None):
        also = f" and --dtype {str(dtype).removeprefix('torch.')}" if asked and dtype is not None else ""
        raise UnsupportedModelError(
            f"asked to export for {runtime.called} with weights in {wanted}{also}; give one of "
            f"{', '.join(runtime.weights)}"
        )
    return found


def _schedule(pipeline: Any) -> dict[str, Any]:
    """All settings of the scheduler of ``pipeline``. Raises BackendError for one that sampler.py does not do."""
    config = dict(pipeline.scheduler.config) | {"_class_name": type(pipeline.scheduler).__name__}
    try:
        sampler.sampler_of(config)
    except ValueError as error:
        instead = (
            "a model that was distilled for few steps draws well by no other: give the one that it was distilled from"
            if usual_drawing(pipeline).few
            else "give its pipeline another scheduler, such as pipeline.scheduler = "
            "DDIMScheduler.from_config(pipeline.scheduler.config), and save it again"
        )
        raise BackendError(
            f"asked to export a pipeline that draws without torch, found {error}; {instead}"
        ) from None
    plain = {name: value for name, value in config.items() if name == "_class_name" or name[0] != "_"}
    plain.pop("lambda_min_clipped", None)  # minus infinity, which JSON has no word for
    if "FlowMatch" in config["_class_name"]:  # what pipelines tell their schedulers of flow
        packs = hasattr(pipeline, "_pack_latents")
        plain |= {
            "latents_per_patch": latents_per_patch(pipeline),
            "evenly_from_one": packs and not config.get("use_flow_sigmas", False),
        }
    return dict(names_alone(plain))


def _rows(part: Part) -> int | None:
    """The number of rows that ``part`` takes, None for any."""
    varies = any("batch" in sizes.values() for sizes in part.varying.values())
    return None if varies else len(part.examples(1, None)[part.inputs[0]])


def _write_texts(
    folder: Path,
    runtime: Runtime,
    source: ModelSource,
    drawing: Drawing,
    parts: Mapping[str, Part],
    schedule: Any,
) -> dict[str, Any]:
    """What generate.py reads, after all that is no graph was written into ``folder``."""
    for name, tokenizer in drawing.tokenizers.items():
        tokenizer.save(str(folder / name))
    write_json(folder / "scheduler_config.json", schedule)
    write_text(folder / "sampler.py", read_text(_HERE / "sampler.py"))
    write_text(folder / "engine.py", read_text(runtime.engine_file))
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(
        read_text(_HERE / "generate.py.jinja")
    )
    text = template.render(
        needs=runtime.runs_with,
        with_torch=runtime.with_torch,
        called=runtime.called,
        version=__version__,
        source=json.dumps(source.name)[1:-1],
    )
    write_text(folder / "generate.py", text)
    for name in ("plan", "provenance"):
        path = (source.model_folder or Path()) / f"{name}.json"
        if path.is_file():
            write_json(folder / path.name, names_alone(read_json(path)))
    told = dict(drawing.told) | {
        "parts": list(parts),
        "one_size": not all(part.varies_in_size for part in list(parts.values())[1:]),
        "rows": {name: _rows(part) for name, part in parts.items()},
        "runtime": runtime.name,
        "with_torch": runtime.with_torch,
        "source": source.name,
        "prune_lab": __version__,
    }
    write_json(folder / "export.json", told)
    return told


def _notes(
    runtime: Runtime, weights: Weights, told: Mapping[str, Any], proof: Proof | None
) -> tuple[str, ...]:
    notes = []
    if proof is None:
        notes.append(
            f"not run here ({runtime.called} runs on {PLATFORMS[runtime.platform]} alone): converted with {weights} "
            "weights, and its matrices read back, which are torch's; neither answers nor pictures were compared"
        )
    else:
        differences = ", ".join(f"{name} {value:.1e}" for name, value in proof.differences.items())
        notes += [
            f"seen: largest difference from torch, relative to the largest number ({weights} weights): {differences}",
            f"seen: the same picture as diffusers' from the same noise, {proof.psnr:.0f} dB, {proof.steps} steps, in a "
            f"process {'of its own' if runtime.with_torch else 'without torch'}",
        ]
    if runtime.with_torch:
        notes.append(f"torch is in its Python process: {runtime.with_torch}")
    notes.append(
        f'draw with: python generate.py "a red apple" (needs {runtime.runs_with}, numpy, tokenizers, Pillow)'
    )
    if told["one_size"]:
        height, width = (told["pixels"] * side for side in told["latent"][1:])
        reason = "it is written for one shape" if told["rows"][MODEL] else "its code computes with the size"
        notes.append(f"it draws pictures of {width} x {height} alone, one at a time: {reason}")
    return tuple(notes)


def tracked(parts: Sequence[Part], called: str) -> Iterator[Part]:
    """The ``parts`` while they are written for the runtime that is ``called`` so, each a step with its name: how long
    one took does not tell of the next.
    """
    return track(parts, f"export for {called}", name=lambda part: part.name)


def export_for(name: str) -> Callable[..., Exported]:
    """The target of ``export`` that writes for the runtime called ``name``."""
    runtime = RUNTIMES[name]

    def export(
        source: ModelSource,
        out: Path,
        *,
        dtype: torch.dtype | None = None,
        form: str = NATIVE,
        force: bool = False,
        weights: str = "",
    ) -> Exported:
        """``source`` as the folder ``out``, proved to draw what diffusers draws with it.

        Raises BackendError where the runtime is not installed or cannot take the pipeline, UnsupportedModelError for
        another format, StorageError where ``out`` may not be written, ProofError where it draws something else.
        """
        runtime.check_installed()
        if form != NATIVE:
            raise UnsupportedModelError(
                f"asked to export for {runtime.called} in the form {form!r}, which is for single files; leave --form "
                "out"
            )
        writing = Writing(weights=_weights(runtime, dtype, weights))
        out = check_folder(out, {"the model": source.places}, force=force)
        pipeline: Any = load_pipeline(source)
        drawing, schedule = drawing_of(pipeline), _schedule(pipeline)
        with output_folder(out, force=force) as folder:
            # guidance asks for two texts and two predictions, unless the model takes it as a number; a picture is one
            rows = 1 if drawing.told["guided_inside"] else 2
            parts = {}
            for part in tracked(drawing.parts, runtime.called):
                # the decoder's last layers show every rounding
                kept = Writing() if part is drawing.parts[2] and writing.weights == "int8" else writing
                shaped = dataclasses.replace(kept, batch=1 if part.name == DECODER else rows)
                parts[part.name] = runtime.write(part, folder, shaped)
            told = _write_texts(folder, runtime, source, drawing, parts, schedule)
            proof = prove(pipeline, runtime, parts, folder, writing.weights) if runtime.runs_here else None
            seen = proof.as_dict() if proof else None
            write_json(folder / "export.json", told | {"proof": seen})
            write_text(folder / "README.md", readme_text(runtime, source, told, writing.weights, proof))
        tensors = sum(len(part.module.state_dict()) for part in parts.values())
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return Exported(out, tensors, size, _notes(runtime, writing.weights, told, proof))

    return export
