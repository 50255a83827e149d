"""A folder onto the model hub: private unless asked otherwise, exactly the files that were listed before."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prune_lab.errors import HubError, StorageError
from prune_lab.models.files import PICKLED
from prune_lab.models.hub import HUB_ID
from prune_lab.models.silence import quiet
from prune_lab.runs import open_run

# What training and reading leave behind, by the names of folders and the ends of files: never part of a model.
_LEFT_OUT_FOLDERS = ("__pycache__", "checkpoints", "logs", "runs")
_LEFT_OUT_NAMES = ("optimizer", "scheduler.bin", "random_states", "rng_state", "scaler.pt", "trainer_state")
# Libraries that carry requests, by the version of the client: each has errors of its own for a broken connection.
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet")
_UNFINISHED = (".tmp", ".lock", ".old", ".pyc", ".log")


@dataclasses.dataclass(frozen=True, slots=True)
class Upload:
    """A file that goes to the hub: its path there, and where it lies here."""

    name: str
    path: Path

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.path.stat().st_size


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or (path.is_symlink() and not path.exists()):
            continue
        if path.is_dir():
            if path.name not in _LEFT_OUT_FOLDERS and not path.name.endswith(".run"):
                yield from _files(path)
        elif not (path.name.startswith(_LEFT_OUT_NAMES) or path.suffix in (*PICKLED, *_UNFINISHED)):
            yield path


def uploads_of(folder: Path) -> tuple[Upload, ...]:
    """The files of the model in ``folder`` that go to the hub, in order of their names.

    Hidden files, caches, states of training, pickled and unfinished files stay here. Raises StorageError when
    ``folder`` is not there, is a run, or holds no model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StorageError(f"asked to push {folder}, found no such folder; give the folder of a student")
    if open_run(folder, must_exist=False).config.is_file():
        raise StorageError(
            f"asked to push {folder}, which is the folder of a run; give that of a student (prune-lab prune or "
            "distill with --out)"
        )
    found = tuple(Upload(path.relative_to(folder).as_posix(), path) for path in _files(folder))
    names = {upload.name for upload in found}
    if not names & {"model_index.json", "config.json"} or not any(n.endswith(".safetensors") for n in names):
        raise StorageError(
            f"asked to push {folder}, found no model there (model_index.json or config.json, and safetensors); give "
            "the folder of a student"
        )
    return found


def check_repository(to: str) -> None:
    """Raise HubError unless ``to`` is the name of a repository on the hub, owner/name."""
    if not HUB_ID.fullmatch(to):
        raise HubError(f"asked to push to {to!r}; give owner/name")


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

    uploads = uploads_of(folder)
    check_repository(to)
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
                    CommitOperationAdd(path_in_repo=upload.name, path_or_fileobj=upload.path)
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
        told = next((one for one in (error, cause) if _is_the_hubs(one)), None)
        if told is None:
            raise
        raise HubError(f"asked to push to {to} on {api.endpoint}: {_reason(told)}") from None
    if visible:
        raise HubError(
            f"asked to push to {to}, which is there and public; say --public if everyone may have this model"
        )
    return str(found.commit_url)


def _is_the_hubs(error: Exception) -> bool:
    """Whether ``error`` is about the hub or the way to it, and not a mistake of ours."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    library = type(error).__module__.split(".")[0]
    return library in _TRANSPORTS or isinstance(
        error, (HfHubHTTPError, OfflineModeIsEnabled, ConnectionError)
    )
