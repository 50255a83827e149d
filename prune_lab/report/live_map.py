"""The block map that answers to clicks: what a reader's own plan costs, and whether it can be built.

Everything is looked up in tables that the run has written; the page only adds and subtracts. Impacts are added up as
the search adds them, costs and times are taken off the teacher's as the cost table takes them off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.colors import LogNorm, to_rgb

from prune_lab.report import format as fmt
from prune_lab.report.document import LiveCell, LiveLabel, LiveLayer, LiveMap
from prune_lab.report.figures import DARK, LIGHT, Theme, impact_colors
from prune_lab.report.maps import HEIGHT, WIDTH, ink_on, map_bounds, map_cells, map_scale, shape_words
from prune_lab.report.tables import RunTables, block_map_frame, layer_map_frame

_KINDS = {"resnet": "residual block", "attention": "attention block", "transformer": "transformer block"}
_TALLER = 1.45  # than in the figures: a cell has room for larger letters
_COUNTED = ("params", "macs", "paper_macs")
_WORDS = (
    ("params", "Parameters", fmt.count),
    ("macs", "MACs (whole)", fmt.amount),
    ("paper_macs", "MACs (paper)", fmt.amount),
    ("ms", "Latency, predicted", fmt.milliseconds),
)
_BUDGETS = (("macs", "multiply-adds"), ("params", "parameters"), ("ms", "latency"))


def live_map(tables: RunTables) -> LiveMap | None:
    """The map of the run's blocks; None before the run has listed and counted them."""
    if tables.blocks is None or tables.costs is None:
        return None
    frame = block_map_frame(tables.blocks, tables.importance)
    layers = layer_map_frame(tables.blocks, tables.importance)
    norm = map_scale(frame, layers)
    times = _times(tables.latency)
    costs = _costs(tables.costs, times, tables.blocks, layers)
    inside = {str(name): str(block) for name, block in zip(layers["name"], layers["inside"], strict=True)}
    left, bottom, right, top = map_bounds(frame)
    return LiveMap(
        shape=shape_words(frame),
        width=right - left,
        aspect=(right - left) / (top - bottom) / _TALLER,
        cells=_cells(frame, norm),
        labels=_labels(frame),
        layers=tuple(
            (str(block), tuple(_layer(row, norm) for row in rows.to_dict("records")))
            for block, rows in layers.groupby("inside", sort=False)
        ),
        metrics=tuple(
            (name, words, written(sum(part[name] for part in costs.values())))
            for name, words, written in _WORDS
            if name != "ms" or times
        ),
        budgets=tuple(budget for budget in _BUDGETS if budget[0] != "ms" or times),
        data={
            "model": tables.model,
            "costs": costs,
            "impacts": {
                str(name): None if pd.isna(impact) else float(impact)
                for shown in (frame, layers)
                for name, impact in zip(shown["name"], shown["impact"], strict=True)
            },
            "inside": inside,
            "choices": tables.choices,
            "neutral": _neutral(tables.choices, costs, inside),
            "forms": {plan.label: plan.form for plan in tables.plans},
            "plans": {"teacher": [], **{plan.label: list(plan.removed) for plan in tables.plans}},
        },
    )


def _times(latency: Mapping[str, Any] | None) -> dict[str, float]:
    """Milliseconds that each part takes off the teacher's time, and the teacher's as ``""``; empty: not measured."""
    if not latency:
        return {}
    scale = float(latency["scale"])
    saved = {str(one["name"]): scale * max(0.0, float(one["measured_ms"])) for one in latency["savings"]}
    first = {name.split("+")[0]: saving for name, saving in saved.items()}
    return {"": float(latency["whole"]["median_ms"]), **first}


def _costs(
    costs: pd.DataFrame, times: Mapping[str, float], blocks: pd.DataFrame, layers: pd.DataFrame
) -> dict[str, dict[str, float]]:
    """What each block without its layers, each layer, each sampler and the rest take, by name.

    A part without a saving in time takes none; a layer has the share of its block's time that it has of its MACs.
    """
    found = {
        str(row["name"]): {metric: int(row[metric]) for metric in _COUNTED} | {"ms": 0.0}
        for row in costs.to_dict("records")
    }
    for name, part in found.items():
        part["ms"] = times.get(name, 0.0)
    if times and "rest" in found:
        found["rest"]["ms"] = times[""] - sum(part["ms"] for name, part in found.items() if name != "rest")
    whole = {name: dict(part) for name, part in found.items()}
    counted = blocks.set_index("name")
    for name, around in zip(layers["name"], layers["inside"], strict=True):
        params, macs, products = (int(counted.loc[name, c]) for c in ("params", "macs", "attention_macs"))
        time = whole[around]["ms"] * macs / max(1, whole[around]["macs"])
        found[name] = {"params": params, "macs": macs, "paper_macs": macs - products, "ms": time}
        for metric, cost in found[name].items():
            found[around][metric] -= cost
    return found


