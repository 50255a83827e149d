"""What a model learnt, for plain diffusers: a pipeline folder, or a LoRA, each proved before it gets its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch

from prune_lab.applications.personal import ADAPTER, Learnt, PersonalSettings
from prune_lab.errors import PruneLabError, UnsupportedModelError
from prune_lab.families import family_of
from prune_lab.models import ModelSource
from prune_lab.models.files import json_object, read_headers
from prune_lab.models.silence import quiet
from prune_lab.models.written import PLAN, PROVENANCE, beside
from prune_lab.runs.records import typed
from prune_lab.runtime import Environment, names_alone, output_folder, write_json
from prune_lab.surgery import get_ready_to_prove
from prune_lab.surgery.proof import prove_lora
from prune_lab.surgery.writing import trained_pipeline

ABOUT = "personal.json"  # beside a LoRA: what it was made from, and how


class _About(TypedDict):
    """What is read back of ``about``."""

    settings: dict[str, Any]
    training: dict[str, Any]
    model_digest: str
    pictures: dict[str, Any]
    class_pictures: dict[str, Any] | None


_FORMATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


_SHOWN = ("pictures", "context")  # settings that nothing learns from


def _told(settings: PersonalSettings) -> dict[str, Any]:
    return dataclasses.asdict(settings) | {"learning_rate": settings.rate}


def told_in(source: ModelSource, out: Path, settings: PersonalSettings) -> dict[str, Any] | None:
    """What the folder ``out`` says of what was learnt there from ``source`` under ``settings``, its ``training`` as
    ``Learnt``; None where it says nothing, or was learnt otherwise.
    """
    path = out / ABOUT if settings.lora else out / source.component / PROVENANCE
    if not path.is_file():
        return None
    try:
        found = json_object(path)
        known: _About = typed(_About, found if settings.lora else found.get("personal"))
        training = typed(Learnt, known["training"])
    except (ValueError, PruneLabError):  # damaged, of another version, or of somebody else
        return None
    asked, there = names_alone(_told(settings)), known["settings"]
    if {name: asked[name] for name in asked if name not in _SHOWN} != {
        name: there[name] for name in there if name not in _SHOWN
    }:
        return None
    return {**known, "training": training}


def about(settings: PersonalSettings, learnt: Learnt, more: Mapping[str, Any]) -> dict[str, Any]:
    """How a subject was learnt, ready for JSON."""
    return {
        "prompt": settings.prompt,
        "class_prompt": settings.class_prompt,
        "settings": _told(settings),
        "training": dataclasses.asdict(learnt),
        **more,
    }


def _format_in_files(source: ModelSource) -> torch.dtype:
    """The number format of the weights of ``source``, in which the other parts of its pipeline are, too."""
    found = {dtype for dtype, _ in read_headers(source.weight_paths).values() if dtype in _FORMATS}
    return _FORMATS[found.pop()] if len(found) == 1 else torch.float32


def save_whole(
    source: ModelSource,
    model: Any,
    out: Path,
    made: Mapping[str, Any],
    *,
    force: bool,
    finish: Callable[[Path], object] | None = None,
) -> Path:
    """The pipeline ``source`` with the trained ``model`` in the folder ``out``, proved to load in plain diffusers.

    In the number format of the files of ``source``. The plan of a student goes along, and so does where it came from.
    """
    assert source.model_folder is not None
    plan, provenance = (beside(source.model_folder, name) for name in (PLAN, PROVENANCE))
    origin = provenance or source.origin
    with quiet():  # diffusers warns of any change of the format
        model.to(_format_in_files(source))
    return trained_pipeline(
        source,
        model,
        out,
        plan or None,
        {**origin, "personal": dict(made)},
        force=force,
        finish=finish,
    )


def lora_name_of(pipeline: Any, component: str) -> str:
    """The argument by which ``pipeline`` takes the LoRA of its model to save. Raises UnsupportedModelError for none."""
    if not hasattr(pipeline, "load_lora_weights") or not hasattr(pipeline, "save_lora_weights"):
        raise UnsupportedModelError(
            f"asked for a LoRA, found a {type(pipeline).__name__}, into which diffusers loads none; leave --lora away, "
            "and the whole model is trained"
        )
    return f"{component}_lora_layers"


def _plain(value: Any) -> Any:
    """``value`` of a setting as JSON holds it."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value if isinstance(value, (bool, int, float, str, list, dict, type(None))) else str(value)


def save_lora(
    source: ModelSource,
    pipeline: Any,
    model: Any,
    out: Path,
    made: Mapping[str, Any],
    *,
    force: bool,
    finish: Callable[[Path], object] | None = None,
) -> Path:
    """The LoRA on ``model`` in the folder ``out``, as ``pytorch_lora_weights.safetensors`` of diffusers.

    A process of its own loads ``source`` with plain diffusers and the LoRA onto it, and must get the answer that
    ``model`` gives. Raises ProofError when it does not.
    """
    from peft.utils import get_peft_model_state_dict

    model.to("cpu")  # where the other process computes
    component = family_of(model).component
    argument = lora_name_of(pipeline, component)
    layers = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    config = {name: _plain(value) for name, value in model.peft_config[ADAPTER].to_dict().items()}
    with output_folder(out, force=force) as temporary:
        get_ready_to_prove()
        type(pipeline).save_lora_weights(
            temporary,
            **{argument: layers, f"{component}_lora_adapter_metadata": config},
        )
        assert source.folder is not None
        proof = prove_lora(source.folder, temporary, model, layers, variant=source.asked_variant)
        environment = Environment.capture().as_dict()
        told = {**source.origin, **made, "environment": environment, "proof": proof.as_dict()}
        write_json(temporary / ABOUT, names_alone(told))
        if finish is not None:
            finish(temporary)
    return out
