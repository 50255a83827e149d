"""The page of ``benchmarks.applications``, from its tables alone, and its figures, from the pictures that it drew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from benchmarks.rows import rows_of
from prune_lab.report import LIGHT, Column, draw_comparison
from prune_lab.runtime import atomic_write, bytes_text, write_text

TEACHER = "reference"
MODELS = (TEACHER, "bk-base", "bk-small", "bk-tiny", "searched")
CALLED = {
    TEACHER: "teacher",
    "bk-base": "Base",
    "bk-small": "Small",
    "bk-tiny": "Tiny",
    "searched": "searched",
}
WAYS = {
    "untouched": "untouched",
    "whole": "whole model",
    "lora": "LoRA",
    "carried": "the teacher's LoRA, carried over",
}
_DPI = 90


# Tables --------------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "| --- " + "| ---: " * (len(head) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _mean(frame: pd.DataFrame, column: str, form: str = ".3f") -> str:
    """The mean of a column in words; a dash where nothing was measured."""
    found = frame[column].mean() if len(frame) else float("nan")
    return "-" if pd.isna(found) else format(found, form)


def _of(frame: pd.DataFrame, **values: object) -> pd.DataFrame:
    for name, value in values.items():
        frame = frame[frame[name] == value]
    return frame


def learnt_table(personal: pd.DataFrame, speed: pd.DataFrame, way: str) -> list[str]:
    """Models by what they learnt in one way: the mean over subjects, and what a step takes."""
    rows = []
    for model in MODELS:
        own, before = _of(personal, model=model, way=way), _of(personal, model=model, way="untouched")
        if not len(own):
            continue
        times = _of(speed, model=model, way=way)
        cells = [CALLED[model], _mean(before[before["subject"].isin(own["subject"])], "subject_likeness")]
        cells += [_mean(own, name) for name in ("subject_likeness", "same_style_likeness", "prompt_clip")]
        cells += [_mean(own, "class_likeness"), _mean(own, "class_clip")]
        if way != "carried":
            median = "-" if not len(times) else f"{times['steps_per_second'].median():.2f}"
            spent = "-" if not len(times) else f"{times['cpu_seconds'].median():.2f}"
            cells += [median, spent, bytes_text(int(own["peak_bytes"].max()))]
        else:
            cells += [
                f"{own['kept'].iloc[0]:.0f} of {own['parts'].iloc[0]:.0f}",
                f"{own['renamed'].iloc[0]:.0f}",
            ]
        rows.append(cells)
    cost = (
        ("keys that fit", "renamed") if way == "carried" else ("steps/s", "processor s/step", "peak memory")
    )
    head = (
        "model",
        "likeness before",
        "likeness",
        "in its style",
        "CLIP",
        "class likeness",
        "class CLIP",
        *cost,
    )
    return _table(head, rows)


def changed_table(moved: pd.DataFrame, column: str) -> list[str]:
    """Models by strength: the mean of one column over pictures and seeds."""
    strengths = sorted(moved["strength"].unique())
    rows = [
        [CALLED[model], *(_mean(_of(moved, model=model, strength=one), column) for one in strengths)]
        for model in MODELS
        if len(_of(moved, model=model))
    ]
    return _table(("model", *(f"strength {one:g}" for one in strengths)), rows)


# What they say -------------------------------------------------------------------------------------------------------


def _gain(personal: pd.DataFrame, model: str, way: str) -> float:
    """How much likeness to the subject grew in its own style, on the mean over subjects that were learnt so."""
    after = _of(personal, model=model, way=way).set_index("subject")["same_style_likeness"]
    before = _of(personal, model=model, way="untouched").set_index("subject")["same_style_likeness"]
    return float((after - before).mean())


def said_of_subjects(personal: pd.DataFrame) -> Iterator[str]:
    """Sentences on what was learnt, by the numbers."""
    for way in ("whole", "lora"):
        gains = {model: _gain(personal, model, way) for model in MODELS}
        if any(pd.isna(gain) for gain in gains.values()):
            continue
        students = ", ".join(f"{CALLED[model]} {gains[model]:+.2f}" for model in MODELS[1:])
        yield (
            f"{WAYS[way]}: likeness in the subject's own style changed by {gains[TEACHER]:+.2f} in the teacher; "
            f"{students}."
        )
    gains = {model: _gain(personal, model, "carried") for model in MODELS[1:]}
    if not any(pd.isna(gain) for gain in gains.values()):
        own = {model: _gain(personal, model, "lora") for model in MODELS[1:]}
        parts = ", ".join(
            f"{CALLED[model]} {gain:+.2f} (of its own: {own[model]:+.2f})" for model, gain in gains.items()
        )
        yield f"The teacher's LoRA, carried over by `prune-lab convert lora` without a step of training: {parts}."


def said_of_changes(moved: pd.DataFrame) -> Iterator[str]:
    """Sentences on pictures that were changed, by the numbers."""
    strengths = sorted(moved["strength"].unique())
    apart = {
        model: [_of(moved, model=model, strength=one)["from_first"].mean() for one in strengths]
        for model in MODELS[1:]
    }
    for model, found in apart.items():
        yield (
            f"{CALLED[model]}: from what the teacher makes of a picture it is {found[0]:.4f} away at strength "
            f"{strengths[0]:g} and {found[-1]:.4f} at {strengths[-1]:g}, {np.mean(found):.4f} on the mean over all."
        )
    for model in MODELS:
        clip = [_of(moved, model=model, strength=one)["clip"].mean() for one in strengths]
        best = strengths[int(np.argmax(clip))]
        yield f"{CALLED[model]}: the CLIP score is best at strength {best:g} ({max(clip):.3f})."


# The page ------------------------------------------------------------------------------------------------------------


def page(personal: pd.DataFrame, speed: pd.DataFrame, moved: pd.DataFrame) -> str:
    """The report in Markdown."""
    how = next(rows_of(personal[personal["way"] == "whole"]))
    low = next(rows_of(personal[personal["way"] == "lora"]))
    subjects = ", ".join(personal["subject"].unique())
    lines = [
        "# What a smaller model can still be used for",
        "",
        "Made by `python -m benchmarks.applications` on the shipped U-Net (64 pixels) and its students, each "
        "distilled for "
        "400 steps of batch 8 before. One training seed; float32, one thread of a CPU that other programs used "
        "as well, "
        f"torch {how.torch}. All likeness and CLIP scores are the shipped scorer's, so they compare rows of "
        f"these tables "
        "and nothing else. The figures of the paper are of other models and other scorers.",
        "",
        "## A subject from six pictures",
        "",
        f"Subjects ({subjects}) are emoji that were held out with all six skin tones: a woman cook of twemoji, "
        f"taught as "
        '"zorv woman", and a man pilot of noto, taught as "zorv man". "zorv" is one of four made-up words, the '
        "one for "
        f"which the untouched teacher still draws a figure. DreamBooth with prior preservation: {how.steps:.0f} "
        f"steps of "
        f"{how.batch:.0f} pictures of the subject and {how.batch:.0f} of its class, of 24 that the model drew "
        f"itself; learning "
        f"rate {how.learning_rate:g} for the whole U-Net, {low.learning_rate:g} for a LoRA of rank "
        f"{low.rank:.0f} on all "
        "attentions; text encoder untouched.",
        "",
        "Likeness is the mean cosine of the scorer's picture embeddings with the six pictures, over four prompts "
        "(alone, two skin tones, and in another style of emoji, in which the subject was never seen) and three "
        "seeds; *in its "
        "style* leaves the other style out. CLIP is the score with the prompt without its token, so a cook need "
        "not score as "
        "a woman does. *Class* is what the model draws for the class after it learnt: its likeness to the "
        "subject should "
        "stay low. Steps per second and processor seconds are medians of three rounds in which the models took "
        "turns; memory "
        "is that of weights, gradients, optimiser and the activations of one step.",
    ]
    for way in ("whole", "lora"):
        if len(_of(personal, way=way)):
            lines += ["", f"### {WAYS[way].capitalize() if way == 'whole' else WAYS[way]}", ""]
            lines += learnt_table(personal, speed, way)
    if len(_of(personal, way="carried")):
        lines += ["", "### The teacher's LoRA, carried over to its students", ""]
        lines += learnt_table(personal, speed, "carried")
    lines += ["", *(f"- {line}" for line in said_of_subjects(personal)), ""]
    for subject in personal["subject"].unique():
        lines += [
            f"![Pictures of the subject {subject}, drawn by all models before and after they learnt it]"
            f"(subject-{subject}.png)",
            "",
        ]
    if len(moved):
        seeds, steps = moved["seed"].nunique(), moved["passes"].max() / moved["strength"].max()
        lines += [
            "## Pictures changed",
            "",
            f"`prune-lab img2img` on three sketches of flat shapes, {seeds} seeds, {steps:.0f} steps at "
            f"strength 1, guidance 3, "
            "the same noise for all models. Means over sketches and seeds.",
            "",
            "CLIP score with the prompt:",
            "",
            *changed_table(moved, "clip"),
            "",
            "Likeness to the sketch:",
            "",
            *changed_table(moved, "likeness"),
            "",
            "Mean squared difference of pixels (0 to 1) from what the teacher made of it:",
            "",
            *changed_table(moved, "from_first"),
            "",
            *(f"- {line}" for line in said_of_changes(moved)),
            "",
            "![Three sketches changed by all models at six strengths](changed.png)",
            "",
        ]
    return "\n".join(lines)


# Figures -------------------------------------------------------------------------------------------------------------


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def _save(path: Path, columns: Sequence[Column], labels: Sequence[str]) -> None:
    figure = draw_comparison(columns, labels, {}, LIGHT)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI, bbox_inches="tight", metadata={"Software": None})


def draw_subject(path: Path, subject: str, work: Path, seeds: int) -> None:
    """Models by ways: the first seed of each prompt of the subject, and of its class."""
    blank = np.full((64, 64, 3), 255, dtype=np.uint8)
    own = [_pixels(work / "subjects" / subject / f"{number}.png") for number in range(len(MODELS))]
    columns = [Column("", "subject", "", tuple(own))]
    words = ("alone", "dark", "light", "other style", "class")
    for way, title in WAYS.items():
        for place, word in enumerate(words):
            files = [
                work / "drawn" / f"{subject}-{model}-{way}" / f"{place * seeds:02d}.png" for model in MODELS
            ]
            drawn = tuple(_pixels(one) if one.is_file() else blank for one in files)
            columns.append(Column("", title, word, drawn))
    _save(path, columns, [CALLED[model] for model in MODELS])


def draw_changed(path: Path, moved: pd.DataFrame, work: Path) -> None:
    """Sketches and strengths by models, the first seed of each."""
    seed = moved["seed"].min()
    rows = list(moved.groupby(["picture", "strength"], sort=False).groups)
    folders = {model: "reference" if model == TEACHER else model for model in MODELS}
    given = tuple(_pixels(work / "changed" / str(name) / "given.png") for name, _ in rows)
    columns = [Column("", "sketch", "", given)]
    for model in MODELS:
        files = (
            work / "changed" / str(name) / folders[model] / f"strength-{strength:g}-seed-{seed}.png"
            for name, strength in rows
        )
        columns.append(Column("", CALLED[model], "", tuple(map(_pixels, files))))
    _save(path, columns, [f"{name}, strength {strength:g}" for name, strength in rows])


def write_page(out: Path, work: Path | None = None) -> None:
    """Write README.md beside the tables in ``out``, and the figures where the pictures in ``work`` are there."""
    personal, speed, moved = (pd.read_csv(out / f"{name}.csv") for name in ("personal", "speed", "changed"))
    write_text(out / "README.md", page(personal, speed, moved))
    if work is not None:
        for subject in personal["subject"].unique():
            draw_subject(out / f"subject-{subject}.png", str(subject), work, 3)
        draw_changed(out / "changed.png", moved, work)
