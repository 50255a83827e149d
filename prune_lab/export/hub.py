"""A folder onto the model hub: private unless asked otherwise, exactly the files that were listed before."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from prune_lab.errors import HubError, StorageError
from prune_lab.families import known_files
from prune_lab.models import resolve_model
from prune_lab.models.conversion import refuse_flawed, stored
from prune_lab.models.files import json_object, read_header
from prune_lab.models.hub import is_the_hubs
from prune_lab.models.silence import quiet
from prune_lab.models.written import tell_weights
from prune_lab.runs import open_run
from prune_lab.runtime import names_alone, path_text, printable, read_json, read_text, without_folders

_INDEX = "model_index.json"
# What a model is made of and described with, by the ends of files.
_KEPT = (".json", ".safetensors", ".txt", ".model", ".md", ".png", ".jpg", ".jpeg", ".webp", ".gif")
_LICENCES = ("licen", "notice")
# What training leaves behind, by the begin of names: never part of a model.
_LEFT_OUT = ("optimizer", "random_states", "rng_state", "trainer_state")
_BRANCH = re.compile(r"[A-Za-z0-9_][\w-]*(?:[./][\w-]+)*", re.ASCII)
_LONGEST_BRANCH, _LONGEST_NAME = 200, 96


@dataclasses.dataclass(frozen=True, slots=True)
class Upload:
    """A file that goes to the hub: its path there, where it lies here, and what is sent where that is not the same."""

    name: str
    path: Path
    content: bytes | None = None

    @property
    def num_bytes(self) -> int:
        """How many bytes are sent."""
        return self.path.stat().st_size if self.content is None else len(self.content)


def _belongs(path: Path) -> bool:
    named = path.name.lower().startswith(_LICENCES) or path.suffix.lower() in _KEPT
    named = named or path.name in {known.name for known in known_files().values()}  # code of a student's own
    return named and not path.name.startswith((".", *_LEFT_OUT))


def _files(folder: Path) -> Iterator[Path]:
    """The files of the model in ``folder``, those of its parts included. Raises StorageError for a link or no file."""
    index = folder / _INDEX
    listed = json_object(index) if index.is_file() else {}
    parts = [part for part, value in listed.items() if isinstance(value, list) and value[:1] != [None]]
    for place in (folder, *(folder / part for part in sorted(parts))):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            plain = not path.is_symlink() and (path.is_dir() or path.is_file())
            if not plain and not path.name.startswith("."):
                raise StorageError(
                    f"asked to push {path_text(folder)}, found {path_text(path)}, a link, a pipe or a device; only "
                    "plain files are sent: take it out, or put a copy of the file in its place"
                )
            if plain and path.is_file() and _belongs(path):
                yield path


def _without_places(path: Path) -> bytes | None:
    """The content of ``path`` with names in place of the folders of this machine; None where it holds none.

    Raises ModelFormatError for what is no JSON or safetensors, StorageError for weights whose notes hold a folder.
    """
    if path.suffix == ".safetensors":
        read_header(path)
        with safe_open(path, framework="numpy") as file:
            notes = file.metadata() or {}
        if names_alone(notes) != notes:
            raise StorageError(
                f"asked to push {path_text(path)}, found folders of a machine in its metadata; save its tensors "
                "without them"
            )
    elif path.suffix == ".json" and path.name != "tokenizer.json":
        value = read_json(path)
        if (told := names_alone(value)) != value:
            return json.dumps(told, indent=2, ensure_ascii=False).encode() + b"\n"
    elif path.suffix == ".md":
        text = read_text(path)
        if (written := without_folders(text)) != text:
            return written.encode()
    return None


def uploads_of(folder: Path) -> tuple[Upload, ...]:
    """The files of the model in ``folder`` that go to the hub, in order of their names, without folders of a machine.

    What is not of the model stays here: hidden files, caches, states of training, folders that its index does not list.
    Raises StorageError when ``folder`` is not there, is a run, holds no model, or a link or a pipe in it; other errors
    as ``resolve_model`` does, and ModelFormatError for numbers that are broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StorageError(f"asked to push {folder}, found no such folder; give the folder of a student")
    if open_run(folder, must_exist=False).config.is_file():
        raise StorageError(
            f"asked to push {folder}, which is the folder of a run; give that of a student (prune-lab prune or "
            "distill with --out)"
        )
    if not any((folder / name).is_file() for name in (_INDEX, "config.json")):
        raise StorageError(
            f"asked to push {folder}, found no model there (model_index.json or config.json, and safetensors); give "
            "the folder of a student"
        )
    source = resolve_model(str(folder.resolve()))
    if source.model_folder is not None:
        tell_weights(source.model_folder, source.variant)
    files = tuple(_files(folder))
    found = {path.relative_to(folder).as_posix(): path for path in files}
    uploads = tuple(Upload(name, path, _without_places(path)) for name, path in sorted(found.items()))
    for part in {path.parent: None for path in files}:
        weights = [path for path in files if path.parent == part and path.suffix == ".safetensors"]
        refuse_flawed(stored(weights), f"the weights in {path_text(part)}")
    return uploads


