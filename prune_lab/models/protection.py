"""What a result is made from is never replaced by it, wherever links lead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prune_lab.errors import StorageError
from prune_lab.models.files import json_object

_INDEX = "model_index.json"
_WEIGHTS = ("diffusion_pytorch_model", "model")


def _own_folders(source: Path) -> Iterator[Path]:
    """Folders of a model that belong to it as a whole: the parts of a pipeline, the U-Net of a candidate."""
    parts = json_object(source / _INDEX) if (source / _INDEX).is_file() else {}
    yield from (source / part for part in {*parts, "unet"} if (source / part).is_dir())


def _own_files(folder: Path) -> Iterator[Path]:
    """Configs and weights right in ``folder``."""
    for path in folder.iterdir():
        if path.is_file() and (path.suffix == ".json" or path.name.startswith(_WEIGHTS)):
            yield path


def refuse_to_replace(out: Path, *sources: Path) -> None:
    """Raise StorageError where writing ``out`` would replace a file or folder of ``sources``, or one that holds them.

    A source is a folder of a model, or a file; one that is not there is left aside. Nothing may be written into the
    parts of a pipeline either.
    """
    place = Path(out).resolve()
    for source in (Path(path) for path in sources if Path(path).exists()):
        folders = [*_own_folders(source)] if source.is_dir() else []
        files = [file for folder in (source, *folders) if folder.is_dir() for file in _own_files(folder)]
        parts = [folder.resolve() for folder in folders]
        whole = [source.resolve(), *parts, *(file.resolve() for file in files)]
        if any(place == one or place in one.parents for one in whole) or any(
            part in place.parents for part in parts
        ):
            raise StorageError(
                f"asked to write {out}, found there the model that it is made from ({source}); give another name"
            )
