"""A pipeline as one ``.safetensors`` in the CompVis/LDM layout, which ComfyUI and other front ends read.

Tensors are read one by one, renamed by ``ldm_keys`` and written in turn, so memory holds one at a time. The plan,
the provenance and the configs go into the file's metadata.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from prune_lab.errors import ModelFormatError, PruneLabError, UnsupportedModelError
from prune_lab.export.students import student_in
from prune_lab.families import CLASS_NAME, base_name, is_own
from prune_lab.families.adapter_names import check_has_additions
from prune_lab.families.ldm_keys import (
    TEXT_CLASSES,
    Place,
    empty_attentions,
    text_places,
    text_prefixes,
    unet_places,
    unet_shapes,
    vae_places,
    with_middle,
)
from prune_lab.families.ldm_readers import reader_notes
from prune_lab.forms import exists_in
from prune_lab.models import ModelSource, preset_config, weight_files
from prune_lab.models.clip_vocabulary import NUM_TOKENS
from prune_lab.models.components import modern_name
from prune_lab.models.conversion import converted
from prune_lab.models.files import MOST_HEADER, read_header
from prune_lab.models.protection import check_file
from prune_lab.models.single_file import TOKENIZER_FILES, prove_readable
from prune_lab.models.written import tell_weights
from prune_lab.runtime import (
    atomic_write,
    bytes_text,
    names_alone,
    open_regular,
    parse_json,
    read_json,
    read_text,
    track,
)
from prune_lab.version import __version__

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
NATIVE, NEUTRAL = "native", "neutral"
FORMS = (NATIVE, NEUTRAL)
_ALIGNMENT = 8  # bytes that the header is padded to, as safetensors does


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """A file that was written for another program, and what its reader must be told."""

    path: Path
    num_tensors: int
    num_bytes: int
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor on disk."""

    path: Path | None  # None: zeros, which lie nowhere
    begin: int  # bytes before it in the file
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the file to be written."""

    key: str
    place: Place
    sources: tuple[_Stored, ...]
    dtype: str

    @property
    def name(self) -> str:
        """Where its numbers come from, as the model calls it: ``vae/decoder.conv_out.bias``."""
        path = self.sources[0].path
        return f"{path.parent.name if path else 'unet'}/{self.place.sources[0]}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.shape([source.shape for source in self.sources])

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _itemsize(self.dtype)


def _itemsize(dtype: str) -> int:
    return _DTYPES[dtype].itemsize


# Reading the parts -------------------------------------------------------------------------------------------------


def _read(stored: _Stored) -> Tensor:
    if stored.path is None:
        return torch.zeros(stored.shape, dtype=_DTYPES[stored.dtype])
    # Not through a memory map: one that stays open keeps every page that was read, in the end the whole model.
    content = bytearray(math.prod(stored.shape) * _itemsize(stored.dtype))
    with stored.path.open("rb") as file:
        file.seek(stored.begin)
        if file.readinto(content) != len(content):
            raise ModelFormatError(
                f"asked to read {stored.path}, which became shorter meanwhile; check the file"
            )
    return torch.frombuffer(content, dtype=_DTYPES[stored.dtype]).reshape(stored.shape)


def _begins(path: Path) -> dict[str, int]:
    """Where the bytes of each tensor begin in the safetensors file ``path``, whose header is known to be sound."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        header: Any = parse_json(file.read(min(length, MOST_HEADER)))
    return {
        key: 8 + length + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"
    }


def _modern(key: str) -> str:
    """The name that the classes of today give a tensor: older files of a VAE or a text encoder have others."""
    return modern_name(key).removeprefix("text_model.")


def _stored(folder: Path) -> dict[str, _Stored]:
    """Every tensor of the component in ``folder`` by its name of today; ``position_ids`` count up and are left out."""
    found = {}
    for path in weight_files(folder):
        tensors, begins = read_header(path), _begins(path)
        for key, (dtype, shape) in tensors.items():
            if not key.endswith("position_ids"):
                found[_modern(key)] = _Stored(path, begins[key], dtype, shape)
    return found


def _text_places(folder: Path, config: Mapping[str, Any], class_name: str) -> tuple[Place, ...]:
    if class_name not in TEXT_CLASSES:
        raise UnsupportedModelError(
            f"asked to export {folder}, a {class_name}; the LDM layout holds CLIP text encoders: export the folder of "
            "the U-Net alone"
        )
    return text_places(config, class_name)


def _vae_places(folder: Path, config: Mapping[str, Any], class_name: str) -> tuple[Place, ...]:
    if class_name != "AutoencoderKL":
        raise UnsupportedModelError(
            f"asked to export {folder}, a {class_name}; the LDM layout holds an AutoencoderKL: export the folder "
            "of the U-Net alone"
        )
    return vae_places(config)


