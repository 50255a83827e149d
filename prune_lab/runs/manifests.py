"""What each step of a run was made from, and whether its files are still those that it wrote.

A manifest is a JSON file in ``manifests/`` of the run, or of a candidate: the outputs of one part of a step with their
digests, the digests of what it read, its settings, and the versions of the libraries. It is written after the outputs,
so a part without one is unfinished. A file whose size and time of change are those in a manifest is not read again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import secrets
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from prune_lab.errors import RunError, StorageError
from prune_lab.runs.manifest_files import (
    FOLDER,
    ORIGINS,
    Manifest,
    Part,
    Stamp,
    file_digest,
    files_in,
    files_of,
    read_manifest,
    versions,
)
from prune_lab.runs.records import damaged
from prune_lab.runs.removing import remains
from prune_lab.runtime import write_json

GIVEN = "given"  # the input of scores that the user gave: made from nothing else
_RECORDS = ("provenance.json", "plan.json")  # beside weights; they say how these were made: no number is of them
_CHANGED = "changed_ns"  # in the manifest of the origins
_INDEX = "cache.json"  # which says that a cache is complete


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a part is done, and why not; ``by`` says what is to blame: its files, or what it was made from."""

    state: Literal["done", "to do", "redo"]
    why: str = ""
    by: Literal["", "outputs", "inputs"] = ""
    damaged: tuple[Path, ...] = ()  # of its outputs


_DONE = Verdict("done")
_ANEW = Stamp(0, 0, "anew")  # of what will be made from other inputs


def _changed_ns(path: Path) -> int:
    """The system's own time of change of a file in nanoseconds; 0 where there is none."""
    try:
        return path.stat().st_ctime_ns
    except OSError:
        return 0


def _other_size(path: Path, known: Stamp) -> bool:
    """Whether ``path`` is a file of another size than ``known``; equal weights may have headers of two lengths."""
    if path.suffix == ".safetensors":
        return False
    try:
        found = path.stat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size != known.size


# All manifests of a run --------------------------------------------------------------------------------------------


