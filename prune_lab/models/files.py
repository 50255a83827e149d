"""The files of a model: JSON and safetensors headers, read with suspicion; pickled weights are never opened."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from prune_lab.errors import ModelFormatError

PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# diffusers and transformers name the weights of a component by these stems
_STEMS = ("diffusion_pytorch_model", "model")
# Both orders of names: model.safetensors.index.fp16.json as the libraries write it, and the one that people make.
_WEIGHTS = re.compile(
    rf"(?P<stem>{'|'.join(_STEMS)})(?P<variant>(?:\.[\w-]+)*?)\.safetensors(?P<index>\.index(?P<late>\.[\w-]+)?\.json)?"
)
_SHARD = re.compile(
    rf"(?:{'|'.join(_STEMS)})(?P<before>\.[\w.-]+?)?-\d+-of-\d+(?P<after>\.[\w.-]+)?\.safetensors"
)
_NUMBERED = re.compile(r"-\d+-of-\d+")  # a shard, which is no model
_ON_REQUEST = "non_ema"  # what a training keeps beside the model itself: read on request only
_UNFINISHED = (".part", ".partial", ".incomplete", ".crdownload", ".download", ".aria2", ".tmp")

# What a file may be instead --------------------------------------------------------------------------------------

_LFS = b"version https://git-lfs.github.com/spec/"
_LFS_TEXT = "is a Git LFS pointer and not the file itself; run git lfs pull in that folder, or fetch it again"
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (_LFS, _LFS_TEXT),
    (b"PK\x03\x04", "is a pickled PyTorch file under another name, which is never opened here"),
    (b"\x80\x02", "is a pickled PyTorch file under another name, which is never opened here"),
    (b"GGUF", "is a GGUF file, quantised for other programs; fetch the safetensors of the model"),
    (b"<!", "is a web page, as a browser saves it, and not the file; fetch it again with its download link"),
    (
        b"<html",
        "is a web page, as a browser saves it, and not the file; fetch it again with its download link",
    ),
)
_MERGE = re.compile(rb"^(<<<<<<<|>>>>>>>|=======)( |\r?$)", re.MULTILINE)


def instead_of_it(content: bytes) -> str:
    """What a file that begins with ``content`` is instead of what its name says; empty where nothing is known."""
    if not content.strip():
        return f"is empty ({len(content)} bytes); fetch it again"
    begin = content.lstrip()
    return next((text for magic, text in _MAGIC if begin[: len(magic)].lower() == magic.lower()), "")


def is_lfs_pointer(path: Path) -> bool:
    """Whether ``path`` is the few lines that Git keeps in place of a large file."""
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def _not_json(content: bytes, error: Exception) -> str:
    if marker := _MERGE.search(content):
        line = content[: marker.start()].count(b"\n") + 1
        return (
            f"is not JSON: line {line} is a merge marker of Git ({marker[1].decode()}); "
            "keep one side of each conflict, or fetch the file again"
        )
    instead = instead_of_it(content)
    return (
        f"is not JSON: it {instead}"
        if instead
        else f"is not JSON ({error}); fetch it again, or give its folder"
    )


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, with or without a byte-order mark; ModelFormatError for anything else."""
    content = b""
    try:
        content = path.read_bytes()
        value = json.loads(
            content
        )  # bytes: UTF-8, 16 and 32 are told apart, and a mark at the beginning is skipped
    except OSError as error:
        raise ModelFormatError(f"asked to read {path}: {error.strerror}; fetch the model again") from None
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} {_not_json(content, error)}") from None
    if not isinstance(value, dict):
        raise ModelFormatError(
            f"{path} holds a JSON {type(value).__name__}, not an object; fetch the model again"
        )
    return value


def is_plain_text(path: Path) -> bool:
    """Whether ``path`` is UTF-8 without a byte-order mark, as the libraries read it."""
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return not content.startswith(b"\xef\xbb\xbf")


# Headers ---------------------------------------------------------------------------------------------------------


def _damaged(path: Path, size: int, promised: str) -> str:
    return f"{path} holds {size:,} bytes, its first bytes promise {promised}: it is damaged; fetch it again"


def _refuse_what_it_is_instead(path: Path) -> None:
    with path.open("rb") as file:
        instead = instead_of_it(file.read(64))
    if instead:
        raise ModelFormatError(f"{path} {instead}")


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Number format and shape of every tensor in the safetensors file ``path``, without reading the tensors.

    Raises ModelFormatError when the file is cut short, too long, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                _refuse_what_it_is_instead(path)
                raise ModelFormatError(_damaged(path, size, f"a header of {length:,} bytes"))
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        tensors = {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in entries.items()}
        whole = 8 + length + int(end)
    except ModelFormatError:
        raise
    except OSError as error:
        raise ModelFormatError(f"asked to read {path}: {error.strerror}; check the file") from None
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
        raise ModelFormatError(f"{path} is not a safetensors file; fetch it again") from None
    if whole != size:
        raise ModelFormatError(_damaged(path, size, f"{whole:,} bytes"))
    return tensors


