"""What is written for a reader beside a subject that was learnt: lines that draw it, and a sheet of what it draws."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from prune_lab.applications import BeforeAndAfter, PersonalSettings
from prune_lab.applications.before_and_after import SHEET
from prune_lab.export.snippets import mixes_formats, snippet_for
from prune_lab.families import CLASS_NAME, is_own
from prune_lab.models import ModelSource, usual_drawing
from prune_lab.models.files import json_object
from prune_lab.report import Column, Theme, draw_comparison
from prune_lab.report.figures import PlanStyle
from prune_lab.report.format import enumeration
from prune_lab.runtime import write_text
from prune_lab.runtime.files import listed_files, write_file_list
from prune_lab.tables import Plot

_LORA_FILE = "pytorch_lora_weights.safetensors"


def _class_of(source: ModelSource) -> str:
    assert source.folder is not None
    return str(json_object(source.folder / "model_index.json").get(CLASS_NAME))


def _lines_of(source: ModelSource, settings: PersonalSettings) -> str:
    """Lines of Python that draw the subject, in the folder that was written."""
    size, trusted = source.config.get("sample_size"), is_own(source.config)
    _, lines = snippet_for(
        _class_of(source), size=size, tokens=source.tokens, trusted=trusted, usual=usual_drawing(source)
    )
    lines = lines.replace('"a red bird on a branch"', repr(settings.prompt))
    if not settings.lora:
        return lines
    loaded = f'pipeline.load_lora_weights(".")  # {_LORA_FILE}\n'
    assert source.folder is not None, "a pipeline lies in a folder"
    given, where = '"MODEL"', f"the folder or hub id of {source.name}."
    if source.name.endswith(".safetensors"):
        where = f"{source.name} as a folder of diffusers, which loads a LoRA onto that alone."
    if mixes_formats(source.folder):
        lines, given = f"import torch\n{lines}", '"MODEL", torch_dtype=torch.float32'
    lines = lines.replace('from_pretrained("."', f"from_pretrained({given}")
    lines = lines.replace(
        "# In this folder; from anywhere else give its path, or its name on the hub.",
        f"# MODEL: {where} The LoRA lies in this folder.",
    )
    return lines.replace("picture = pipeline(", f"{loaded}picture = pipeline(", 1)


def _about_sheet(shown: BeforeAndAfter) -> str:
    """The part of the page that says what the sheet shows, and how it is read."""
    subject, elsewhere, others = shown.prompts
    seeds = f"seed{'s' if len(shown.seeds) > 1 else ''} {enumeration([str(seed) for seed in shown.seeds])}"
    return (
        "\n## What it draws\n\n"
        f"![what it draws, before and after]({SHEET})\n\n"
        "The first row is what it learnt from. Below, each prompt is drawn before and after, from the same noise "
        f"({seeds}, {shown.steps} steps, guidance {shown.guidance:g}):\n\n"
        f"- `{subject}`: after, this should be the subject.\n"
        f"- `{elsewhere}`: the subject, and the place. Where the place is gone, it has learnt its few pictures by "
        "heart; fewer steps, or a smaller learning rate, learn less of them.\n"
        f"- `{others}`: others of the class, as before. Where they look like the subject, the class was forgotten; "
        "more pictures of the class, more weight on them, or fewer steps keep it.\n"
    )


def write_page(
    folder: Path, source: ModelSource, settings: PersonalSettings, shown: BeforeAndAfter | None = None
) -> None:
    """Write README.md in ``folder``: how the subject is drawn and, where that is known, what it looks like."""
    what = f"A LoRA of rank {settings.lora} for {source.name}" if settings.lora else source.name
    text = (
        f"# {what}, taught one subject\n\n"
        f"`{settings.prompt}` draws it; `{settings.class_prompt}` draws others of its class. Learnt by prune-lab in "
        f"{settings.steps:,} steps from a few pictures, by DreamBooth (arXiv:2208.12242).\n\n"
        f"```python\n{_lines_of(source, settings)}```\n"
        f"{'' if shown is None else _about_sheet(shown)}"
    )
    write_text(folder / "README.md", text)


def draw_sheet(shown: BeforeAndAfter, theme: Theme) -> Figure:
    """What was learnt from in a row; below a row for each prompt, and for each seed what was drawn before and after."""
    columns = []
    for number, seed in enumerate(shown.seeds):
        for state, drawn in (("before", shown.before), ("after", shown.after)):
            pixels = drawn[:, number].permute(0, 2, 3, 1).numpy()
            columns.append(Column(str(seed), f"seed {seed}", state, tuple(pixels)))
    given = tuple(shown.given.permute(0, 2, 3, 1).numpy())
    plain = PlanStyle(theme.text, "o", "-")  # a seed stands apart from the next one, as plans do
    styles = {column.plan_id: plain for column in columns}
    above = Column("", "what it learnt from", "", given)
    return draw_comparison(columns, shown.prompts, styles, theme, above)


def add_sheet(folder: Path, source: ModelSource, settings: PersonalSettings, shown: BeforeAndAfter) -> None:
    """Add the sheet to the finished ``folder``, and to its README.md; whenever that is stopped, all in it is whole."""
    # listed first: --force removes nothing that is not
    write_file_list(folder, {*(listed_files(folder) or ()), SHEET})
    Plot(lambda theme: draw_sheet(shown, theme)).save(folder / SHEET)
    write_page(folder, source, settings, shown)
