"""The model card of a student: what it was cut from and how, what it costs, what fits it, and what is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError  # type: ignore[import-untyped]  # as the hub's client reads cards

from prune_lab.blocks import blocks_frame
from prune_lab.errors import UnsupportedModelError
from prune_lab.export.compatibility import compatibility
from prune_lab.export.snippets import snippet_for, variant_of
from prune_lab.export.students import Student, model_folder_in, padded_widths, provenance_in
from prune_lab.families import (
    base_name,
    family_of,
    film_frames,
    is_own,
    meta_model,
    plain_config,
    text_form,
)
from prune_lab.families.adapter_names import has_additions
from prune_lab.models import ModelSource, usual_drawing
from prune_lab.models.files import json_object
from prune_lab.models.hub import HUB_ID
from prune_lab.plans import PruningPlan
from prune_lab.profiling import cost_table
from prune_lab.report import LIGHT, PlanRow, block_map_frame, draw_plan_maps, plan_styles
from prune_lab.report.figures import freeze_layout, save_png
from prune_lab.report.format import amount, count, percent_change
from prune_lab.runtime import names_alone, write_json, write_text
from prune_lab.surgery import TEACHER, notes_on_form
from prune_lab.version import __version__

_OF_THE_PACKAGE = "apache-2.0"  # LICENSE, as the hub calls it
CARD, MAP = "README.md", "block_map.png"
_LICENCE = ("license", "license_name", "license_link")  # what a card says of it


def parent_name(source: ModelSource) -> str:
    """What the model that was pruned is called, without a path of this machine."""
    return source.text if is_on_hub(source) else source.name


def is_on_hub(source: ModelSource) -> bool:
    """Whether the user called the model by its name on the hub."""
    return bool(HUB_ID.fullmatch(source.text)) and not Path(source.text).exists()


def parents_card(source: ModelSource) -> dict[str, Any]:
    """What the card of the model that was pruned says at its beginning; empty where there is none that can be read. Of
    a model that ships it is the licence of the package.
    """
    if source.kind == "shipped":
        return {"license": _OF_THE_PACKAGE}
    path = (source.folder or Path()) / CARD
    if source.folder is None or not path.is_file():
        return {}
    try:
        return dict(names_alone(metadata_load(path) or {}))
    except (ValueError, OSError, YAMLError):
        return {}


# The parts of the text -----------------------------------------------------------------------------------------------


def front_matter(source: ModelSource, inherited: Mapping[str, Any], tag: str | None, *, trained: bool) -> str:
    """What a card says at its beginning for the hub: licence (that of the parent's card), tags, the parent's name."""
    stated = inherited if inherited.get("license") else {}
    licence = {name: stated[name] for name in _LICENCE if stated.get(name)}
    data = ModelCardData(
        base_model=source.text if is_on_hub(source) else None,
        library_name="diffusers",
        pipeline_tag=tag,
        tags=["prune-lab", "pruned", *(["distillation"] if trained else [])],
        **(licence or {"license": "other", "license_name": "not-stated"}),
    )
    return f"---\n{data.to_yaml()}\n---\n"


def card_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |\n" for line in lines)


def _called(student: Student) -> str:
    return family_of(student.architecture.config).called


def _costs(student: Student) -> str:
    head = [_called(student), "parent", "this model", "change"]
    try:
        costs = cost_table(student.architecture)
    except UnsupportedModelError as error:  # without a size there is nothing to count
        was = student.architecture.total_params
        now = sum(parameter.numel() for parameter in meta_model(student.layout.config).parameters())
        row = ("parameters", count(was), count(now), percent_change(now / was - 1))
        return card_table(head, [row]) + f"\nMultiply-adds were not counted: {error}.\n"
    before, after = costs.total, costs.of(student.plan)
    rows = [
        (name, text(was), text(now), percent_change(now / was - 1))
        for name, text, was, now in (
            ("parameters", count, before.params, after.params),
            ("multiply-adds", amount, before.macs, after.macs),
        )
    ]
    height, width = costs.latent
    film = film_frames(student.architecture.config)
    frames = f" of {film} frames" if film else ""
    timed = student.plan.timed
    latency = f"One pass takes, as measured, {timed}." if timed else "Latency was not measured."
    words = f" with {costs.tokens} words of text" if text_form(student.architecture.config)[1] else ""
    return (
        card_table(head, rows)
        + f"\nMultiply-adds are those of one forward pass over one sample of {height} x {width} latents{frames}"
        f"{words}, attention products included. {latency}\n"
    )


def _form(student: Student) -> str:
    """What one has to know of a student that is not a plain config alone."""
    if student.plan.form == "neutral":
        return (
            "A plain model in which removed blocks are still there and do nothing: weights that are zero keep them "
            "silent. A training that changes these weights brings the blocks back to life; `prune-lab distill` leaves "
            "them alone.\n"
        )
    if student.plan.form == "padded":
        return (
            "A plain model as wide as before: what leaves is there as zeros, so it saves nothing and is for trying. "
            "Both sides of each narrow point are zero, and stay so when it is trained.\n"
        )
    return notes_on_form(student.layout.config)


def _of_padded(source: ModelSource) -> str:
    """What the plan of the student of a padded model does not say."""
    widths = padded_widths(source)
    return (
        widths
        and f"Its parent is padded: {widths} of that one's own parent. These units are zeros here, too, where their "
        "block stayed, and count among the parameters below; the plan above does not name them.\n"
    )


def _cut(plan: PruningPlan) -> str:
    """What was done to the blocks, as the end of "after the blocks were"."""
    done = {"removed": plan.removed or not plan.widths, "made narrower": plan.widths}
    return " and ".join(words for words, there in done.items() if there)


def _cut_in_place(plan: PruningPlan) -> str:
    """The parent that answers as the student does: the end of "that of the parent with"."""
    done = {"these blocks bypassed": plan.removed, "the units that are gone set to 0": plan.widths}
    return " and ".join(words for words, there in done.items() if there) or "no change"


def _title(parent: str, plan: PruningPlan, blocks: int) -> str:
    widths = f"{len(plan.widths)} {'width' if len(plan.widths) == 1 else 'widths'} narrower"
    if plan.widths and not plan.removed:
        return f"{parent} with {widths}"
    return f"{parent} without {len(plan.removed)} of {blocks} blocks" + (f", {widths}" if plan.widths else "")


def _caption(plan: PruningPlan) -> str:
    """What the marks on the map mean."""
    marks = {
        "dashed outlines are those that were removed": plan.removed or not plan.widths,
        "the bar in one that is narrower is what stays of its inside": plan.widths,
    }
    return "; ".join(
        ("Blocks of the parent in order of execution", *(one for one, there in marks.items() if there))
    )


def _training(plan: PruningPlan, training: Mapping[str, object]) -> str:
    if not training:
        return f"Nothing was trained after the blocks were {_cut(plan)}: every weight is the parent's.\n"
    return "Distilled from the parent.\n\n" + card_table(["setting", "value"], list(training.items()))


def _check(student: Student, proof: Mapping[str, Any]) -> str:
    """What was seen when the folder was loaded before it got its name; see ``surgery.Proof``."""
    seen = {
        "bypassed teacher": f"its answer differs from that of the parent with {_cut_in_place(student.plan)} by at most "
        f"{proof.get('largest_difference')}",
        "same tensors": "every tensor equals that of the model that was saved",
    }.get(str(proof.get("kind")), "it loads")
    return (
        f"Loaded by plain diffusers in a process of its own, with {proof['parameters']:,} parameters in the "
        f"{_called(student)}: {seen}.\n"
    )


def _fits(student: Student) -> str:
    rows = []
    for row in compatibility(student).to_dict("records"):
        known = f"{row['kept']} of {row['of']}" if isinstance(row["of"], int) else ""
        rows.append((row["what"], row["fits"], known, row["note"]))
    table = card_table(["made for the parent", "fits", "parts", ""], rows)
    if not has_additions(student.architecture.config):
        return table
    return (
        table
        + "\n`prune-lab convert lora|controlnet|ip-adapter FILE --plan FOLDER --out FILE` converts, with this model in "
        "FOLDER.\n"
    )


def licence_of_shipped(name: str) -> str:
    """What is said of the licence of a model that ships, which is called ``name``."""
    return f"Apache-2.0, that of prune-lab, with which {name} ships."


def licence_text(source: ModelSource, inherited: Mapping[str, Any]) -> str:
    """Which licence applies, as the parent's card states it, or that it is not known."""
    name, parent = inherited.get("license"), parent_name(source)
    if source.kind == "shipped":
        return f"{licence_of_shipped('the parent')}\n"
    if name:
        return f"That of the parent, as its card states it: {inherited.get('license_name', name)}.\n"
    return (
        f"Not known: no card of {parent} that states one was found. This model holds its weights, so its licence "
        "applies: find it out before you share this.\n"
    )


def _limits(training: Mapping[str, object]) -> str:
    lines = [
        "Nothing is claimed about the quality of its pictures: what is not in a table above was not measured.",
        "It was cut from its parent and has the parent's limits and biases.",
    ]
    if not training:
        lines.append(
            "As nothing was trained after the cut, it cannot be expected to draw like its parent: distil it."
        )
    return "".join(f"- {line}\n" for line in lines)


def card_text(
    folder: Path, student: Student, source: ModelSource, training: Mapping[str, object] | None = None
) -> str:
    """The model card of the ``student`` of ``source`` that lies in ``folder``, in Markdown.

    ``training`` are settings and figures of its distillation by their names; nothing for one that was only cut.
    """
    training, inherited = training or {}, parents_card(source)
    index = folder / "model_index.json"
    named = json_object(index) if index.is_file() else student.layout.config
    config = student.layout.config
    tag, code = snippet_for(
        base_name(str(named["_class_name"])),
        variant_of(model_folder_in(folder)),
        size=student.architecture.config.get("sample_size"),
        tokens=source.tokens,
        trusted=is_own(config),
        usual=usual_drawing(source),
    )
    plan, blocks = student.plan, len(student.architecture.blocks)
    what = {
        (True, True): "removes (-) and narrows (~) these blocks",
        (False, True): "makes these blocks narrower (what stays / what there was @ which units stay, from 0)",
    }.get((bool(plan.removed), bool(plan.widths)), "removes these blocks")
    parent = parent_name(source)
    inner = model_folder_in(folder)
    beside, proof = ("" if inner == folder else f"{inner.name}/"), provenance_in(inner).get("proof")
    parts = {
        _title(parent, plan, blocks): (
            f"Parent: {f'[{parent}](https://huggingface.co/{parent})' if is_on_hub(source) else parent}. Plan "
            f"{plan.label} {what} of its {_called(student)}:\n\n    {plan.text or 'none'}\n\n"
            f"![{_caption(plan)}]({MAP})\n"
        ),
        "Use": f"```python\n{code}```\n",
        **({"Form": form} if (form := _form(student) + _of_padded(source)) else {}),
        "Costs": _costs(student),
        "Training": _training(plan, training),
        **({"Check": _check(student, proof)} if isinstance(proof, dict) else {}),
        "What fits": _fits(student),
        "Licence": licence_text(source, inherited),
        "Limits": _limits(training)
        + f"\nMade by prune-lab {__version__} after BK-SDM (arXiv:2305.15798). The plan is in `{beside}plan.json`, "
        f"where the model comes from in `{beside}provenance.json`.\n",
    }
    level = ["#", *["##"] * (len(parts) - 1)]
    text = [f"{mark} {title}\n\n{body}" for mark, (title, body) in zip(level, parts.items(), strict=True)]
    return "\n".join(
        [front_matter(source, inherited, tag if index.is_file() else None, trained=bool(training)), *text]
    )


def write_map(path: Path, student: Student) -> None:
    """Draw the blocks of the teacher as a map on which those that the plan removes are outlines, and those that it
    makes narrower have a bar; a PNG.
    """
    plan = student.plan
    stays = tuple((width.site, width.share) for width in plan.widths)
    row = PlanRow(plan.id, plan.title, "control", plan.removed, plan.form, stays=stays)
    frame = block_map_frame(blocks_frame(student.architecture), None)
    figure = draw_plan_maps(frame, [row], plan_styles([row]), LIGHT, named=True)
    save_png(figure, path, freeze_layout(figure))


def write_card(
    folder: Path, plan: PruningPlan, source: ModelSource, training: Mapping[str, object] | None = None
) -> Path:
    """Write the card of the student in ``folder``, cut from ``source`` by ``plan``, and the map of its plan.

    The card takes the place of the parent's. The structure of the teacher goes into ``provenance.json``, so that
    conversions need nothing but the folder.
    """
    folder, student = Path(folder), Student(source.architecture, plan, Path(folder))
    model = model_folder_in(folder)
    write_json(
        model / "provenance.json",
        provenance_in(model) | {TEACHER: names_alone(plain_config(student.architecture.config))},
    )
    write_map(folder / MAP, student)
    write_text(folder / CARD, card_text(folder, student, source, training))
    return folder / CARD
