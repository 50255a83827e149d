"""The findings of a run in sentences, each put together from numbers of its tables."""

from __future__ import annotations

from prune_lab.report.document import SectionItem, Text
from prune_lab.report.format import amount, change, count, figure3, in_words, plural, short_number
from prune_lab.report.tables import RunTables, at_the_end, dropped, left_out, teacher_row


def summary(tables: RunTables) -> tuple[SectionItem, ...]:
    """What was found, and which steps of the run are still to be done."""
    sentences = [*_say_model(tables), *_say_impacts(tables), *_say_reductions(tables), *_say_outcome(tables)]
    steps = (
        ("blocks listed", tables.blocks is not None, "run"),
        ("blocks scored", tables.importance is not None, "score"),
        ("costs counted", tables.costs is not None, "run"),
        ("candidates chosen", bool(tables.plans), "search"),
        ("candidates distilled", bool(tables.recoveries), "distill"),
        ("candidates ranked", tables.ranking is not None, "rank"),
    )
    missing = [(step, verb) for step, done, verb in steps if not done]
    parts: list[SectionItem] = [Text(tuple(sentences), bullets=True)] if sentences else []
    if missing:
        steps_left = in_words(f"{step} (`prune-lab {verb}`)" for step, verb in missing)
        parts.append(Text((f"This run is not complete. Not done yet: {steps_left}.",), note=True))
    return tuple(parts)


def _say_model(tables: RunTables) -> list[str]:
    if tables.blocks is None:
        return []
    kinds = tables.blocks["kind"].value_counts()
    says = (
        f"The U-Net of `{tables.model}` has {len(tables.blocks)} blocks ({kinds.get('resnet', 0)} residual, "
        f"{kinds.get('attention', 0)} attention); {int(tables.blocks['removable'].sum())} of them can be removed."
    )
    if tables.reductions is None:
        return [says]
    teacher = tables.reductions.iloc[0]
    return [
        f"{says} It has {count(teacher['params'])} parameters and takes {amount(teacher['macs'])} multiply-adds for "
        f"one forward pass, {amount(teacher['paper_macs'])} without attention products."
    ]


def _say_impacts(tables: RunTables) -> list[str]:
    if tables.importance is None:
        return []
    blocks = tables.importance[
        (tables.importance["kind"] == "block") & ~tables.importance["starred"].astype(bool)
    ]
    if blocks.empty:
        return []
    ordered = blocks.sort_values("impact")
    least = in_words(f"{row.group} ({short_number(row.impact)})" for row in ordered.head(3).itertuples())
    most = in_words(f"{row.group} ({short_number(row.impact)})" for row in ordered[::-1].head(3).itertuples())
    sure = int((blocks["low"] > 0).sum())
    return [
        f"Removed one at a time, the blocks missed least are {least}; those missed most are {most}. "
        f"The interval excludes zero for {sure} of {len(blocks)} removable blocks."
    ]


def _say_reductions(tables: RunTables) -> list[str]:
    if tables.reductions is None:
        return []
    says = []
    for model, rows in tables.reductions.groupby("model", sort=False):
        plans = [
            f"{row['plan']} {change(row['params_change'])} parameters and {change(row['macs_change'])} multiply-adds"
            for row in rows.iloc[1:].to_dict("records")
        ]
        if plans:
            says.append(f"On `{model}`: {'; '.join(plans)}.")
    return says


def _say_outcome(tables: RunTables) -> list[str]:
    if tables.ranking is None:
        return []
    ranked = at_the_end(tables.ranking)
    ranked = ranked[ranked["rank"].notna() & (ranked["origin"] != "teacher")]
    fell = dropped(tables.ranking)
    says = []
    if len(ranked):
        ordered = ranked.sort_values("rank")
        best = ordered.iloc[0]
        teacher = teacher_row(tables.ranking)
        steps = tables.setting("distill", "steps")
        after = f"after {steps} steps of distillation" if steps else "after distillation"
        against = "" if teacher is None else f"; the teacher has {figure3(teacher['loss_after'])}"
        those = f"{plural(len(ranked), 'candidate')} ranked"
        if len(fell):
            those = (
                f"{plural(len(ranked) + len(fell), 'candidate')} ranked, {len(fell)} of them dropped on the way by the "
                f"tournament"
            )
        says.append(
            f"{those}. First is {best['plan']}: held-out loss "
            f"{figure3(best['loss_after'])} {after} ({figure3(best['loss_before'])} before){against}."
        )
        tied = ordered.iloc[1:]
        tied = tied[tied["tie_group"] == best["tie_group"]]
        if len(tied):
            says.append(
                f"By their held-out losses {best['plan']} cannot be told apart from {in_words(map(str, tied['plan']))}."
            )
        controls = ordered[ordered["origin"] == "control"]
        if len(controls) and controls.iloc[0]["plan"] != best["plan"]:
            control = controls.iloc[0]
            says.append(
                f"First of the controls is {control['plan']} at rank {count(control['rank'])}: "
                f"{figure3(control['loss_after'])} ({figure3(control['loss_before'])} before), with "
                f"{amount(control['params'])} parameters against {amount(best['params'])}."
            )
    out = left_out(tables.ranking)
    if len(out):
        says.append(f"Left out: {in_words(f'{row.plan} ({row.reason})' for row in out.itertuples())}.")
    return says
