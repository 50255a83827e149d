"""The settings of a run: frozen, checked dataclasses, and the TOML they are read from and written to.

Each table of the TOML is one dataclass, each key one field of the same name, so there is one list of settings and one
place for their defaults. The settings that stand before the first table are those of ``RunConfig`` itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from prune_lab.errors import ConfigError

GROUP_KINDS = ("block", "pair", "triplet", "stage", "inner")
PLAN_FILES = (".txt", ".json")  # groups may also be plans from such a file
DTYPES = ("float32", "bfloat16", "float16")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


class _Settings(Protocol):
    """Any of the dataclasses below."""

    __dataclass_fields__: typing.ClassVar[dict[str, dataclasses.Field[Any]]]


Settings = TypeVar("Settings", bound=_Settings)


# Checks ----------------------------------------------------------------------------------------------------------


def _require(met: bool, name: str, value: object, rule: str) -> None:
    if not met:
        raise ConfigError(f"setting {name} = {value!r} cannot be used; it must be {rule}")


def _require_counts(table: str, settings: object, **least: int) -> None:
    for field, bound in least.items():
        value = getattr(settings, field)
        _require(value >= bound, f"{table}.{field}", value, f"a whole number of at least {bound}")


def _require_finite(table: str, settings: object, *fields: str) -> None:
    for field in fields:
        value = getattr(settings, field)
        _require(
            math.isfinite(value) and value >= 0, f"{table}.{field}", value, "a finite number, zero or more"
        )


def _require_fraction(table: str, settings: object, *fields: str) -> None:
    for field in fields:
        value = getattr(settings, field)
        _require(0 <= value < 1, f"{table}.{field}", value, "at least 0 and below 1")


# Tables ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """The fixed inputs on which blocks are scored and candidates compared."""

    samples: int = 64  # held-out pictures
    timesteps: int = 8  # points they are spread over, evenly along the noise schedule
    seed: int = 0
    prompts: str = (
        ""  # .txt, .csv or .parquet; the model draws their pictures itself; empty: held-out pictures
    )

    def __post_init__(self) -> None:
        _require_counts("probe", self, samples=2, timesteps=1, seed=0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """How blocks are scored."""

    criterion: str = "output-mse"  # what is searched and reported with
    also: tuple[str, ...] = ()  # criteria measured beside it, on the same model and probe
    groups: tuple[str, ...] = ("block", "pair", "stage")
    batch: int = 0  # probe samples per forward pass; 0: as many as fit into memory
    guidance: float = 1.0  # of the predictions that output criteria compare; 1: no guidance
    bootstrap: int = 1000  # resamples behind each interval
    race: float = (
        0.0  # share of the naive loop's cost for a race by output criteria; 0: every group gets all samples
    )
    channels_last: bool = (
        False  # memory format of the U-Net while it is scored; pays on a GPU with tensor cores
    )
    compile: bool = False  # blocks go through torch.compile first; pays when there are many samples

    def __post_init__(self) -> None:
        _require_counts("score", self, batch=0, bootstrap=1)
        _require(0 <= self.race <= 1, "score.race", self.race, "a share from 0 to 1")
        _require_finite("score", self, "guidance")
        named = [group for group in self.groups if not group.endswith(PLAN_FILES)]
        rule = f"some of {', '.join(GROUP_KINDS)}, or files of plans ({', '.join(PLAN_FILES)})"
        _require(
            bool(self.groups) and set(named) <= set(GROUP_KINDS), "score.groups", list(self.groups), rule
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """Which plans become candidates: the controls, and the best found under each budget."""

    budgets: tuple[str, ...] = ("params<=bk-base", "params<=bk-small", "params<=bk-tiny")
    count: int = 1  # plans per budget
    controls: tuple[str, ...] = ("bk-base", "bk-small", "bk-tiny")

    def __post_init__(self) -> None:
        _require_counts("search", self, count=1)
        some = bool(self.budgets or self.controls)
        _require(some, "search.budgets", list(self.budgets), "not empty when search.controls is empty too")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """The short distillation that every candidate goes through; the weights of the three losses are BK-SDM's."""

    steps: int = 500
    batch: int = 16
    learning_rate: float = 5e-5  # BK-SDM, arXiv:2305.15798
    weight_decay: float = 1e-2
    task_weight: float = 1.0  # against the noise that was added
    output_weight: float = 1.0  # against the teacher's prediction
    feature_weight: float = 1.0  # against the teacher's stage outputs
    ema_decay: float = 0.995  # short runs need a short memory; 0 keeps the last weights
    clip_norm: float = 1.0  # of the gradient; 0 does not clip
    warmup: int = 20  # steps until the learning rate is reached
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for guidance
    seed: int = 0
    checkpoint_every: int = 100  # steps
    validate_every: int = 100  # steps
    pictures: int = 2048  # training pictures whose latents are cached

    def __post_init__(self) -> None:
        counts = {"steps": 1, "batch": 1, "warmup": 0, "seed": 0, "checkpoint_every": 1, "validate_every": 1}
        _require_counts("distill", self, **counts, pictures=1)
        weights = ("task_weight", "output_weight", "feature_weight")
        _require_finite("distill", self, "learning_rate", "weight_decay", "clip_norm", *weights)
        _require(self.learning_rate > 0, "distill.learning_rate", self.learning_rate, "above zero")
        _require_fraction("distill", self, "ema_decay", "caption_dropout")
        total = self.task_weight + self.output_weight + self.feature_weight
        _require(
            total > 0, "distill.task_weight", self.task_weight, "above zero when the other two weights are 0"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """The pictures that teacher and candidates draw, and who judges them."""

    prompts: tuple[str, ...] = ()  # empty: captions of the held-out split
    seeds: tuple[int, ...] = (0,)  # one picture per prompt and seed
    steps: int = 25  # of the sampler
    guidance: float = 7.5
    scorer: str = "reference"  # a CLIP model: reference, a folder or a hub id

    def __post_init__(self) -> None:
        _require_counts("evaluate", self, steps=1)
        _require_finite("evaluate", self, "guidance")
        usable = bool(self.seeds) and min(self.seeds) >= 0
        _require(usable, "evaluate.seeds", list(self.seeds), "one or more whole numbers, none below zero")
        _require(bool(self.scorer), "evaluate.scorer", self.scorer, "reference, a folder or a hub id")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """How latency is measured."""

    batch: int = 1
    runs: int = 20  # recorded calls
    warmup: int = 3  # calls before them that are not recorded

    def __post_init__(self) -> None:
        _require_counts("profile", self, batch=1, runs=2, warmup=0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What the report says besides the run's own tables."""

    title: str = "Block pruning report"
    also_presets: tuple[str, ...] = ()  # models whose reduction table is shown beside the run's own


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run; two runs with equal settings differ in timings only."""

    model: str = "reference"  # reference, a preset, a pipeline or U-Net folder, a config.json, or a hub id
    device: str = "auto"
    dtype: str = "float32"
    seed: int = 0
    probe: ProbeConfig = dataclasses.field(default_factory=ProbeConfig)
    score: ScoreConfig = dataclasses.field(default_factory=ScoreConfig)
    search: SearchConfig = dataclasses.field(default_factory=SearchConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        _require(
            bool(self.model), "model", self.model, "reference, a preset, a folder, a config.json or a hub id"
        )
        is_device = _DEVICE.fullmatch(self.device) is not None
        _require(is_device, "device", self.device, "auto, cpu, mps, cuda or cuda:N")
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        _require(self.seed >= 0, "seed", self.seed, "a whole number of at least 0")


# Names -----------------------------------------------------------------------------------------------------------


def _flat(config: RunConfig) -> dict[str, object]:
    flat: dict[str, object] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            own_fields = dataclasses.fields(value)
            flat |= {f"{field.name}.{own.name}": getattr(value, own.name) for own in own_fields}
        else:
            flat[field.name] = value
    return flat


def setting_names() -> tuple[str, ...]:
    """Every setting by its dotted name, such as ``distill.steps``, in the order they are written."""
    return tuple(_flat(RunConfig()))


def _suggestion(name: str) -> str:
    known = setting_names()
    leaf = name.rsplit(".", 1)[-1]
    # a right name in the wrong table is a nearer miss than any spelling
    moved = [other for other in known if other.rsplit(".", 1)[-1] == leaf]
    near = moved or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    tables = sorted({other.split(".")[0] for other in known})
    return f"settings and tables are: {', '.join(tables)}"


def changed_settings(old: RunConfig, new: RunConfig) -> tuple[str, ...]:
    """The dotted names of the settings in which ``old`` and ``new`` differ."""
    before, after = _flat(old), _flat(new)
    return tuple(name for name in before if before[name] != after[name])


# Reading ---------------------------------------------------------------------------------------------------------


_KIND_NAMES: dict[type, str] = {
    str: "text in quotes",
    int: "whole number",
    float: "number",
    bool: "true or false",
}


def _read(hint: Any, value: object, name: str) -> object:
    if dataclasses.is_dataclass(hint):
        _require(isinstance(value, dict), name, value, f"a table: write [{name}] and its settings below")
        return _build(
            typing.cast("type[_Settings]", hint), typing.cast("dict[str, object]", value), f"{name}."
        )
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        _require(isinstance(value, list), name, value, f"a list of {_KIND_NAMES[item]}s in [ ]")
        return tuple(_read(item, one, name) for one in typing.cast("list[object]", value))
    if hint is float and type(value) is int:
        return float(value)
    # `type`, not `isinstance`: true is an int to Python, and no count to a reader
    _require(type(value) is hint, name, value, f"a {_KIND_NAMES[hint]}")
    return value


def _build(kind: type[Settings], table: Mapping[str, object], prefix: str) -> Settings:
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in table.items():
        name = prefix + key
        if key not in hints:
            raise ConfigError(f"there is no setting {name}; {_suggestion(name)}")
        values[key] = _read(hints[key], value, name)
    return kind(**values)


def config_from_toml(text: str) -> RunConfig:
    """The settings that the TOML ``text`` describes.

    Raises ConfigError, as ``load_config`` does.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"this is not TOML: {error}; write lines such as steps = 500 under [distill]"
        ) from None
    return _build(RunConfig, table, "")


def load_config(path: Path | str) -> RunConfig:
    """The settings in the TOML file ``path``; whatever it leaves out has its default.

    Raises ConfigError when the file is missing or not TOML, or when a setting is unknown or out of range.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"asked for the settings in {path}: {reason}; give the path of a TOML file"
        ) from None
    try:
        return config_from_toml(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


# Writing ---------------------------------------------------------------------------------------------------------


def _literal(value: object) -> str:
    if isinstance(value, str):
        # TOML's escapes are JSON's, but TOML wants U+007F escaped as well
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_literal(one) for one in value)}]"
    return repr(value)


def to_toml(config: RunConfig) -> str:
    """The TOML of every setting of ``config``, defaults included; reading it gives ``config`` again."""
    lines = []
    tables = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            tables += ["", f"[{field.name}]"]
            tables += [
                f"{own.name} = {_literal(getattr(value, own.name))}" for own in dataclasses.fields(value)
            ]
        else:
            lines.append(f"{field.name} = {_literal(value)}")
    return "\n".join(lines + tables) + "\n"