class Manifests:
    """The manifests of the run in ``root``; what was found to hold is not looked at again by the same object."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._found: dict[Path, Manifest] = {}
        self._stamps: dict[Path, Stamp] = {}
        self._origins: dict[str, Stamp] = {}
        self._changed: dict[str, int] = {}  # by origin: the time of change that no program can set
        self._expected: dict[Path, Stamp] = {}  # what files will be once their parts are made again
        self._sound: set[Path] = set()
        self._run = ""  # in all manifests of the run; empty while there is none
        there = [(path, found) for path in sorted(self._paths()) if (found := self._read(path)) is not None]
        if there:  # a few of another run do not say which run this is
            ((self._run, _),) = Counter(found.run for _, found in there).most_common(1)
        for path, manifest in there:
            if manifest.run == self._run:
                self._take(path, manifest)

    def _paths(self) -> list[Path]:
        of_candidates = self.root.glob(f"candidates/*/{FOLDER}/*.json")
        return [
            *self.root.glob(f"{FOLDER}/*.json"),
            *(path for path in of_candidates if path.stem != ORIGINS),
        ]

    def _read(self, path: Path) -> Manifest | None:
        """The manifest in ``path``; None where it is missing, damaged, or one of another part or run."""
        found = read_manifest(path)
        known = found is not None and found.place == self._name(path) and self._run in ("", found.run)
        return found if known else None

    def _take(self, path: Path, manifest: Manifest) -> None:
        self._found[path] = manifest
        if path == self._path_of_origins:
            self._origins = dict(manifest.outputs)
            changed = manifest.settings.get(_CHANGED)
            self._changed = dict(changed) if isinstance(changed, dict) else {}
        else:
            self._stamps |= {self.root / name: stamp for name, stamp in manifest.outputs.items()}

    @property
    def _path_of_origins(self) -> Path:
        return self.root / FOLDER / f"{ORIGINS}.json"

    @property
    def started(self) -> bool:
        """Whether a run wrote a manifest here."""
        return bool(self._found)

    @property
    def without_origins(self) -> str:
        """What is wrong with the record of what lies outside of the run folder, in words; empty where nothing is."""
        if self._path_of_origins in self._found or not self.started:
            return ""
        state = "is damaged" if self._path_of_origins.exists() else "is not there"
        return f"{self._name(self._path_of_origins)} {state}"

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    # Digests

    def _stamp(self, path: Path, known: Stamp | None) -> Stamp | None:
        """The stamp of the file ``path`` as it is, read where ``known`` does not fit; None where there is none."""
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                return None
            if known is not None and known.at(found):
                return known
            return Stamp(found.st_size, found.st_mtime_ns, file_digest(path))
        except (OSError, StorageError):
            return None

    def stamp(self, path: Path) -> Stamp | None:
        """The stamp of a file of the run as it is now, or will be; None where there is no regular file."""
        if path in self._expected:
            return self._expected[path]
        found = self._stamp(path, self._stamps.get(path))
        if found is not None:
            self._stamps[path] = found
        return found

    def check(self, *paths: Path) -> None:
        """Raise DataError for a file that a part wrote and that holds something else now; for those that only read."""
        for path in paths:
            if (known := self._stamps.get(path)) is None:
                continue
            found = None if (other := _other_size(path, known)) else self._stamp(path, known)
            if other or (found and found.sha256 != known.sha256):
                raise damaged(path, "something else than its step has written")

    def digest(self, path: Path) -> str:
        """The digest of a file, or of what is read in a folder; empty where nothing is there."""
        if path in self._expected:
            return self._expected[path].sha256
        coming = [file for file in self._expected if file.is_relative_to(path) or path.is_relative_to(file)]
        if any(self._expected[file] is _ANEW for file in coming):
            return _ANEW.sha256
        if not path.is_dir() and path not in (file.parent for file in coming):
            found = self.stamp(path)
            return found.sha256 if found else ""
        files = sorted({*files_in(path), *coming})
        files = [file for file in files if file.name not in _RECORDS]
        stamps = [(file.relative_to(path).as_posix(), self.stamp(file)) for file in files]
        if not stamps:
            return ""
        return hashlib.sha256(
            "".join(f"{name} {found.sha256 if found else ''}\n" for name, found in stamps).encode()
        ).hexdigest()

    def origin(self, title: str, files: Mapping[str, Path]) -> str:
        """The digest of ``files`` outside of the run, by names that are the same on every machine; empty for none."""
        lines = []
        for name, path in sorted(files.items()):
            full = f"{title}/{name}"
            changed = _changed_ns(path)
            known = self._origins.get(full) if self._changed.get(full) == changed else None
            if (found := self._stamp(path, known)) is not None:
                self._origins[full], self._changed[full] = found, changed
                lines.append(f"{name} {found.sha256}\n")
        return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else ""

    def recorded(self, name: str) -> str:
        """The digest of the input ``name`` that parts were made from; empty where none says it."""
        return next((value for one in self._found.values() if (value := one.inputs.get(name))), "")

    def other_settings(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of settings with which parts were made and that are not those in ``values``."""
        found = {
            name
            for one in self._found.values()
            for name, value in one.settings.items()
            if name in values and values[name] != value
        }
        return tuple(name for name in values if name in found)

    @property
    def other_versions(self) -> dict[str, tuple[str, str]]:
        """(version that parts were made with, version here) of the libraries that differ, by name."""
        here = versions()
        return {
            name: (version, here[name])
            for one in self._found.values()
            for name, version in one.versions.items()
            if name in here and here[name] != version
        }

    # Parts

    def settled(self, part: Part) -> bool:
        """Whether this object has found, or written down, that ``part`` is done."""
        return part.manifest in self._sound

    def given(self, part: Part) -> bool:
        """Whether the user gave what ``part`` would make."""
        manifest = self._found.get(part.manifest)
        return manifest is not None and GIVEN in manifest.inputs

    def verdict(self, part: Part) -> Verdict:
        """Whether ``part`` is done: its outputs are those that it wrote, made from what is there now.

        Raises RunError where it is not, and files of others lie where it is to be made (see ``remains``).
        """
        if self.settled(part):
            return _DONE
        known = self._found.get(part.manifest)
        found = self._verdict(part, known)
        if found.state != "done" and (written := self._read(part.manifest)) not in (None, known):
            assert written is not None
            self._take(part.manifest, written)  # another process wrote it meanwhile
            found = self._verdict(part, written)
        if found.state == "done":
            self._sound.add(part.manifest)
        else:  # it raises for files that are not ours, before any work
            remains(self.root, part.outputs, self.listed)
        return found

    @property
    def listed(self) -> frozenset[Path]:
        """The files of the run that its parts wrote."""
        manifests = (one for path, one in self._found.items() if path != self._path_of_origins)
        return frozenset(self.root / name for manifest in manifests for name in manifest.outputs)

    def _verdict(self, part: Part, manifest: Manifest | None) -> Verdict:
        if manifest is None:
            if part.resumes:
                return Verdict("to do")
            there = [path for path in part.outputs if files_of(path)]
            if not there:
                return Verdict("to do")
            what = "is damaged" if part.manifest.exists() else "is not there"
            return Verdict("redo", f"{self._name(part.manifest)} {what}", "outputs")
        found = self.intact(part.name, manifest, part.outputs)
        if found.state == "done" and GIVEN not in manifest.inputs:
            return self._made_from_the_same(part, manifest)
        return found

    def intact(self, name: str, manifest: Manifest, folders: Iterable[Path] = ()) -> Verdict:
        """Whether the outputs of ``manifest`` are as they were written."""
        damaged, why = [], ""
        for output, known in manifest.outputs.items():
            path = self.root / output
            # of another size it holds something else, and is not read: it may be endless
            found = None if _other_size(path, known) else self._stamp(path, known)
            if found is None or found.sha256 != known.sha256:
                state = "was changed" if path.is_file() else "is missing" if not path.exists() else "is not a regular file"
                why = why or f"{output} {state}"
                damaged.append(path)
            else:
                self._stamps[path] = found
        if damaged:
            more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            return Verdict("redo", why + more, "outputs", tuple(damaged))
        known_files = {self.root / output for output in manifest.outputs}
        for folder in folders:
            if folder.is_dir() and (extra := [file for file in files_in(folder) if file not in known_files]):
                raise RunError(
                    f"asked for the {name} of {self.root}, found {self._name(extra[0])}, which no step of it has "
                    "written; move it out of the run folder"
                )
        return _DONE

    def _made_from_the_same(self, part: Part, manifest: Manifest) -> Verdict:
        # Of an older or newer version a setting may be unknown.
        for name, value in part.settings.items():
            if name in manifest.settings and manifest.settings[name] != value:
                why = f"{name} is {value!r} and was {manifest.settings[name]!r}"
                return Verdict("redo", why, "inputs")
        found = self._inputs(part)
        gone = {name: self.digest(self.root / name) for name in manifest.inputs if name not in found}
        for name, digest in (gone | found).items():
            known = manifest.inputs.get(name, "")
            if known == digest or (name in part.inputs and not digest):
                continue
            if digest == _ANEW.sha256:
                return Verdict("redo", f"{name} is made anew", "inputs")
            state = "was changed" if known and digest else "is there now" if digest else "is gone"
            return Verdict("redo", f"{name} {state}", "inputs")
        return _DONE

    def expect(self, part: Part, verdict: Verdict) -> None:
        """From now on take ``part`` as made again: from the same inputs its files are what they were."""
        manifest = self._found.get(part.manifest)
        if verdict.by == "outputs" and manifest:
            self._expected |= {self.root / name: stamp for name, stamp in manifest.outputs.items()}
        elif verdict.state != "done":
            self._expected |= dict.fromkeys(part.outputs, _ANEW)

    @contextlib.contextmanager
    def looking_ahead(self) -> Iterator[None]:
        """Inside, verdicts may be about what will be made (``expect``); afterwards they are forgotten."""
        expected, sound = dict(self._expected), set(self._sound)
        try:
            yield
        finally:
            self._expected, self._sound = expected, sound

    def _inputs(self, part: Part) -> dict[str, str]:
        return dict(part.inputs) | {self._name(path): self.digest(path) for path in part.reads}

    def record(self, part: Part, *more: Path) -> None:
        """Write down that ``part`` is done, with the outputs that are there, and ``more`` of them. Raises StorageError."""
        files = [file for path in (*part.outputs, *more) for file in files_of(path)]
        outputs = {self._name(file): found for file in files if (found := self.stamp(file)) is not None}
        manifest = Manifest(part.step, outputs, self._inputs(part), dict(part.settings), versions())
        self._write(part.manifest, manifest)
        self._sound.add(part.manifest)
        self.save_origins()

    def _write(self, path: Path, manifest: Manifest) -> None:
        if not self._run:
            first = self._read(self._path_of_origins)  # which another writer may have begun with
            self._run = first.run if first else secrets.token_hex(8)
        manifest = dataclasses.replace(manifest, place=self._name(path), run=self._run)
        if self._found.get(path) != manifest or not path.exists():
            write_json(path, manifest.as_dict())
        self._found[path] = manifest

    def save_origins(self, **digests: str) -> None:
        """Write down what is known of the files outside of the run, and ``digests`` of them. Raises StorageError."""
        known = self._found.get(self._path_of_origins)
        inputs = {**(known.inputs if known else {}), **digests}
        manifest = Manifest(ORIGINS, dict(self._origins), inputs, {_CHANGED: dict(self._changed)}, {})
        self._write(self._path_of_origins, manifest)

    def of_steps(self, steps: Collection[str]) -> tuple[Path, ...]:
        """The manifests of these steps."""
        return tuple(path for path, manifest in self._found.items() if manifest.step in steps)

    def damaged(self) -> Iterator[tuple[Path, str]]:
        """(manifest, what is wrong) of each whose outputs are not as they were written, or are not there."""
        for path, manifest in sorted(self._found.items()):
            found = self.intact(path.stem, manifest) if path != self._path_of_origins else _DONE
            if found.state != "done":
                yield path, found.why

    def renew(self) -> None:
        """Write the stamps of outputs that were read and found to be the same, so that they are not read again."""
        for path in [path for path in self._found if path in self._sound]:
            manifest = self._found[path]
            outputs = {name: self._stamps.get(self.root / name, stamp) for name, stamp in manifest.outputs.items()}
            self._write(path, dataclasses.replace(manifest, outputs=outputs))
        self.save_origins()

    def clear(self, part: Part, verdict: Verdict, *more: Path) -> None:
        """Remove what is left of ``part``, and ``more``, so that it can be made again: files of ours alone.

        Of a cache that resumes files that are as they were stay: what is missing is made again. Raises StorageError,
        and RunError as ``remains`` does.
        """
        manifest = self._found.get(part.manifest)
        written = [self.root / name for name in manifest.outputs] if manifest else []
        doomed = [*written, *part.outputs, *more]
        if part.resumes and verdict.by == "outputs" and not more:
            doomed = [*verdict.damaged, *(path for path in written if path.name == _INDEX)]
        found = remains(self.root, doomed, self.listed)
        self._found.pop(part.manifest, None)
        self._sound.discard(part.manifest)
        for path in (*doomed, *found.files):
            self._stamps.pop(path, None)
        dataclasses.replace(found, files=(part.manifest, *found.files)).remove(
            f"asked to redo {part.step} in {self.root}"
        )
