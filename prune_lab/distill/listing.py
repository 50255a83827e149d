"""The files in a folder of data: which are there, and which a table means by a name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from prune_lab.distill.image_source import IMAGE_SUFFIXES, is_hidden

_MOST_PATH = 4096  # characters of a name in a table
_MOST_FOLDERS = 32  # in it that may be left away


def files_below(folder: Path) -> tuple[list[Path], list[str]]:
    """The files in ``folder`` and its folders in the order of their names, and what is left out, with the reason.

    Hidden files and folders are no data (see ``is_hidden``). A link to a file is that file; one to a folder is left
    out, as are files that are not regular (a pipe would be waited for) and folders that cannot be listed.
    """
    found, left_out = list[Path](), list[str]()

    def failed(error: OSError) -> None:
        left_out.append(f"{error.filename}: {error.strerror}")

    for at, folders, names in os.walk(folder, onerror=failed):
        folders[:] = [name for name in folders if not is_hidden(name)]
        linked = (path for name in folders if (path := Path(at, name)).is_symlink())
        left_out += [f"{path}: a link to a folder, which is not followed" for path in linked]
        for path in (Path(at, name) for name in names if not is_hidden(name)):
            if path.is_file():
                found.append(path)
            else:
                what = "a link that leads nowhere" if path.is_symlink() else "no regular file"
                left_out.append(f"{path}: {what}")
    return sorted(found), left_out


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """The files of a folder, to be found by the names that tables give them."""

    every: Sequence[Path]
    outside: bool  # whether a table may name images that lie elsewhere
    root: str = ""  # absolute name of the folder that holds them all
    known: set[str] = field(default_factory=set)  # names of images without folder and ending
    images: dict[str, Path] = field(default_factory=dict)  # by absolute name
    stems: dict[str, list[Path]] = field(default_factory=dict)  # images by absolute name without its ending
    others: dict[str, dict[str, Path]] = field(
        default_factory=dict
    )  # ending -> file, by absolute name without it

    @classmethod
    def of(cls, every: Sequence[Path], *, outside: bool) -> FolderFiles:
        """Files of which there is one at least."""
        root = os.path.abspath(os.path.commonpath([path.parent for path in every]))  # noqa: PTH100
        found = cls(every, outside, root)
        for path in every:
            name = os.path.abspath(path)  # noqa: PTH100, links stay as they are
            stem, ending = os.path.splitext(name)  # noqa: PTH122
            if ending.lower() in IMAGE_SUFFIXES:
                found.known.add(os.path.basename(stem))  # noqa: PTH119
                found.images[name] = path
                found.stems.setdefault(stem, []).append(path)
            else:
                found.others.setdefault(stem, {}).setdefault(ending.lower(), path)
        return found

    def _holds(self, name: str) -> bool:
        """Whether the folder holds the absolute ``name``, wherever links lead."""
        return Path(os.path.realpath(name)).is_relative_to(os.path.realpath(self.root))

    def _at(self, name: str) -> Path | None:
        name = os.path.normpath(name)
        alike = self.stems.get(name, [])  # a table may leave the ending away
        found = self.images.get(name) or (alike[0] if len(alike) == 1 else None)
        if found is None and (self.outside or name.startswith(os.path.join(self.root, ""))):  # noqa: PTH118
            named_so = name.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(name)  # noqa: PTH113
            if named_so and (self.outside or self._holds(name)):
                return Path(name)
        return found

    def _knows(self, name: str) -> bool:
        """Whether some image may be meant by ``name``, in whatever folder; where a table is alone, any may."""
        base = os.path.basename(name)  # noqa: PTH119
        return self.outside or not self.known or base in self.known or os.path.splitext(base)[0] in self.known  # noqa: PTH122

    def lies_outside(self, folder: str, text: str) -> bool:
        """Whether ``text`` in a table in ``folder`` is the name of a file that the table may not name."""
        name = os.path.join(folder, text.strip())  # noqa: PTH118
        return not self.outside and os.path.isfile(name) and not self._holds(name)  # noqa: PTH113

    def find(self, folders: Sequence[str], text: str) -> tuple[Path | None, bool]:
        """The image that a table calls ``text``, and whether folders of that name had to be left away.

        ``folders`` are the absolute names of the table's own and of those above it.
        """
        if len(text) > _MOST_PATH:
            return None, False
        names = list(filter(None, dict.fromkeys((text.strip(), text.strip().replace("\\", "/")))))
        for name in names:
            for folder in folders if self._knows(name) else folders[:1]:
                found = self._at(os.path.join(folder, name))  # noqa: PTH118
                if found is not None:
                    return found, False
        for name in filter(self._knows, names):
            parts = PurePosixPath(name).parts
            for first in range(max(1, len(parts) - _MOST_FOLDERS), len(parts)):
                found = self._at(os.path.join(folders[0], *parts[first:]))  # noqa: PTH118
                if found is not None:
                    return found, True
        return None, False

    def beside(self, image: Path) -> dict[str, Path]:
        """Other files of the name of ``image``, with its ending or without, by their own ending."""
        name = os.path.abspath(image)  # noqa: PTH100
        return {**self.others.get(name, {}), **self.others.get(os.path.splitext(name)[0], {})}  # noqa: PTH122
