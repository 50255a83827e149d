"""The process that proves what another one wrote: it loads a folder with plain diffusers and compares.

A line of JSON comes in, a line goes out (``prune_lab.surgery.proof``). One model is in memory at a time: the answer of
the original is computed first, and of the original only what survives is read.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import diffusers
import torch
import transformers
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from prune_lab.blocks import architecture_of
from prune_lab.families import check_code, empty_model, family_of, is_own
from prune_lab.models.answers import complaint_of_parts, model_complaint, random_inputs
from prune_lab.models.files import json_object
from prune_lab.models.parts import component_of, left_out
from prune_lab.models.silence import quiet
from prune_lab.models.views import STEMS, component_view
from prune_lab.plans import PruningPlan, plan_of
from prune_lab.runtime import read_json
from prune_lab.surgery.bypass import bypassed
from prune_lab.surgery.proof import MODULES, digest_of, tensors_in_float32
from prune_lab.width import site_named, width_of

_IDLE = 300.0  # seconds without a question after which this process ends; the next proof starts another
ROUNDING = 1e-5  # most that shorter sums may change an answer: of its largest number, at least 1

_ROUNDED = 1e-4  # of the largest number of an answer: what differs by less is rounded otherwise

Question = Mapping[str, Any]


# Answers to random latents -----------------------------------------------------------------------------------------


def _answer(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    found: Any = model(**inputs, return_dict=False)[0]
    return found.clone() if isinstance(found, Tensor) else torch.stack(list(found))  # of one tensor a row


def _plan_of(original: Mapping[str, Any]) -> PruningPlan:
    """What was taken out of the original, widths included."""
    architecture = architecture_of(original["config"])
    widths = [
        width_of(site_named(name, architecture.sites), units) for name, units in original["widths"].items()
    ]
    return plan_of(architecture, original["removed"], widths=widths)


def _read(original: Mapping[str, Any]) -> Any:
    """The original without the weights of its removed blocks, in float32: what survives is read tensor by tensor."""
    model = empty_model(original["config"])
    with bypassed(model, _plan_of(original)):
        wanted = set(model.state_dict())
        tensors: dict[str, Tensor] = {}
        for path in original["files"]:
            with safe_open(path, framework="pt") as file:
                for name in wanted & set(file.keys()):
                    # copied, so that it lies in memory as torch would lay it
                    tensors[name] = file.get_tensor(name).to(torch.float32, copy=True)
        model.load_state_dict(tensors, strict=True, assign=True)
    return model


def _original_answer(original: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Inputs, and what the original without its removed blocks answers to them in float32.

    Where another number format is asked for, plain diffusers loads it in that: nothing of ours rounds it.
    """
    if original["dtype"] is None:
        model = _read(original)
    else:
        folder = Path(original["files"][0]).parent
        with component_view(folder, STEMS["diffusers"], original["variant"]) as view:
            found = family_of(original["config"]).model_class()
            model = _widened(found.from_pretrained(view, torch_dtype=getattr(torch, original["dtype"])))
    inputs = random_inputs(model)
    with bypassed(model, _plan_of(original)):
        return inputs, _answer(model, inputs)


def _widened(model: Any) -> Any:
    """The same numbers in float32, each tensor laid where torch would lay it: one in a memory map lies where its file
    has it, and matrix products round by how memory is aligned.
    """
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                wide = torch.float32 if tensor.is_floating_point() else tensor.dtype
                copied = tensor.detach().to(wide, copy=True)
                held[name] = nn.Parameter(copied) if held is module._parameters else copied
    return model


# Loading -----------------------------------------------------------------------------------------------------------


def _format_of(module: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}


def _model_alone(folder: Path, *, variant: str, dtype: torch.dtype | None = None) -> Any:
    """The model in ``folder``, or of the pipeline there, as a user would load it by itself, in ``dtype``."""
    if (folder / "model_index.json").is_file():
        index: Any = read_json(folder / "model_index.json")
        folder = folder / component_of(index)
    named = ({"variant": variant} if variant else {}) | ({} if dtype is None else {"torch_dtype": dtype})
    config: Any = read_json(folder / "config.json")
    if is_own(config):
        check_code(folder, config)  # nothing else is run
        return diffusers.AutoModel.from_pretrained(str(folder), trust_remote_code=True, **named)
    return getattr(diffusers, config["_class_name"]).from_pretrained(folder, **named)


