"""The files of a model: JSON and safetensors headers, read with suspicion; pickled weights are never opened."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from prune_lab.errors import ModelFormatError, StorageError
from prune_lab.runtime import open_regular, parse_json, path_text, read_bytes

MOST_JSON = 8 * 2**20  # bytes of a config or an index; that of a thousand billion parameters takes one
MOST_HEADER = 32 * 2**20  # bytes of a header: adapters carry the words they were trained on, some millions
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
    with open_regular(path) as file:
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
        content = read_bytes(path, most=MOST_JSON)
        value = parse_json(content)
    except StorageError as error:
        raise ModelFormatError(f"{error}, or fetch the model again") from None
    except ValueError as error:
        raise ModelFormatError(f"{path_text(path)} {_not_json(content, error)}") from None
    if not isinstance(value, dict):
        raise ModelFormatError(
            f"{path_text(path)} holds a JSON {type(value).__name__}, not an object; fetch the model again"
        )
    return value


def is_plain_text(path: Path) -> bool:
    """Whether ``path`` is UTF-8 without a byte-order mark, as the libraries read it."""
    content = read_bytes(path)
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return not content.startswith(b"\xef\xbb\xbf")


# Headers ---------------------------------------------------------------------------------------------------------


_BITS = (
    {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U4": 4, "I4": 4, "C64": 64}
    | dict.fromkeys(("U8", "I8", "F8_E4M3", "F8_E4M3FN", "F8_E5M2", "F8_E8M0"), 8)
    | dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
    | dict.fromkeys(("U32", "I32", "F32"), 32)
    | dict.fromkeys(("U64", "I64", "F64"), 64)
)


_LARGEST = 2**60  # numbers in a tensor


def bits_of(dtype: str) -> int:
    """Bits that a number takes in this format of safetensors."""
    return _BITS[dtype]


def _damaged(path: Path, size: int, promised: str) -> str:
    return f"{path_text(path)} holds {size:,} bytes, its first bytes promise {promised}: it is damaged; fetch it again"


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _checked_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(number format, shape, first byte, byte behind the last) of one tensor. Raises ValueError, which says why not."""
    shown = path_text(name)
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"of {shown} it has no number format, shape and place")
    dtype, shape, places = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"the number format of {shown} is not known")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise ValueError(f"the shape of {shown} is no list of whole numbers")
    if math.prod(max(1, side) for side in shape) > _LARGEST:
        raise ValueError(f"the shape of {shown} is larger than any tensor")
    if not isinstance(places, list) or len(places) != 2 or not all(map(_is_count, places)):
        raise ValueError(f"the place of {shown} is not two whole numbers")
    if (places[1] - places[0]) * 8 != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"{shown} does not take the bytes of its shape")
    return dtype, tuple(shape), places[0], places[1]


def _tensors_of(content: bytes) -> tuple[dict[str, tuple[str, tuple[int, ...]]], int]:
    """The tensors of a header as they lie, and how many bytes they take. Raises ValueError, which says why not."""
    header = parse_json(content.decode(), once=True)
    if not isinstance(header, dict) or content[:1] != b"{":
        raise ValueError("its header is no object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are not all text")
    json.dumps(header, ensure_ascii=False).encode()  # half of a character may be written in an escape
    entries = {name: _checked_entry(name, entry) for name, entry in header.items() if name != "__metadata__"}
    end = 0
    ordered = sorted(entries, key=lambda name: entries[name][2:])
    for name in ordered:
        if entries[name][2] != end:
            raise ValueError(f"{path_text(name)} does not begin where the tensor before it ends")
        end = entries[name][3]
    return {name: entries[name][:2] for name in ordered}, end


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Number format and shape of every tensor in the safetensors file ``path``, without reading the tensors; in the
    order in which they lie there, without gaps, at its end.

    Raises ModelFormatError when the file is cut short, too long, or not safetensors: tensors that overlap, leave a gap
    or do not take the bytes of their shape are none.
    """
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            begin = file.read(64)
            length = int.from_bytes(begin[:8], "little")
            if size < 8 or length > size - 8:
                if instead := instead_of_it(begin):
                    raise ModelFormatError(f"{path_text(path)} {instead}")
                raise ModelFormatError(_damaged(path, size, f"a header of {length:,} bytes"))
            if length > MOST_HEADER:
                raise ModelFormatError(
                    f"{path_text(path)} has a header of {length:,} bytes; at most {MOST_HEADER:,} are read: save its "
                    "tensors without their metadata"
                )
            file.seek(8)
            content = file.read(length)
    except (StorageError, OSError) as error:
        reason = (
            str(error) if isinstance(error, StorageError) else f"asked to read {path_text(path)}: {error}"
        )
        raise ModelFormatError(reason) from None
    try:
        tensors, end = _tensors_of(content)
    except ValueError as error:
        said = "" if isinstance(error, (json.JSONDecodeError, UnicodeError)) else f" ({error})"
        raise ModelFormatError(f"{path_text(path)} is not a safetensors file{said}; fetch it again") from None
    whole = 8 + length + end
    if whole != size:
        raise ModelFormatError(_damaged(path, size, f"{whole:,} bytes"))
    return tensors


def read_headers(files: Iterable[Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """``read_header`` of all ``files`` together; ModelFormatError when two of them hold a tensor of the same name."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in files:
        header = read_header(path)
        if twice := found.keys() & header.keys():
            raise ModelFormatError(
                f"{path_text(path)} holds {path_text(min(twice))}, which another file of the same weights holds too; "
                "fetch the model again"
            )
        found |= header
    return found


