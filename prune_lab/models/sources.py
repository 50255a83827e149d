"""Finding a model by what the user calls it, and checking its files before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from prune_lab.assets import SHIPPED_MODELS, shipped_places
from prune_lab.blocks import Architecture, architecture_of
from prune_lab.config import RunConfig, load_config
from prune_lab.errors import ModelFormatError, ModelNotFoundError, StorageError
from prune_lab.families import CLIP_TOKENS, family_of
from prune_lab.models.diagnosis import OTHER_PACKINGS
from prune_lab.models.files import PICKLED, json_object, weight_files
from prune_lab.models.folders import checked_config, checked_model, checked_pipeline
from prune_lab.models.hub import HUB_ID, commit_of, hub_folder
from prune_lab.runtime import open_regular, path_text, without_folders

SourceKind = Literal["shipped", "preset", "pipeline", "model", "config"]

PRESETS = (
    *("sd-v1.4", "sd-v1.5", "sd-v2.1-base", "sd-v2.1", "sdxl-base"),
    *("pixart-alpha", "pixart-sigma", "sd3-medium", "flux-dev", "dit-xl-2-256"),
)

_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that was found: what the user called it, what it is, where it lies, and its config."""

    text: str
    kind: SourceKind
    folder: Path | None  # of the pipeline or of the model alone; None where there is structure only
    config: dict[str, Any]
    revision: str = ""  # the commit of the hub where it is known, else what was asked for
    subfolder: str = ""  # of ``text``, in which ``folder`` lies
    variant: str = ""  # of the model's weights, such as fp16; empty for the plain ones
    asked_variant: str = ""  # what was asked for; parts that have no such variant are read as they are
    random_seed: int | None = None  # weights are drawn with it; None: they are read
    notes: tuple[str, ...] = ()  # what the user should be told of how it was found

    @property
    def has_weights(self) -> bool:
        """Whether there are tensors to load."""
        return self.folder is not None

    @property
    def is_pipeline(self) -> bool:
        """Whether what draws with the model, such as a scheduler, comes with it."""
        return self.kind in ("shipped", "pipeline")

    @property
    def component(self) -> str:
        """The name of the model among the parts of a pipeline: unet or transformer."""
        return family_of(self.config).component

    @property
    def called(self) -> str:
        """What messages call the model: a U-Net or a transformer."""
        return family_of(self.config).called

    @property
    def tokens(self) -> int:
        """Length of the text that the model reads: what it is for, and no more than the one text encoder of a pipeline
        takes. Of several encoders not every one's text is as long.
        """
        meant = family_of(self.config).tokens(self.config)
        if self.folder is None or not self.is_pipeline or not meant:
            return meant
        parts = [self.folder / part / "config.json" for part in _ENCODERS]
        encoders = [json_object(path) for path in parts if path.is_file()]
        longest = [config.get("max_position_embeddings") for config in encoders]
        if self.component == "unet":  # whose encoders all write as many words
            found = longest[0] if longest else meant
            return found if isinstance(found, int) else CLIP_TOKENS
        return min([meant, *(one for one in longest[:1] if isinstance(one, int) and len(longest) == 1)])

    @property
    def timesteps(self) -> int | None:
        """Timesteps of the pipeline's scheduler, the most steps that it draws in; None where it is not said."""
        if self.folder is None or not self.is_pipeline:
            return None
        path = self.folder / "scheduler" / "scheduler_config.json"
        found = json_object(path).get("num_train_timesteps") if path.is_file() else None
        return found if isinstance(found, int) else None

    @property
    def architecture(self) -> Architecture:
        """The inventory of the model, its MACs counted for texts of ``tokens``; needs no weights."""
        return architecture_of(self.config, tokens=self.tokens)

    @property
    def model_folder(self) -> Path | None:
        """The folder with the config and weights of the model."""
        return self.folder / self.component if self.folder is not None and self.is_pipeline else self.folder

    @property
    def places(self) -> tuple[Path, ...]:
        """Where the model lies: what the user named, its folder and that of the model; see ``refuse_to_replace``."""
        named = Path(self.text).expanduser() if self.text and self.kind != "shipped" else None
        return tuple(path for path in (self.folder, self.model_folder, named) if path is not None)

    @property
    def weight_paths(self) -> tuple[Path, ...]:
        """The safetensors files that together hold the weights of the model; none where there is structure only."""
        return () if self.model_folder is None else weight_files(self.model_folder, self.variant)

    @property
    def name(self) -> str:
        """What the model is called in what is written: of a path the last part alone, for that travels."""
        path = Path(self.text).expanduser()
        if not path.exists():
            return without_folders(self.text)
        return path.name if path.name not in ("", "..") else path.resolve().name

    @property
    def origin(self) -> dict[str, object]:
        """Where the model is from, for the record of what is made of it: ``source`` and what else was asked for."""
        known: dict[str, object] = {
            "revision": self.revision,
            "subfolder": self.subfolder,
            "variant": self.variant,
        }
        found: dict[str, object] = {
            "source": self.name,
            **{name: value for name, value in known.items() if value},
        }
        return found if self.random_seed is None else found | {"random_weights": self.random_seed}


