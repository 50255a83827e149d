"""Where results may be written: never over what they are made from, and never over what is not ours.

Every verb asks here before it works. Places are compared as the file system knows them, so neither links nor another
spelling lead around it.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError, safe_open

from prune_lab.assets import SHIPPED_MODELS, shipped_places
from prune_lab.assets.assembling import kept_in
from prune_lab.config import PLAN_FILES, RunConfig
from prune_lab.errors import RunError, StorageError
from prune_lab.runs import Run
from prune_lab.runtime.files import check_replaceable, listed_files
from prune_lab.runtime.holders import LONGEST_NAME, remove_leftovers, temporary_beside
from prune_lab.runtime.reading import open_regular, read_json

Sources: TypeAlias = Mapping[str, Iterable["Path | str"]]
"""What a result is made from: paths by what they are, such as "the model". One that is not there is left aside."""

_INDEX = "model_index.json"
_LOOKED_AT = 10_000  # entries of a source's folder in which links are looked for
_LONGEST_PATH = 4000  # bytes; Linux takes 4,096 with the mark of the temporary file


# What a result is made from ----------------------------------------------------------------------------------------


def sources_of(config: RunConfig) -> dict[str, tuple[Path | str, ...]]:
    """What a job with these settings reads: model, data, prompts, scorer and plans, as far as they are paths."""
    plans = (name for name in (*config.score.groups, *config.search.controls) if name.endswith(PLAN_FILES))
    prompts = config.data.prompts, config.probe.prompts, config.distill.captions
    return {
        "the model": (config.model,),
        "the data": (config.data.source,),
        "the scorer": (config.evaluate.scorer,),
        "the prompts": prompts,
        "the plans": tuple(plans),
    }


def _matching(pattern: str) -> Iterator[str]:
    return glob.iglob(pattern, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern


def _found(text: Path | str) -> Iterator[Path]:
    """The paths that ``text`` names, as far as they are there."""
    if not str(text):
        return
    with_home = expanded(text)
    try:
        if str(text) in SHIPPED_MODELS:
            yield from (*shipped_places(str(text)), kept_in())
        elif with_home.exists():
            yield with_home
        elif glob.has_magic(str(text)):
            yield from map(Path, islice(_matching(str(with_home)), _LOOKED_AT))
    except (OSError, ValueError):  # no name of a file
        return


def _behind_links(source: Path) -> Iterator[Path]:
    """What the links in the folder ``source``, and in the folders in it, lead to: parts, and files of a cache."""
    inner = (path for path in source.iterdir() if path.is_dir() and not path.is_symlink())
    for path in islice(chain(source.iterdir(), *(folder.iterdir() for folder in inner)), _LOOKED_AT):
        if path.is_symlink() and path.exists():
            yield path


def _whole(source: Path) -> Iterator[Path]:
    """``source`` with the pipeline that it is a part of, and with what lies behind links in it."""
    yield source
    yield from (folder for folder in list(source.parents)[:2] if (folder / _INDEX).is_file())
    if source.is_dir():
        yield from _behind_links(source)


# How two places lie to each other ----------------------------------------------------------------------------------


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _overlap(place: Path, source: Path) -> str:
    """How ``place`` (resolved) lies to ``source``, in words: it is it, lies in it, or holds it; empty where apart."""
    real = Path(os.path.realpath(source))
    own, theirs = _identity(place), _identity(real)
    if theirs is not None and own == theirs:
        return "which is"
    if theirs is not None and theirs in {_identity(one) for one in place.parents}:
        return "which lies in"
    return "which holds" if own is not None and own in {_identity(one) for one in real.parents} else ""


def _overlap_of_names(place: Path, file: Path) -> bool:
    return place == file or file in place.parents or place in file.parents


def _is_run(folder: Path) -> bool:
    """Whether ``folder`` is that of a run: with its settings, and with something that a run wrote."""
    run = Run(folder)
    written = run.environment, run.choices, run.plans_dir, run.candidates_dir
    return run.config.is_file() and any(path.exists() for path in written)


def expanded(path: Path | str) -> Path:
    """``path`` with ``~`` as the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # of somebody who is not known here
        return Path(path)


def _place(out: Path | str) -> Path:
    """Where ``out`` lies, links followed. Raises StorageError for what can be no name of a file, or none that fits."""
    text = str(expanded(out))
    if "\0" in text:
        raise StorageError(f"asked to write {str(out)!r}, which is no name of a file; give another name")
    try:
        whole = Path(text).absolute()
    except FileNotFoundError:
        raise StorageError(
            f"asked to write {out}, found the current directory removed; give a full path, or go to another directory"
        ) from None
    longest = max((len(os.fsencode(part)) for part in Path(text).parts), default=0)
    if longest > LONGEST_NAME or len(os.fsencode(whole)) > _LONGEST_PATH:
        raise StorageError(
            f"asked to write {text[:60]}..., a name of {longest:,} bytes in a path of {len(os.fsencode(text)):,}; "
            f"give a name of at most {LONGEST_NAME}"
        )
    try:
        return Path(os.path.realpath(text))
    except (OSError, ValueError) as error:
        raise StorageError(f"asked to write {out}: {error}; give another path") from None


