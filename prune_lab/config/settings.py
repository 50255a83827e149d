"""The settings of a run as frozen, checked dataclasses, one for each table of the TOML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from prune_lab.config.declaration import (
    CHOICES,
    MOST,
    Setting,
    declared,
    in_words,
    require,
    require_ranges,
    setting,
)

GROUP_KINDS = ("block", "pair", "triplet", "stage", "inner")
PLAN_FILES = (".txt", ".json")  # groups may also be plans from such a file
BUDGET_CONTROLS = ("uniform", "random-median", "lowest-one-shot", "similarity")  # found for a budget
SHIPPED = "shipped"  # data.source of the pictures that come with the package
NO_SCORER = "none"
MANY = 10**6  # of what is drawn, tried or measured one by one: more is a slip of the hand
AXES = ("depth", "width")
AUTO = "auto"  # what a setting is called whose value follows from the model
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """The fixed inputs on which blocks are scored and candidates compared."""

    samples: int = setting(
        64, "rows, of one held-out picture each where there are as many", least=2, most=MANY
    )
    timesteps: int = setting(8, "points they are spread over, evenly along the noise schedule", least=1)
    seed: int = setting(0, "seed of the pictures, their noise and their timesteps")
    prompts: str = setting(
        "", "file of prompts (.txt, .csv, .parquet), whose pictures the model draws; empty: held-out pictures"
    )
    drawn: int = setting(
        16, "pictures that the model draws for it where it has no others", least=1, most=MANY
    )
    steps: int = setting(10, "denoising steps of these pictures", least=1, most=MANY)

    def __post_init__(self) -> None:
        require_ranges(self, "probe.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """How blocks are scored."""

    criterion: str = setting("output-mse", "criterion that is searched and reported with")
    also: tuple[str, ...] = setting((), "criteria measured beside it, on the same model and probe")
    groups: tuple[str, ...] = setting(
        ("block", "pair", "stage"),
        f"what is removed at a time: {', '.join(GROUP_KINDS)}, or plans from files ({', '.join(PLAN_FILES)})",
    )
    batch: int = setting(0, "probe samples per forward pass; 0: as many as fit into memory", most=MANY)
    guidance: float = setting(1.0, "guidance scale of the predictions that output criteria compare; 1: none")
    bootstrap: int = setting(1000, "resamples behind each interval", least=1, most=MANY)
    race: float = setting(
        0.0,
        "share of the naive loop's cost, such as 0.15, for a race by output criteria: groups whose place is settled "
        "get no more samples; 0: every group gets all samples",
    )
    channels_last: bool = setting(
        False, "channels-last memory format of the model while it is scored; pays on a GPU with tensor cores"
    )
    stream: bool = setting(
        False,
        "blocks are read from disk when they run, one at a time in the memory of the device, GPU or not: slower, for a "
        "model that does not fit; one that cannot fit is read so anyway",
    )
    compile: bool = setting(False, "put the blocks through torch.compile; pays when there are many samples")

    def __post_init__(self) -> None:
        require(0 <= self.race <= 1, "score.race", self.race, "a share from 0 to 1")
        require_ranges(self, "score.")
        named = [group for group in self.groups if not group.endswith(PLAN_FILES)]
        rule = f"some of {', '.join(GROUP_KINDS)}, or files of plans ({', '.join(PLAN_FILES)})"
        require(bool(self.groups) and set(named) <= set(GROUP_KINDS), "score.groups", list(self.groups), rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """Which plans become candidates: the controls, and the best found under each budget."""

    budgets: tuple[str, ...] = setting(
        (AUTO,),
        'each one budget, or several that hold at once with commas between: "macs<=65%, latency<=0.7x"; auto: the '
        "parameters of the family's named plans (bk-base, bk-small, bk-tiny), or shares of a model without them",
    )
    solver: str = setting("exact", f"how plans are found: {in_words(CHOICES['search.solver'])}")
    objective: str = setting(
        "impact",
        "what greedy, interactions, descent and evolution measure of a plan: impact, as it is cut; repaired, after the "
        "closed-form repair of its cuts, on held-out rows of the probe",
    )
    repair: str = setting(
        "auto",
        f"the repair behind objective repaired: {in_words(CHOICES['search.repair'])}; auto: linear in a U-Net, refit "
        "in a transformer",
    )
    count: int = setting(1, "plans per budget", least=1, most=MANY)
    diverse: int = setting(1, "blocks in which any two plans of a budget differ at least", least=1)
    form: str = setting(
        "native",
        "plans that may be found, by how they can be built: native, by a plain diffusers config; neutral, any plan, in "
        "which removed blocks stay and do nothing; own, any plan, with code of its own in the folder. What is native "
        "is built natively in any case; what makes blocks narrower (search.axes) is always built with code of its own",
    )
    axes: tuple[str, ...] = setting(
        ("depth",),
        "what may leave: depth, whole blocks and layers; width, parts of blocks (groups of a residual block's norm, "
        "heads of attention, channels of a feed-forward), in a student with code of its own; or both",
    )
    widths: str = setting(
        "gate-fisher", f"how parts of blocks are scored: {in_words(CHOICES['search.widths'])}"
    )
    round_to: int = setting(
        0,
        "channels of which what stays of a width is a multiple, as devices like 8, 16 or 32; 0: any number",
        most=1024,
    )
    keep: tuple[str, ...] = setting((), "blocks and stages that stay")
    remove: tuple[str, ...] = setting((), "blocks and stages that go")
    quotas: tuple[str, ...] = setting((), '"Dn1<=2": at most two blocks of Dn1 go; "Dn1=2": exactly two')
    longest_run: int = setting(0, "most blocks in a row that go together; 0: no rule")
    least_resnets: int = setting(0, "residual blocks that stay in every stage; 0: no rule")
    samples: int = setting(96, "plans that are measured to learn interactions", least=20, most=MANY)
    trials: int = setting(400, "plans that the evolution tries", least=40, most=MANY)
    gate_steps: int = setting(300, "steps in which gates are learnt", least=2, most=MANY)
    gate_rank: int = setting(4, "rank of the update that is trained beside the gates; 0: none", most=MANY)
    gate_rate: float = setting(
        0.1, "learning rate of the gates' logits, relative to the size of their gradient"
    )
    gate_update_rate: float = setting(1e-3, "learning rate of the update beside the gates")
    controls: tuple[str, ...] = setting(
        (AUTO,),
        "plans to compare with; auto: the family's named plans that are defined for the model; "
        f"{', '.join(BUDGET_CONTROLS)} are found for each budget",
    )

    def __post_init__(self) -> None:
        require_ranges(self, "search.")
        known = bool(self.axes) and set(self.axes) <= set(AXES) and len(set(self.axes)) == len(self.axes)
        require(
            known,
            "search.axes",
            list(self.axes),
            f'some of {", ".join(AXES)}, each once, as in ["depth", "width"]',
        )
        require(
            self.objective == "impact" or self.solver not in ("exact", "learned-gates"),
            "search.objective",
            self.objective,
            f"impact with the solver {self.solver}, which measures no plans; greedy, interactions, descent and "
            "evolution can search by repaired",
        )
        require(self.gate_rate > 0, "search.gate_rate", self.gate_rate, "a number above zero")
        require(
            self.gate_update_rate > 0, "search.gate_update_rate", self.gate_update_rate, "a number above zero"
        )
        some = bool(self.budgets or self.controls)
        require(some, "search.budgets", list(self.budgets), "not empty when search.controls is empty too")


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairConfig:
    """The closed-form repair of the cut before any training, from the teacher's activations on the probe; it is kept
    for a plan only if the loss of that plan's model falls, on training pictures that the fit has not seen.
    """

    kind: str = setting("best", f"how the cuts are repaired: {in_words(CHOICES['repair.kind'])}")

    def __post_init__(self) -> None:
        require_ranges(self, "repair.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The pictures that students are trained on, the user's own or drawn by the model, and how they are encoded."""

    source: str = setting(
        "",
        "folder, .parquet, .tar, .zip or glob, hub id, finished cache, or shipped (distill.pictures of the package); "
        "empty: shipped for the shipped models and their students, else what the model draws",
        read_by="probe",
    )
    image_column: str = setting(
        "", "column of pictures; empty: the usual names, such as image or jpg", read_by="probe"
    )
    caption_column: str = setting(
        "", "column of captions; empty: the usual names, such as caption or text", read_by="probe"
    )
    outside: bool = setting(
        False, "read pictures that a table names outside of the folder of data, too", read_by="probe"
    )
    limit: int = setting(0, "pictures, drawn at random from all; 0: all", read_by="probe")
    crop: str = setting(
        "center",
        f"where the square is cut once the short side fits the model: {in_words(CHOICES['data.crop'])}",
    )
    flip: bool = setting(False, "mirror every second variant")
    variants: int = setting(
        0,
        "encodings of each picture, the first cropped in the middle; 0: 4 for random crops, 2 for flips, else 1",
        most=MANY,
    )
    seed: int = setting(
        0, "seed of limit, crops, the rows that are held out, and what the model draws", read_by="probe"
    )
    cached: bool = setting(True, "encode once, before training; false: encode each batch when it is drawn")
    format: str = setting(
        "float32",
        "number format of the cache: float32, what the encoders gave, or float16, half the disk, rounded to 3 digits",
    )
    shard: int = setting(
        1024,
        "pictures per file of the cache, and what is lost when a build is stopped",
        least=1,
        most=MANY,
    )
    batch: int = setting(
        16, "pictures per pass of the encoders, or of the model that draws", least=1, most=MANY
    )
    prompts: str = setting(
        "default",
        "what the model draws where data.source names no pictures: default, the list that ships, or a file of prompts",
    )
    count: int = setting(1000, "pictures that the model draws", least=1, most=10**9)
    steps: int = setting(25, "denoising steps of a picture that the model draws", least=1, most=MANY)
    guidance: float = setting(7.5, "guidance scale of a picture that the model draws")
    resolution: int = setting(
        0,
        "pixels per side of a picture that the model draws, and of all pictures of a model without a size of its own "
        "(FLUX, Wan); 0: those of the model",
        most=65_536,
        read_by="probe",
    )

    def __post_init__(self) -> None:
        require_ranges(self, "data.")
        require(bool(self.prompts), "data.prompts", self.prompts, "default, or a file of prompts")
        most = 1 + self.flip  # different ones, without random crops
        rule = f"at most {most} without random crops" + ("" if self.flip else " or flips")
        require(self.crop == "random" or self.variants <= most, "data.variants", self.variants, rule)
        rule = "0 or at least 2 for flips"
        require(not self.flip or self.variants != 1, "data.variants", self.variants, rule)

    @property
    def num_variants(self) -> int:
        """Number of encodings of each image."""
        return self.variants or (4 if self.crop == "random" else 1 + self.flip)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """The short distillation that every candidate goes through; the weights of the three losses are BK-SDM's."""

    steps: int = setting(500, "steps of AdamW that a student gets", least=1)
    batch: int = setting(16, "samples per step, over all processes", least=1)
    learning_rate: float = setting(5e-5, "learning rate after the warm-up; BK-SDM's (arXiv:2305.15798)")
    weight_decay: float = setting(1e-2, "weight decay of AdamW")
    task_weight: float = setting(1.0, "weight of the loss against the noise that was added; 0: off")
    output_weight: float = setting(1.0, "weight of the loss against the teacher's prediction; 0: off")
    feature_weight: float = setting(1.0, "weight of the loss against the teacher's features; 0: off")
    loss_variant: str = setting(
        "raw", f"kind of feature loss: {in_words(CHOICES['distill.loss_variant'])}; raw is BK-SDM's"
    )
    min_snr: float = setting(0.0, "gamma of min-SNR weighting of the task loss (arXiv:2303.09556); 0: off")
    noise_offset: float = setting(0.0, "offset of each channel of the noise; 0: off")
    ema_decay: float = setting(
        0.995,
        "decay of the moving average of the weights, which is what is kept; 0: the last weights are kept",
    )
    clip_norm: float = setting(1.0, "largest norm of the gradient; 0: not clipped")
    warmup: int = setting(20, "steps until the learning rate is reached")
    schedule: str = setting(
        "constant", f"course of the learning rate after the warm-up: {in_words(CHOICES['distill.schedule'])}"
    )
    caption_dropout: float = setting(0.1, "share of captions replaced by the empty one, for guidance")
    random_conditioning: float = setting(
        0.0,
        "probability that a latent of pure noise is shown with another caption, where only the losses against the "
        "teacher count; less with less noise (arXiv:2504.02011); 0: off",
    )
    captions: str = setting(
        "default",
        "the other captions of distill.random_conditioning: default, the list that ships, or a file of prompts",
    )
    seed: int = setting(0, "seed of noise, timesteps, dropout and order of pictures", read_by="data")
    checkpoint_every: int = setting(100, "steps between states to resume from", least=1, free=True)
    validate_every: int = setting(100, "steps between held-out losses", least=1, resumes=True)
    precision: str = setting(
        "",
        "number format of the forward passes, while weights stay float32: float32 or bfloat16; empty: the teacher's",
    )
    micro_batch: int = setting(
        0, "samples of one student per forward and backward pass; 0: as many as fit into memory", free=True
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations of the students: less memory for a third more work", resumes=True
    )
    compile: bool = setting(False, "put blocks of teacher and students through torch.compile", resumes=True)
    together: int = setting(0, "students per pass of the teacher; 0: as many as fit into memory", free=True)
    diverged: float = setting(
        3.0, "times the held-out loss before training: a student above that is stopped", resumes=True
    )
    trackers: tuple[str, ...] = setting(
        ("tensorboard",), "where curves are shown besides the CSV: whatever accelerate knows", free=True
    )
    grid_every: int = setting(0, "steps between grids of pictures drawn by each student; 0: none", free=True)
    pictures: int = setting(
        2048, "shipped training pictures whose latents are cached", least=1, read_by="data", resumes=True
    )

    def __post_init__(self) -> None:
        require_ranges(self, "distill.")
        require(self.diverged > 1, "distill.diverged", self.diverged, "above 1")
        rule = "float32, bfloat16 or empty for the teacher's; float16 loses the gradients of students"
        require(self.precision in ("", "float32", "bfloat16"), "distill.precision", self.precision, rule)
        require(
            0 < self.learning_rate <= 1e30,
            "distill.learning_rate",
            self.learning_rate,
            "above zero, at most 1e30",
        )
        for share in ("ema_decay", "caption_dropout"):
            value = getattr(self, share)
            require(0 <= value < 1, f"distill.{share}", value, "at least 0 and below 1")
        rule = "at least 0 and at most 1"
        require(self.random_conditioning <= 1, "distill.random_conditioning", self.random_conditioning, rule)
        taught = self.output_weight + self.feature_weight > 0
        rule = "0 where the weights of output and feature loss are 0: nothing is learnt from another caption"
        alone = taught or not self.random_conditioning
        require(alone, "distill.random_conditioning", self.random_conditioning, rule)
        require(bool(self.captions), "distill.captions", self.captions, "default, or a file of prompts")
        total = self.task_weight + self.output_weight + self.feature_weight
        rule = "above zero when the other two weights are 0"
        require(total > 0, "distill.task_weight", self.task_weight, rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankConfig:
    """How many steps of the distillation each candidate gets: all, or fewer where it falls behind in a tournament."""

    eta: int = setting(
        0, "the best 1/eta of each rung go on, and who ties with them; 0: everyone gets distill.steps"
    )
    first: int = setting(
        0,
        "steps of the first rung; 0: distill.steps over the power of eta that leaves twice the warm-up",
    )
    keep_controls: bool = setting(False, "BK-SDM's and other controls go on to the end, whatever their loss")
    clip: bool = setting(True, "from the second rung on the CLIP score decides between ties on held-out loss")

    def __post_init__(self) -> None:
        require(self.eta == 0 or self.eta >= 2, "rank.eta", self.eta, "0 for no tournament, or 2 or more")
        require_ranges(self, "rank.")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Where candidates are trained, plans scored and pictures drawn."""

    kind: str = setting(
        "local", f"what does the work, this machine or a Ray cluster: {in_words(CHOICES['engine.kind'])}"
    )
    address: str = setting(
        "",
        "address of a running Ray cluster, or auto for this machine's; empty: one is started here",
        free=True,
    )
    storage: str = setting(
        "",
        "folder or fsspec URL that all machines of the cluster see; empty: they all see the run folder",
        free=True,
    )
    cpus: int = setting(
        1, "cores, and threads, of each candidate on a Ray cluster", least=1, free=True, most=MANY
    )

    def __post_init__(self) -> None:
        require_ranges(self, "engine.")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """The pictures that teacher and candidates draw, and who judges them."""

    prompts: tuple[str, ...] = setting((), "what is drawn; empty: captions of the held-out split")
    seeds: tuple[int, ...] = setting((0,), "one picture per prompt and seed")
    steps: int = setting(25, "denoising steps of a picture", least=1, read_by="shares", most=MANY)
    guidance: float = setting(7.5, "guidance scale of a picture", read_by="shares")
    scorer: str = setting(
        "",
        "CLIP model that judges: a folder or a hub id, or none; empty: reference for the shipped models and their "
        "students, else the CLIP model that the text encoder is part of, where it is on this machine",
    )

    def __post_init__(self) -> None:
        require_ranges(self, "evaluate.")
        usable = bool(self.seeds) and min(self.seeds) >= 0 and max(self.seeds) <= MOST
        rule = f"one or more whole numbers, none below zero or above {MOST:,}"
        require(usable, "evaluate.seeds", list(self.seeds), rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """How latency is measured."""

    batch: int = setting(1, "pictures per call", least=1, most=MANY)
    runs: int = setting(20, "rounds in which everything that is compared is timed once", least=2, most=MANY)
    warmup: int = setting(3, "calls before them that are not recorded", most=MANY)
    anew: bool = setting(False, "measure the latency table anew, also where one is kept", free=True)

    def __post_init__(self) -> None:
        require_ranges(self, "profile.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What the report says besides the run's own tables."""

    title: str = setting("Block pruning report", "heading of the report")
    also_presets: tuple[str, ...] = setting(
        (), "models whose reduction table is shown beside the run's own", read_by="reductions"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run; two runs with equal settings differ in timings only.

    A table names the step that reads it first; a setting inside may name an earlier one.
    """

    model: str = setting(
        "reference",
        "reference or transformer, which ship, a preset, a pipeline or model folder, a config.json, or a hub id",
        read_by="blocks",
    )
    revision: str = setting(
        "", "branch, tag or commit of a model on a hub; empty: the newest", read_by="blocks"
    )
    subfolder: str = setting(
        "", "folder of the model or pipeline inside of it, such as unet_ema", read_by="blocks"
    )
    variant: str = setting(
        "", "variant of the weights, such as fp16 or non_ema; empty: the plain ones", read_by="blocks"
    )
    random_weights: bool = setting(
        False, "draw the weights of the model with seed instead of reading them", read_by="blocks"
    )
    device: str = setting(
        "auto",
        "auto, cpu, mps, cuda or cuda:N; auto: the first there is of CUDA, MPS and CPU",
        read_by="blocks",
    )
    dtype: str = setting("float32", f"number format: {in_words(CHOICES['dtype'])}", read_by="blocks")
    seed: int = setting(0, "seed of everything that has no seed of its own", read_by="blocks")
    probe: ProbeConfig = field(default_factory=ProbeConfig, metadata={"read_by": "probe"})
    score: ScoreConfig = field(default_factory=ScoreConfig, metadata={"read_by": "scores"})
    search: SearchConfig = field(default_factory=SearchConfig, metadata={"read_by": "plans"})
    repair: RepairConfig = field(default_factory=RepairConfig, metadata={"read_by": "repaired"})
    data: DataConfig = field(default_factory=DataConfig, metadata={"read_by": "data"})
    distill: DistillConfig = field(default_factory=DistillConfig, metadata={"read_by": "distilled"})
    rank: RankConfig = field(default_factory=RankConfig, metadata={"read_by": "distilled"})
    engine: EngineConfig = field(default_factory=EngineConfig, metadata={"read_by": "distilled"})
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig, metadata={"read_by": "pictures"})
    profile: ProfileConfig = field(default_factory=ProfileConfig, metadata={"read_by": "plans"})
    report: ReportConfig = field(default_factory=ReportConfig, metadata={"read_by": "report"})

    def __post_init__(self) -> None:
        rule = "reference, a preset, a folder, a config.json or a hub id"
        require(bool(self.model), "model", self.model, rule)
        is_device = _DEVICE.fullmatch(self.device) is not None
        require(is_device, "device", self.device, "auto, cpu, mps, cuda or cuda:N")
        require_ranges(self)
        first, most = self.rank.first, self.distill.steps
        require(first <= most, "rank.first", first, f"no more than distill.steps = {most}")


SETTINGS: Mapping[str, Setting] = declared(RunConfig)
"""Every setting by its dotted name, such as ``distill.steps``, in the order in which they are written."""
