"""Students that bring code of their own: any plan of any class, by one small model file in the student's folder.

``modeling_pruned_<hash>.py`` beside this file is that model file; its name holds the first digits of the SHA-256 of its
content. A folder carries a copy, which plain diffusers runs when it is told to trust it. Here the copy is never run: by
its hash it is known which file of this package it equals, and that one is run. A file that a release has shipped stays
here for ever, so that its students load; a better one is added under its own name and becomes ``NEWEST``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from prune_lab.errors import NonNativePlanError, UnsupportedModelError
from prune_lab.families.family import (
    CLASS_NAME,
    Family,
    Layout,
    Outline,
    Removed,
    Unit,
    plain_config,
)
from prune_lab.families.meta_device import shapes_of, tensors_of
from prune_lab.families.own_settings import check_own
from prune_lab.families.widths import Kept, narrowed
from prune_lab.runtime import printable, read_bytes

FOLDER = Path(__file__).resolve().parent
NEWEST = "modeling_pruned_a6a94653a752"
PREFIX = "Pruned"  # of class names; what follows is the diffusers class
REMOVED, MAIN_PATH, WIDTHS, AUTO_MAP = "removed", "main_path", "widths", "auto_map"
WIDTHS_MARK = "widths_mark"  # the tensor without numbers that tells by which widths the weights were saved
GUARD = "quantization_config"  # in a file: makes every class but its own refuse it
_OWN = (REMOVED, MAIN_PATH, WIDTHS, AUTO_MAP, GUARD)  # settings that the diffusers class does not have


def is_own(source: Any) -> bool:
    """Whether a config, or the name of a class, is that of a student with code of its own."""
    name = source.get(CLASS_NAME) if isinstance(source, Mapping) else source
    return isinstance(name, str) and name.startswith(PREFIX)


def base_name(class_name: str) -> str:
    """The diffusers class that the class ``class_name`` of a model file is made of."""
    return class_name.removeprefix(PREFIX)


def without_guard(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config`` of a file as its own class reads it; itself where nothing in it keeps other classes away."""
    settings = config.get(GUARD)
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    guarded = is_own(config) and isinstance(method, str) and method.startswith("none, ")
    return {name: value for name, value in config.items() if not (guarded and name == GUARD)}


# Model files ---------------------------------------------------------------------------------------------------------


@functools.cache
def known_files() -> Mapping[str, Path]:
    """The model files of this package, old ones too, by the SHA-256 of their content."""
    return {
        hashlib.sha256(read_bytes(path)).hexdigest(): path for path in sorted(FOLDER.glob("modeling_*.py"))
    }


def file_of(config: Mapping[str, Any]) -> str:
    """Name of the model file of a ``config``, without its ending. Raises UnsupportedModelError where it says none."""
    named = config.get(AUTO_MAP)
    text = named.get("AutoModel") if isinstance(named, Mapping) else None
    file, _, name = text.partition(".") if isinstance(text, str) else ("", "", "")
    if not file.isidentifier() or name != config.get(CLASS_NAME):
        raise UnsupportedModelError(
            f"asked for a {printable(str(config.get(CLASS_NAME)), 60)}, found no file of its code in the config "
            f"({AUTO_MAP}.AutoModel, such as {NEWEST}.{PREFIX}UNet2DConditionModel); fetch the model again"
        )
    return file


def check_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError unless the model file that ``config`` names is one of this package, and its copy in
    ``folder`` the same byte for byte. The copy is read, and never run; without it the name alone counts, since no
    code is fetched from a hub.
    """
    if not is_own(config):
        return
    path = Path(folder) / f"{file_of(config)}.py"
    if not path.is_file():
        code_path(path.stem)
        return
    found = hashlib.sha256(read_bytes(path)).hexdigest()
    known = known_files().get(found)
    if known is None or known.name != path.name:
        raise UnsupportedModelError(
            f"found {path}, code that this version of prune-lab does not know (SHA-256 {found[:12]}...) and so never "
            f"runs; it runs {', '.join(sorted(one.name for one in known_files().values()))}: install the prune-lab "
            "that wrote the folder, or load it with diffusers where you trust its code (trust_remote_code=True)"
        )


@functools.cache
def _module(file: str) -> ModuleType:
    """The package's own copy of a model file, run under the name that diffusers gives it too."""
    spec = importlib.util.spec_from_file_location(file, FOLDER / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file] = module  # what is pickled is found again by this name
    spec.loader.exec_module(module)
    return module