def check_apart(out: Path | str, sources: Sources, *, run: Path | None = None) -> Path:
    """``out`` as it can be written to. Raises StorageError, whatever was forced, where it is or holds or lies in one of
    ``sources`` or a run, or where nothing can be written; ``run`` is the folder of the run that is itself written.
    """
    place = _place(out)
    for what, texts in sources.items():
        for named in chain.from_iterable(map(_found, texts)):
            if lies := next(filter(None, (_overlap(place, one) for one in _whole(named))), ""):
                raise StorageError(
                    f"asked to write {out}, {lies} {what} that it is made from ({named}); give another name"
                )
    own = None if run is None else _place(run)
    for folder in (place, *place.parents):
        if folder != own and _is_run(folder):
            raise StorageError(
                f"asked to write {out}, found the run {folder} there, which only its own steps write to; "
                "give a path outside of it"
            )
    for folder in place.parents:
        if any(_overlap_of_names(place, folder / name) for name in listed_files(folder) or ()):
            raise StorageError(
                f"asked to write {out}, a part of {folder}, which prune-lab wrote as a whole; give a path outside of it"
            )
    _check_writable(out, place)
    return expanded(out)


def _check_writable(out: Path | str, place: Path) -> None:
    """Raise StorageError unless a file can be made where ``place`` will be; leftovers of it are removed on the way."""
    if not place.name:
        raise StorageError(f"asked to write {out}, the root of the file system; give a path in it")
    there = next(folder for folder in place.parents if os.path.lexists(folder))
    tried = temporary_beside(there / place.name)
    try:
        tried.mkdir()
        tried.rmdir()
        if place.is_dir() and os.path.ismount(place):  # it is filled, not replaced
            tried = temporary_beside(place / place.name)
            tried.mkdir()
            tried.rmdir()
    except OSError as error:
        raise StorageError(
            f"asked to write {out}: {error.strerror} ({there}); give a path that can be written"
        ) from None
    remove_leftovers(there, of=place.name)


# Before the work ---------------------------------------------------------------------------------------------------


def check_folder(out: Path | str, sources: Sources, *, force: bool = False) -> Path:
    """The folder ``out`` as ``output_folder`` can write it.

    Raises StorageError as ``check_apart`` does, and where it holds something: with ``force`` only what is not ours.
    """
    found = check_apart(out, sources)
    try:
        check_replaceable(found, force=force)
    except OSError as error:
        raise StorageError(f"asked to write {out}: {error.strerror}; give another path") from None
    return found


def check_file(out: Path | str, sources: Sources, kind: str, *, force: bool = False) -> Path:
    """The file ``out`` as ``atomic_write`` can write it; ``kind`` is tensors, scores, plans or pictures.

    Raises StorageError as ``check_apart`` does, for a name that does not end as files of that kind do, and where
    something is there: with ``force`` only what prune-lab did not write.
    """
    ending, wrote = _KINDS[kind]
    if not Path(out).name.lower().endswith(ending):
        raise StorageError(f"asked to write {out}; give a name that ends in {ending}")
    found = check_apart(out, sources)
    if found.is_dir():
        raise StorageError(f"asked to write {out}, found a folder there; give another name")
    if os.path.lexists(found):
        if not found.is_file() or not _is_ours(found, wrote):
            raise StorageError(
                f"asked to write {out}, found something there that prune-lab did not write and --force does not "
                "replace; give another name, or remove it"
            )
        if not force:
            raise StorageError(f"asked to write {out}, found a file there; give another name or --force")
    return found


def check_run_folder(folder: Path, config: RunConfig, **more: Iterable[Path | str]) -> None:
    """Raise RunError where a run with these settings cannot lie in ``folder``: over, in or around what it reads, or in
    another run. ``more`` are other sources.
    """
    try:
        check_apart(folder, {**sources_of(config), **more}, run=folder)
    except StorageError as error:
        raise RunError(str(error)) from None


# Whether a file is one of ours -------------------------------------------------------------------------------------

_CSV = b"group,kind,blocks,starred,impact,"  # how a table of scores begins


def _wrote_tensors(path: Path) -> bool:
    with safe_open(path, framework="numpy") as file:
        return "prune_lab.version" in (file.metadata() or {})


def _wrote_scores(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(len(_CSV)) == _CSV


def _wrote_plans(path: Path) -> bool:
    found = read_json(path)
    return isinstance(found, list) and all(
        isinstance(one, dict) and {"id", "architecture", "removed"} <= one.keys() for one in found
    )


def _wrote_pictures(path: Path) -> bool:
    from PIL import Image

    with Image.open(path) as picture:
        return str(picture.info.get("Software", "")).startswith("prune_lab")


_KINDS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "tensors": (".safetensors", _wrote_tensors),
    "pictures": (".png", _wrote_pictures),
    "scores": ("", _wrote_scores),
    "plans": ("", _wrote_plans),
}
"""How the name of a file of that kind ends, and whether its content shows that prune-lab wrote it."""


def _is_ours(path: Path, wrote: Callable[[Path], bool]) -> bool:
    try:
        return wrote(path)
    except (OSError, ValueError, SyntaxError, SafetensorError):
        return False
