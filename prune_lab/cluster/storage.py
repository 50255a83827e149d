"""Files of a run on storage that all machines reach by fsspec, each visible under its name only when complete.

An artifact store is a folder whose key is made of the contents of the files that were published there, which never
change: a run with other settings or weights has another store. Workers add the files that they make.
Ray Tune's own checkpoints would not replace it: they bring no inputs to a machine, and resuming a search from them
unpickles, which is not done here.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from prune_lab.errors import StorageError
from prune_lab.runtime import atomic_write


@contextlib.contextmanager
def _storage_errors(url: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"asked to use the storage {url}: {str(error).rstrip('.')}; give a folder or an fsspec URL such as "
            "s3://bucket/folder, and install what its protocol needs"
        ) from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class ArtifactStore:
    """The folder ``key`` at ``url``, and which files were published there."""

    url: str
    key: str
    names: tuple[str, ...]

    @property
    def scratch(self) -> Path:
        """The folder on this machine for fetched files."""
        return Path(tempfile.gettempdir()) / f"prune-lab-{self.key}"

    def sweep(self) -> None:
        """Remove the files that this machine has fetched."""
        shutil.rmtree(self.scratch, ignore_errors=True)

    def opened(self) -> tuple[Any, str]:
        """(filesystem of fsspec, path of the store in it). Raises StorageError."""
        from fsspec.core import url_to_fs

        with _storage_errors(self.url):
            fs, root = url_to_fs(self.url)
            return fs, f"{root.rstrip('/')}/{self.key}"

    def put(self, folder: Path, names: Sequence[str]) -> None:
        """Write the files ``names`` of ``folder`` to the store, in this order. Raises StorageError."""
        fs, root = self.opened()
        with _storage_errors(self.url):
            for name in names:
                target = f"{root}/{name}"
                # under a hidden name first, as ``atomic_write`` does: an interrupted copy is never taken for the file
                temporary = f"{target.rpartition('/')[0]}/.{uuid.uuid4().hex}.tmp"
                fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                try:
                    fs.put_file(str(folder / name), temporary)
                    fs.mv(temporary, target)
                except BaseException:
                    with contextlib.suppress(OSError):
                        fs.rm_file(temporary)
                    raise

    def get(self, folder: Path, names: Sequence[str]) -> None:
        """Write the files ``names`` of the store to ``folder``, in this order. Raises StorageError."""
        fs, root = self.opened()
        with _storage_errors(self.url):
            for name in names:
                with atomic_write(folder / name) as temporary:
                    fs.get_file(f"{root}/{name}", str(temporary))

    def listed(self, under: str) -> tuple[str, ...]:
        """The names of the files in the folder ``under``, in alphabetical order, of complete files alone."""
        fs, root = self.opened()
        with _storage_errors(self.url):
            fs.invalidate_cache()
            found = fs.find(f"{root}/{under}") if fs.exists(f"{root}/{under}") else []
        # fsspec may return paths without the leading slash, or with one more
        names = [path[path.rindex(f"{self.key}/") + len(self.key) + 1 :] for path in found]
        return tuple(sorted(name for name in names if not PurePosixPath(name).name.startswith(".")))

    def remove(self, under: str) -> None:
        """Remove the folder ``under`` where it is there. Raises StorageError."""
        fs, root = self.opened()
        with _storage_errors(self.url):
            if fs.exists(f"{root}/{under}"):
                fs.rm(f"{root}/{under}", recursive=True)

    def fetch(self, folder: Path, wanted: Callable[[str], bool] = lambda _name: True) -> None:
        """Write the published files that are ``wanted`` and not in ``folder`` yet to it; they never change."""
        self.get(folder, [name for name in self.names if wanted(name) and not (folder / name).is_file()])


def publish(folder: Path, names: Sequence[str], url: str) -> ArtifactStore:
    """A store at ``url`` with the files ``names`` of ``folder``; files that are there already are not sent again."""
    whole = hashlib.sha256()
    for name in sorted(names):
        whole.update(f"{name}:{_digest(folder / name)};".encode())
    store = ArtifactStore(url, whole.hexdigest()[:16], tuple(sorted(names)))
    there = set(store.listed(""))
    store.put(folder, [name for name in store.names if name not in there])
    return store
