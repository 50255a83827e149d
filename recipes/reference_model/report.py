"""The report of the reference model: its page in words, prompt grid, block impacts and loss curves, as files."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prune_lab.runtime import atomic_write

MID_STAGE_BAR = 1e-3  # relative change of the prediction that the mid stage should at least be worth
PIXEL_BAR = 0.5  # share of generated pictures whose own real picture should be the nearest
MATCHES = {
    "generated": "generated picture, by the scorer",
    "shuffled": "generated picture of another prompt, by the scorer",
    "real": "real held-out picture, by the scorer",
    "real_blurred": "the same at 4 x 4 pixels, by the scorer",
    "pixels": "own real picture nearest to the generated one, by 16 x 16 pixels",
}
_DRAWN, _REAL = "#1f5a96", "#999999"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def shortcomings(metrics: dict[str, Any]) -> list[str]:
    """Lines (Markdown) that name the bars this model misses; none where it misses none."""
    missed = []
    mid = metrics["impacts"]["mid_stage"]
    if mid < MID_STAGE_BAR:
        missed.append(
            f"- The mid stage should be worth at least {MID_STAGE_BAR:.0e}; it is worth {mid:.1e}. The innermost "
            "blocks do next to nothing here, so their scores and the cost of removing them say little."
        )
    pixels = metrics["scorer_generated"]["pixels"]["r1"]
    if pixels < PIXEL_BAR:
        missed.append(
            f"- Pictures: {percent(pixels)} of the generated ones are nearest to their own prompt's real picture. "
            "Look at the grid before judging a pruned model by pictures."
        )
    return ["## What falls short", "", *missed, ""] if missed else []


def report_page(metrics: dict[str, Any], losses: pd.DataFrame, impacts: pd.DataFrame) -> str:
    """The report in words (Markdown), every number from `metrics` and the two tables."""
    clip, drawn, blocks = metrics["scorer_heldout"], metrics["scorer_generated"], metrics["impacts"]
    single = impacts[(impacts["kind"] == "block") & ~impacts["starred"]].sort_values("impact")
    stages = impacts[impacts["kind"] == "stage"]
    lines = [
        "# The reference model, measured",
        "",
        f"Trained on {metrics['pictures']['train']:,} pictures; every number below is on the "
        f"{metrics['pictures']['heldout']:,} held-out ones, whose combination of style, subject and tone was never "
        "trained on. Weights: float16 on disk, "
        f"{metrics['megabytes']['pipeline']:.1f} MB pipeline and {metrics['megabytes']['scorer']:.1f} MB scorer; "
        "all measurements in float32 on the CPU. Versions, threads and seeds are in `metrics.json`.",
        "",
        f"- Autoencoder: {metrics['autoencoder']['psnr_mean']:.2f} dB PSNR in the mean "
        f"({metrics['autoencoder']['psnr_p10']:.2f} at the 10th percentile).",
        f"- Scorer, {int(clip['pictures'])} held-out pictures against their {int(clip['texts'])} captions: picture to "
        f"text R@1 {percent(clip['picture_to_text_r1'])}, R@5 {percent(clip['picture_to_text_r5'])}; text to "
        f"picture R@1 {percent(clip['text_to_picture_r1'])}, R@5 {percent(clip['text_to_picture_r5'])}.",
        f"- U-Net: held-out loss (mean squared error of the predicted velocity) {metrics['denoiser']['loss']:.4f} "
        f"({metrics['denoiser']['rows']} rows).",
        f"- Generated pictures, {drawn['prompts']} held-out prompts ({drawn['steps']} steps, guidance "
        f"{drawn['guidance']:g}, seed {drawn['seed']}): see the table below; the scorer's word alone is not enough.",
        f"- Removal impact (relative mean squared change of the prediction, {blocks['rows']} held-out rows, 95 % "
        f"bootstrap intervals): of {blocks['removable']} removable blocks {blocks['above_1e-3']} change it by at least "
        f"1e-3 and {blocks['above_1e-4']} by at least 1e-4; {blocks['above_zero']} have an interval above zero, which "
        "a mean of squares has almost by itself and which is no proof of worth; the whole mid stage is worth "
        f"{blocks['mid_stage']:.2e} "
        f"[{blocks['mid_stage_low']:.2e}, {blocks['mid_stage_high']:.2e}].",
        "",
        "![Pictures for held-out prompts](grid.png)",
        "",
        *shortcomings(metrics),
        "## Is the right caption found for generated pictures?",
        "",
        f"| among {drawn['prompts']} | first | in the first five |",
        "| --- | ---: | ---: |",
        *(
            f"| {words} | {percent(drawn[k]['r1'])} | {percent(drawn[k]['r5'])} |"
            for k, words in MATCHES.items()
        ),
        "",
        "Coarse colour alone pleases the scorer often (last but one row), so its agreement with generated pictures "
        "does not say that a person recognises them.",
        "",
        "## Denoising loss by timestep",
        "",
        "| timesteps | loss | rows |",
        "| --- | ---: | ---: |",
        *(f"| {row.first}-{row.last} | {row.loss:.4f} | {row.rows} |" for row in losses.itertuples()),
        "",
        "## Removal impact of stages",
        "",
        "| stage | impact | 95 % interval |",
        "| --- | ---: | --- |",
        *(
            f"| {row.group} | {row.impact:.2e} | {row.low:.2e} to {row.high:.2e} |"
            for row in stages.itertuples()
        ),
        "",
        "Least and most of the removable blocks: "
        + ", ".join(f"{row.group} {row.impact:.1e}" for row in single.head(5).itertuples())
        + " ... "
        + ", ".join(f"{row.group} {row.impact:.1e}" for row in single.tail(5).itertuples())
        + ". All of them are in `impacts.csv`.",
        "",
        "![Removal impact of every block](impacts.png)",
        "",
        "## Training",
        "",
        *(
            f"- {name}: {one['steps']:,} steps, last loss (mean of the last 100) {one['loss']:.4f}"
            for name, one in metrics["training"].items()
        ),
        "",
        "The recipe is `recipes/reference_model/reference.toml`; `python -m recipes.reference_model train` "
        "runs it. What happened on the way is in `HISTORY.md`.",
        "",
        "![Loss curves](curves.png)",
        "",
    ]
    return "\n".join(lines)


def write_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write the figure as PNG, equal figures as equal bytes."""
    FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})