# Weights ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """The safetensors files that together hold the weights of one component."""

    variant: str  # such as fp16; empty for the plain ones
    files: tuple[Path, ...]
    index: Path | None = None  # says which shard holds which tensor; None where there is one file


def variants_among(names: Collection[str]) -> dict[str, str]:
    """The weights among the file ``names`` of a component: of each variant its one file, or the index of its shards.

    The plain variant is the empty text.
    """
    ordered = []
    for name in sorted(names):
        match = _WEIGHTS.fullmatch(name)
        if match and not _NUMBERED.search(name):
            variant = (match["variant"] or match["late"] or "").removeprefix(".")
            ordered.append((_STEMS.index(match["stem"]), match["index"] is not None, variant, name))
    found: dict[str, str] = {}
    for _, _, variant, name in sorted(ordered):
        found.setdefault(variant, name)
    return found


def shards_among(names: Collection[str], variant: str) -> tuple[str, ...]:
    """Those of the file ``names`` that are shards of the weights of this ``variant``."""
    matches = ((name, _SHARD.fullmatch(name)) for name in sorted(names))
    return tuple(
        name
        for name, match in matches
        if match and (match["before"] or match["after"] or "").removeprefix(".") == variant
    )


def chosen_variant(names: Collection[str], variant: str = "") -> str | None:
    """The variant to read of a component with these file ``names``: the one asked for, the plain one, or the only one.

    None where there is none, or several to choose from. ``non_ema`` is only read when it is asked for.
    """
    found = variants_among(names)
    if variant:
        return variant if variant in found else None
    usable = [one for one in found if _ON_REQUEST not in one]
    return "" if "" in found else usable[0] if len(usable) == 1 else None


def _shards(index: Path) -> tuple[Path, ...]:
    entries = json_object(index).get("weight_map")
    names = list(entries.values()) if isinstance(entries, dict) else []
    # a shard's name is only a name: nothing outside the folder is read
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ModelFormatError(f"{index} does not list the shards of the weights; fetch the model again")
    names = sorted(set(names))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelFormatError(
            f"{index.parent} lacks {len(missing)} of {len(names)} shards of its weights ({missing[0]}); fetch it again"
        )
    return tuple(index.parent / name for name in names)


def _why_no_weights(folder: Path, names: Collection[str], variant: str) -> str:
    """What there is instead of the weights that were asked for, and what to do."""
    found = sorted(variants_among(names))
    if variant and found:
        have = ", ".join(one or "the plain one" for one in found)
        return (
            f"found no variant {variant}; there is {have}: give one of these with --variant, or leave it out"
        )
    if found == [one for one in found if _ON_REQUEST in one] and found:
        return f"found {found[0]} only, which is read on request: give --variant {found[0]}"
    if found:
        return f"found the variants {', '.join(found)} and no plain ones: say which with --variant"
    wanted = f"{_STEMS[0]}.safetensors"
    if any(_SHARD.fullmatch(name) for name in names):
        return f"found shards without their index ({wanted}.index.json): fetch that file too"
    for name in sorted(names):
        if "safetensor" in name.lower() and name.lower().endswith(_UNFINISHED):
            return f"found {name}, a download that did not end: fetch it again"
    for name in sorted(names):
        if "safetensor" in name.lower() and not name.endswith(".json"):
            return f"found {name}, which is no name of weights: if it holds them, rename it to {wanted}"
    pickled = [name for name in sorted(names) if Path(name).suffix in PICKLED]
    if pickled:
        return (
            f"found only pickled files ({', '.join(pickled[:3])}), which are never opened here; convert them to "
            "safetensors: load the model where you trust it and save it with save_pretrained(..., "
            "safe_serialization=True)"
        )
    return (
        f"found no {wanted} there; fetch the model again, or give the path of its config.json to work with the "
        "structure alone"
    )


def weights_in(folder: Path, variant: str = "") -> Weights:
    """The weights of the component in ``folder``: the ``variant`` asked for, else the plain ones, else the only ones.

    Raises ModelFormatError when there are only pickled weights, none at all, or several variants to choose from, or
    when a shard is missing.
    """
    folder = Path(folder)
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    chosen = chosen_variant(names, variant)
    if chosen is None:
        raise ModelFormatError(
            f"asked for the weights in {folder}, {_why_no_weights(folder, names, variant)}"
        )
    path = folder / variants_among(names)[chosen]
    if path.suffix == ".json":
        return Weights(chosen, _shards(path), path)
    return Weights(chosen, (path,))


def weight_files(folder: Path, variant: str = "") -> tuple[Path, ...]:
    """The safetensors files that together hold the weights of the component in ``folder``; see ``weights_in``."""
    return weights_in(folder, variant).files