def own_class(file: str, class_name: str) -> type[Any]:
    """The class ``class_name`` of the package's copy of a model file. Raises UnsupportedModelError for another file."""
    known = {path.stem for path in known_files().values()}
    if file not in known or not is_own(class_name):
        raise UnsupportedModelError(
            f"asked for the code {printable(file, 60)}.{printable(class_name, 60)}, which this version of prune-lab "
            f"does not know and so never runs; it runs {', '.join(sorted(known))}: install the prune-lab that wrote "
            "the model"
        )
    try:
        found: type[Any] = getattr(_module(file), class_name)
    except AttributeError:
        raise UnsupportedModelError(
            f"asked for a {printable(class_name, 60)}, and the installed diffusers has no {base_name(class_name)}"
        ) from None
    return found


def only_watches(hook: Any) -> bool:
    """Whether ``hook`` of a module is one that a model file has put there: it looks at results and changes nothing."""
    owner = type(getattr(hook, "__self__", None))
    return owner.__module__.rpartition(".")[2] in {path.stem for path in known_files().values()}


def code_path(file: str) -> Path:
    """Where the package's copy of a model file lies. Raises UnsupportedModelError for another file."""
    for path in known_files().values():
        if path.stem == file:
            return path
    raise UnsupportedModelError(
        f"asked for the code {printable(file, 60)}, which this version of prune-lab does not know and so never runs; "
        "install the prune-lab that wrote the model"
    )


def entry_of(config: Mapping[str, Any]) -> list[str]:
    """What ``model_index.json`` says of a model: the library or model file, and the class."""
    return [file_of(config) if is_own(config) else "diffusers", str(config[CLASS_NAME])]


def mark_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """By name of each tensor without numbers in a student of this ``config``, which was checked: its shape."""
    code = _module(file_of(config))
    removed, widths = config.get(REMOVED) or {}, config.get(WIDTHS)
    shape = code.mark_shape(config.get(REMOVED), config.get(MAIN_PATH))
    marks = {f"{path}.{how['mark']}": shape for path, how in removed.items() if how.get("mark")}
    return marks | ({WIDTHS_MARK: code.mark_shape(widths)} if widths else {})


# What is left of a model ---------------------------------------------------------------------------------------------


