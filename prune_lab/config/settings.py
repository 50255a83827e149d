"""The settings of a run as frozen, checked dataclasses, one for each table of the TOML."""

from __future__ import annotations

import dataclasses
import math
import re

from prune_lab.errors import ConfigError

GROUP_KINDS = ("block", "pair", "triplet", "stage", "inner")
PLAN_FILES = (".txt", ".json")  # groups may also be plans from such a file
SOLVERS = ("exact", "interactions", "greedy", "evolution")
BUDGET_CONTROLS = ("uniform", "random-median", "lowest-one-shot", "similarity")  # found for a budget
REPAIRS = ("none", "shift", "scale-shift", "linear", "refit", "best")
LOSS_VARIANTS = ("raw", "normalised", "outlier-masked", "self-attention", "inverse-sensitivity")
SCHEDULES = ("constant", "linear", "cosine")
RANK_ENGINES = ("local", "ray")
CROPS = ("center", "random")
CACHE_FORMATS = ("float32", "float16")
DTYPES = ("float32", "bfloat16", "float16")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


# Checks ----------------------------------------------------------------------------------------------------------


def require(met: bool, name: str, value: object, rule: str) -> None:
    """Raise ConfigError, which says what the setting ``name`` was and by which ``rule`` it fails, unless ``met``."""
    if not met:
        raise ConfigError(f"setting {name} = {value!r} cannot be used; it must be {rule}")


def _require_counts(table: str, settings: object, **least: int) -> None:
    for field, bound in least.items():
        value = getattr(settings, field)
        require(value >= bound, f"{table}.{field}", value, f"a whole number of at least {bound}")


def _require_finite(table: str, settings: object, *fields: str) -> None:
    for field in fields:
        value = getattr(settings, field)
        require(
            math.isfinite(value) and value >= 0, f"{table}.{field}", value, "a finite number, zero or more"
        )


