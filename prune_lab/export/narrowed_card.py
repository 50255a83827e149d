"""The model card of a model whose stages were made narrower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune_lab.export.card import CARD, card_table, front_matter, licence_text, parent_name, parents_card
from prune_lab.export.snippets import snippet_for, variant_of
from prune_lab.export.students import model_folder_in, provenance_in
from prune_lab.families import CLASS_NAME
from prune_lab.models import ModelSource, usual_drawing
from prune_lab.models.files import json_object
from prune_lab.profiling import PlanCost
from prune_lab.report.format import amount, count, percent_change
from prune_lab.runtime import names_alone, write_json, write_text
from prune_lab.version import __version__


def write_narrowed_card(
    folder: Path,
    source: ModelSource,
    notes: Mapping[str, Any],
    costs: tuple[PlanCost, PlanCost],
    training: Mapping[str, object],
) -> Path:
    """Write the card of the model in ``folder``, which is ``source`` with narrower stages, and ``notes`` on how it was
    made into its ``provenance.json``. ``costs`` are those of the whole model and of this one.
    """
    inner, inherited = model_folder_in(folder), parents_card(source)
    provenance = provenance_in(inner)
    write_json(inner / "provenance.json", provenance | dict(names_alone(notes)))
    index = folder / "model_index.json"
    config = json_object(inner / "config.json")
    named = json_object(index) if index.is_file() else config
    tag, code = snippet_for(
        str(named[CLASS_NAME]),
        variant_of(inner),
        size=config.get("sample_size"),
        tokens=source.tokens,
        trusted=False,
        usual=usual_drawing(source),
    )
    parent = parent_name(source)
    was, now = (", ".join(map(str, notes[name])) for name in ("channels_before", "channels"))
    rows = [
        (name, text(one), text(other), percent_change(other / one - 1))
        for name, text, one, other in (
            ("parameters", count, costs[0].params, costs[1].params),
            ("multiply-adds", amount, costs[0].macs, costs[1].macs),
        )
    ]
    trained = (
        "Distilled from the parent.\n\n" + card_table(["setting", "value"], list(training.items()))
        if training
        else "Nothing was trained after the cut: distil it before it is used (`prune-lab narrow --steps N`).\n"
    )
    proof = provenance.get("proof")
    parts = {
        f"{parent} with narrower stages": (
            f"Parent: {parent}. Its stages have {now} channels instead of {was}, in the {source.called} alone. What "
            f"stays was chosen by {notes['chosen_by']}; before any training the prediction changed by "
            f"{notes['impact']:.3g} of its mean square.\n"
        ),
        "Use": f"```python\n{code}```\n",
        "Costs": card_table([source.called, "parent", "this model", "change"], rows)
        + "\nMultiply-adds are those of one forward pass over one sample, attention products included. Latency was not "
        "measured.\n",
        "Training": trained,
        **(
            {
                "Check": f"Loaded by plain diffusers in a process of its own, with {proof['parameters']:,} parameters "
                f"in the {source.called}: every tensor equals that of the model that was saved.\n"
            }
            if isinstance(proof, dict)
            else {}
        ),
        "What fits": "Nothing that was made for the parent's stages fits: no LoRA, ControlNet or IP-Adapter of it.\n",
        "Licence": licence_text(source, inherited),
        "Limits": (
            "- Nothing is claimed about the quality of its pictures: what is not in a table above was not measured.\n"
            "- It was cut from its parent and has the parent's limits and biases.\n"
            f"\nMade by prune-lab {__version__}. How is in `{'' if inner == folder else f'{inner.name}/'}"
            "provenance.json`.\n"
        ),
    }
    text = "\n".join(
        f"{'#' if place == 0 else '##'} {title}\n\n{body}"
        for place, (title, body) in enumerate(parts.items())
    )
    head = front_matter(source, inherited, tag if index.is_file() else None, trained=bool(training))
    write_text(folder / CARD, f"{head}\n{text}")
    return folder / CARD