def _neutral(
    choices: Mapping[str, Any] | None, costs: Mapping[str, Mapping[str, float]], inside: Mapping[str, str]
) -> dict[str, Any] | None:
    """What leaves with each part in the neutral form, in which removed blocks stay and do nothing, and what only when
    several are gone; None where the model has no such form, or an older version has not counted it.

    A part's time leaves by the share of its MACs that does.
    """
    savings = (choices or {}).get("neutral")
    if savings is None:
        return None
    whole = {name: dict(cost) for name, cost in costs.items()}
    for layer, around in inside.items():
        for metric, cost in costs[layer].items():
            whole[around][metric] += cost

    def saved(amounts: Sequence[int], usual: Mapping[str, float] | None = None) -> dict[str, float]:
        params, macs, products = amounts
        time = usual["ms"] * macs / usual["macs"] if usual and usual["macs"] else 0.0
        return {"params": params, "macs": macs, "paper_macs": macs - products, "ms": time}

    return {
        "parts": {name: saved(amounts, whole.get(name)) for name, amounts in savings["parts"].items()},
        "together": [[one["blocks"], saved(one["saves"])] for one in savings["together"]],
    }


def _look(impact: float, theme: Theme, norm: LogNorm) -> tuple[str, str]:
    """Colour of a cell and of the letters on it."""
    if fmt.is_missing(impact):
        return "transparent", theme.text
    red, green, blue = to_rgb(impact_colors(theme)(float(norm(impact))))
    return f"rgb({red:.1%} {green:.1%} {blue:.1%})", ink_on((red, green, blue), theme)


def _spoken(name: str, kind: str, impact: float, removable: object) -> str:
    """What a screen reader says of a block or layer."""
    words = [f"{name}, {kind}"]
    words += ["not scored" if pd.isna(impact) else f"impact {fmt.short_number(impact)}"]
    return ", ".join([*words, *([] if removable else ["cannot be removed"])])


def _layer(row: Mapping[Any, Any], norm: LogNorm) -> LiveLayer:
    name, impact = str(row["name"]), row["impact"]
    return LiveLayer(
        name=name,
        stage=name.split(".", maxsplit=1)[0],
        short=name.rpartition(".")[2],
        scored=not pd.isna(impact),
        spoken=_spoken(name, "transformer layer", impact, row["removable"]),
        removable=bool(row["removable"]),
        light=_look(impact, LIGHT, norm),
        dark=_look(impact, DARK, norm),
    )


def _cells(frame: pd.DataFrame, norm: LogNorm) -> tuple[LiveCell, ...]:
    left, bottom, right, top = map_bounds(frame)
    cells = []
    for cell, row in zip(map_cells(frame)[0], frame.to_dict("records"), strict=True):
        impact = row["impact"]
        kind = _KINDS.get(str(row["kind"]), str(row["kind"]))
        cells.append(
            LiveCell(
                name=cell.name,
                stage=str(row["stage"]),
                short=cell.name.removeprefix(f"{row['stage']}."),
                number="" if pd.isna(impact) else fmt.short_number(impact),
                spoken=_spoken(cell.name, kind, impact, row["removable"]),
                removable=bool(row["removable"]),
                round=row["kind"] == "attention",
                left=100 * (cell.x - left) / (right - left),
                top=100 * (top - cell.y - HEIGHT) / (top - bottom),
                width=100 * WIDTH / (right - left),
                height=100 * HEIGHT / (top - bottom),
                light=_look(impact, LIGHT, norm),
                dark=_look(impact, DARK, norm),
            )
        )
    return tuple(cells)


def _labels(frame: pd.DataFrame) -> tuple[LiveLabel, ...]:
    left, bottom, right, top = map_bounds(frame)
    return tuple(
        LiveLabel(
            stage, 100 * (x - left) / (right - left), 100 * (top - y) / (top - bottom), align == "right"
        )
        for stage, x, y, align in map_cells(frame)[1]
    )