def _require_fraction(table: str, settings: object, *fields: str) -> None:
    for field in fields:
        value = getattr(settings, field)
        require(0 <= value < 1, f"{table}.{field}", value, "at least 0 and below 1")


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
        require(0 <= self.race <= 1, "score.race", self.race, "a share from 0 to 1")
        _require_finite("score", self, "guidance")
        named = [group for group in self.groups if not group.endswith(PLAN_FILES)]
        rule = f"some of {', '.join(GROUP_KINDS)}, or files of plans ({', '.join(PLAN_FILES)})"
        require(bool(self.groups) and set(named) <= set(GROUP_KINDS), "score.groups", list(self.groups), rule)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """Which plans become candidates: the controls, and the best found under each budget."""

    budgets: tuple[str, ...] = ("params<=bk-base", "params<=bk-small", "params<=bk-tiny")
    # each one budget, or several that hold at once with commas between them: "macs<=65%, latency<=0.7x"
    solver: str = "exact"  # exact, interactions, greedy or evolution
    count: int = 1  # plans per budget
    diverse: int = 1  # blocks in which any two plans of a budget differ at least
    native_only: bool = True  # plans that a plain diffusers config describes, which alone can be built
    keep: tuple[str, ...] = ()  # blocks and stages that stay
    remove: tuple[str, ...] = ()  # blocks and stages that go
    quotas: tuple[str, ...] = ()  # "Dn1<=2": at most two blocks of Dn1 go; "Dn1=2": exactly two
    longest_run: int = 0  # most blocks in a row that go together; 0: no rule
    least_resnets: int = 0  # residual blocks that stay in every stage
    samples: int = 96  # plans that are measured to learn interactions
    trials: int = 400  # plans that the evolution tries
    controls: tuple[str, ...] = ("bk-base", "bk-small", "bk-tiny")
    # plans; uniform, random-median, lowest-one-shot and similarity are found for each budget

    def __post_init__(self) -> None:
        _require_counts(
            "search", self, count=1, diverse=1, longest_run=0, least_resnets=0, samples=20, trials=40
        )
        some = bool(self.budgets or self.controls)
        require(some, "search.budgets", list(self.budgets), "not empty when search.controls is empty too")
        require(self.solver in SOLVERS, "search.solver", self.solver, f"one of {', '.join(SOLVERS)}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RepairConfig:
    """The closed-form repair of the cut before any training, from the teacher's activations on the probe."""

    kind: str = "none"  # none, shift, scale-shift, linear, refit or best

    def __post_init__(self) -> None:
        require(self.kind in REPAIRS, "repair.kind", self.kind, f"one of {', '.join(REPAIRS)}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The pictures that students are trained on, and how they are encoded."""

    source: str = (
        ""  # folder, .parquet, .tar or glob, hub id, finished cache; empty: distill.pictures shipped ones
    )
    image_column: str = ""  # empty: the usual names, such as image or jpg
    caption_column: str = ""  # empty: the usual names, such as caption or text
    limit: int = 0  # pictures, drawn at random from all; 0: all
    crop: str = "center"  # after the short side was scaled to the model's size: center or random
    flip: bool = False  # every second variant is mirrored
    variants: int = (
        0  # encodings of each picture, the first cropped in the middle; 0: 4 for random crops, 2 for flips
    )
    seed: int = 0  # of limit and crops
    cached: bool = True  # encode once, before the training; false: encode each batch when it is drawn
    format: str = (
        "float32"  # of the cache: what the encoders gave; float16: half the disk, rounded to 3 digits
    )
    shard: int = 1024  # pictures per file of the cache, and what is lost when a build is stopped
    batch: int = 16  # pictures per pass of the encoders

    def __post_init__(self) -> None:
        _require_counts("data", self, limit=0, variants=0, seed=0, shard=1, batch=1)
        require(self.crop in CROPS, "data.crop", self.crop, f"one of {', '.join(CROPS)}")
        formats = f"one of {', '.join(CACHE_FORMATS)}"
        require(self.format in CACHE_FORMATS, "data.format", self.format, formats)
        most = 1 + self.flip  # different ones, without random crops
        rule = f"at most {most} without random crops" + ("" if self.flip else " or flips")
        require(self.crop == "random" or self.variants <= most, "data.variants", self.variants, rule)
        rule = "0 or at least 2 for flips"
        require(not self.flip or self.variants != 1, "data.variants", self.variants, rule)

    @property
    def num_variants(self) -> int:
        """Number of encodings of each image."""
        return self.variants or (4 if self.crop == "random" else 1 + self.flip)


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
    loss_variant: str = (
        "raw"  # of the feature loss: raw (paper), normalised, outlier-masked, ... (see losses)
    )
    min_snr: float = 0.0  # gamma of the min-SNR weighting of the task loss (arXiv:2303.09556); 0: off
    noise_offset: float = 0.0  # of each channel of the noise; 0: off
    ema_decay: float = 0.995  # short runs need a short memory; 0 keeps the last weights
    clip_norm: float = 1.0  # of the gradient; 0 does not clip
    warmup: int = 20  # steps until the learning rate is reached
    schedule: str = "constant"  # of the learning rate after the warm-up: constant, linear or cosine
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for guidance
    seed: int = 0
    checkpoint_every: int = 100  # steps
    validate_every: int = 100  # steps
    precision: str = (
        ""  # of the forward passes, weights stay float32: float32 or bfloat16; empty: the teacher's
    )
    micro_batch: int = (
        0  # samples of one student per forward and backward pass; 0: as many as fit into memory
    )
    gradient_checkpointing: bool = False  # of the students: less memory for a third more work
    compile: bool = False  # the blocks of teacher and students go through torch.compile
    together: int = 0  # students trained on one teacher pass; 0: as many as fit into memory
    diverged: float = 3.0  # times the held-out loss before training: a student above that is stopped
    trackers: tuple[str, ...] = ("tensorboard",)  # and what else accelerate knows; a CSV is always written
    grid_every: int = 0  # steps between grids of pictures drawn by each student; 0: none
    pictures: int = 2048  # training pictures whose latents are cached

    def __post_init__(self) -> None:
        counts = {"steps": 1, "batch": 1, "warmup": 0, "seed": 0, "checkpoint_every": 1, "validate_every": 1}
        _require_counts("distill", self, **counts, pictures=1, micro_batch=0, together=0, grid_every=0)
        weights = ("task_weight", "output_weight", "feature_weight")
        _require_finite("distill", self, "learning_rate", "weight_decay", "clip_norm", *weights)
        _require_finite("distill", self, "min_snr", "noise_offset")
        require(self.diverged > 1, "distill.diverged", self.diverged, "above 1")
        require(
            self.loss_variant in LOSS_VARIANTS,
            "distill.loss_variant",
            self.loss_variant,
            f"one of {', '.join(LOSS_VARIANTS)}",
        )
        require(
            self.schedule in SCHEDULES, "distill.schedule", self.schedule, f"one of {', '.join(SCHEDULES)}"
        )
        require(
            self.precision in ("", "float32", "bfloat16"),
            "distill.precision",
            self.precision,
            "float32, bfloat16 or empty for the teacher's; float16 loses the gradients of students",
        )
        require(self.learning_rate > 0, "distill.learning_rate", self.learning_rate, "above zero")
        _require_fraction("distill", self, "ema_decay", "caption_dropout")
        total = self.task_weight + self.output_weight + self.feature_weight
        require(
            total > 0, "distill.task_weight", self.task_weight, "above zero when the other two weights are 0"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RankConfig:
    """Who gets how much of the distillation: everyone all of it, or less who falls behind in a tournament."""

    eta: int = 0  # the best 1/eta of each rung go on, and who ties with them; 0: everyone gets distill.steps
    first: int = (
        0  # steps of the first rung; 0: distill.steps over the power of eta that leaves twice the warm-up
    )
    keep_controls: bool = False  # BK-SDM's and the other controls go on to the end, whatever their loss
    clip: bool = True  # from the second rung on the CLIP score decides between those who tie on held-out loss
    engine: str = "local"  # who trains the candidates of a rung: local or ray
    address: str = ""  # of a running Ray cluster, or auto for this machine's; empty: one is started here
    storage: str = ""  # folder or fsspec URL; empty: every machine of the cluster sees the run folder
    cpus: int = 1  # cores, and threads, of each candidate on a Ray cluster

    def __post_init__(self) -> None:
        require(self.eta == 0 or self.eta >= 2, "rank.eta", self.eta, "0 for no tournament, or 2 or more")
        _require_counts("rank", self, first=0, cpus=1)
        known = f"one of {', '.join(RANK_ENGINES)}"
        require(self.engine in RANK_ENGINES, "rank.engine", self.engine, known)


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
        require(usable, "evaluate.seeds", list(self.seeds), "one or more whole numbers, none below zero")
        require(bool(self.scorer), "evaluate.scorer", self.scorer, "reference, a folder or a hub id")


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
    repair: RepairConfig = dataclasses.field(default_factory=RepairConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    rank: RankConfig = dataclasses.field(default_factory=RankConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        require(
            bool(self.model), "model", self.model, "reference, a preset, a folder, a config.json or a hub id"
        )
        is_device = _DEVICE.fullmatch(self.device) is not None
        require(is_device, "device", self.device, "auto, cpu, mps, cuda or cuda:N")
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        require(self.seed >= 0, "seed", self.seed, "a whole number of at least 0")
        most = self.distill.steps
        require(
            self.rank.first <= most, "rank.first", self.rank.first, f"no more than distill.steps = {most}"
        )