# Weights ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """The safetensors files that together hold the weights of one component."""

    variant: str  # such as fp16; empty for the plain ones
    files: tuple[Path, ...]
    index: Path | None = None  # says which shard holds which tensor; None where there is one file


def rivals_among(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The weights among the file ``names`` of a component: of each variant its file, or the index of its shards.

    The plain variant is the empty text. Where a variant has several, diffusers takes another one than transformers.
    """
    ordered = []
    for name in sorted(names):
        match = _WEIGHTS.fullmatch(name)
        if match and not _NUMBERED.search(name):
            variant = (match["variant"] or match["late"] or "").removeprefix(".")
            ordered.append((_STEMS.index(match["stem"]), match["index"] is not None, variant, name))
    found: dict[str, tuple[str, ...]] = {}
    for _, _, variant, name in sorted(ordered):
        found[variant] = (*found.get(variant, ()), name)
    return found


def variants_among(names: Collection[str]) -> dict[str, str]:
    """The first of ``rivals_among`` of each variant."""
    return {variant: rivals[0] for variant, rivals in rivals_among(names).items()}


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


def _weight_map(index: Path) -> dict[str, Any]:
    """Which shard holds which tensor by ``index``; empty where it does not say."""
    entries = json_object(index).get("weight_map")
    return entries if isinstance(entries, dict) else {}


def _shards(index: Path) -> tuple[Path, ...]:
    names = list(_weight_map(index).values())
    # a shard's name is only a name: nothing outside the folder is read
    if not names or any(
        not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors")
        for name in names
    ):
        raise ModelFormatError(
            f"{path_text(index)} does not list the shards of the weights; fetch the model again"
        )
    names = sorted(set(names))
    there = {path.name for path in index.parent.iterdir() if path.is_file()}
    missing = [name for name in names if name not in there]
    if missing:
        raise ModelFormatError(
            f"{index.parent} lacks {len(missing)} of {len(names)} shards of its weights "
            f"({path_text(missing[0])}); fetch it again"
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

    Raises ModelFormatError when there are only pickled weights, none at all, or several variants to choose from, when
    the variant is there twice, as one file and in shards, or when a shard is missing.
    """
    folder = Path(folder)
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    chosen = chosen_variant(names, variant)
    if chosen is None:
        raise ModelFormatError(
            f"asked for the weights in {folder}, {_why_no_weights(folder, names, variant)}"
        )
    first, *others = rivals_among(names)[chosen]
    if others:
        raise ModelFormatError(
            f"asked for the weights in {folder}, found {' and '.join([first, *others])}, of which programs read one or "
            "the other; keep the right one there, alone"
        )
    path = folder / first
    if path.suffix == ".json":
        return Weights(chosen, _shards(path), path)
    return Weights(chosen, (path,))


def headers_of(weights: Weights) -> dict[str, tuple[str, tuple[int, ...]]]:
    """``read_headers`` of the files of ``weights``; ModelFormatError when their index lists other tensors, by which
    diffusers decides what is there.
    """
    found = read_headers(weights.files)
    if weights.index is not None and (differ := found.keys() ^ _weight_map(weights.index).keys()):
        where = "its shards lack" if min(differ) not in found else "it does not list"
        raise ModelFormatError(
            f"{path_text(weights.index)} does not fit its shards: {where} {path_text(min(differ))}; "
            "fetch the model again"
        )
    return found


def weight_files(folder: Path, variant: str = "") -> tuple[Path, ...]:
    """The safetensors files that together hold the weights of the component in ``folder``; see ``weights_in``."""
    return weights_in(folder, variant).files
