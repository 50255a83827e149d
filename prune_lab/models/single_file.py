"""Single ``.safetensors`` files in the CompVis/LDM layout, as Civitai, A1111 and ComfyUI use them, made into folders.

Everything here works on folders. So a single file is read once, by diffusers' own loader with configs made from its
shapes, and written as a pipeline folder into the user's cache, where the same file is found again.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from prune_lab.errors import ModelFormatError, ProofError, PruneLabError, UnsupportedModelError
from prune_lab.families import CLASS_NAME, family_of, meta_model
from prune_lab.families.ldm_keys import empty_attentions, ldm_to_diffusers, unet_places
from prune_lab.families.ldm_structure import (
    UNET,
    VAE,
    Kind,
    Shapes,
    has_even_depths,
    kind_of,
    model_index,
    scheduler_config,
    text_configs,
    unet_config,
    vae_config,
)
from prune_lab.models.clip_vocabulary import NUM_TOKENS, clip_tokenizer
from prune_lab.models.diagnosis import beyond_bounds, quantised
from prune_lab.models.files import read_header
from prune_lab.models.folders import tensor_shapes
from prune_lab.models.ldm_contents import left_out
from prune_lab.models.parts import part_class, pipeline_class
from prune_lab.models.silence import quiet
from prune_lab.runtime import (
    atomic_folder,
    bytes_text,
    cache_folder,
    note,
    parse_json,
    path_text,
    printable,
    write_json,
    write_text,
)
from prune_lab.runtime.files import list_about, some_of, write_file_list

_WIDEST_FIRST = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Stable Diffusion 2 shows what it predicts in its weights only: these spread where it is v, as ComfyUI tells.
_TELLS_V = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SPREAD_OF_V = 0.09
_FOLDER_OF_CONFIGS = "prune_lab.configs"  # what our own export leaves in the metadata
_TOKENIZERS = "prune_lab.tokenizers"  # the same, of a vocabulary that is not CLIP's
_PARTS = ("model_index", "unet", "vae", "scheduler", "text_encoder", "text_encoder_2")
TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)

PresetConfig = Callable[[str], dict[str, Any]]


def _predicts(kind: Kind, path: Path, shapes: Shapes) -> str:
    if "v_pred" in shapes:  # a marker that some XL files carry
        return "v_prediction"
    if kind != "sd-v2" or _TELLS_V not in shapes or shapes[f"{UNET}input_blocks.0.0.weight"][1] != 4:
        return "epsilon"
    with safe_open(path, framework="pt") as file:
        spread = float(file.get_tensor(_TELLS_V).float().std(correction=0))
    return "v_prediction" if spread > _SPREAD_OF_V else "epsilon"


def _configs_by_shape(path: Path, shapes: Shapes, preset_config: PresetConfig) -> dict[str, dict[str, Any]]:
    kind = kind_of(shapes)
    predicts = _predicts(kind, path, shapes)
    preset = {"sd-v1": "sd-v1.5", "sd-v2": "sd-v2.1-base", "sdxl": "sdxl-base"}[kind]
    if kind == "sd-v2" and predicts == "v_prediction":
        preset = "sd-v2.1"
    unet = unet_config(kind, preset_config(preset), shapes)
    scheduler = scheduler_config(kind, predicts)
    return {
        "model_index": model_index(kind, unet["in_channels"], scheduler["_class_name"]),
        "unet": unet,
        "vae": vae_config(kind, shapes),
        "scheduler": scheduler,
        **text_configs(kind, shapes),
    }


def _inside(path: Path, key: str, kind: type) -> dict[str, dict[str, Any]]:
    """What our own export wrote into the metadata of the file under ``key``: for each part texts or settings.

    ``kind`` is the type of the values in a part. Raises ModelFormatError for anything else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(key)
        found: Any = parse_json(text) if text else {}
    except (SafetensorError, ValueError) as error:
        raise ModelFormatError(
            f"asked to read {path_text(path)}: {printable(str(error))}; fetch the file again"
        ) from None
    if not isinstance(found, dict) or not all(
        isinstance(part, dict) and all(isinstance(value, kind) for value in part.values())
        for part in found.values()
    ):
        raise ModelFormatError(
            f"asked to read {path_text(path)}: its metadata {key} do not hold the files of each part; export it again"
        )
    return found


def _configs_inside(path: Path) -> dict[str, dict[str, Any]] | None:
    """The configs that our own export wrote into the file, or None; a file of a U-Net alone has no index among them.

    Only those of parts that are read here, whatever else it names: each becomes a file of its name.
    """
    configs = {name: one for name, one in _inside(path, _FOLDER_OF_CONFIGS, object).items() if name in _PARTS}
    if "model_index" not in configs:
        return None
    if lacking := [name for name in ("unet", "vae", "scheduler") if name not in configs]:
        raise ModelFormatError(
            f"asked to read {path_text(path)}: its metadata lack the config of the {lacking[0]}; export it again"
        )
    return configs