def draw_prompt_grid(
    path: Path, prompts: Sequence[str], drawn: torch.Tensor, real: torch.Tensor, columns: int = 8
) -> None:
    """Generated uint8 pictures (N, 3, H, W), each with its prompt above and the real held-out picture beside it."""
    rows = -(-len(prompts) // columns)
    figure = Figure(figsize=(1.75 * columns, 1.32 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    gap = torch.full((3, drawn.shape[2], 4), 255, dtype=torch.uint8)
    for axis, prompt, made, true in zip(axes, prompts, drawn, real, strict=False):
        axis.imshow(torch.cat([made, gap, true], dim=2).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title("\n".join(textwrap.wrap(prompt, 30)[:3]), fontsize=6)
    figure.suptitle(
        "Held-out prompts: generated (left) and the real picture, never trained on (right)", fontsize=9
    )
    write_figure(figure, path, dpi=72)


def draw_impacts(path: Path, blocks: pd.DataFrame) -> None:
    """Removal impact of every removable block on a logarithmic axis, in order of execution, with its interval."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axis = figure.subplots()
    place = range(len(blocks))
    below, above = blocks["impact"] - blocks["low"], blocks["high"] - blocks["impact"]
    colours = [_DRAWN if ".A" in name else _REAL for name in blocks["group"]]
    axis.bar(
        place, blocks["impact"], color=colours, yerr=[below.clip(lower=0), above.clip(lower=0)], capsize=2
    )
    axis.set_yscale("log")
    axis.set_xticks(place, blocks["group"], rotation=90, fontsize=7)
    axis.set_ylabel("relative change of the prediction")
    axis.set_title("Removal impact (blue: attention, grey: residual), 95 % intervals", fontsize=9)
    write_figure(figure, path, dpi=100)


def draw_curves(path: Path, curves: Mapping[str, pd.DataFrame]) -> None:
    """Training loss of each network by step, smoothed over 10 rows, logarithmic."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    for axis, (name, curve) in zip(
        figure.subplots(1, max(1, len(curves)), squeeze=False)[0], curves.items(), strict=False
    ):
        axis.plot(curve["step"], curve["loss"].rolling(10, min_periods=1).mean(), color=_DRAWN, linewidth=1)
        axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.set_title(f"{name}: training loss", fontsize=9)
    write_figure(figure, path, dpi=100)