@functools.lru_cache(maxsize=64)
def _file_digest(path: Path, size: int, modified: int) -> bytes:
    # size and time are there for the cache alone: a file that was written anew is read anew
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def model_digest(source: ModelSource) -> str:
    """16 hexadecimal digits over the config and every byte of the weights of the model, or the seed of random ones."""
    settings = {name: value for name, value in source.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    if source.random_seed is not None:
        digest.update(f"random weights {source.random_seed}".encode())
    for path in source.weight_paths:
        status = path.stat()
        digest.update(_file_digest(path, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()[:16]


def preset_config(name: str) -> dict[str, Any]:
    """The settings of the model of a preset, as its authors published them."""
    return json_object(Path(__file__).resolve().parent.parent / "presets" / f"{name}.json")


def shipped(folder: Path, called: str) -> Path:
    """``folder`` of the package; ModelNotFoundError when this installation lacks what is ``called`` so."""
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"{called} is not part of this installation ({folder} is not there); install prune-lab again"
        )
    return folder


# Finding ---------------------------------------------------------------------------------------------------------


def _from_folder(text: str, folder: Path, *, variant: str = "", subfolder: str = "") -> ModelSource:
    inner = folder / subfolder if subfolder else folder
    kind: SourceKind = "model"
    if (inner / "model_index.json").is_file():
        kind = "pipeline"
        config, found = checked_pipeline(inner / "model_index.json", variant)
    elif subfolder and not inner.is_dir():
        inside = sorted(
            path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        raise ModelFormatError(
            f"asked for the subfolder {subfolder} of {folder}, which has {', '.join(inside) or 'none'}; "
            "give one of these with --subfolder"
        )
    else:
        config, found = checked_model(inner, variant)
    notes = (
        ()
        if found == variant
        else (
            f"the weights of the {family_of(config).called} are the variant {found}, the only one in {inner}",
        )
    )
    return ModelSource(
        text, kind, inner, config, subfolder=subfolder, variant=found, asked_variant=variant, notes=notes
    )


def _shipped_model(name: str) -> ModelSource:
    for place in shipped_places(name):
        shipped(place, f"the model {name!r}")
    beside = Path(name)
    notes = (f"{name} is the model that ships; the one in the folder here is ./{name}",)
    return dataclasses.replace(
        _from_folder(name, SHIPPED_MODELS[name]()), kind="shipped", notes=notes if beside.exists() else ()
    )


def _refuse_what_means_nothing(text: str, what: str, **asked: str) -> None:
    for name, value in asked.items():
        if value:
            raise ModelNotFoundError(
                f"asked for the {name} {value} of {text}, which is {what} and has none; leave --{name} out"
            )


def _path(text: str) -> Path:
    path = Path(text)
    try:
        return path.expanduser()
    except RuntimeError:  # the home of somebody who is not known here
        return path


def _found(text: str, revision: str, subfolder: str, variant: str) -> ModelSource:
    asked = {"subfolder": subfolder, "variant": variant}
    if text in SHIPPED_MODELS:
        _refuse_what_means_nothing(text, "a shipped model", revision=revision, **asked)
        return _shipped_model(text)
    if text in PRESETS:
        _refuse_what_means_nothing(text, "a preset", revision=revision, **asked)
        return ModelSource(text, "preset", None, preset_config(text))
    path = _path(text)
    if text and path.exists():
        _refuse_what_means_nothing(text, "on this machine", revision=revision)
    if path.suffix == ".safetensors" and path.is_file():
        from prune_lab.models.single_file import unpacked

        _refuse_what_means_nothing(text, "a single file", **asked)
        return _from_folder(text, unpacked(path, preset_config))
    if path.suffix in PICKLED and path.is_file():
        raise ModelFormatError(
            f"asked for the model {text}, a pickled file, which is never opened here; convert it to safetensors "
            "(its owner may offer that already), or give a diffusers folder"
        )
    if path.suffix in OTHER_PACKINGS and path.is_file():
        raise ModelFormatError(f"asked for the model {text}, {OTHER_PACKINGS[path.suffix]}")
    if path.is_file():
        _refuse_what_means_nothing(text, "a file", **asked)
        if path.name == "model_index.json":
            return _from_folder(text, path.parent)
        return ModelSource(text, "config", None, checked_config(path))
    if text and path.is_dir():
        return _from_folder(text, path, **asked)
    if text and path.exists():
        open_regular(path)  # it is no file: raises what it is
    if HUB_ID.fullmatch(text):
        try:
            folder = hub_folder(text, revision=revision, **asked)
        except ModelNotFoundError as error:
            near = _near(text, path).strip()
            raise ModelNotFoundError(f"{error}; {near}" if near else str(error)) from None
        return dataclasses.replace(
            _from_folder(text, folder, **asked), revision=commit_of(folder) or revision
        )
    raise ModelNotFoundError(
        f"asked for the model {path_text(text)!r}, found no file or folder of that name; {_near(text, path)}"
        f"Give {' or '.join(SHIPPED_MODELS)}, a preset ({', '.join(PRESETS)}), a folder, a config.json or a hub id "
        "(owner/name)"
    )


def _near(text: str, path: Path) -> str:
    """A name like ``text`` that would be found; empty where there is none."""
    near = difflib.get_close_matches(text, (*SHIPPED_MODELS, *PRESETS), n=1)
    if not near and path.parent.is_dir() and path.name:
        beside = {one.name: str(one) for one in path.parent.iterdir()}
        near = [beside[name] for name in difflib.get_close_matches(path.name, beside, n=1, cutoff=0.85)]
    return f"did you mean {near[0]}? " if near else ""


def resolve_model(
    text: str,
    *,
    revision: str = "",
    subfolder: str = "",
    variant: str = "",
    random_weights: bool = False,
    seed: int = 0,
) -> ModelSource:
    """The model that ``text`` names, its files checked as far as can be without loading them.

    ``revision`` is a branch, tag or commit of a hub repository, ``subfolder`` the folder inside of a model or a
    pipeline, ``variant`` that of the weights (fp16, non_ema, ...); without it the plain ones are read, or the only
    ones. ``random_weights`` keeps the structure of the model alone and draws its weights with ``seed``. Raises
    ModelNotFoundError when nothing has that name, ModelFormatError when its files are damaged or pickled,
    UnsupportedModelError when it is a class whose blocks are not known here.
    """
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise ModelNotFoundError(
            f"asked for the subfolder {subfolder} of {text}; give a folder inside of the model"
        )
    try:
        found = _found(text, revision, subfolder.strip("/"), variant)
    except StorageError as error:
        raise ModelNotFoundError(str(error)) from None
    except (OSError, UnicodeError) as error:  # no name of a file, or it may not be read
        reason = getattr(error, "strerror", None) or "it is no name of a file"
        raise ModelNotFoundError(
            f"asked for the model {path_text(text)!r}: {reason}; check its name and who may read it"
        ) from None
    if not random_weights:
        return found
    note = f"the weights of {text} are random (seed {seed}): what is measured holds for its structure alone"
    return dataclasses.replace(
        found,
        kind="preset" if found.kind == "preset" else "config",
        folder=None,
        random_seed=seed,
        notes=(note,),
    )


def configured_model(config: RunConfig) -> ModelSource:
    """The model that the settings of a run name, found as they say."""
    return resolve_model(
        config.model,
        revision=config.revision,
        subfolder=config.subfolder,
        variant=config.variant,
        random_weights=config.random_weights,
        seed=config.seed,
    )


def recorded_model(config: RunConfig, run: Path) -> ModelSource:
    """``configured_model`` of the run in ``run``.

    Where the model that its config.toml names is not found, ModelNotFoundError says from where a run names it.
    """
    try:
        return configured_model(config)
    except ModelNotFoundError as error:
        text, written = config.model, run / "config.toml"
        if not written.is_file() or load_config(written).model != text or _path(text).is_absolute():
            raise
        raise ModelNotFoundError(
            f"asked for the run {path_text(run)}, whose model is {path_text(text)!r} as seen from the folder in which "
            f"the run was started; found none from {path_text(Path.cwd())}: call prune-lab in that other "
            f"folder ({error})"
        ) from None
