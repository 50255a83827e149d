"""Digests of what a run is made from and that lies outside of its folder: teacher, scorer, pictures, files of prompts.

A file is read once: its digest is kept in manifests/origins.json, with its size and time of change.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
from pathlib import Path
from typing import Any

from prune_lab.assets import scorer_folder
from prune_lab.config import RunConfig, setting_values
from prune_lab.distill import CACHE_INDEX, is_cache
from prune_lab.errors import PruneLabError, RunError
from prune_lab.models import ModelSource, ScorerChoice, model_digest, weight_files
from prune_lab.models.folders import variant_of_part
from prune_lab.models.hub import HUB_ID, hub_folder
from prune_lab.models.parts import LEFT_OUT
from prune_lab.runs import Manifests, Run
from prune_lab.runtime import read_json

TEACHER = "teacher"
_TEXTS = (".json", ".txt", ".model")


def _component_files(folder: Path, variant: str) -> dict[str, Path]:
    """The files of a component: its texts, and the weights that are loaded, by name."""
    if not folder.is_dir():
        return {}
    found = [path for path in folder.iterdir() if path.suffix in _TEXTS and path.is_file()]
    with contextlib.suppress(PruneLabError):  # no weights, such as a scheduler
        found += weight_files(folder, variant_of_part(folder, variant))
    return {path.name: path for path in found}


def _teacher_files(source: ModelSource) -> dict[str, Path]:
    found = {f"{source.component}/{path.name}": path for path in source.weight_paths}
    if source.folder is None or not source.is_pipeline:
        return found
    index = source.folder / "model_index.json"
    parts = read_json(index)
    assert isinstance(parts, dict), "it was checked when the model was found"
    named = [name for name, value in parts.items() if isinstance(value, list) and value[0] is not None]
    for part in sorted({*named} - {source.component, *LEFT_OUT}):
        inside = _component_files(source.folder / part, source.asked_variant)
        found |= {f"{part}/{name}": path for name, path in inside.items()}
    return found | {index.name: index}


def teacher_digest(manifests: Manifests, source: ModelSource) -> str:
    """The digest of the model of a run: of the config and weights of its model, and of the parts that it works with."""
    config = {name: value for name, value in source.config.items() if not name.startswith("_")}
    files = manifests.origin(TEACHER, _teacher_files(source))
    content = json.dumps([config, source.random_seed, files], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def check_teacher(run: Run, manifests: Manifests, source: ModelSource) -> str:
    """The digest of the teacher. Raises RunError where the run was started with another one."""
    found, recorded = teacher_digest(manifests, source), manifests.recorded(TEACHER)
    other = recorded != found
    if not recorded:
        with contextlib.suppress(PruneLabError):  # started by an earlier version, which knew the model alone
            written = read_json(run.environment)
            recorded = str(written.get("model_digest", "")) if isinstance(written, dict) else ""
        other = bool(recorded) and recorded != model_digest(source)
    if other:
        raise RunError(
            f"run {run.folder} was started with other weights of {source.text}; give the model as it was, another "
            f"--run folder, or redo all of it: prune-lab run --run {run.folder} --force"
        )
    return found


def scorer_digest(manifests: Manifests, choice: ScorerChoice) -> str:
    """The digest of the scorer; empty where there is none."""
    folder = Path(choice.text).expanduser()
    if choice.text == "reference":
        folder = scorer_folder()
    elif choice.text and not folder.is_dir() and HUB_ID.fullmatch(choice.text):
        with contextlib.suppress(PruneLabError):
            folder = hub_folder(choice.text)
    return manifests.origin("scorer", _component_files(folder, "")) if choice.text else ""


def _below(folder: Path) -> dict[str, Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: path for name, path in named.items() if "." not in {part[0] for part in name.split("/")}}


def data_digest(manifests: Manifests, config: RunConfig) -> str:
    """The digest of the user's pictures and captions; empty where they are none, of a hub, or gone by now."""
    path = Path(config.data.source).expanduser()
    if not config.data.source:
        return ""
    if is_cache(path):
        files = {CACHE_INDEX: path / CACHE_INDEX}  # which holds the digest of every shard
    elif path.is_dir():
        files = _below(path)
    elif path.is_file():
        files = {path.name: path}
    else:
        files = {name: Path(name) for name in glob.glob(str(path), recursive=True)}  # noqa: PTH207, an absolute glob
        files = {Path(name).name: one for name, one in files.items() if one.is_file()}
    return manifests.origin("data", files)


def files_digests(manifests: Manifests, config: RunConfig, *names: str) -> dict[str, str]:
    """The digests of the files that the settings ``names`` name, such as prompts or plans, by setting."""
    values: dict[str, Any] = setting_values(config)
    found = {}
    for name in names:
        texts = values[name] if isinstance(values[name], tuple) else (values[name],)
        paths = [Path(text).expanduser() for text in texts if Path(text).suffix]
        with contextlib.suppress(OSError, ValueError):  # no name of a file
            files = {path.name: path for path in paths if path.is_file()}
            found[name] = manifests.origin(name, files)
    return found
