"""Figures of the reference model's report: the prompt grid, block impacts, loss curves. Tables in, PNG out."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prune_lab.runtime import atomic_write

_DRAWN, _REAL = "#1f5a96", "#999999"


def _write(figure: Figure, path: Path, dpi: int) -> None:
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
    _write(figure, path, dpi=72)


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
    _write(figure, path, dpi=100)


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
    _write(figure, path, dpi=100)
