"""Finding a model by what the user calls it, and checking its files before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from prune_lab.assets import reference_folder
from prune_lab.blocks import Architecture, architecture_of
from prune_lab.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from prune_lab.families import CLASS_NAME, CLIP_TOKENS, FAMILIES, meta_unet, plain_config
from prune_lab.models.files import PICKLED, json_object, read_header, weight_files
from prune_lab.models.silence import quiet

SourceKind = Literal["reference", "preset", "pipeline", "unet", "config"]

PRESETS = ("sd-v1.4", "sd-v1.5", "sd-v2.1-base", "sd-v2.1", "sdxl-base")
SUPPORTED_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Root folders of SD repositories also hold whole checkpoints of several GB in one file: not these.
_WEIGHTS = ("*/*.safetensors", "diffusion_pytorch_model*.safetensors", "model*.safetensors")
_HUB_FILES = ["*.json", "*.txt", *_WEIGHTS]
_HUB_VARIANTS = ["*.fp16*", "*non_ema*", "safety_checker/*"]
# What diffusers raises, all of it unplanned, when it builds a U-Net from a config that makes no sense.
_BUILD_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)
# Components that a pipeline can do without, and that say nothing about its U-Net.
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")


def pipeline_components(parts: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The components that are read, each with its library and class, of the ``parts`` in a model_index.json."""
    return {part: value for part, value in parts.items() if isinstance(value, list) and part not in LEFT_OUT}


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that was found: what the user called it, what it is, where it lies, and the config of its U-Net."""

    text: str
    kind: SourceKind
    folder: Path | None  # of the pipeline or U-Net; None where there is structure only
    config: dict[str, Any]

    @property
    def has_weights(self) -> bool:
        """Whether there are tensors to load."""
        return self.folder is not None

    @property
    def is_pipeline(self) -> bool:
        """Whether text encoder, VAE and scheduler come with the U-Net."""
        return self.kind in ("reference", "pipeline")

    @property
    def tokens(self) -> int:
        """Length of the text that the U-Net reads: the most a pipeline's text encoder takes, else CLIP's 77."""
        if self.folder is not None and self.is_pipeline:
            encoder = self.folder / "text_encoder" / "config.json"
            if encoder.is_file():
                return int(json_object(encoder).get("max_position_embeddings", CLIP_TOKENS))
        return CLIP_TOKENS

    @property
    def architecture(self) -> Architecture:
        """The inventory of the U-Net, its MACs counted for texts of ``tokens``; needs no weights."""
        return architecture_of(self.config, tokens=self.tokens)

    @property
    def unet_folder(self) -> Path | None:
        """The folder with the config and weights of the U-Net."""
        return self.folder / "unet" if self.folder is not None and self.is_pipeline else self.folder


@functools.lru_cache(maxsize=64)
def _file_digest(path: Path, size: int, modified: int) -> bytes:
    # size and time are there for the cache alone: a file that was written anew is read anew
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def model_digest(source: ModelSource) -> str:
    """16 hexadecimal digits over the config and every byte of the weights of the U-Net."""
    settings = {name: value for name, value in source.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    if source.unet_folder is not None:
        for path in weight_files(source.unet_folder):
            status = path.stat()
            digest.update(_file_digest(path, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()[:16]


def preset_config(name: str) -> dict[str, Any]:
    """The settings of the U-Net of a preset, as its authors published them."""
    return json_object(Path(__file__).resolve().parent.parent / "presets" / f"{name}.json")


def _unet_config(path: Path) -> dict[str, Any]:
    config = json_object(path)
    name = config.get(CLASS_NAME)
    if name not in FAMILIES:
        found = f"a model of class {name}" if name else f"no {CLASS_NAME}"
        raise UnsupportedModelError(
            f"asked for a U-Net, found {found} in {path}; supported is {', '.join(FAMILIES)}"
        )
    return config


@functools.lru_cache(maxsize=16)
def _tensor_shapes(config: str, path: Path) -> Mapping[str, tuple[int, ...]]:
    try:
        unet = meta_unet(json.loads(config))
    except _BUILD_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModelError(
            f"no U-Net can be built from {path}: {reason}; give the config.json that save_pretrained wrote"
        ) from None
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}


def _check_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelFormatError unless the files in ``folder`` hold exactly the tensors that ``config`` describes."""
    found: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        found |= {name: shape for name, (_, shape) in read_header(path).items()}
    wanted = _tensor_shapes(json.dumps(plain_config(config), sort_keys=True), folder / "config.json")
    complaints = [f"{name} is missing" for name in wanted if name not in found]
    complaints += [f"{name} is not part of that U-Net" for name in found if name not in wanted]
    complaints += [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if complaints:
        more = f" and {len(complaints) - 1} more" if len(complaints) > 1 else ""
        raise ModelFormatError(
            f"the weights in {folder} do not fit its config.json: tensor {complaints[0]}{more}; "
            "fetch both from the same place again"
        )


def _checked_pipeline(index: Path) -> dict[str, Any]:
    """The config of the U-Net of the pipeline that ``index`` describes, after checking all its parts."""
    parts = json_object(index)
    name = parts.get("_class_name")
    if not isinstance(name, str) or name not in SUPPORTED_PIPELINES:
        raise UnsupportedModelError(
            f"{index} describes a pipeline of class {name!r}; supported are {', '.join(SUPPORTED_PIPELINES)}"
        )
    components = pipeline_components(parts)
    for part, value in components.items():
        if len(value) != 2 or value[0] not in ("diffusers", "transformers", None):
            raise UnsupportedModelError(
                f"{index} wants code of its own for {part} ({value}), which is never run here; supported are "
                "pipelines made of diffusers and transformers classes"
            )
    unet = _unet_config(index.parent / "unet" / "config.json")
    _check_weights(index.parent / "unet", unet)
    for part, (library, _) in components.items():
        folder = index.parent / part
        if library is None or part == "unet":
            continue
        if not folder.is_dir():
            raise ModelFormatError(f"{index} lists {part}, but {folder} is not there; fetch it again")
        if (folder / "config.json").is_file():  # tokenizers and schedulers have no weights
            for path in weight_files(folder):
                read_header(path)
    return unet


def _from_folder(text: str, folder: Path, kind: Literal["reference"] | None = None) -> ModelSource:
    index = folder / "model_index.json"
    if index.is_file():
        return ModelSource(text, kind or "pipeline", folder, _checked_pipeline(index))
    if not (folder / "config.json").is_file():
        raise ModelFormatError(
            f"asked for the model in {folder}, found neither model_index.json (a pipeline) nor config.json (a U-Net) "
            "there; give the folder that save_pretrained wrote"
        )
    config = _unet_config(folder / "config.json")
    _check_weights(folder, config)
    return ModelSource(text, "unet", folder, config)


def shipped(folder: Path) -> Path:
    """``folder`` of the package; ModelNotFoundError when this installation lacks it."""
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"the model 'reference' is not part of this installation ({folder} is not there); "
            "install prune-lab again"
        )
    return folder


