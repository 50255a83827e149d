"""The columns of every table, in order: what the steps write is what the report and a script read.

Imports neither torch nor pandas, so that anything may import it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# The model: its blocks, what they cost, what plans leave ------------------------------------------------------------

BLOCK_COLUMNS = (
    *("name", "path", "stage", "kind", "in_channels", "out_channels", "skip_channels"),
    *("transformer_layers", "params", "macs", "attention_macs", "tokens", "removable", "reason"),
    *("lane", "row"),
)
COST_COLUMNS = ("name", "kind", "params", "macs", "attention_macs", "paper_macs", "weight_bytes", "tokens")
BLOCK_PROFILE_COLUMNS = (*COST_COLUMNS, "median_ms", "share")
PRICE_COLUMNS = (
    *("params", "macs", "attention_macs", "paper_macs", "weight_bytes"),
    *("latency_ms", "activation_bytes", "memory"),
)
REDUCTION_COLUMNS = (
    *("model", "plan", "params", "params_change", "macs", "macs_change", "paper_macs", "paper_macs_change"),
    *("blocks_removed", "tokens", "native", "uncounted"),
)
# Where it was timed: the times alone, and the change by the ratios of times of one round, with its 95 % interval.
REDUCTION_LATENCY_COLUMNS = (
    *("median_ms", "p10_ms", "p90_ms", "runs", "latency_change", "latency_low", "latency_high"),
    *("latency_verdict", "timed", "service"),
)
# Of models in several runtimes: wall-clock and processor time, the change within the rounds of one runtime, memory.
RUNTIME_COLUMNS = (
    *("model", "backend", "plan", "median_ms", "p10_ms", "p90_ms", "runs", "cpu_ms"),
    *("latency_change", "latency_low", "latency_high", "latency_verdict", "macs_change"),
    *("threads", "dtype", "tokens", "peak_bytes", "timed", "service"),
)
ROUNDS_COLUMNS = ("timing", "round", "name", "milliseconds", "warmup", "processes")  # of times taken in turns
PIPELINE_COLUMNS = ("part", "calls", "tokens", "params", "macs", "median_ms", "share")
ACTIVATION_COLUMNS = ("name", "kind", "input_bytes", "output_bytes", "workspace_bytes", "live_bytes")
LATENCY_TABLE_COLUMNS = ("name", "kind", "measured_ms", "p10_ms", "p90_ms", "saved_ms", "share")
LATENCY_CHECK_COLUMNS = ("plan", "removed", "use", "measured_ms", "predicted_ms", "error_percent")
DISAGREEMENT_COLUMNS = ("name", "kind", "macs", "macs_share", "saved_ms", "latency_share", "ratio", "gap")

# Importance ---------------------------------------------------------------------------------------------------------

IMPORTANCE_COLUMNS = (
    *(
        "group",
        "kind",
        "blocks",
        "starred",
        "impact",
        "low",
        "high",
        "samples",
        "criterion",
        "probe",
        "model",
    ),
)
PARTS_COLUMNS = ("group", "kind", "criterion", "part", "of", "impact", "samples")
AGREEMENT_COLUMNS = (
    *("criterion", "other", "spearman", "spearman_low", "spearman_high"),
    *("kendall", "kendall_low", "kendall_high", "over", "count"),
)
ORDERS_COLUMNS = ("criterion", "other", "spearman", "kendall", "over", "count")  # of every two criteria
RANK = "_rank"  # behind the name of a criterion: the column of its ranks, where criteria stand side by side
STABILITY_COLUMNS = ("part", "of", "samples", "top", "overlap", "overlap_low", "overlap_high")

# Search and plans ---------------------------------------------------------------------------------------------------

WIDTH_SCORE_COLUMNS = ("site", "block", "kind", "unit", "channels", "score", "criterion", "samples", "model")
SITE_SCORE_COLUMNS = ("site", "units", "least", "median", "largest", "criterion", "samples", "model")
SEARCHED_COLUMNS = ("plan_id", "origin", "name", "budget")
SEARCHES_COLUMNS = (
    *("budget", "solver", "objective", "plans", "sets_measured", "forwards", "seconds"),
    *("pairs", "r2", "rank_correlation", "additive_r2", "additive_rank_correlation"),
)
LEARNED_GATES_COLUMNS = (  # of each block that can leave, and budget
    *("budget", "block", "stays", "stays_low", "stays_high", "sure", "removed", "value"),
    *("logit", "logit_spread", "masks"),
)
GATE_STEPS_COLUMNS = (
    "budget",
    "step",
    "loss",
    "blocks_removed",
    "metric",
    "left",
)  # the steps in which gates are learnt
PLANS_COLUMNS = (
    *(
        "plan",
        "plan_id",
        "origin",
        "budgets",
        "removed",
        "widths",
        "blocks_removed",
        "narrower",
        "params",
        "params_change",
    ),
    *("macs", "macs_change", "paper_macs", "paper_macs_change", "latency_ms", "latency_change"),
    *("measured_change", "predicted_impact", "native", "form"),
)
COMPARISON_COLUMNS = (
    *("name", "kind", "blocks_removed", "params", "params_change", "macs", "macs_change"),
    *("paper_macs", "paper_macs_change", "native", "predicted_impact", "impact", "median_ms"),
    *("latency_change", "latency_low", "latency_high"),
    *("loss_before", "loss_after", "clip_before", "clip_after"),
)

# Repair, distillation, ranking --------------------------------------------------------------------------------------

REPAIR_COLUMNS = (
    *("cut", "also_read_by", "kind", "side", "unit", "folds", "applied", "reason", "strength"),
    *("cut_error_before", "cut_error_after", "impact_before", "impact_after"),
)
REPAIRED_COLUMNS = (
    *("plan", "plan_id", "kind", "applied", "impact_before", "impact_after"),
    *("kept", "loss_before", "loss_after", "rows"),  # losses on training pictures that the fit has not seen
)
RECOVERY_COLUMNS = ("step", "task", "output", "feature", "total", "validation", "learning_rate", "seconds")
HELDOUT_COLUMNS = ("step", "row", "loss")
CONSISTENCY_COLUMNS = ("step", "loss", "learning_rate", "seconds")
FEW_STEPS_COLUMNS = (  # of every way to draw: model, scheduler, steps and reuse
    *("model", "scheduler", "steps", "reuse", "role", "lever", "guidance", "passes", "whole", "pictures"),
    *(
        "median_ms",
        "p10_ms",
        "p90_ms",
        "rounds",
        "latency_change",
        "clip",
        "clip_change",
        "clip_low",
        "clip_high",
    ),
    *("psnr_teacher", "psnr_own", "best"),
)
FEW_STEPS_WORK_COLUMNS = (  # of prune-lab steps --dry-run
    *("model", "scheduler", "steps", "reuse", "pictures", "timed", "state", "estimate_seconds"),
)
CONSISTENT_COLUMNS = (
    *("student", "teacher", "steps", "guidance", "grid", "loss_first", "loss_last", "seconds", "out"),
)
LEVEL_COLUMNS = ("stages", "channels", "step", "fewer")
NARROWED_COLUMNS = (
    *(
        "model",
        "channels_before",
        "channels",
        "chosen_by",
        "folder",
        "params",
        "params_change",
        "macs",
        "macs_change",
    ),
    *("impact", "teacher_loss", "loss_before", "loss_after", "steps"),
)
RECOVERY_SUMMARY_COLUMNS = (
    *("plan", "plan_id", "status", "steps", "loss_before", "loss_after", "seconds", "reason"),
)
PROMPTS_COLUMNS = ("file", "prompt", "seed")  # of every picture of a set
PICTURES_COLUMNS = ("plan", "plan_id", "weights", "pictures", "clip", "clip_low")
DRAWN_COLUMNS = (
    "file",
    "prompt",
    "kind",
    "number",
    "seed",
)  # of every picture of prune-lab evaluate --prompts
METRIC_COLUMNS = (
    *("model", "metric", "value", "low", "high", "better", "floor"),
    *(
        "difference",
        "difference_low",
        "difference_high",
        "verdict",
        "features",
        "prompts",
        "seeds",
        "reason",
        "note",
    ),
)
KIND_COLUMNS = (
    *("kind", "prompts", "model", "clip", "low", "high"),
    *("difference", "difference_low", "difference_high", "floor", "verdict", "note"),
)
GATE_COLUMNS = ("gate", "model", "value", "low", "high", "bound", "verdict", "reason", "note")
RANKING_COLUMNS = (
    *("rank", "tie_group", "plan", "plan_id", "origin", "blocks_removed", "params", "macs", "paper_macs"),
    *(
        "median_ms",
        "latency_change",
        "latency_low",
        "latency_high",
    ),  # by times taken in turns with the teacher's
    *("impact_one_shot", "loss_before", "loss_after", "clip_before", "clip_after", "steps"),
    *("rung", "pareto", "status", "reason"),
)
TOURNAMENT_COLUMNS = (
    *("rung", "steps", "name", "loss", "clip", "place", "fate", "tied", "against", "difference", "low"),
    *("high", "reason"),
)

# Files for other programs, and of them --------------------------------------------------------------------------------

CONVERTED_COLUMNS = ("kind", "file", "parts", "kept", "renamed", "dropped", "dropped_from", "plan", "plan_id")
COMPATIBILITY_COLUMNS = ("what", "fits", "kept", "of", "renamed", "note")
PUSHED_COLUMNS = ("file", "bytes")

# What a model is used for -------------------------------------------------------------------------------------------

PERSONAL_COLUMNS = (
    *("model", "trained", "prompt", "folder", "pictures", "class_pictures", "parameters", "steps", "batch"),
    *("learning_rate", "loss_before", "loss_after", "class_loss_before", "class_loss_after"),
    *("steps_per_second", "seconds", "peak_bytes", "device", "precision", "seed"),
)
SWEEP_COLUMNS = (
    *("model", "strength", "seed", "prompt", "passes", "file", "clip", "likeness", "pixel_error"),
    *("kept_error", "from_first", "seconds"),
)
SWEEP_MEAN_COLUMNS = (  # over seeds: mean and standard deviation, and how far the mean is from that of the first model
    *("model", "strength", "seeds", "prompt", "passes"),
    *("clip", "clip_spread", "clip_difference", "clip_low", "clip_high", "clip_verdict"),
    *(
        "likeness",
        "likeness_spread",
        "likeness_difference",
        "likeness_low",
        "likeness_high",
        "likeness_verdict",
    ),
    *("pixel_error", "pixel_error_spread", "pixel_error_difference", "pixel_error_low", "pixel_error_high"),
    *("pixel_error_verdict", "kept_error", "kept_error_spread", "kept_error_difference", "kept_error_low"),
    *("kept_error_high", "kept_error_verdict", "from_first", "from_first_spread", "seconds"),
)

# What a reader asks of a finished run --------------------------------------------------------------------------------

CHOICE_COLUMNS = ("block", "kind", "removed", "impact", "params", "macs", "extra_impact", "instead", "reason")
WIDER_COLUMNS = (
    *("budget", "predicted_impact", "wider_impact", "impact_change", "params_change", "macs_change"),
    *("come_back", "go", "plan"),
)
SURPRISE_COLUMNS = (
    *("plan", "plan_id", "impact_one_shot", "loss_before", "loss_after"),
    *("place_by_impact", "place_by_loss", "places_lost"),
)
PICTURE_CHANGE_COLUMNS = ("prompt", "seed", "plan", "plan_id", "weights", "difference", "file")

# The run itself -----------------------------------------------------------------------------------------------------

STEPS_COLUMNS = ("step", "state", "does")
DRY_RUN_COLUMNS = (*STEPS_COLUMNS, "estimate_seconds")  # of prune-lab run --dry-run
DOCTOR_COLUMNS = ("step", "of", "state", "why")
STEP_SECONDS_COLUMNS = ("step", "seconds")

# Kinds of columns ---------------------------------------------------------------------------------------------------

# pandas turns integers into floats where one of them is missing; these are integers whatever is missing.
INTEGER_COLUMNS = frozenset(
    (
        *("in_channels", "out_channels", "skip_channels", "transformer_layers", "tokens"),
        *("params", "macs", "attention_macs", "paper_macs", "calls", "runs", "batch", "blocks_removed"),
        *(
            "weight_bytes",
            "activation_bytes",
            "memory",
            "input_bytes",
            "output_bytes",
            "workspace_bytes",
            "live_bytes",
        ),
        *("disk_bytes", "peak_memory_bytes", "samples", "top", "count", "plans", "sets_measured", "pairs"),
        *("rank", "tie_group", "steps", "step", "masks", "rung", "place", "row"),
        *("parts", "kept", "of", "renamed", "dropped", "bytes"),
        *("place_by_impact", "place_by_loss", "places_lost"),
    )
)

# Tables that are read back --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cells:
    """What every cell of a column holds; ``runs.read_records`` refuses the file otherwise."""

    kind: Literal["text", "integer", "number", "truth"]
    missing: bool = False  # whether a cell may be empty: unknown, not measured, or it does not apply
    infinite: bool = False  # whether a number may be infinite
    least: float = -math.inf  # of integers and numbers
    words: tuple[str, ...] = ()  # the only texts there are; none: any text


@dataclass(frozen=True, slots=True)
class Records:
    """One kind of CSV that is written here and read back: its columns, what they hold, and what tells rows apart."""

    columns: tuple[str, ...]
    cells: Mapping[Cells, str]  # names of columns, with spaces between them
    key: tuple[str, ...] = ()  # no two rows have equal values in all of these columns
    optional: tuple[str, ...] = ()  # columns that may be there too
    rows: bool = True  # whether there is at least one row

    def cells_of(self, column: str) -> Cells:
        """What the cells of ``column`` hold."""
        return next(cells for cells, names in self.cells.items() if column in names.split())


_TEXT, _TEXT_OR_NONE = Cells("text"), Cells("text", missing=True)
_ORIGIN = Cells("text", words=("teacher", "control", "search"))
_STATUS = Cells("text", words=("teacher", "ranked", "dropped", "left out", "failed"))
_FATE = Cells("text", words=("kept", "dropped", "failed"))
_PROCESSES = Cells("text", words=("one process", "own processes"))
_INTEGER = Cells("integer")
_COUNT, _COUNT_OR_NONE = Cells("integer", least=0), Cells("integer", least=0, missing=True)
_NUMBER, _NUMBER_OR_NONE = Cells("number"), Cells("number", missing=True)
_ANY_NUMBER = Cells("number", missing=True, infinite=True)
_AMOUNT, _AMOUNT_OR_NONE = Cells("number", least=0), Cells("number", least=0, missing=True)
_TIME = Cells("number", least=1e-9)  # changes of time are ratios
_TRUTH, _TRUTH_OR_NONE = Cells("truth"), Cells("truth", missing=True)

BLOCKS = Records(
    BLOCK_COLUMNS,
    {
        _TEXT: "name path stage kind lane",
        _TEXT_OR_NONE: "reason",
        _COUNT: "in_channels out_channels skip_channels transformer_layers params macs attention_macs tokens row",
        _TRUTH: "removable",
    },
    key=("name",),
)
COSTS = Records(
    COST_COLUMNS,
    # the rest of a model may be less than nothing: what leaves with the last block of SD3 is counted there as well
    {
        _TEXT: "name kind size",
        _INTEGER: "params macs attention_macs paper_macs weight_bytes",
        _COUNT: "tokens",
    },
    key=("name",),
    optional=("size",),  # what the multiply-adds are counted at, in words
)
REDUCTIONS = Records(
    REDUCTION_COLUMNS,
    {
        _TEXT: "model plan",
        _COUNT: "params macs paper_macs blocks_removed tokens",
        _NUMBER: "params_change macs_change paper_macs_change",
        _TRUTH: "native",
        _TEXT_OR_NONE: "uncounted latency_verdict timed service",
        _AMOUNT_OR_NONE: "median_ms p10_ms p90_ms",
        _COUNT_OR_NONE: "runs",
        _NUMBER_OR_NONE: "latency_change latency_low latency_high",
    },
    optional=REDUCTION_LATENCY_COLUMNS,
)
ROUNDS = Records(
    ROUNDS_COLUMNS,
    {_COUNT: "timing round warmup", _TEXT: "name", _PROCESSES: "processes", _TIME: "milliseconds"},
    key=("timing", "round", "name"),
)
PIPELINE = Records(
    PIPELINE_COLUMNS,
    {
        _TEXT: "part",
        _COUNT: "calls params macs",
        _COUNT_OR_NONE: "tokens",
        _AMOUNT: "median_ms share",
    },
)
IMPORTANCE = Records(
    IMPORTANCE_COLUMNS,
    {
        _TEXT: "group kind blocks criterion",
        _TEXT_OR_NONE: "probe model",
        _TRUTH: "starred",
        _NUMBER: "impact",
        _NUMBER_OR_NONE: "low high",
        _COUNT: "samples",
        _ANY_NUMBER: "psnr",
    },
    optional=("psnr",),
)
WIDTH_SCORES = Records(
    WIDTH_SCORE_COLUMNS,
    {
        _TEXT: "site block kind criterion",
        _TEXT_OR_NONE: "model",
        _COUNT: "unit channels samples",
        _NUMBER: "score",
    },
    key=("site", "unit"),
)
PARTS = Records(
    PARTS_COLUMNS,
    {_TEXT: "group kind criterion part of", _NUMBER_OR_NONE: "impact", _COUNT: "samples"},
    rows=False,
)
SEARCHED = Records(
    SEARCHED_COLUMNS, {_TEXT: "plan_id name", _ORIGIN: "origin", _TEXT_OR_NONE: "budget"}, rows=False
)
LEARNED_GATES = Records(
    LEARNED_GATES_COLUMNS,
    {
        _TEXT: "budget block",
        _TRUTH: "removed",
        _AMOUNT: "stays stays_low stays_high sure value logit_spread",
        _NUMBER: "logit",
        _COUNT: "masks",
    },
    key=("budget", "block"),
    rows=False,
)
GATE_STEPS = Records(
    GATE_STEPS_COLUMNS,
    {_TEXT: "budget metric", _COUNT: "step blocks_removed", _AMOUNT: "loss left"},
    key=("budget", "step"),
    rows=False,
)
REPAIRS = Records(
    REPAIR_COLUMNS,
    {
        _TEXT: "cut kind side unit",
        _TEXT_OR_NONE: "also_read_by reason",
        _TRUTH: "folds applied",
        _ANY_NUMBER: "strength",
        _NUMBER_OR_NONE: "cut_error_before cut_error_after impact_before impact_after",
    },
    rows=False,
)
RECOVERY = Records(
    RECOVERY_COLUMNS,
    {
        _COUNT: "step",
        _NUMBER_OR_NONE: "task output feature total validation",
        _AMOUNT: "learning_rate seconds",
    },
    key=("step",),
)
HELDOUT = Records(HELDOUT_COLUMNS, {_COUNT: "step row", _NUMBER_OR_NONE: "loss"}, key=("step", "row"))
PROMPTS = Records(PROMPTS_COLUMNS, {_TEXT: "file", _TEXT_OR_NONE: "prompt", _INTEGER: "seed"}, key=("file",))
RANKING = Records(
    RANKING_COLUMNS,
    {
        _COUNT_OR_NONE: "rank tie_group rung",
        _ORIGIN: "origin",
        _STATUS: "status",
        _COUNT: "blocks_removed params macs paper_macs steps",
        _AMOUNT_OR_NONE: "median_ms",
        _NUMBER_OR_NONE: "latency_change latency_low latency_high impact_one_shot loss_before loss_after "
        "clip_before clip_after",
        _TRUTH_OR_NONE: "pareto",
        _TEXT_OR_NONE: "reason",
        _TEXT: "plan plan_id form",
    },
    key=("plan_id",),
    optional=("form",),
)
REPAIRED = Records(
    REPAIRED_COLUMNS,
    {
        _TEXT: "plan plan_id kind",
        _TRUTH: "kept",
        _COUNT: "applied rows",
        _NUMBER_OR_NONE: "impact_before impact_after loss_before loss_after",
    },
    key=("plan_id",),
)
TOURNAMENT = Records(
    TOURNAMENT_COLUMNS,
    {
        _COUNT: "rung steps",
        _TEXT: "name",
        _FATE: "fate",
        _NUMBER_OR_NONE: "loss clip difference low high",
        _COUNT_OR_NONE: "place",
        _TRUTH_OR_NONE: "tied",
        _TEXT_OR_NONE: "against reason",
    },
    key=("rung", "name"),
    rows=False,
)
STEP_SECONDS = Records(STEP_SECONDS_COLUMNS, {_TEXT: "step", _AMOUNT: "seconds"}, key=("step",))
