"""The files of a model: JSON and safetensors headers, read with suspicion; pickled weights are never opened."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from prune_lab.errors import ModelFormatError

# diffusers and transformers name the weights of a component by these stems
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; ModelFormatError when it is missing or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFormatError(f"asked to read {path}: {error.strerror}; fetch the model again") from None
    except ValueError as error:
        raise ModelFormatError(f"{path} is not JSON ({error}); fetch it again, or give its folder") from None
    if not isinstance(value, dict):
        raise ModelFormatError(
            f"{path} holds a JSON {type(value).__name__}, not an object; fetch the model again"
        )
    return value


def _shards(index: Path) -> tuple[Path, ...]:
    entries = json_object(index).get("weight_map")
    names = sorted(set(entries.values())) if isinstance(entries, dict) else []
    # a shard's name is only a name: nothing outside the folder is read
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ModelFormatError(f"{index} does not list the shards of the weights; fetch the model again")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelFormatError(
            f"{index.parent} lacks {len(missing)} of {len(names)} shards of its weights ({missing[0]}); fetch it again"
        )
    return tuple(index.parent / name for name in names)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that together hold the weights of the component in ``folder``.

    Full precision is preferred to a ``fp16`` variant, one file or shards alike. Raises ModelFormatError when there are
    only pickled weights, none at all, or when a shard is missing.
    """
    folder = Path(folder)
    for stem, variant in itertools.product(_WEIGHT_STEMS, ("", ".fp16")):
        whole = folder / f"{stem}{variant}.safetensors"
        if whole.is_file():
            return (whole,)
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            return _shards(index)
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
    if pickled:
        raise ModelFormatError(
            f"asked for the weights in {folder}, found only pickled files ({', '.join(pickled[:3])}), which are never "
            "opened here; save the model again with save_pretrained(..., safe_serialization=True)"
        )
    raise ModelFormatError(
        f"asked for the weights in {folder}, found no {_WEIGHT_STEMS[0]}.safetensors there; fetch the model again, "
        "or give the path of its config.json to work with the structure alone"
    )


def _damaged(path: Path, size: int, promised: str) -> str:
    return f"{path} holds {size:,} bytes, its first bytes promise {promised}: it is damaged; fetch it again"


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Number format and shape of every tensor in the safetensors file ``path``, without reading the tensors.

    Raises ModelFormatError when the file is cut short, too long, or not safetensors.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ModelFormatError(_damaged(path, size, f"a header of {length:,} bytes"))
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        tensors = {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in entries.items()}
        whole = 8 + length + int(end)
    except OSError as error:
        raise ModelFormatError(f"asked to read {path}: {error.strerror}; check the file") from None
    except (AttributeError, LookupError, TypeError, UnicodeDecodeError, json.JSONDecodeError):
        raise ModelFormatError(f"{path} is not a safetensors file; fetch it again") from None
    if whole != size:
        raise ModelFormatError(_damaged(path, size, f"{whole:,} bytes"))
    return tensors