def _entries(
    folder: Path,
    prefix: str,
    places: Iterable[Place],
    dtype: torch.dtype | None,
    left_out: Sequence[str] = (),
    zeros: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Iterator[_Entry]:
    """What the component in ``folder`` puts into the file, after a check that it has the tensors of its config.

    ``zeros`` are the shapes of tensors that it does not have, and that are zero in the file.
    """
    stored = _stored(folder)
    places = tuple(places)
    widest = next((tensor.dtype for tensor in stored.values()), "F32")
    stored |= {key: _Stored(None, 0, widest, shape) for key, shape in zeros.items() if key not in stored}
    wanted = {source for place in places for source in place.sources}
    found = {key for key in stored if not key.startswith(tuple(f"{module}." for module in left_out))}
    if wrong := sorted(wanted ^ found):
        state = "is missing" if wrong[0] in wanted else "is not part of that model"
        raise ModelFormatError(
            f"the weights in {folder} do not fit its config.json: tensor {wrong[0]} {state}; save the model again"
        )
    for place in places:
        sources = tuple(stored[source] for source in place.sources)
        kept = sources[0].dtype
        if kept not in _DTYPES:
            raise UnsupportedModelError(
                f"asked to export {folder}, whose tensor {place.sources[0]} is in {kept}; "
                f"{', '.join(_DTYPES)} can be written: save the model in one of these"
            )
        yield _Entry(f"{prefix}{place.key}", place, sources, _NAMES[dtype] if dtype else kept)


def _unet_entries(
    folder: Path, config: Mapping[str, Any], unet: Mapping[str, Any], dtype: torch.dtype | None
) -> Iterator[_Entry]:
    """What the U-Net in ``folder`` of this ``config`` puts into a file that describes the U-Net ``model``."""
    left_out, own = empty_attentions(config), unet_shapes(config)
    _check_identity(folder, left_out)
    zeros = {key: shape for key, shape in unet_shapes(unet).items() if key not in own}
    yield from _entries(folder, "model.diffusion_model.", unet_places(unet), dtype, left_out, zeros)


def _file_entries(
    source: ModelSource, configs: Mapping[str, Mapping[str, Any]], dtype: torch.dtype | None
) -> list[_Entry]:
    assert source.model_folder is not None
    entries = [*_unet_entries(source.model_folder, source.config, configs["unet"], dtype)]
    if source.is_pipeline and source.folder is not None:
        index = configs["model_index"]
        vae = source.folder / "vae"
        entries += _entries(
            vae, "first_stage_model.", _vae_places(vae, configs["vae"], index["vae"][1]), dtype
        )
        for part, prefix in text_prefixes(index).items():
            folder = source.folder / part
            entries += _entries(folder, prefix, _text_places(folder, configs[part], index[part][1]), dtype)
    # wider numbers first, so that each tensor begins at a multiple of its own width
    return sorted(entries, key=lambda entry: -_itemsize(entry.dtype))


def _check_identity(folder: Path, attentions: Sequence[str]) -> None:
    """Refuse to leave out attention blocks that do something: those of no layers whose last projection is not zero."""
    stored = _stored(folder) if attentions else {}
    for attention in attentions:
        if any(_read(stored[f"{attention}.proj_out.{kind}"]).any() for kind in ("weight", "bias")):
            raise UnsupportedModelError(
                f"asked to export {folder}, whose {attention} has no layers and still changes its input; "
                "the LDM layout has no place for it: export a student with that block removed or whole"
            )


# What goes along ---------------------------------------------------------------------------------------------------


def _configs(source: ModelSource) -> dict[str, dict[str, Any]]:
    """The config of each part by its name, without paths of the machine that it was saved on."""
    if source.folder is None or not source.is_pipeline:
        return {"unet": dict(source.config)}
    found = {}
    for path in sorted([source.folder / "model_index.json", *source.folder.glob("*/*config.json")]):
        value = read_json(path)
        if isinstance(value, dict) and path.name != "tokenizer_config.json":
            name = "model_index" if path.parent == source.folder else path.parent.name
            found[name] = value
    return found


def _text_of(path: Path) -> str:
    """The text of a file of a tokenizer; settings without the folders they may name."""
    if path.suffix != ".json" or path.stem == "vocab":
        return read_text(path)
    value = read_json(path)
    # the words in a tokenizer.json may look like paths
    return json.dumps(value if path.stem == "tokenizer" else names_alone(value), ensure_ascii=False)


def _tokenizers(source: ModelSource, configs: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The files of each tokenizer whose vocabulary is not CLIP's, which readers bring along."""
    found = {}
    for part in ("text_encoder", "text_encoder_2"):
        folder = (source.folder or Path()) / part.replace("text_encoder", "tokenizer")
        if configs.get(part, {}).get("vocab_size", NUM_TOKENS) != NUM_TOKENS:
            paths = [folder / name for name in TOKENIZER_FILES]
            found[folder.name] = {path.name: _text_of(path) for path in paths if path.is_file()}
    return found


def _metadata(source: ModelSource, configs: Mapping[str, Any]) -> dict[str, str]:
    metadata = {
        "format": "pt",
        "prune_lab.version": __version__,
        "prune_lab.configs": json.dumps(names_alone(configs)),
    }
    if tokenizers := _tokenizers(source, configs):
        metadata["prune_lab.tokenizers"] = json.dumps(tokenizers)
    for name in ("plan", "provenance"):
        path = (source.model_folder or Path()) / f"{name}.json"
        if path.is_file():
            metadata[f"prune_lab.{name}"] = json.dumps(names_alone(read_json(path)))
    return metadata


# Writing -----------------------------------------------------------------------------------------------------------


def _header(entries: Sequence[_Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for entry in entries:
        end = begin + entry.num_bytes
        header[entry.key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _plain_instead(source: ModelSource) -> str:
    """What to build of the plan of ``source``, a student with code of its own, so that a single file can hold it."""
    try:
        student = student_in(source.folder) if source.folder else None
    except PruneLabError:  # a folder without its plan: the config says as much as there is to know
        student = None
    if not source.config.get("widths"):
        return "build the plan with --form neutral and export that"
    if student is not None and not exists_in(student.architecture, student.plan, "padded"):
        return (
            "no plain class has its widths without the blocks that it removes: leave out the widths (~...) of the "
            "plan, build that with --form neutral and export it"
        )
    return (
        "build the plan with --form padded and export that: zeros at full width, which save nothing by widths"
    )


def export_single_file(
    source: ModelSource,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    form: str = NATIVE,
    force: bool = False,
    weights: str = "",
) -> Exported:
    """``source`` as the one file ``out`` in the LDM layout, and what its readers must be told.

    A pipeline gives U-Net, VAE and text encoders, a U-Net folder the U-Net alone. ``dtype`` converts all tensors;
    ``None`` keeps each as it is. With the ``form`` neutral a mid stage that is gone or cut is there again as the
    identity, for readers that know no U-Net without one: the same pictures from a larger file.

    Raises UnsupportedModelError when there are no weights or a part has no place in the layout, ModelFormatError when
    weights do not fit their config, StorageError where ``out`` may not be written (``models.protection.check_file``).
    """
    if not source.has_weights:
        raise UnsupportedModelError(
            f"asked to export {source.text!r}, which has no weights (kind: {source.kind}); "
            "give a pipeline or U-Net folder"
        )
    plain = {**source.config, CLASS_NAME: base_name(str(source.config[CLASS_NAME]))}
    check_has_additions(
        plain, f"to export {source.text} as a single file", instead="use its folder in diffusers"
    )
    if is_own(source.config):
        raise UnsupportedModelError(
            f"asked to export {source.text}, a student with code of its own, for which a single file has no place; "
            + _plain_instead(source)
        )
    if weights:
        raise UnsupportedModelError(
            f"asked to export a single file with weights in {weights}; give --dtype float16, or a runtime with --to"
        )
    if dtype is not None and dtype not in _NAMES:
        raise UnsupportedModelError(f"asked to export in {dtype}; give float32, float16 or bfloat16")
    if form not in FORMS:
        raise UnsupportedModelError(f"asked to export in the form {form!r}; give {' or '.join(FORMS)}")
    out = check_file(out, {"the model": source.places}, "tensors", force=force)
    if source.model_folder is not None:
        tell_weights(source.model_folder, source.variant)
    configs = _configs(source)
    configs["unet"] = with_middle(source.config) if form == NEUTRAL else dict(source.config)
    entries = _file_entries(source, configs, dtype)
    header = _header(entries, _metadata(source, configs))
    with atomic_write(out) as temporary:
        with temporary.open("wb") as file:
            file.write(header)
            for entry in track(entries, "export", unit="tensors"):
                tensor = entry.place.joined([_read(source) for source in entry.sources])
                tensor = converted(entry.name, tensor, _DTYPES[entry.dtype]).contiguous()
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        read_header(temporary)  # raises when fewer bytes than promised were written
        if source.is_pipeline and source.folder is not None:
            prove_readable(temporary, source.folder, preset_config)
    added = sum(entry.num_bytes for entry in entries if any(source.path is None for source in entry.sources))
    notes = reader_notes(configs)
    if added:
        share = added / out.stat().st_size
        notes += (f"the mid stage is the identity: {bytes_text(added)} of zeros, {share:.0%} of the file",)
    return Exported(out, len(entries), out.stat().st_size, notes)
