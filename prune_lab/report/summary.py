"""The summary of a run in sentences, made from the numbers in its tables."""

from __future__ import annotations

from prune_lab.report.document import SectionItem, Text
from prune_lab.report.format import (
    amount,
    count,
    enumeration,
    loss_or_score,
    percent_change,
    plural,
    short_number,
)
from prune_lab.report.tables import RunTables, dropped, not_dropped, teacher_row, unranked, whole_blocks

_KINDS = {"resnet": "residual", "attention": "attention", "transformer": "transformer"}
_NAMED = 12  # as many candidates are called by name in a sentence


def _num_layers(tables: RunTables) -> int:
    """How many layers inside blocks can be named."""
    return 0 if tables.blocks is None else len(tables.blocks) - len(whole_blocks(tables.blocks))


def _model_sentences(tables: RunTables) -> list[str]:
    if tables.blocks is None:
        return []
    blocks = whole_blocks(tables.blocks)
    kinds = blocks["kind"].value_counts()
    counted = ", ".join(f"{kinds[kind]} {word}" for kind, word in _KINDS.items() if kind in kinds)
    blocks_of_kinds = f"{counted} blocks" if len(kinds) == 1 else f"{len(blocks)} blocks ({counted})"
    num_layers = _num_layers(tables)
    layers = f" Inside them are {num_layers} layers that leave one by one." if num_layers else ""
    sentence = (
        f"The model `{tables.model}` has {blocks_of_kinds}; {int(blocks['removable'].sum())} of them "
        f"can be removed.{layers}"
    )
    if tables.reductions is None:
        return [sentence]
    teacher = tables.reductions.iloc[0]
    return [
        f"{sentence} It has {count(teacher['params'])} parameters and takes {amount(teacher['macs'])} multiply-adds "
        f"for one forward pass, {amount(teacher['paper_macs'])} without attention products."
    ]


def _impact_sentences(tables: RunTables) -> list[str]:
    if tables.importance is None:
        return []
    blocks = tables.importance[
        (tables.importance["kind"] == "block") & ~tables.importance["starred"].astype(bool)
    ]
    if blocks.empty:
        return []
    ordered = blocks.sort_values("impact")
    least, most = (
        enumeration(f"{row.group} ({short_number(row.impact)})" for row in rows.head(3).itertuples())
        for rows in (ordered, ordered[::-1])
    )
    positive = int((blocks["low"] > 0).sum())
    what = "blocks" if _num_layers(tables) == 0 else "blocks and layers"
    return [
        f"Removed one at a time, the {what} with the least impact are {least}; those with the most are {most}. "
        f"The interval excludes zero for {positive} of {len(blocks)} removable {what}."
    ]


def _reduction_sentences(tables: RunTables) -> list[str]:
    if tables.reductions is None:
        return []
    sentences = []
    for model, rows in tables.reductions.groupby("model", sort=False):
        plans = [
            f"{row['plan']} {percent_change(row['params_change'])} parameters and "
            f"{percent_change(row['macs_change'])} multiply-adds"
            for row in rows.iloc[1:].to_dict("records")
        ]
        if plans:
            sentences.append(f"On `{model}`: {'; '.join(plans)}.")
    return sentences


def _ranking_sentences(tables: RunTables) -> list[str]:
    if tables.ranking is None:
        return []
    finalists = not_dropped(tables.ranking)
    finalists = finalists[finalists["rank"].notna() & (finalists["origin"] != "teacher")]
    num_dropped = len(dropped(tables.ranking))
    sentences = []
    if len(finalists):
        ordered = finalists.sort_values("rank")
        best = ordered.iloc[0]
        teacher = teacher_row(tables.ranking)
        steps = tables.setting("distill", "steps")
        after = f"after {steps} steps of distillation" if steps else "after distillation"
        against = "" if teacher is None else f"; the teacher has {loss_or_score(teacher['loss_after'])}"
        ranked = f"{plural(len(finalists) + num_dropped, 'candidate')} ranked"
        if num_dropped:
            ranked = f"{ranked}, {num_dropped} of them dropped by the tournament before the end"
        sentences.append(
            f"{ranked}. First is {best['plan']}: held-out loss "
            f"{loss_or_score(best['loss_after'])} {after} ({loss_or_score(best['loss_before'])} before){against}."
        )
        tied = ordered.iloc[1:]
        tied = tied[tied["tie_group"] == best["tie_group"]]
        if len(tied):
            others = enumeration(map(str, tied["plan"]), most=_NAMED)
            sentences.append(f"By held-out loss {best['plan']} is tied with {others}.")
        controls = ordered[ordered["origin"] == "control"]
        if len(controls) and controls.iloc[0]["plan"] != best["plan"]:
            control = controls.iloc[0]
            sentences.append(
                f"First of the controls is {control['plan']} at rank {count(control['rank'])}: "
                f"{loss_or_score(control['loss_after'])} ({loss_or_score(control['loss_before'])} before), with "
                f"{amount(control['params'])} parameters against {amount(best['params'])}."
            )
    rest = unranked(tables.ranking)
    if len(rest):
        reasons = enumeration((f"{row.plan} ({row.reason})" for row in rest.itertuples()), most=_NAMED)
        sentences.append(f"Not ranked: {reasons}.")
    return sentences


def summary(tables: RunTables) -> tuple[SectionItem, ...]:
    """The results in sentences, and a note on the steps that are still to be run."""
    sentences = [
        sentence
        for part in (_model_sentences, _impact_sentences, _reduction_sentences, _ranking_sentences)
        for sentence in part(tables)
    ]
    steps = (
        ("blocks listed", tables.blocks is not None, "run"),
        ("blocks scored", tables.importance is not None, "score"),
        ("costs counted", tables.costs is not None, "run"),
        ("candidates chosen", bool(tables.plans), "search"),
        ("candidates distilled", bool(tables.recoveries), "distill"),
        ("candidates ranked", tables.ranking is not None, "rank"),
    )
    missing = [(step, verb) for step, done, verb in steps if not done]
    items: list[SectionItem] = [Text(tuple(sentences), bullets=True)] if sentences else []
    if missing:
        steps_left = enumeration(f"{step} (`prune-lab {verb}`)" for step, verb in missing)
        items.append(Text((f"This run is not complete. Not done yet: {steps_left}.",), note=True))
    return tuple(items)