def _tokenizers_inside(path: Path) -> dict[str, dict[str, str]]:
    """The files of each tokenizer by part and name, where our own export wrote them into the file."""
    return {
        part: {name: text for name, text in files.items() if name in TOKENIZER_FILES}
        for part, files in _inside(path, _TOKENIZERS, str).items()
        if part in ("tokenizer", "tokenizer_2")
    }


def _refused(path: Path, error: Exception) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"asked to read the single file {path_text(path)}: diffusers cannot "
        f"({printable(' '.join(str(error).split()), 200)}); give the diffusers folder of the model"
    )


def _check_tokenizers(path: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    known = _tokenizers_inside(path)
    for part in ("text_encoder", "text_encoder_2"):
        tokens = configs.get(part, {}).get("vocab_size", NUM_TOKENS)
        if tokens != NUM_TOKENS and part.replace("text_encoder", "tokenizer") not in known:
            raise UnsupportedModelError(
                f"asked to read the single file {path}: its {part} has {printable(repr(tokens))} tokens and not CLIP's "
                f"{NUM_TOKENS:,}, so its tokenizer is not known here: give the folder it was exported from"
            )


def configs_of(path: Path, preset_config: PresetConfig) -> dict[str, dict[str, Any]]:
    """The config of each part of the single file ``path`` by its name, and the ``model_index``.

    Raises UnsupportedModelError when it is not a whole model of a kind that is read, ModelFormatError when damaged.
    """
    header = read_header(path)
    if reason := quantised(header, {}):
        raise UnsupportedModelError(f"asked to read the single file {path}: {reason}")
    shapes = {key: shape for key, (_, shape) in header.items()}
    try:
        configs = _configs_inside(path) or _configs_by_shape(path, shapes, preset_config)
        tensor_shapes(configs["unet"], path)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"asked to read the single file {path_text(path)}: {error}") from None
    except (
        LookupError,
        IndexError,
    ) as error:  # a tensor that every model of its kind has, or one of its sides
        raise UnsupportedModelError(
            f"asked to read the single file {path_text(path)}: it lacks {printable(str(error))}, or that has another "
            "shape; give the diffusers folder of the model"
        ) from None
    if reason := beyond_bounds(configs):
        raise UnsupportedModelError(f"asked to read the single file {path_text(path)}, whose {reason}")
    _check_tokenizers(path, configs)
    try:
        others = left_out(configs, shapes)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"asked to read the single file {path_text(path)}: {error}") from None
    except Exception as error:  # whatever the libraries raise about configs that make no sense
        raise _refused(path, error) from None
    if others:
        note(f"left out of {path.name}, for they are no part of the model: {some_of(others)}")
    return configs


def _write_configs(
    folder: Path, configs: Mapping[str, Mapping[str, Any]], tokenizers: Mapping[str, Mapping[str, str]]
) -> None:
    for part, config in configs.items():
        name = {"model_index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}
        write_json(folder / name.get(part, f"{part}/config.json"), dict(config))
    for part in ("tokenizer", "tokenizer_2"):
        if part in tokenizers:
            for file, text in tokenizers[part].items():
                write_text(folder / part / file, text)
        elif part in configs["model_index"] and configs["model_index"][part][0] is not None:
            encoder = configs[part.replace("tokenizer", "text_encoder")]
            exact = encoder.get("hidden_act") == "gelu"  # OpenCLIP pads with "!", which is its token 0
            clip_tokenizer(pad_token="!" if exact else "<|endoftext|>").save_pretrained(folder / part)


def _dtype(header: Mapping[str, tuple[str, tuple[int, ...]]], *prefixes: str) -> torch.dtype:
    """The widest number format of the tensors whose keys begin with one of ``prefixes``."""
    names = {dtype for key, (dtype, _) in header.items() if key.startswith(prefixes)}
    return next((dtype for name, dtype in _WIDEST_FIRST.items() if name in names), torch.float32)


def _unet_by_name(path: Path, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The U-Net of ``config`` with the tensors of the file, by our own map of names."""
    unet, places = meta_model(config), unet_places(config)
    try:
        with safe_open(path, framework="pt") as file:
            found = {place.key: file.get_tensor(f"{UNET}{place.key}").to(dtype) for place in places}
    except SafetensorError as error:
        raise UnsupportedModelError(
            f"asked to read the single file {path}: {error}; give the folder it was exported from"
        ) from None
    tensors = ldm_to_diffusers(places, found)
    # attention of no layers has no place in the layout: it is left out where it adds zero
    empty = tuple(f"{attention}." for attention in empty_attentions(config))
    missing = (
        {name: tensor for name, tensor in unet.state_dict().items() if name.startswith(empty)}
        if empty
        else {}
    )
    tensors |= {name: torch.zeros(tensor.shape, dtype=dtype) for name, tensor in missing.items()}
    unet.load_state_dict(tensors, strict=True, assign=True)
    return unet


def _states(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of each file below ``folder``, by its name relative to it."""
    files = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): [state.st_size, state.st_mtime_ns] for path, state in files}


