"""Folders of students that plain diffusers loads, each proved before it gets its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers import ModelMixin
from safetensors import safe_open
from torch import Tensor

from prune_lab.errors import StorageError, UnsupportedModelError
from prune_lab.families import entry_of, is_own, plain_config
from prune_lab.forms import layout_of
from prune_lab.models import ModelSource, model_digest, weight_files
from prune_lab.models.conversion import refuse_flawed, stored
from prune_lab.models.files import json_object
from prune_lab.models.protection import check_folder
from prune_lab.models.written import PLAN, PROVENANCE, RECORD, record_of, tell_weights
from prune_lab.plans import PruningPlan
from prune_lab.runtime import Environment, atomic_folder, names_alone, output_folder, write_json
from prune_lab.surgery.building import materialise_from_files, predicted_shapes
from prune_lab.surgery.code import write_code
from prune_lab.surgery.parts import copy_parts, copy_texts, copy_weights, rename_part, write_config
from prune_lab.surgery.proof import (
    Original,
    Proof,
    digest_of,
    get_ready_to_prove,
    prove,
    tensors_in_float32,
)

TEACHER = "teacher_config"  # in provenance.json: the structure of the model that was pruned

Plan: TypeAlias = PruningPlan | Mapping[str, object] | None  # as it is, as JSON holds it, or not known


def _write_model(model: Any, folder: Path, plan: Plan, variant: str) -> None:
    """Weights, config and plan in ``folder``, which nobody reads yet."""
    model.save_pretrained(folder, safe_serialization=True, variant=variant or None)
    config = folder / "config.json"
    write_config(config, json_object(config))  # a loaded model remembers its folder
    write_code(folder, json_object(config))
    if plan is not None:
        write_json(folder / PLAN, plan.to_json() if isinstance(plan, PruningPlan) else dict(plan))


def _write_provenance(folder: Path, provenance: Mapping[str, object], proof: Proof | None) -> None:
    """How the model in ``folder`` was made, and what was written of it: every writer of models ends here."""
    told = {**provenance, "proof": proof and proof.as_dict(), RECORD: record_of(folder)}
    write_json(folder / PROVENANCE, names_alone(told))


def save_model(
    model: ModelMixin,
    folder: Path,
    plan: Plan,
    provenance: Mapping[str, object],
    *,
    original: Original | None = None,
) -> None:
    """Write ``model`` as a folder that plain diffusers (``from_pretrained``) loads, and prove that it does.

    ``plan.json``, where ``plan`` is known, and ``provenance.json`` lie beside the weights. With ``original`` the model
    is proved to equal that without its removed blocks, else every tensor to equal that of ``model``; one of a class
    that is not of diffusers has no proof. An earlier folder of the same name is replaced only when the new one is
    complete.
    Raises StorageError when it cannot be written, ProofError when what was written is not ``model``.
    """
    proof: Proof | None = None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with atomic_folder(folder, force=True) as temporary:
        _write_model(model, temporary, plan, "")
        name = type(model).__name__
        if is_own(name) or getattr(diffusers, name, None) is type(model):
            digest = "" if original else digest_of(model)
            proof = prove(temporary, shapes=shapes, original=original, digest=digest)
        _write_provenance(temporary, provenance, proof)


def original_of(source: ModelSource, plan: PruningPlan, dtype: torch.dtype | None = None) -> Original:
    """The model of ``source`` as a proof reads it; ``dtype`` is the one that was asked for."""
    assert source.model_folder is not None
    widths = {width.site: width.kept for width in plan.widths}
    exact = plan.form != "neutral"
    return Original(source.config, source.weight_paths, plan.removed, dtype, source.variant, exact, widths)


def prune_pipeline(
    source: ModelSource,
    plan: PruningPlan,
    out: Path,
    *,
    force: bool = False,
    dtype: torch.dtype | None = None,
    variant: str = "",
    finish: Callable[[Path], object] | None = None,
) -> Path:
    """The folder ``out``: ``source`` with its model pruned by ``plan``, proved to load and draw in plain diffusers.

    A pipeline folder gives a whole pipeline folder, a model folder a model folder. Neither the original model nor any
    other part is loaded whole. ``dtype`` converts all parts, None keeps the files' own; ``variant`` names all files
    with weights, as in ``diffusion_pytorch_model.fp16.safetensors``; ``finish`` adds to the proved folder before it
    gets its name. Raises UnsupportedModelError when ``source`` has no weights, StorageError where ``out`` may not be
    written (``models.protection.check_folder``), ProofError when what was written is not the original without these
    blocks, ModelFormatError when a part of it holds what is no number, or answers the same to every input.
    """
    if source.folder is None or source.model_folder is None or not source.has_weights:
        raise UnsupportedModelError(
            f"asked to prune {source.text!r}, which has no weights (kind: {source.kind}); "
            "give the folder of a pipeline or of a model"
        )
    provenance = {
        **source.origin,
        "source_digest": model_digest(source),
        "plan": plan.text,
        "plan_id": plan.id,
        "form": plan.form,
        TEACHER: plain_config(source.config),
        "environment": Environment.capture().as_dict(),
    }
    if variant and not re.fullmatch(r"[\w-]+", variant):
        raise StorageError(
            f"asked for the variant {variant!r} in the names of files; give letters, digits, - and _, such as fp16"
        )
    out = check_folder(out, {"the model": source.places}, force=force)
    original = original_of(source, plan, dtype)
    tell_weights(source.model_folder, source.variant)
    refuse_flawed(stored(original.files), f"the {source.called} in {source.model_folder}")
    with output_folder(out, force=force) as temporary:
        get_ready_to_prove()
        folder = temporary / source.component if source.is_pipeline else temporary
        if source.is_pipeline:
            copy_parts(
                source.folder,
                temporary,
                model=source.component,
                asked=source.asked_variant,
                variant=variant,
                dtype=dtype,
            )
            rename_part(temporary, source.component, entry_of(layout_of(source.architecture, plan).config))
        student = materialise_from_files(source.config, original.files, plan, dtype=dtype)
        _write_model(student, folder, plan, variant)
        del student  # one model at a time: the other process has its turn
        shapes = predicted_shapes(source.config, plan)
        proof = prove(temporary, shapes=shapes, original=original, variant=variant, answers=True)
        _write_provenance(folder, provenance, proof)
        if finish is not None:
            finish(temporary)
    return out


def _tensors_in(files: tuple[Path, ...]) -> tuple[dict[str, tuple[int, ...]], str]:
    """Shapes and digest of the tensors in safetensors ``files``."""
    homes: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            homes |= dict.fromkeys(file.keys(), path)
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def take(name: str) -> Tensor:
        with safe_open(homes[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    return shapes, tensors_in_float32(homes, take)


def pipeline_with(
    source: ModelSource,
    model_folder: Path,
    out: Path,
    *,
    force: bool = False,
    finish: Callable[[Path], object] | None = None,
) -> Path:
    """The folder ``out``: the pipeline ``source`` with the model of ``model_folder``, proved to load in diffusers.

    From a model without a pipeline the model folder alone. Files are copied, and every tensor of the model that is
    loaded from ``out`` is compared with its own; ``finish`` adds to the folder before it gets its name. Raises
    StorageError where ``out`` may not be written (``models.protection.check_folder``), ProofError when what was written
    differs.
    """
    sources = {"the student": (model_folder,), "the model": source.places}
    out = check_folder(out, sources, force=force)
    files = weight_files(model_folder)
    shapes, digest = _tensors_in(files)
    with output_folder(out, force=force) as temporary:
        get_ready_to_prove()
        inside = source.is_pipeline and source.folder is not None
        if source.is_pipeline and source.folder is not None:
            copy_parts(source.folder, temporary, model=source.component, asked=source.asked_variant)
        folder = temporary / source.component if inside else temporary
        copy_texts(model_folder, folder)
        copy_weights(files, folder, variant="", dtype=None)
        config = json_object(folder / "config.json")
        write_code(folder, config)
        if inside:
            rename_part(temporary, source.component, entry_of(config))
        proof = prove(temporary, shapes=shapes, digest=digest)
        written = folder / PROVENANCE
        provenance = json_object(written) if written.is_file() else source.origin
        _write_provenance(folder, provenance, proof)
        if finish is not None:
            finish(temporary)
    return out


def trained_pipeline(
    source: ModelSource,
    model: Any,
    out: Path,
    plan: Plan,
    provenance: Mapping[str, object],
    *,
    force: bool = False,
    finish: Callable[[Path], object] | None = None,
) -> Path:
    """The folder ``out``: the pipeline ``source`` with ``model``, trained on, in the place of its own.

    Every tensor that plain diffusers loads from ``out`` in a process of its own is compared with that of ``model``;
    ``plan.json``, where ``plan`` is known, and ``provenance.json`` lie beside the weights, ``finish`` adds to the
    folder before it gets its name. Raises StorageError where ``out`` may not be written, ProofError when what was
    written differs.
    """
    assert source.is_pipeline
    assert source.folder is not None
    out = check_folder(out, {"the model": source.places}, force=force)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with output_folder(out, force=force) as temporary:
        get_ready_to_prove()
        copy_parts(source.folder, temporary, model=source.component, asked=source.asked_variant)
        folder = temporary / source.component
        _write_model(model, folder, plan, "")
        rename_part(temporary, source.component, entry_of(json_object(folder / "config.json")))
        proof = prove(temporary, shapes=shapes, digest=digest_of(model))
        _write_provenance(folder, provenance, proof)
        if finish is not None:
            finish(temporary)
    return out
