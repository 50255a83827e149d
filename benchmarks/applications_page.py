"""The page of ``benchmarks.applications``, from its tables alone, and its figures, from the pictures that it drew."""

from __future__ import annotations

import io
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
_DPI = 130


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
        cells = [CALLED[model], _mean(before[before["subject"].isin(own["subject"])], "same_style_likeness")]
        cells += [_mean(own, name) for name in ("same_style_likeness", "subject_likeness", "prompt_clip")]
        cells += [_mean(own, name) for name in ("class_likeness", "class_clip")]
        if way in ("whole", "lora"):
            median = "-" if not len(times) else f"{times['steps_per_second'].median():.2f}"
            spent = "-" if not len(times) else f"{times['cpu_seconds'].median():.2f}"
            cells += [median, spent, bytes_text(int(own["peak_bytes"].max()))]
        elif way == "carried":
            cells += [
                f"{own['kept'].iloc[0]:.0f} of {own['parts'].iloc[0]:.0f}",
                f"{own['renamed'].iloc[0]:.0f}",
            ]
        rows.append(cells)
    cost = {
        "carried": ("modules that fit", "renamed"),
        "untouched": (),
    }.get(way, ("steps/s", "processor s/step", "peak memory"))
    head = ("model", "before", "in its style", "likeness", "CLIP", "class likeness", "class CLIP", *cost)
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


def _class_clip(personal: pd.DataFrame, model: str, way: str) -> float:
    return float(_of(personal, model=model, way=way)["class_clip"].mean())


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
        scores = {
            model: [_class_clip(personal, model, way) for way in ("untouched", "carried", "lora")]
            for model in gains
        }
        kept = ", ".join(
            f"{CALLED[model]} {before:.2f} to {carried:.2f} (by its own to {own:.2f})"
            for model, (before, carried, own) in scores.items()
        )
        yield f"Its price is what others of the class look like. CLIP score of the class: {kept}."


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


_TAUGHT = {
    "cook": 'a woman cook of twemoji, taught as "zorv woman"',
    "pilot": 'a man pilot of noto, taught as "zorv man"',
}


def _several(count: int, what: str) -> str:
    return f"one {what}" if count == 1 else f"{count} {what}s"


def whole_subjects(personal: pd.DataFrame) -> pd.DataFrame:
    """The rows of subjects that all models learnt in all ways; a unit that is not done yet leaves its subject out."""
    units = len(MODELS) * len(WAYS) - 1  # nothing is carried over to the teacher
    return personal[personal.groupby("subject")["model"].transform("size") == units]


def _subjects(personal: pd.DataFrame, speed: pd.DataFrame) -> Iterator[str]:
    """The part on subjects that were learnt."""
    how = next(rows_of(personal[personal["way"] == "whole"]))
    low = next(rows_of(personal[personal["way"] == "lora"]))
    names = list(personal["subject"].unique())
    rounds = _several(speed["round"].nunique(), "round")
    yield from ("## A subject from six pictures", "")
    yield (
        f"Emoji that were held out with all six skin tones: {'; '.join(_TAUGHT.get(name, name) for name in names)}. "
        '"zorv" is the one of four made-up words for which the untouched teacher still draws a figure. DreamBooth with '
        f"prior preservation: {how.steps:.0f} steps of {how.batch:.0f} pictures of the subject and {how.batch:.0f} of "
        "its class, of 24 that each model drew itself; the text encoder is left as it is. The learning rate is "
        f"{how.learning_rate:g} for the whole U-Net and {low.learning_rate:g} for a LoRA of rank {low.rank:.0f} on all "
        "attentions, where BK-SDM takes 1e-6 and 1e-4 for Stable Diffusion: chosen by what the teacher made of "
        "the cook at 5e-5 and 2e-4, 1e-3 and 4e-3, of which the higher ones draw it plainly."
    )
    yield ""
    yield (
        "*Likeness* is the mean cosine of the scorer's picture embeddings with the six pictures, over four prompts "
        "(alone, two skin tones, and in another style of emoji, in which the subject was never seen) and three "
        "seeds; *in its style* leaves the other style out. *CLIP* is the score with the prompt without its token, so "
        "a cook need not score as a woman does. *Class* is what the model draws for the class: close to the subject "
        "means that it has forgotten what others look like. Steps per second and processor seconds are medians of "
        f"{rounds} in which the models took turns while other programs used the processor, so of the two the "
        "processor seconds count; memory is that of weights, gradients, optimiser and the activations of one step."
    )
    titles = {
        "untouched": "Before (the control)",
        "whole": "The whole U-Net",
        "lora": "A LoRA",
        "carried": "The teacher's LoRA, carried over to its students",
    }
    for way, title in titles.items():
        yield from ("", f"### {title}", "", *learnt_table(personal, speed, way))
    yield from ("", *(f"- {line}" for line in said_of_subjects(personal)), "")
    for name in names:
        shown = f"Pictures of the subject {name}, drawn by all models before and after they learnt it"
        yield from (f"![{shown}](subject-{name}.png)", "")