def _loaded(folder: Path, variant: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The model in ``folder``, and the pipeline that it may be of, loaded as a user would load it, in ``dtype`` where
    one is given; else None.

    The parts that are never used here stay closed, as they do everywhere.
    """
    named: dict[str, Any] = {"variant": variant} if variant else {}
    if dtype is not None:
        named["torch_dtype"] = dtype
    if not (folder / "model_index.json").is_file():
        return _model_alone(folder, variant=variant, dtype=dtype), None
    index: Any = read_json(folder / "model_index.json")
    unused: dict[str, Any] = dict.fromkeys(left_out(index))
    for part, value in index.items():
        if isinstance(value, list) and is_own(value[-1]):
            check_code(folder / part, json_object(folder / part / "config.json"))
            named["trust_remote_code"] = True
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **named, **unused)
    formats = {
        name: _format_of(part) for name, part in pipeline.components.items() if isinstance(part, nn.Module)
    }
    if len(set().union(*formats.values())) > 1:
        found = ", ".join(f"{name} {sorted(map(str, dtypes))}" for name, dtypes in formats.items())
        raise ValueError(f"its parts have different number formats and cannot draw together: {found}")
    return getattr(pipeline, component_of(index)), pipeline


def _differing(found: Mapping[str, list[int]], wanted: Mapping[str, list[int]]) -> str:
    """The first tensor that is not what was promised, and how many more; empty where all are."""
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} was not promised" for name in found if name not in wanted]
    wrong += [
        f"{name} is {found[name]} instead of {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    return f"tensor {wrong[0]}" + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "") if wrong else ""


def _blank(model: Any) -> dict[str, Any]:
    """An answer that says nothing against ``model``."""
    return {
        "error": "",
        "complaint": "",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "difference": None,
        "versions": {
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def _with_lora(model: Any, pipeline: Any, question: Question) -> dict[str, Any]:
    """What is found once the LoRA is loaded onto the pipeline: its tensors, and how far its answer is from the one that
    is expected.
    """
    found, lora = _blank(model), question["lora"]
    if pipeline is None:
        return {**found, "error": "there is no pipeline to load it onto"}
    pipeline.load_lora_weights(lora["folder"])
    model.eval().float()
    layers = get_peft_model_state_dict(model, adapter_name=next(iter(model.peft_config)))
    if tensors_in_float32(layers, layers.__getitem__) != question["digest"]:
        return {**found, "error": "its tensors are not those of the LoRA that was trained"}
    expected = load_file(lora["answer"])["answer"]
    found["difference"] = float((_answer(model, random_inputs(model)) - expected).abs().max())
    if not found["difference"] <= _ROUNDED * float(expected.abs().max()):  # also when it is not a number
        found["error"] = (
            f"its answer differs from that of the model that was trained by {found['difference']}"
        )
    return found


def _compared(question: Question) -> dict[str, Any]:
    """What is found; ``error`` says what is wrong, and is empty where all is as it should be."""
    original, expected = question["original"], None
    inputs: dict[str, Any] = {}
    if original is not None:
        inputs, expected = _original_answer(original)
        gc.collect()
    # a LoRA is fitted and proved in float32, whatever the files of its pipeline are in
    wide = torch.float32 if question.get("lora") else None
    model, pipeline = _loaded(Path(question["folder"]), question["variant"], wide)
    if question.get("lora"):
        return _with_lora(model, pipeline, question)
    complaint = complaint_of_parts(pipeline) if question["answers"] and pipeline is not None else ""
    del pipeline
    model.eval()
    gc.collect()  # the other parts of the pipeline
    if question["answers"] and not complaint and (found_there := model_complaint(model)):
        complaint = f"its {family_of(model).called} {found_there}"
    found = {**_blank(model), "complaint": complaint}
    if question["shapes"] is not None:
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        found["error"] = _differing(shapes, question["shapes"])
    if expected is not None and not found["error"]:
        if original["dtype"] is not None:
            del model
            gc.collect()
            place = {"variant": question["variant"], "dtype": getattr(torch, original["dtype"])}
            model = _model_alone(Path(question["folder"]), **place)
        difference = float((_answer(_widened(model), inputs) - expected).abs().max())
        found["difference"] = difference
        largest = float(expected.abs().max())
        allowed = 0.0 if original["exact"] else _ROUNDED * largest
        if original["widths"]:
            allowed = max(allowed, ROUNDING * max(1.0, largest))
        if not difference <= allowed:  # also when it is not a number
            found["error"] = (
                f"its answer differs from that of the original without these blocks by {difference}"
            )
    if question["digest"] and not found["error"] and digest_of(model) != question["digest"]:
        found["error"] = "its tensors are not those of the model that was saved"
    return found


# The conversation --------------------------------------------------------------------------------------------------


def _questions(lines: TextIO) -> Iterator[Question]:
    while select.select([lines], [], [], _IDLE)[0]:
        line = lines.readline()
        if not line:
            return
        yield json.loads(line)


@contextlib.contextmanager
def _without_modules() -> Iterator[None]:
    """The folder of code that this process has run is gone on exit, also when nobody waits for this process."""
    folder = Path(os.environ.get("HF_MODULES_CACHE", ""))
    try:
        yield
    finally:
        if folder.name.startswith(MODULES):  # never a user's own
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Answer the questions on standard input until it ends, or until none came for five minutes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer
    torch.set_num_threads(1)
    with _without_modules(), quiet(), torch.no_grad():
        for question in _questions(sys.stdin):
            try:
                found = _compared(question)
            except Exception as error:
                text = str(error).strip().splitlines()
                found = {"error": f"{type(error).__name__}: {text[0] if text else 'without a word'}"}
            gc.collect()
            try:
                answers.write(json.dumps(found) + "\n")
                answers.flush()
            except BrokenPipeError:
                return


if __name__ == "__main__":
    main()