def hub_folder(text: str) -> Path:
    """The local copy of the hub repository ``text``: its JSON, safetensors and tokenizer files, never code.

    Raises ModelNotFoundError when the hub has no such repository or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        with quiet():
            folder = Path(snapshot_download(text, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_VARIANTS))
            unet = folder / "unet" if (folder / "model_index.json").is_file() else folder
            if not any(unet.glob("*.safetensors")):  # some repositories have the half-precision files only
                folder = Path(snapshot_download(text, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"it answered {status}" if status else "it cannot be reached"
        raise ModelNotFoundError(
            f"asked for the model {text!r}, found no such folder here; as a name on the hub, {reason} "
            f"({type(error).__name__}); give a local folder, reference, or a preset ({', '.join(PRESETS)})"
        ) from None
    return folder


def resolve_model(text: str) -> ModelSource:
    """The model that ``text`` names, its files checked as far as can be without loading them.

    Raises ModelNotFoundError when nothing has that name, ModelFormatError when its files are damaged or pickled,
    UnsupportedModelError when it is a class whose blocks are not known here.
    """
    if text == "reference":
        return _from_folder(text, shipped(reference_folder()), kind="reference")
    if text in PRESETS:
        return ModelSource(text, "preset", None, preset_config(text))
    path = Path(text).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        from prune_lab.models.single_file import unpacked

        return _from_folder(text, unpacked(path, preset_config))
    if path.suffix in PICKLED and path.is_file():
        raise ModelFormatError(
            f"asked for the model {text}, a pickled file, which is never opened here; convert it to safetensors "
            "(its owner may offer that already), or give a diffusers folder"
        )
    if path.is_file():
        return ModelSource(text, "config", None, _unet_config(path))
    if text and path.is_dir():
        return _from_folder(text, path)
    if HUB_ID.fullmatch(text):
        return _from_folder(text, hub_folder(text))
    near = difflib.get_close_matches(text, ("reference", *PRESETS), n=1)
    raise ModelNotFoundError(
        f"asked for the model {text!r}, found no file or folder of that name; "
        + (f"did you mean {near[0]}? " if near else "")
        + f"Give reference, a preset ({', '.join(PRESETS)}), a folder, a config.json or a hub id (owner/name)"
    )
