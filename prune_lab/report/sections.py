"""The content of the report, section by section; the HTML and the Markdown page are both written from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from prune_lab.report import charts
from prune_lab.report import format as fmt
from prune_lab.report.criteria import criteria_parts, draw_parts
from prune_lab.report.document import Chart, Section, SectionItem, Table, Text, not_run, table_of
from prune_lab.report.figures import plan_styles
from prune_lab.report.gates import gate_parts
from prune_lab.report.live_map import live_map
from prune_lab.report.maps import draw_block_map, draw_plan_maps, is_chain, shape_words
from prune_lab.report.picture_grids import picture_parts
from prune_lab.report.shown import shown_in_figures, shown_note
from prune_lab.report.summary import summary
from prune_lab.report.tables import (
    RunTables,
    block_map_frame,
    curve_frame,
    layer_map_frame,
    measured,
    named_layers,
)
from prune_lab.report.tournament import ranking_tables, tournament_parts

_IMPORTANCE = (
    ("Group", "group", fmt.text),
    ("Kind", "kind", fmt.text),
    ("Impact", "impact", fmt.short_number),
    ("Interval", "interval", fmt.text),
    ("Samples", "samples", fmt.count),
)
_COSTS = (
    ("Part", "name", fmt.text),
    ("Kind", "kind", fmt.text),
    ("Parameters", "params", fmt.count),
    ("MACs (whole)", "macs", fmt.amount),
    ("of these attention products", "attention_macs", fmt.amount),
)
_PIPELINE = (
    ("Part of the pipeline", "part", lambda part: fmt.text(part).replace("_", " ")),
    ("Calls", "calls", fmt.count),
    ("Tokens", "tokens", fmt.count),
    ("Parameters", "params", fmt.count),
    ("MACs of a call", "macs", fmt.amount),
    ("Median time of a call", "median_ms", fmt.milliseconds),
    ("Share of time", "share", fmt.percent),
)


def report_sections(tables: RunTables) -> tuple[Section, ...]:
    """All sections of the report on ``tables``; where a step has not been run, a note names the command."""
    drawn = shown_in_figures(tables)
    return (
        Section("summary", "Summary", summary(tables)),
        Section("blocks", "Impact of each block", _blocks(tables)),
        Section("costs", "Cost of each block", _costs(tables)),
        Section("try", "Try a plan", _try(drawn)),
        Section("reductions", "Savings of the plans", _reductions(tables)),
        Section("candidates", "The candidates", _candidates(tables, drawn)),
        Section("ranking", "Cost against quality", _ranking(tables, drawn)),
        Section("distillation", "Distillation", _distillation(drawn)),
        Section("pictures", "Pictures", picture_parts(drawn)),
        Section("conditions", "Conditions and files", _conditions(tables)),
    )


def _blocks(tables: RunTables) -> tuple[SectionItem, ...]:
    if tables.blocks is None:
        return (
            not_run("the blocks have not been listed", "run --config FILE.toml"),
            *criteria_parts(tables.criteria),
        )
    frame = block_map_frame(tables.blocks, tables.importance)
    layers = named_layers(layer_map_frame(tables.blocks, tables.importance), ())
    parts: list[SectionItem] = [
        Chart(
            "block_map",
            f"The {len(frame)} blocks of the model {shape_words(frame)}, each coloured by the impact of its removal.",
            _how_drawn(frame, layers),
            lambda theme: draw_block_map(frame, theme, layers),
        )
    ]
    importance = tables.importance
    if importance is None:
        return (*parts, not_run("the blocks have not been scored", "score"))
    parts.append(
        Chart(
            "importance",
            f"Impact of removal with bootstrap intervals for {_kinds_of(importance)} on a log axis.",
            _how_scored(importance),
            lambda theme: charts.draw_importance(importance, theme),
        )
    )
    if (impacts := tables.parts) is not None:
        parts.append(
            Chart(
                "importance_parts",
                "Impact of every block by timestep and by kind of prompt, coloured on a log scale.",
                "The impacts in a column are relative to the predictions of its own samples. High timesteps, with much "
                "noise, are on the right. Columns with few samples are less exact.",
                lambda theme: draw_parts(impacts, theme),
            )
        )
    low, high = (importance[end].map(fmt.short_number) for end in ("low", "high"))
    group = importance["group"] + importance["starred"].map({True: "*", False: ""})
    scores = importance.assign(group=group, interval=low + " to " + high)
    parts.append(table_of(scores, _IMPORTANCE, "All scores", "importance.csv", left=2, folded=True))
    return (*parts, *criteria_parts(tables.criteria))


def _how_drawn(frame: pd.DataFrame, layers: pd.DataFrame) -> str:
    """How the map of the blocks ``frame`` and the ``layers`` inside them is read."""
    if is_chain(frame):
        lists = frame["stage"].nunique()
        words = (
            "The blocks of a transformer run one after the other: read them from left to right, row by row."
        )
        words += f" It has {lists} kinds of blocks, named by their letters." if lists > 1 else ""
        stars = " A star marks a block that cannot be removed."
    else:
        words = (
            "Down stages on the left, the mid stage at the bottom, up stages on the right; dotted arrows are skip "
            "connections. Square cells are residual blocks (R), round ones attention blocks (A)."
        )
        stars = (
            " A star marks a block that changes the number of channels: it cannot be removed, and is scored with "
            "channel interpolation."
        )
    words += stars if not frame["removable"].all() else ""
    return words + (" Slices in a block are the layers inside it (T1, T2, ...)." if len(layers) else "")


_GROUPS = {
    "block": "single blocks",
    "pair": "pairs",
    "triplet": "triplets",
    "stage": "stages",
    "inner": "the innermost stages",
    "plan": "plans",
}


def _kinds_of(importance: pd.DataFrame) -> str:
    """The kinds of groups that were scored, in words: a transformer has no pairs."""
    return fmt.enumeration(words for kind, words in _GROUPS.items() if kind in set(importance["kind"]))


def _how_scored(importance: pd.DataFrame) -> str:
    criterion = importance["criterion"].iloc[0]
    least, most = fmt.count(importance["samples"].min()), fmt.count(importance["samples"].max())
    samples = f"{most} held-out samples"
    if least != most:
        samples = f"held-out samples, in a race: between {least} samples, where the order was clear early, and {most}"
    words = f"Criterion `{criterion}` on {samples}. The line through each point is its bootstrap interval."
    if criterion == "output-mse":
        words += (
            " 0.01 means that the mean squared change of the prediction is one hundredth of its mean square."
        )
    return words


def _costs(tables: RunTables) -> tuple[SectionItem, ...]:
    if tables.costs is None:
        return (not_run("costs have not been counted", "run --config FILE.toml"),)
    costs, importance = tables.costs, tables.importance
    samplers = bool((costs["kind"] == "sampler").any())  # of a U-Net
    parts: list[SectionItem] = [
        Chart(
            "costs",
            f"Parameters and multiply-adds of every block{', sampler' if samplers else ''} and the rest, beside the "
            "impact of removal.",
            f"Blocks in the order of execution, then {'the samplers and ' if samplers else ''}the rest; together they "
            "are the whole model. "
            f"The cost of a plan is that of the whole minus the blocks it removes. {_counted_at(costs)}",
            lambda theme: charts.draw_costs(costs, importance, theme),
        ),
        table_of(costs, _COSTS, "All costs", "costs.csv", left=2, folded=True),
    ]
    if tables.pipeline is not None:
        caption = "Where the time of one picture goes"
        parts.append(table_of(tables.pipeline, _PIPELINE, caption, "pipeline.csv"))
    return tuple(parts)


def _counted_at(costs: pd.DataFrame) -> str:
    """What the multiply-adds are of, in a sentence."""
    words = "A multiply-add counts as one; "
    if "size" in costs:
        return f"{words}they are of one forward pass at {costs['size'].iloc[0]}."
    return f"{words}the text is {fmt.count(costs['tokens'].iloc[0])} tokens long."


def _try(tables: RunTables) -> tuple[SectionItem, ...]:
    alive = live_map(tables)
    if alive is None:
        return (not_run("costs have not been counted", "run --config FILE.toml"),)
    words = (
        "Click a block, or the name of a stage, to take it out of the model or put it back. Costs, the predicted "
        "impact and whether a plain `diffusers` config describes what is left change at once. A budget is a share of "
        "the teacher's cost.",
    )
    how = (
        "The predicted impact is the sum of the impacts of single blocks, as the search adds them up. Predicted times "
        "are those of the latency table, where one was measured. Stars mark blocks that cannot be removed. The "
        "command runs in the folder where the run was started."
    )
    return Text(words), alive, Text((how,))


def _reductions(tables: RunTables) -> tuple[SectionItem, ...]:
    if tables.reductions is None:
        return (not_run("no reductions have been counted", "run --config FILE.toml"),)
    conventions = (
        "Multiply-adds (MACs) are counted in two ways: *whole* counts everything; *paper* omits the products inside "
        "attention, as in the figures published with BK-SDM."
    )
    parts: list[SectionItem] = [Text((conventions,))]
    for model, counted in tables.reductions.groupby("model", sort=False):
        alone = len(counted) == 1 and model == tables.reductions["model"].iloc[0]
        frame = _of_ranked(counted, tables.ranking) if alone and tables.ranking is not None else counted
        has_times = "median_ms" in frame and bool(frame["median_ms"].notna().any())
        header = ["Plan", "Blocks removed", "Parameters", "change", "MACs (whole)", "change"]
        header += ["MACs (paper)", "change", "Form"]
        rows = []
        for index, row in enumerate(frame.to_dict("records")):
            cells = [str(row["plan"]), fmt.count(row["blocks_removed"])]
            for column, formatted in (
                ("params", fmt.count),
                ("macs", fmt.amount),
                ("paper_macs", fmt.amount),
            ):
                cells += [
                    formatted(row[column]),
                    fmt.percent_change(row[f"{column}_change"]) if index else "",
                ]
            cells.append(_form(row, tables, own=model == tables.reductions["model"].iloc[0]) if index else "")
            if has_times:
                cells.append(fmt.milliseconds(row["median_ms"]))
                ends = row.get("latency_low"), row.get("latency_high")
                cells.append(fmt.change_with_interval(row["latency_change"], *ends) if index else "")
                cells.append(f"{row['p10_ms']:.3g} to {fmt.milliseconds(row['p90_ms'])}")
            rows.append(tuple(cells))
        header += ["Median time", "change", "p10 to p90"] if has_times else []
        parts.append(Table(str(model), tuple(header), tuple(rows), "reductions.csv"))
        parts += _footnotes(frame, has_times)
    return tuple(parts)


def _of_ranked(teacher: pd.DataFrame, ranking: pd.DataFrame) -> pd.DataFrame:
    """The row of the ``teacher`` with one for each plan that is ranked: of a model that has no named plans."""
    plans = ranking[ranking["origin"] != "teacher"].assign(native=True)
    for cost in ("params", "macs", "paper_macs"):
        plans[f"{cost}_change"] = plans[cost] / teacher[cost].iloc[0] - 1
    shown = [name for name in teacher if name in plans]
    times = ["median_ms", "p10_ms", "p90_ms"]  # of the ranking they are in its own table
    return pd.concat([teacher.drop(columns=times, errors="ignore"), plans[shown].drop(columns="median_ms")])


def _form(row: Mapping[Any, Any], tables: RunTables, *, own: bool) -> str:
    """How the student of a row is built: as the run builds it; of another model natively where it can be."""
    known = {plan.label: plan.form for plan in tables.plans} if own else {}
    return known.get(str(row["plan"]), "native" if row["native"] else "no plain config")


def _footnotes(frame: pd.DataFrame, has_times: bool) -> list[SectionItem]:
    """Notes on a table of reductions: operators that are not counted, and the number of timed runs."""
    sentences = []
    if not fmt.is_missing(frame["uncounted"].iloc[0]):
        calls = str(frame["uncounted"].iloc[0]).replace(":", " ").split()
        listed = ", ".join(f"{name} {number}" for name, number in zip(calls[::2], calls[1::2], strict=False))
        sentences.append(
            f"Operators that are not counted, with their calls in one pass of the teacher: {listed}."
        )
    if has_times:
        known = {name: str(frame[name].dropna().iloc[0]) for name in ("timed", "service") if name in frame}
        how = ", ".join(known.values())
        sentences.append(
            f"Times are of one forward pass with random weights, {fmt.count(frame['runs'].max())} rounds"
            f"{f' ({how})' if how else ''}. A change is the median of the ratios to the teacher within a round, with "
            "its 95 % interval: undecided where that contains no change, or where there are fewer than six rounds."
        )
    return [Text((" ".join(sentences),))] if sentences else []


def _candidates(tables: RunTables, drawn: RunTables) -> tuple[SectionItem, ...]:
    if not tables.plans:
        return (not_run("no candidates have been chosen", "search"),)
    styles = plan_styles(drawn.plans)
    rows: tuple[tuple[str, ...], ...] = tuple(
        (plan.label, plan.origin, plan.form, str(len(plan.removed)), " ".join(plan.removed), plan.id)
        for plan in tables.plans
    )
    header: tuple[str, ...] = ("Plan", "Origin", "Form", "Blocks removed", "Names of blocks", "Id")
    title, numbers = "Removed blocks of each candidate", 6
    if any(plan.widths for plan in tables.plans):
        title, numbers = "Removed and narrower blocks of each candidate", 7
        rows = tuple((*row, ", ".join(plan.widths)) for row, plan in zip(rows, tables.plans, strict=True))
        header = (*header, "What stays of widths")
    listing = Table(title, header, rows, left=numbers, folded=True)
    learnt = gate_parts(tables.gates, tables.gate_steps)
    if tables.blocks is None:
        return (listing, *learnt)
    frame = block_map_frame(tables.blocks, tables.importance)
    layers = named_layers(layer_map_frame(tables.blocks, tables.importance), drawn.plans)
    note = shown_note(tables)
    return (
        *((Text((note,)),) if note else ()),
        Chart(
            "plans",
            "One small map of the model per candidate with the removed blocks as dashed outlines.",
            "Dashed outlines are removed blocks; the others have the colour of their impact. Controls are what a "
            "search has to beat: BK-SDM's plans where they are defined, and plans that cost nothing to find; searched "
            "plans are the best that the solver found under the budget."
            + (" Hollow slices in a block are layers that leave from inside it." if len(layers) else ""),
            lambda theme: draw_plan_maps(frame, drawn.plans, styles, theme, layers),
        ),
        listing,
        *learnt,
    )


def _ranking(tables: RunTables, drawn: RunTables) -> tuple[SectionItem, ...]:
    ranking = tables.ranking
    if ranking is None:
        return (not_run("the candidates have not been ranked", "rank"),)
    styles = plan_styles(drawn.plans)
    parts: list[SectionItem] = []
    if len(measured(ranking)):
        parts.append(
            Chart(
                "quality",
                "Held-out loss and CLIP score against multiply-adds and parameters for every candidate.",
                "Hollow marks are candidates before distillation, filled marks after it; the square and the dashed "
                "line are the teacher. Pale marks are candidates that the tournament dropped, at their last rung. The "
                "grey staircase is the Pareto front of its panel: the best quality at each cost. In the table, *on the "
                "front* means the front of parameters, multiply-adds and loss together.",
                lambda theme: charts.draw_quality_plane(ranking, styles, theme),
            )
        )
    if ranking[["clip_before", "clip_after"]].isna().all(axis=None) and (why := _no_scorer(tables)):
        parts.append(Text((f"There are no CLIP scores: {why}.",), note=True))
    parts += ranking_tables(ranking, tables.plans)
    parts += tournament_parts(tables, drawn)
    if (measured(ranking)["impact_one_shot"] > 0).sum() > 1:
        parts.append(
            Chart(
                "prediction",
                "Impact in one shot against held-out loss before and after distillation.",
                "Each mark is one candidate. If the marks lie on a rising line, the cheap score predicts the loss.",
                lambda theme: charts.draw_prediction(ranking, styles, theme),
            )
        )
    return tuple(parts)


def _no_scorer(tables: RunTables) -> str:
    """Why pictures were not scored; empty where that is not known."""
    return next((str(role["source"]) for role in tables.roles if role["name"] == "scorer"), "")


_REPAIRS = (
    ("Plan", "plan", fmt.text),
    ("Repair kept", "kept", fmt.yes_or_no),
    ("Loss as cut", "loss_before", fmt.loss_or_score),
    ("Loss repaired", "loss_after", fmt.loss_or_score),
    ("Rows", "rows", fmt.count),
    ("Corrections", "applied", fmt.count),
    ("Impact as cut", "impact_before", fmt.loss_or_score),
    ("Impact repaired", "impact_after", fmt.loss_or_score),
)


def _repairs(tables: RunTables) -> tuple[SectionItem, ...]:
    if tables.repairs is None:
        return ()
    words = (
        "Before any training the cuts are mended in closed form. The repair is kept where the loss falls by it on "
        "training pictures that it was not fitted on and that no student is judged by."
    )
    return (
        Text((words,)),
        table_of(tables.repairs, _REPAIRS, "Repair of the cuts", "repairs.csv"),
    )


def _distillation(tables: RunTables) -> tuple[SectionItem, ...]:
    if not tables.recoveries:
        return (*_repairs(tables), not_run("no candidate has been distilled", "distill"))
    styles = plan_styles(tables.plans)
    curves = curve_frame(tables)
    settings: dict[str, Any] = tables.settings.get("distill", {})
    shown = ("steps", "batch", "learning_rate", "task_weight", "output_weight", "feature_weight", "seed")
    listed = ", ".join(f"{key.replace('_', ' ')} {settings[key]:g}" for key in shown if key in settings)
    return (
        *_repairs(tables),
        Chart(
            "curves",
            "Held-out loss and the task, output and feature losses of every candidate over the distillation steps.",
            "Every candidate sees the same pictures, noise and timesteps in the same order"
            + (f" ({listed})." if listed else "."),
            lambda theme: charts.draw_curves(curves, tables.plans, styles, theme),
        ),
    )


def _conditions(tables: RunTables) -> tuple[SectionItem, ...]:
    parts: list[SectionItem] = []
    if tables.environment:
        rows = tuple((key.replace("_", " "), str(value)) for key, value in tables.environment.items())
        parts.append(Table("Environment of the measurements", ("Item", "Value"), rows, left=2))
    else:
        parts.append(Text(("The environment of this run was not recorded.",), note=True))
    if tables.roles:
        used = tuple(
            (str(role["name"]), str(role["source"]), fmt.count(role["count"]), fmt.count(role["size"]))
            for role in tables.roles
        )
        header = ("Used as", "Source", "Pictures", "Pixels of a side")
        parts.append(Table("Data and scorer of this run", header, used, "sources.json", left=2))
    if tables.steps is not None:
        times = tuple(
            (str(row.step), f"{row.seconds:,.1f}{fmt.NARROW}s") for row in tables.steps.itertuples()
        )
        caption = "Time of each step in the last call of the job (finished steps are only read)"
        parts.append(Table(caption, ("Step", "Time"), times, "steps.csv", left=1))
    validity = (
        "Exact numbers are in the CSV files beside this page. Times are valid only for the machine above; parameters "
        f"and multiply-adds are the same on every machine. A dash ({fmt.UNKNOWN}) means not measured."
    )
    return (*parts, Text((validity,)))