def _is_whole(folder: Path) -> bool:
    """Whether the files that were written into ``folder`` are there as they were written."""
    written = list_about(folder)
    return bool(written) and written.items() <= _states(folder).items()


def _unpack(path: Path, out: Path, configs: Mapping[str, dict[str, Any]], pipeline_class: Any) -> None:
    header = read_header(path)
    with tempfile.TemporaryDirectory() as temporary, quiet():
        _write_configs(Path(temporary), configs, _tokenizers_inside(path))
        # the loader takes all stages for equally deep and all attention for there
        plain = has_even_depths(configs["unet"]) and not empty_attentions(configs["unet"])
        given: dict[str, Any] = {"config": temporary, "local_files_only": True}
        # without a number format the loader makes everything float32; with one, every part the same
        parts = {
            part: part_class.from_single_file(
                str(path), subfolder=part, dtype=_dtype(header, prefix), **given
            )
            for part, part_class, prefix in (
                ("unet", family_of(configs["unet"]).model_class(), UNET),
                ("vae", diffusers.AutoencoderKL, VAE),
            )
            if part != "unet" or plain
        }
        if not plain:
            parts["unet"] = _unet_by_name(path, configs["unet"], _dtype(header, UNET))
        text = _dtype(header, "cond_stage_model.", "conditioner.")
        pipeline = pipeline_class.from_single_file(str(path), dtype=text, **parts, **given)
        with atomic_folder(out, force=True) as folder:
            pipeline.save_pretrained(folder, safe_serialization=True)
            states = _states(folder)
            write_file_list(folder, states, about=states)


def unpack(path: Path, out: Path, preset_config: PresetConfig) -> Path:
    """The pipeline folder ``out`` with what the single file ``path`` holds, each part in its own number format."""
    configs = configs_of(path, preset_config)
    name = configs["model_index"].get(CLASS_NAME)
    if (found := pipeline_class(name)) is None:
        raise UnsupportedModelError(
            f"asked to read the single file {path_text(path)}, found that it is of class {printable(repr(name))}, "
            "which the installed diffusers has not; give the diffusers folder of the model"
        )
    try:
        _unpack(path, out, configs, found)
    except PruneLabError:
        raise
    except OSError as error:
        if error.errno is not None:  # of the disk, and told as that
            raise
        raise _refused(path, error) from None
    except Exception as error:  # whatever the libraries raise about tensors and configs that make no sense
        raise _refused(path, error) from None
    return out


def _cache_folder(path: Path) -> Path:
    """Where the folder of ``path`` as it is now lies: another file, or the same one changed, has another."""
    status = path.stat()
    name = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    return cache_folder("single_files") / hashlib.sha256(name.encode()).hexdigest()[:16]


def unpacked(path: Path, preset_config: PresetConfig) -> Path:
    """The pipeline folder of the single file ``path``, made on first use, and again where files of it are gone."""
    folder = _cache_folder(path)
    if not _is_whole(folder):
        note(f"writing {path.name} ({bytes_text(path.stat().st_size)}) as a folder into {folder}, once")
        unpack(path, folder, preset_config)
    return folder


def prove_readable(path: Path, folder: Path, preset_config: PresetConfig) -> None:
    """Raise unless the single file ``path``, made of the pipeline in ``folder``, has all of its tensors and words."""
    configs = configs_of(path, preset_config)
    index = configs["model_index"]
    with tempfile.TemporaryDirectory() as temporary, quiet():
        _write_configs(Path(temporary), configs, _tokenizers_inside(path))
        for part in ("tokenizer", "tokenizer_2"):
            if (index.get(part) or [None])[0] is None:
                continue
            found: Any = part_class(*index[part])
            try:
                words, wanted = (
                    found.from_pretrained(home / part, local_files_only=True).get_vocab()
                    for home in (Path(temporary), folder)
                )
            except Exception as error:  # whatever the libraries raise about files that make no sense
                raise _refused(path, error) from None
            if words != wanted or not words:
                raise ProofError(
                    f"asked to export {path_text(folder)}, whose {part} has {len(wanted):,} words, found "
                    f"{len(words):,} or others in what was written; save it with its {TOKENIZER_FILES[2]}"
                )
