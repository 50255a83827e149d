"""Models on a hub: which files of a repository are read, and fetching them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_lab.errors import ModelNotFoundError
from prune_lab.models.files import chosen_variant, json_object, rivals_among, shards_among
from prune_lab.models.parts import pipeline_parts
from prune_lab.models.silence import quiet

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_INDEX = "model_index.json"
_TEXT = (".json", ".txt", ".model")  # configs, and the files of tokenizers
# Libraries that carry requests, by the version of the client: each has errors of its own for a broken connection.
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet")
_CARDS = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")


def _weights_among(names: Iterable[str], folder: str, variant: str) -> list[str]:
    prefix = f"{folder}/" if folder else ""
    inner = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    inner = [name for name in inner if "/" not in name]
    chosen = chosen_variant(inner, variant) if variant else None
    if chosen is None:
        chosen = chosen_variant(inner)
    if chosen is None:
        return []  # what is wrong is told when the folder is looked at
    rivals = rivals_among(inner)[chosen]  # several are refused when the folder is looked at
    shards = shards_among(inner, chosen) if rivals[0].endswith(".json") else ()
    return [f"{prefix}{name}" for name in (*rivals, *shards)]


def files_to_fetch(
    names: Sequence[str], index: Mapping[str, Any] | None, *, subfolder: str = "", variant: str = ""
) -> list[str]:
    """The files among the ``names`` of a repository that its model consists of; never code, and nothing pickled.

    ``index`` is its model_index.json, None where it has none or a ``subfolder`` is asked for.
    """
    if index is not None and not subfolder:
        folders = ["", *pipeline_parts(index)]
    else:
        inside = f"{subfolder}/" if subfolder else ""
        folders = sorted({name.rpartition("/")[0] for name in names if name.startswith(inside)})
    text = [
        name
        for name in names
        if name.rpartition("/")[0] in folders
        and (name.endswith(_TEXT) or name.rpartition("/")[2] in _CARDS)
        and ".safetensors" not in name
    ]
    holders = [folder for folder in folders if f"{folder}/config.json".lstrip("/") in names]
    if index is None and not subfolder and "" in holders:
        holders = [""]  # a model of one part; what lies below it is something else
    elif index is None and not subfolder:
        holders = []  # nothing that can be read as it is: the configs tell what to ask for
    return sorted({*text, *(file for folder in holders for file in _weights_among(names, folder, variant))})


def is_the_hubs(error: Exception) -> bool:
    """Whether ``error`` is about the hub or the way to it, and not a mistake of ours."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    known = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
    return type(error).__module__.split(".")[0] in _TRANSPORTS or isinstance(error, known)


def _why(text: str, revision: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    if isinstance(error, RevisionNotFoundError):
        return f"asked for revision {revision!r} of {text!r}, the hub has no such branch, tag or commit of it"
    if isinstance(error, GatedRepoError):
        return (
            f"asked for {text!r}, which its owner shares on request: accept its terms on the hub and log in"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = f"it answered {status}" if status else "it cannot be reached"
    return (
        f"asked for the model {text!r}, found no such folder here; as a name on the hub, {reason} "
        f"({type(error).__name__}); give a local folder, reference or a preset such as sd-v1.4"
    )


def _cached(text: str, revision: str, subfolder: str) -> Path | None:
    """The local copy of an earlier time, complete or not: what lacks in it is told when it is looked at."""
    from huggingface_hub import try_to_load_from_cache

    prefix = f"{subfolder}/" if subfolder else ""
    for name in (f"{prefix}{_INDEX}", f"{prefix}config.json", f"{prefix}unet/config.json"):
        found = try_to_load_from_cache(text, name, revision=revision or None)
        if isinstance(found, str):
            return Path(found).parents[name.count("/")]
    return None


def hub_folder(text: str, *, revision: str = "", subfolder: str = "", variant: str = "") -> Path:
    """The local copy of the hub repository ``text``: its JSON, safetensors and tokenizer files, never code.

    The folder is called by the commit that ``revision`` (a branch, a tag, a commit; empty: the newest) stands for.
    Raises ModelNotFoundError when the hub has no such repository or cannot be reached, and it is not in the cache.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    asked = revision or None
    try:
        with quiet():
            found = HfApi().model_info(text, revision=asked, files_metadata=False)
            names = [one.rfilename for one in found.siblings or ()]
            index = None
            if _INDEX in names and not subfolder:
                path = hf_hub_download(text, _INDEX, revision=asked)
                index = json_object(Path(path))
            wanted = files_to_fetch(names, index, subfolder=subfolder, variant=variant)
            exact = [re.sub(r"([\[?*])", r"[\1]", name) for name in wanted]
            # By its name, which the cache remembers: without a network the same name finds the same commit.
            return Path(snapshot_download(text, revision=asked, allow_patterns=exact))
    except Exception as error:  # of the client, of its transport, and of the hub: none has a class in common
        if not (is_the_hubs(error) or isinstance(error, (OSError, ValueError))):
            raise
        reason = _why(text, revision, error)
    if (folder := _cached(text, revision, subfolder)) is not None:
        return folder
    raise ModelNotFoundError(reason)


def commit_of(folder: Path) -> str:
    """The commit whose files the local copy ``folder`` of a hub repository holds; empty where that is not known."""
    return folder.name if folder.parent.name == "snapshots" else ""