def check_repository(to: str, revision: str = "") -> None:
    """Raise HubError unless ``to`` is the name of a repository on the hub, owner/name, and ``revision``, where given,
    that of a branch.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(to)
        known = to.isascii() and to.count("/") == 1
    except HFValidationError:
        known = False
    if not known:
        raise HubError(
            f"asked to push to {printable(to, 100)!r}; give owner/name, each of at most {_LONGEST_NAME} letters, "
            "digits, -, _ and ."
        )
    named = _BRANCH.fullmatch(revision) and not f"{revision}/".count(".lock/")
    if revision and not (named and len(revision) <= _LONGEST_BRANCH):
        raise HubError(
            f"asked to push to the revision {printable(revision, 100)!r}; give the name of a branch of at most "
            f"{_LONGEST_BRANCH} letters, digits, -, _, . and /"
        )


def _reason(error: Exception) -> str:
    """Why the hub refused, in a few words and without what was sent."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = {
        401: "it does not know your token: log in with `hf auth login`, or set HF_TOKEN",
        403: "your token may not write there: make one with the role write",
        404: "it has no such place for you",
    }
    if status in known:
        return f"it answered {status}, {known[status]}"
    return f"it answered {status}" if status else f"it cannot be reached ({type(error).__name__})"


def push_folder(
    folder: Path, to: str, *, public: bool = False, revision: str | None = None, message: str = ""
) -> str:
    """The address of the commit with the files of ``folder`` in the hub's repository ``to`` (owner/name).

    The repository is made where there is none, private unless ``public``. Raises HubError in one line when there is
    no token, the hub refuses or cannot be reached, or a repository that is public already was not asked for as such.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    check_repository(to, revision or "")
    uploads = uploads_of(folder)
    if get_token() is None:
        raise HubError(
            f"asked to push to {to}, found no token of the hub; log in with `hf auth login`, or set HF_TOKEN"
        )
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    bars = contextlib.nullcontext() if sys.stderr.isatty() else quiet()
    try:
        with bars:
            api.create_repo(to, private=not public, exist_ok=True)
            visible = not public and api.model_info(to).private is not True
            if not visible:
                if revision:
                    api.create_branch(to, branch=revision, exist_ok=True)
                operations: list[Any] = [
                    CommitOperationAdd(
                        path_in_repo=upload.name,
                        path_or_fileobj=upload.path if upload.content is None else upload.content,
                    )
                    for upload in uploads
                ]
                found = api.create_commit(
                    to,
                    operations=operations,
                    commit_message=message or f"Upload of {Path(folder).resolve().name} by prune-lab",
                    revision=revision,
                )
    except Exception as error:  # of the client, of its transport, and of the hub: none has a class in common
        # an upload that fails in a thread of the client is told by an error of its own, about that of the hub
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        told = next((one for one in (error, cause) if is_the_hubs(one)), None)
        if told is None:
            raise
        raise HubError(f"asked to push to {to} on {api.endpoint}: {_reason(told)}") from None
    if visible:
        raise HubError(
            f"asked to push to {to}, which is there and public; say --public if everyone may have this model"
        )
    return str(found.commit_url)
