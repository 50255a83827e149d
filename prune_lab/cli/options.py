"""The options that several verbs share, and what became of those that verbs had once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from prune_lab.api.settings import VERB_TABLES
from prune_lab.config import SETTINGS
from prune_lab.errors import BudgetError
from prune_lab.runs import check_plan_file
from prune_lab.runtime.reading import printable

MODEL_HELP = (
    "reference or transformer (they ship), a preset (sd-v1.4), a pipeline or model folder, a single-file .safetensors, "
    "a config.json of a model, or a hub id."
)


def plan_checked(text: str) -> str:
    """``text``, the plan of an option: a file without such a plan is refused here, before a model is read."""
    check_plan_file(text)
    return text


def plans_checked(texts: list[str]) -> list[str]:
    """``texts``, the plans of an option that may be repeated, as ``plan_checked``."""
    return [plan_checked(text) for text in texts]


ModelArgument = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")]
OptionalModel = Annotated[str, typer.Argument(help=MODEL_HELP + " Or the folder of a run.", metavar="MODEL")]
RevisionOption = Annotated[
    str, typer.Option("--revision", help="Branch, tag or commit of a hub id; default: the newest.")
]
SubfolderOption = Annotated[
    str, typer.Option("--subfolder", help="Folder inside of MODEL to read, such as unet or unet_ema.")
]
VariantOption = Annotated[
    str, typer.Option("--variant", help="Weights to read: fp16, bf16, non_ema, ...; default: the plain ones.")
]
ReadVariantOption = Annotated[
    str,
    typer.Option(
        "--read-variant", help="Weights of MODEL to read: fp16, non_ema, ...; default: the plain ones."
    ),
]
RandomWeightsOption = Annotated[
    bool,
    typer.Option("--random-weights", help="Draw the weights with --seed: for a preset or a config.json."),
]
PlanOption = Annotated[
    list[str],
    typer.Option(
        "--plan",
        callback=plans_checked,
        help='Plan: bk-base, "bk-small +Md", "-Dn1.R2 -Dn1.A2", a plan.json, plans.json (all of them), plans.json#2 or '
        "the folder of a student; may be repeated.",
    ),
]
ResolutionOption = Annotated[
    int | None, typer.Option("--resolution", help="Pixels of the picture's sides; default: the model's own.")
]
DrawingStepsOption = Annotated[
    int | None,
    typer.Option("--steps", help="Denoising steps; default: 25, or 4 of a model that was distilled for few."),
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        help="Classifier-free guidance scale; default: 7.5, or 1 of a model that was distilled for few steps.",
    ),
]
TokensOption = Annotated[
    int | None,
    typer.Option("--tokens", help="Words of text; default: what the text encoder takes, or the model's own."),
]
FramesOption = Annotated[
    int | None,
    typer.Option(
        "--frames",
        help="Of a model of films: frames of the latent (Wan: 21 are 81 of the film, 1 is a picture).",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print a JSON list of objects instead of a table.")]
WideOption = Annotated[
    bool,
    typer.Option("--wide", help="All columns, not only those that decide; of blocks what a screen holds."),
]
RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder; made when it is not there.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="TOML with the settings of the job.")]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Any other setting; may be repeated. See: prune-lab config --show.",
    ),
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of everything that is drawn.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Redo: replace what is there already.")]
MacsLimit = Annotated[
    list[str], typer.Option("--macs", help="Most multiply-adds: 65%, 0.65x, 150G or as:bk-small.")
]
ParamsLimit = Annotated[list[str], typer.Option("--params", help="Most parameters, as with --macs.")]
LatencyLimit = Annotated[
    list[str],
    typer.Option(
        "--latency",
        help="Most latency, measured: 0.7x, 35ms; elsewhere 0.7x@float16,512,batch=1 or 0.7x@openvino.",
    ),
]
MemoryLimit = Annotated[
    list[str], typer.Option("--memory", help="Most memory of weights and activations: 70%, 2GiB.")
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Pictures with captions: a folder, .parquet, .tar, .zip, hub id, a cache, or shipped; none: MODEL draws.",
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, then stop.")]


def limits(**given: Sequence[str]) -> dict[str, str]:
    """The one amount of each budget, by name; empty for one that was not given. A list, so that a second amount, of
    which a command line keeps the last alone, is refused. Raises BudgetError.
    """
    found = {}
    for name, amounts in given.items():
        if len(amounts) > 1:
            several = ", ".join(f'"{name}<={printable(amount, 20)}"' for amount in amounts)
            raise BudgetError(
                f"asked for --{name} {len(amounts)} times, found no one amount to keep to; give it once, or search "
                f"under each in turn: --set 'search.budgets=[{several}]'"
            )
        if "".join(amounts).strip() == "" and amounts:
            raise BudgetError(f"asked for --{name} without an amount; give one, such as 65%, or leave it out")
        found[name] = "".join(amounts)
    return found


def for_setting(name: str, *flags: str) -> Any:
    """The option of a setting that is changed every day; its help is what the setting says of itself."""
    meaning = SETTINGS[name].meaning
    return typer.Option(*flags, help=f"{meaning[0].upper()}{meaning[1:]} ({name}).")


def found_by(revision: str, subfolder: str, variant: str, random_weights: bool = False) -> dict[str, object]:
    """The settings of how MODEL is found, by their names; None for what was not asked for."""
    asked = {
        "revision": revision,
        "subfolder": subfolder,
        "variant": variant,
        "random_weights": random_weights,
    }
    return {name: value or None for name, value in asked.items()}


# Options that verbs had once under other names than the settings have.
_ONCE: dict[tuple[str, str], str] = {
    ("score", "--precision"): "--set dtype=VALUE",
    ("score", "--contiguous"): "--set score.channels_last=false",
    ("search", "--budget"): "--set search.budgets=VALUE",
    ("search", "--samples"): "--set probe.samples=VALUE",  # as of score; search.samples are plans
    ("search", "--count"): "--plans",
    ("search", "--any"): "--form own",
    ("search", "--quota"): "--set search.quotas=VALUE",
    ("search", "--control"): "--set search.controls=VALUE",
}


def instead_of(verb: str, option: str) -> str:
    """What to write instead of an ``option`` that ``verb`` does not have; empty where nothing is known."""
    if (verb, option) in _ONCE:
        return _ONCE[verb, option]
    key = option.removeprefix("--no-").removeprefix("--").replace("-", "_")
    value = "false" if option.startswith("--no-") else "VALUE"
    for table in VERB_TABLES.get(verb, ()):
        setting = SETTINGS.get(f"{table}.{key}")
        if setting is not None:
            return f"--set {setting.name}={'true' if setting.hint is bool and value == 'VALUE' else value}"
    return ""
