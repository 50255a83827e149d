"""The folder of a pipeline that ships in pieces: its own model in packed weights, all else with the reference pipeline.

It is put together once, in the user's cache, as plain diffusers reads it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from prune_lab.errors import StorageError
from prune_lab.runtime import atomic_folder, cache_folder

PACKED = "packed.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"  # the name that diffusers looks for
SHARED = ("scheduler", "text_encoder", "tokenizer", "vae")


def _pieces(own: Path, shared: Path) -> Mapping[str, Path]:
    """The files of the pipeline, by their names in its folder."""
    files = {path.relative_to(own).as_posix(): path for path in sorted(own.rglob("*")) if path.is_file()}
    for part in SHARED:
        files |= {f"{part}/{path.name}": path for path in sorted((shared / part).iterdir())}
    return files


def _digest(pieces: Mapping[str, Path]) -> str:
    found = hashlib.sha256()
    for name, path in pieces.items():
        found.update(f"{name} {path.stat().st_size}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _read_as(name: str) -> str:
    """What the piece is called in the folder that diffusers reads."""
    return name.removesuffix(PACKED) + WEIGHTS if name.endswith(PACKED) else name


def _is_whole(folder: Path, pieces: Mapping[str, Path]) -> bool:
    return all((folder / _read_as(name)).is_file() for name in pieces)


def _unpack(source: Path, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    from prune_lab.assets.packing import unpacked

    save_file(unpacked(load_file(source)), target, metadata={"format": "pt"})


def kept_in() -> Path:
    """The folder in the user's cache that holds what was put together."""
    return cache_folder("shipped")


def assembled(own: Path, shared: Path) -> Path:
    """Folder of the pipeline whose model lies in `own` and whose other parts lie in the pipeline `shared`.

    Other pieces make another folder, so what a newer version ships is never mixed with what is there. Raises
    StorageError when the cache cannot be written.
    """
    pieces = _pieces(own, shared)
    folder = kept_in() / f"{own.name}-{_digest(pieces)}"
    if _is_whole(folder, pieces):
        return folder
    try:
        with atomic_folder(folder, force=True) as temporary:  # a cache may have been cleared in part
            for name, source in pieces.items():
                target = temporary / _read_as(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.name == PACKED:
                    _unpack(source, target)
                else:
                    shutil.copyfile(source, target)
    except StorageError as error:
        if not _is_whole(folder, pieces):  # else another process has just made the same
            raise StorageError(f"{error}; another place for the cache is named by XDG_CACHE_HOME") from None
    return folder