def _whole(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the model that nothing is gone from."""
    settings = {name: value for name, value in config.items() if name not in _OWN}
    return {**settings, CLASS_NAME: base_name(str(config[CLASS_NAME]))}


@functools.lru_cache(maxsize=1024)
def _mark(unit: Unit, names: tuple[str, ...]) -> str:
    """The first tensor of ``unit`` that is gone with it, by its path in it; empty where it has none.

    Under its name the student has a tensor without numbers: the plain class then refuses the weights, where it would
    leave what is missing as random numbers, or as no numbers at all.
    """
    inside = (name.removeprefix(f"{unit.path}.") for name in names if name.startswith(f"{unit.path}."))
    kept = tuple(f"{path}." for path in unit.keeps)
    return next((name for name in inside if not name.startswith(kept)), "")


def own_layout(family: Family, outline: Outline, removed: Removed, kept: Kept | None = None) -> Layout:
    """The student of ``outline`` without the units ``removed``, whatever they are, by the newest model file.

    Of the sites in ``kept`` it has only these of their units. ``family`` is that of the diffusers class. Raises
    NonNativePlanError where the student would be the model itself, or nothing of it would tell it from the plain class.
    """
    units = [unit for unit in outline.units if unit.name in removed]
    names = tensors_of(_whole(outline.config))
    gone: dict[str, Any] = dict(outline.config.get(REMOVED) or {})
    paths: dict[str, str | None] = {}
    new: list[str] = []
    sizes, cut = narrowed(shapes_of(_whole(outline.config)), kept) if kept else ({}, {})
    for unit in units:
        mark = _mark(unit, names)
        stays = [f"{unit.path}.{path}" for path in unit.keeps]
        paths |= {unit.path: None} | dict(zip(stays, stays, strict=True))
        if mark:
            new.append(f"{unit.path}.{mark}")
        gone = {path: how for path, how in gone.items() if not path.startswith(f"{unit.path}.")}
        gone[unit.path] = {
            "hands_on": list(unit.hands_on),
            "channels": unit.main_channels if unit.takes_skip else None,
            "in_tuple": unit.in_tuple,
            "keeps": list(unit.keeps),
            "mark": mark,
        }
    widths = {
        path: numbers
        for path, numbers in ((outline.config.get(WIDTHS) or {}) | sizes).items()
        if not any(path == one or path.startswith(f"{one}.") for one in gone)
    }
    if (gone or not widths) and not any(how["mark"] for how in gone.values()):
        raise NonNativePlanError(
            "asked for a student with code of its own that has all tensors of the model: nothing would tell the two "
            "apart; remove a block that has weights"
        )
    name = PREFIX + base_name(str(outline.config[CLASS_NAME]))
    takes_part = any(how["channels"] is not None for how in gone.values())
    writers = [family.stem(outline.config), *(unit.path for unit in outline.units if not unit.inside)]
    # those of blocks that were gone before as well: their shape says what is gone of all
    marks = [f"{path}.{how['mark']}" for path, how in gone.items() if how["mark"]]
    main_path = writers if takes_part else None
    own = {
        CLASS_NAME: name,
        REMOVED: gone,
        MAIN_PATH: main_path,
        **({WIDTHS: widths} if widths else {}),
        AUTO_MAP: {"AutoModel": f"{NEWEST}.{name}"},
    }
    code = _module(NEWEST)
    shape = code.mark_shape(gone, main_path)
    return Layout(
        MappingProxyType({**outline.config, **own}),
        MappingProxyType(paths | dict(zip(new, new, strict=True)) | ({} if widths else {WIDTHS_MARK: None})),
        cut | dict.fromkeys(marks, lambda tensor: tensor.new_empty(shape)),
        empty={WIDTHS_MARK: code.mark_shape(widths)} if widths else {},
    )


# Students as models --------------------------------------------------------------------------------------------------


def _without_gone(family: Family, model: Any) -> Outline:
    config = plain_config(model)
    outline = family.outline(shapes_of(_whole(config)))
    paths = set(config.get(REMOVED) or {})
    gone = {unit.name for unit in outline.units if unit.path in paths}
    units = tuple(
        dataclasses.replace(unit, gone=True, reason="is gone already", stand_in=None, changes_others=False)
        if unit.name in gone
        else dataclasses.replace(
            unit,
            changes_others=False,  # those that stay are what they were, whatever else leaves
            leaves_with=tuple(name for name in unit.leaves_with if name not in gone),
            self_attention=tuple(
                path for path in unit.self_attention if not any(path.startswith(f"{one}.") for one in paths)
            ),
        )
        for unit in outline.units
        if unit.inside not in gone  # what lies in a block that is gone has no place any more
    )
    return Outline(MappingProxyType(config), outline.stages, units)


def _nothing_native(outline: Outline, removed: Removed) -> Layout:
    if removed:
        raise NonNativePlanError(
            "blocks of this model are gone by code of its own, which no plain config describes; ask for --form own"
        )
    return Layout(outline.config, {})


def own_family(family: Family, file: str) -> Family:
    """What is known about students that the model file ``file`` makes of the class of ``family``."""
    name = PREFIX + family.model_class().__name__

    def settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
        return {key: value for key, value in config.items() if key not in _OWN}

    def check(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        family.check(settings(config), settings(defaults))
        try:
            whole = shapes_of(_whole(config))
        except Exception:  # diffusers refuses the whole model: it is told so where the student is built
            return
        check_own(whole, *(config.get(name) for name in (REMOVED, MAIN_PATH, WIDTHS)))

    def gone(outline: Outline) -> Removed:
        return frozenset(unit.name for unit in outline.units if unit.gone)

    return dataclasses.replace(
        family,
        model_class=lambda: own_class(file, name),
        check=check,
        outline=lambda model: _without_gone(family, model),
        layout=_nothing_native,
        neutral=None,
        levels=lambda outline: [],
        more_options=lambda *_: (),
        complete=None,
        plans={},
        stage_features=lambda outline, removed: family.stage_features(outline, removed | gone(outline)),
    )
