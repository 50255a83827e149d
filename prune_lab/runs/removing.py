"""Which files of a run may be removed so that they are made again: those that a run wrote, and never another one."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from prune_lab.errors import RunError, StorageError
from prune_lab.runtime.files import FILE_LIST, some_of
from prune_lab.runtime.holders import is_temporary
from prune_lab.runtime.reading import path_text

_CANDIDATE = "candidates/[0-9a-f]{12}/"
# What no manifest need list: it is written before the manifest, or is of no part.
_KNOWN = re.compile(
    rf"{_CANDIDATE}(plan\.json|repair\.csv|kept\.json|profile\.json|recovery\.csv|heldout\.csv|manifests/[a-z_]+\.json)"
    rf"|{_CANDIDATE}(distilled/(recovery\.json|checkpoint\.safetensors)|grids/step-\d+\.png)"
    r"|plans/(searched|searches|gates|gate_steps)\.csv|plans/evolution/.*|curves/(.*/)?(events\.out\.tfevents\..*|hparams\.yml)"
    rf"|(.*/)?({re.escape(FILE_LIST)}|\.shard-[^/]*\.lock)"
)
# What a part writes into a folder; taken as ours only where no manifest lists the files of that folder.
_UNLISTED = re.compile(
    r"plans/[0-9a-f]{12}\.json"
    rf"|{_CANDIDATE}(pruned|repaired|distilled/model)/((config|plan|provenance)\.json|diffusion_pytorch_model\.[^/]+)"
    rf"|({_CANDIDATE})?pictures/(teacher|pruned|distilled)/\d+-[^/]*seed-\d+\.png"
    r"|data/(cache\.json|shard-\d+\.safetensors|pictures/\d+\.png)"
    r"|report/(index\.html|report\.md|sources\.json|[a-z_]+(-\w+)?\.(csv|png))"
)
_SHARED = re.compile(
    r"(plans|curves)/.*"
)  # folders that are not replaced as a whole: what is not ours stays there


@dataclasses.dataclass(frozen=True, slots=True)
class Remains:
    """What goes before a part is made again: files and links first, then folders that are empty by then."""

    files: tuple[Path, ...]
    folders: tuple[Path, ...]  # inner ones first

    def remove(self, asked: str) -> None:
        """Remove them. Raises StorageError, which says what was ``asked``."""
        path = Path()
        try:
            for path in self.files:
                path.unlink(missing_ok=True)
            for path in self.folders:
                _remove_empty(path)
        except OSError as error:
            raise StorageError(
                f"{asked}, cannot remove {path}: {error.strerror}; remove it by hand"
            ) from None


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (
            errno.ENOENT,
            errno.ENOTEMPTY,
            errno.EEXIST,
            errno.EBUSY,
        ):  # busy: a mounted disk
            raise


def _below(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Each folder at and below ``folder``, inner ones last, with its files and links; temporary ones left out."""
    for at, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(at) / name).is_symlink()]
        folders[:] = [name for name in folders if not is_temporary(name) and name not in links]
        yield Path(at), [Path(at, name) for name in (*names, *links) if not is_temporary(name)]


def remains(root: Path, paths: Iterable[Path], listed: Collection[Path]) -> Remains:
    """What goes with ``paths`` of the run in ``root``; of folders the files that are ``listed`` by manifests, or known.

    Links are removed and not followed. Nothing is removed yet. Raises RunError where another file is in a folder that
    is replaced as a whole, hidden or not, and where a link leads to a path out of the run.
    """
    known, inside = {path.parent for path in listed}, root.resolve()
    files: list[Path] = []
    folders: list[Path] = []
    others: list[str] = []
    for path in paths:
        if not os.path.lexists(path):
            continue
        if not path.parent.resolve().is_relative_to(inside):
            raise RunError(
                f"asked to make {path_text(path)} again, found that a link leads out of the run folder there; "
                "put the folder itself in the place of the link"
            )
        if path.is_symlink() or not path.is_dir():
            files.append(path)
            continue
        for folder, found in _below(path):
            folders.append(folder)
            for file in found:
                name = file.relative_to(root).as_posix()
                unlisted = folder not in known and _UNLISTED.fullmatch(name)
                if file in listed or _KNOWN.fullmatch(name) or unlisted:
                    files.append(file)
                elif not _SHARED.fullmatch(name):
                    others.append(name)
    if others:
        raise RunError(
            f"asked to make a part of {path_text(root)} again, found files there that no step has written: "
            f"{ascii(some_of(sorted(set(others))))[1:-1]}; move them out of the run folder"
        )
    return Remains(tuple(dict.fromkeys(files)), tuple(sorted(dict.fromkeys(folders), reverse=True)))