def _changes(moved: pd.DataFrame) -> Iterator[str]:
    """The part on pictures that were changed."""
    steps = moved["passes"].max() / moved["strength"].max()
    sketches, seeds = (
        _several(moved[name].nunique(), word) for name, word in (("picture", "sketch"), ("seed", "seed"))
    )
    sketches = sketches.replace("sketchs", "sketches")
    yield from ("## Pictures changed", "")
    yield (
        f"`prune-lab img2img` on {sketches} of flat shapes ({', '.join(moved['prompt'].unique())}), {seeds}, "
        f"{steps:.0f} steps at strength 1, guidance 3, the same noise for all models. Means over sketches and seeds."
    )
    titles = {
        "clip": "CLIP score with the prompt:",
        "likeness": "Likeness to the sketch:",
        "from_first": "Mean squared difference of pixels (0 to 1) from what the teacher made of it:",
    }
    for column, title in titles.items():
        yield from ("", title, "", *changed_table(moved, column))
    yield from ("", *(f"- {line}" for line in said_of_changes(moved)), "")
    yield from (f"![{sketches.capitalize()} changed by all models at several strengths](changed.png)", "")


def page(personal: pd.DataFrame, speed: pd.DataFrame, moved: pd.DataFrame) -> str:
    """The report in Markdown."""
    personal = whole_subjects(personal)
    versions = ", ".join(sorted(personal["torch"].unique()))
    lines = [
        "# What a smaller model can still be used for",
        "",
        "Made by `python -m benchmarks.applications` on the shipped U-Net (64 pixels) and its students, each distilled "
        "for 400 steps of batch 8 before. One training seed; float32, one thread of a CPU, torch "
        f"{versions}. All scores are the shipped scorer's, so they compare rows of these tables and nothing else; "
        "the paper's figures are of other models and scorers. The pictures on this page are shown in 256 colours.",
        "",
        *_subjects(personal, speed),
    ]
    return "\n".join([*lines, *(_changes(moved) if len(moved) else ())])


# Figures -------------------------------------------------------------------------------------------------------------


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def _save(path: Path, columns: Sequence[Column], labels: Sequence[str]) -> None:
    figure = draw_comparison(columns, labels, {}, LIGHT)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    small = Image.open(drawn).convert("RGB").quantize(256)  # a third of the bytes
    with atomic_write(path) as temporary:
        small.save(temporary, format="PNG", optimize=True)


def draw_subject(path: Path, subject: str, work: Path, seeds: int) -> None:
    """Models by ways: the first seed of each prompt of the subject, and of its class."""
    blank = np.full((64, 64, 3), 255, dtype=np.uint8)
    own = [_pixels(work / "subjects" / subject / f"{number}.png") for number in range(len(MODELS))]
    columns = [Column("", "subject", "", tuple(own))]
    words = ("alone", "dark", "light", "other", "class")
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
    rows = [(row.picture, row.strength) for row in rows_of(moved[["picture", "strength"]].drop_duplicates())]
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
        for subject in whole_subjects(personal)["subject"].unique():
            draw_subject(out / f"subject-{subject}.png", str(subject), work, 3)
        draw_changed(out / "changed.png", moved, work)
