"""Whether two pipelines draw the same: digests of all their parts, and of a folder of one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from prune_lab.families import CLASS_NAME
from prune_lab.models.files import json_object, weight_files
from prune_lab.models.folders import variant_of_part
from prune_lab.models.schedulers import FILE
from prune_lab.models.sources import ModelSource, model_digest

_SETTINGS = (".json", ".txt", ".model")  # endings of settings, vocabularies and tokenizers


def _add_part(digest: hashlib._Hash, part: Path, variant: str) -> None:
    files = [path for path in part.iterdir() if path.suffix in _SETTINGS]
    if any(path.suffix == ".safetensors" for path in part.iterdir()):
        files += weight_files(part, variant_of_part(part, variant))
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(f"{part.name}/{path.name}".encode() + hashlib.file_digest(file, "sha256").digest())


def folder_digest(folder: Path) -> str:
    """16 hexadecimal digits over every setting and weight in the folder of a model, such as a scorer's."""
    digest = hashlib.sha256()
    _add_part(digest, folder, "")
    return digest.hexdigest()[:16]


def pipeline_digest(source: ModelSource) -> str:
    """16 hexadecimal digits over all that decides the pictures of a pipeline: every config and weight in its parts."""
    assert source.folder is not None
    digest = hashlib.sha256(model_digest(source).encode())
    for part in sorted(path for path in source.folder.iterdir() if path.is_dir()):
        if part.name not in (source.component, "safety_checker", "feature_extractor"):
            _add_part(digest, part, source.asked_variant)
    # The index decides which sampler draws, whatever class the sampler's own settings were written by.
    named = (json_object(source.folder / "model_index.json").get("scheduler") or [None])[-1]
    settings = source.folder / "scheduler" / FILE
    if settings.is_file() and named != json_object(settings).get(CLASS_NAME):
        digest.update(f"drawn by {named}".encode())
    return digest.hexdigest()[:16]
