"""The report of the transformer in words, every number from what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from recipes.reference_model.report import MATCHES, percent

MODELS = ("transformer", "reference U-Net")  # in the order of the columns


def _row(first: str, cells: Iterable[object]) -> str:
    return f"| {first} | {' | '.join(map(str, cells))} |"


def _losses(values: Iterable[float]) -> list[str]:
    return [f"{value:.4f}" for value in values]


def _loss_lines(metrics: dict[str, Any], losses: pd.DataFrame) -> list[str]:
    models = metrics["models"]
    rule = "| --- |" + " ---: |" * len(models)
    by_bucket = [
        _row(
            f"{part['first'].iloc[0]}-{part['last'].iloc[0]}", [*_losses(part["loss"]), part["rows"].iloc[0]]
        )
        for _, part in losses.groupby("bucket")
    ]
    return [
        "## Held-out loss",
        "",
        f"Mean squared error of the velocity on {metrics['rows']:,} rows, the same for both models.",
        "",
        _row("timesteps", [*models, "rows"]),
        rule + " ---: |",
        *by_bucket,
        _row("all", [*_losses(one["loss"] for one in models.values()), metrics["rows"]]),
        "",
        "What the captions are worth, at timesteps of 800 and above:",
        "",
        _row("caption", models),
        rule,
        *(
            _row(name, _losses(one["captions"][name] for one in models.values()))
            for name in ("right", "none", "another")
        ),
        "",
    ]


def _picture_lines(drawn: dict[str, Any]) -> list[str]:
    both = [drawn[name] for name in MODELS]
    pleased = " and ".join(f"{drawn[name]['clip_score']:.3f} ({name})" for name in MODELS)
    return [
        "## Pictures",
        "",
        f"{drawn['prompts']} held-out prompts, {drawn['steps']} steps, guidance {drawn['guidance']:g}, seed "
        f"{drawn['seed']}, the same for both models. CLIP score by the shipped scorer (mean cosine of picture and "
        f"prompt): {pleased}; of the real pictures "
        f"{drawn['real']['clip_score']:.3f}.",
        "",
        _row(
            f"the right one among {drawn['prompts']}",
            [f"{name}: {place}" for name in MODELS for place in ("first", "in the first five")],
        ),
        "| --- |" + " ---: |" * 2 * len(MODELS),
        *(
            _row(words, [percent(one["matches"][name][place]) for one in both for place in ("r1", "r5")])
            for name, words in MATCHES.items()
        ),
        "",
    ]


def report_page(metrics: dict[str, Any], losses: pd.DataFrame) -> str:
    """The page (Markdown), from `metrics` and the losses by timestep and model, buckets in the models' order."""
    stored, training = metrics["stored"], metrics["training"]
    lines = [
        "# The second shipped model, measured",
        "",
        f"A PixArt transformer of {metrics['parameters']:,} parameters ({metrics['megabytes']:.2f} MB on disk), "
        f"trained on {metrics['pictures']['train']:,} pictures. Every number below is on the "
        f"{metrics['pictures']['heldout']:,} held-out ones, whose combination of style, subject and tone was never "
        "trained on, in float32 on the CPU, with the weights as they ship. Versions, threads and seeds are in "
        "`metrics.json`.",
        "",
        "![Pictures for held-out prompts](sheet.png)",
        "",
        *_loss_lines(metrics, losses),
        *_picture_lines(metrics["drawn"]),
    ]
    if stored:
        lines += [
            "## What storing in one byte changes",
            "",
            "Held-out loss, every held-out picture once: "
            + ", ".join(f"{name} {value:.5f}" for name, value in stored.items())
            + ". The first is the model as trained; int8, with a scale for each row, is how it ships.",
            "",
        ]
    if training:
        lines += [
            "## Training",
            "",
            f"{training['steps']:,} steps, last loss (mean of the last 100) {training['loss']:.4f}. The recipe is "
            "`recipes/transformer_model/transformer.toml`; `python -m recipes.transformer_model train` runs it. "
            "What happened on the way is in `HISTORY.md`.",
            "",
            "![Loss curve](curves.png)",
            "",
        ]
    return "\n".join(lines)
