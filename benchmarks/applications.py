"""What students can be used for beside their teacher: one subject learnt from a few pictures, and pictures changed.

    python -m benchmarks.applications --work DIR --out reports/applications

The teacher is the shipped U-Net; its students are BK-SDM's Base, Small and Tiny and the searched plan that lies beside
``reports/runtimes``, each distilled first. Subjects are emoji that none of them was trained on: one picture in six skin
tones. A unit of work is one subject and model and way of training (whole, LoRA), the time of their steps, a LoRA of the
teacher that is carried over to a student, or one picture changed at several strengths. Its rows are appended to a table
when it is done, and the same command goes on with what is not there. ``DIR`` keeps students, subjects, pictures and
whatever was learnt.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image

from benchmarks.applications_page import TEACHER, write_page
from prune_lab.api.model import Model
from prune_lab.applications import (
    PersonalSettings,
    SweepSettings,
    class_pictures,
    learn_subject,
    likeness,
    personalise,
    sweep,
)
from prune_lab.assets import decode_pictures, load_pictures
from prune_lab.config import RunConfig, with_settings
from prune_lab.distill import encode_data
from prune_lab.evaluation import clip_scores, generate, read_pictures, save_pictures
from prune_lab.export import CONVERSIONS, student_of
from prune_lab.families import model_of
from prune_lab.models import ModelSource, load_pipeline, load_scorer, model_digest, resolve_model
from prune_lab.runtime import note, progress_shown, write_frame

PLANS = ("bk-base", "bk-small", "bk-tiny", "reports/runtimes/searched-reference.json")
MODELS = (TEACHER, "bk-base", "bk-small", "bk-tiny", "searched")
DISTILLED = {"steps": 400, "batch": 8}
TOKEN = "zorv"  # a word that is in no caption
WAYS = ("whole", "lora")
RANK, STEPS, BATCH = 8, 100, 4
RATES = {"whole": 2e-4, "lora": 4e-3}
CLASS_COUNT, DRAW_STEPS, GUIDANCE = 24, 15, 3.0
SEEDS = (100, 101, 102)
ROUNDS, TIMED_STEPS = 3, 4
STRENGTHS = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
PERSONAL = (
    *("subject", "model", "way", "plan_id", "subject_likeness", "same_style_likeness", "prompt_clip"),
    *("class_likeness", "class_clip", "loss_first", "loss_last", "trained", "peak_bytes", "seconds"),
    *("parts", "kept", "renamed", "steps", "batch", "learning_rate", "rank", "torch"),
)
SPEED = ("model", "way", "round", "steps_per_second", "cpu_seconds", "peak_bytes", "batch", "torch")
CHANGED = (
    *("picture", "model", "strength", "seed", "prompt", "passes", "clip", "likeness", "pixel_error"),
    *("from_first", "seconds", "torch"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """One emoji that was held out with all its tones, and the class that it is one of."""

    name: str
    style: str
    subject: str
    subject_class: str
    other_style: str

    @property
    def template(self) -> str:
        return f"{self.style}, {{}}"

    @property
    def prompts(self) -> tuple[str, ...]:
        """With the token: alone, in two skin tones, and in another style of emoji, in which it was never seen."""
        words = f"{TOKEN} {self.subject_class}"
        tones = (f"{self.style}, {words}, {tone} skin tone" for tone in ("dark", "light"))
        return f"{self.style}, {words}", *tones, f"{self.other_style}, {words}"

    def settings(self, way: str, steps: int = STEPS) -> PersonalSettings:
        return PersonalSettings(
            token=TOKEN,
            subject_class=self.subject_class,
            template=self.template,
            lora=RANK if way == "lora" else 0,
            steps=steps,
            batch=BATCH,
            learning_rate=RATES[way],
        )


SUBJECTS = (
    Subject("cook", "twemoji emoji", "woman cook", "woman", "fluent emoji"),
    Subject("pilot", "noto emoji", "man pilot", "man", "fluent emoji"),
)
# Pictures to be changed: drawn plainly here, as somebody would sketch them; (name, prompt).
SKETCHES = (
    ("sun", "twemoji emoji, sun"),
    ("face", "fluent emoji, grinning face"),
    ("apple", "noto emoji, red apple"),
)


def sketch(name: str, side: int = 64) -> Image.Image:
    """A sketch of a few flat shapes on white, ``side`` pixels high and wide."""
    from PIL import ImageDraw

    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    if name == "sun":
        draw.ellipse((16, 16, 48, 48), fill=(250, 190, 40))
        for box in ((29, 2, 35, 12), (29, 52, 35, 62), (2, 29, 12, 35), (52, 29, 62, 35)):
            draw.rectangle(box, fill=(250, 190, 40))
    elif name == "face":
        draw.ellipse((6, 6, 58, 58), fill=(250, 200, 60))
        draw.ellipse((18, 20, 26, 30), fill=(60, 40, 20))
        draw.ellipse((38, 20, 46, 30), fill=(60, 40, 20))
        draw.chord((16, 26, 48, 52), 0, 180, fill=(120, 30, 30))
    else:
        draw.ellipse((10, 16, 54, 58), fill=(210, 40, 40))
        draw.rectangle((30, 6, 34, 20), fill=(90, 60, 30))
        draw.ellipse((35, 6, 50, 16), fill=(80, 160, 60))
    return image


# Tables that grow -----------------------------------------------------------------------------------------------------


def known(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The table in ``path``; an empty one where there is none."""
    return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=list(columns))


def append(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Add ``rows`` to the table in ``path``."""
    more, before = pd.DataFrame([list(row) for row in rows], columns=list(columns)), known(path, columns)
    write_frame(path, pd.concat([before, more], ignore_index=True) if len(before) else more)


def is_done(table: pd.DataFrame, **unit: object) -> bool:
    """Whether the table has rows of the unit with these values."""
    found = table
    for name, value in unit.items():
        found = found[found[name] == value]
    return len(found) > 0


# What is measured -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """Where things lie, and what judges."""

    work: Path
    out: Path
    scorer: Any

    def source(self, model: str) -> ModelSource:
        return resolve_model("reference" if model == TEACHER else str(self.work / "students" / model))

    def plan_id(self, model: str) -> str:
        return "" if model == TEACHER else student_of(str(self.work / "students" / model)).plan.id

    def subject_folder(self, subject: Subject) -> Path:
        """Its pictures, and their folder, written where they are not there."""
        folder = self.work / "subjects" / subject.name
        if not folder.is_dir():
            frame = load_pictures("heldout")
            rows = frame[(frame["style"] == subject.style) & (frame["subject"] == subject.subject)]
            trained = load_pictures("train")
            seen = trained[(trained["style"] == subject.style) & (trained["subject"] == subject.subject)]
            assert len(rows) == 6
            assert not len(seen), "it was trained on"
            save_pictures(folder, decode_pictures(rows), [f"{number}.png" for number in range(len(rows))])
        return folder

    def class_folder(self, subject: Subject, model: str, pipeline: Any, source: ModelSource) -> Path:
        """The pictures of the class that the model draws, before it learns."""
        settings = subject.settings("whole")
        return class_pictures(
            pipeline,
            model_digest(source),
            settings.class_prompt,
            CLASS_COUNT,
            self.work / "class" / f"{subject.name}-{model}",
            seed=0,
            steps=DRAW_STEPS,
            guidance=GUIDANCE,
            batch=8,
        ).folder

    def judged(self, pipeline: Any, subject: Subject, name: str) -> tuple[float, float, float, float, float]:
        """How alike to the subject what is drawn for its prompts is, all and those of its own style; CLIP score with
        the prompts without the token; and the same of pictures of the class.
        """
        own = read_pictures(self.subject_folder(subject))
        how: dict[str, Any] = {"steps": DRAW_STEPS, "guidance": GUIDANCE}
        drawn = generate(pipeline, subject.prompts, SEEDS, **how)
        texts = [prompt.replace(f"{TOKEN} ", "") for prompt in subject.prompts for _ in SEEDS]
        prompt = subject.settings("whole").class_prompt
        others = generate(pipeline, [prompt], SEEDS, **how)
        folder = self.work / "drawn" / f"{subject.name}-{name}"
        every = torch.cat([drawn, others])
        save_pictures(folder, every, [f"{number:02d}.png" for number in range(len(every))])
        alike = likeness(self.scorer, drawn, own)
        return (
            float(alike.mean()),
            float(alike[: -len(SEEDS)].mean()),
            float(clip_scores(self.scorer, drawn, texts).mean()),
            float(likeness(self.scorer, others, own).mean()),
            float(clip_scores(self.scorer, others, [prompt] * len(others)).mean()),
        )


_TORCH = importlib.metadata.version("torch")
_NONE = float("nan")


def untouched(bench: Bench, subject: Subject, model: str) -> tuple[object, ...]:
    pipeline = load_pipeline(bench.source(model))
    scores = bench.judged(pipeline, subject, f"{model}-untouched")
    blank = (_NONE,) * 5
    return (
        *(
            subject.name,
            model,
            "untouched",
            bench.plan_id(model),
            *scores,
            *blank,
            *(_NONE,) * 3,
            0,
            0,
            0,
            0,
            _TORCH,
        ),
    )


def learnt(bench: Bench, subject: Subject, model: str, way: str) -> tuple[object, ...]:
    """One model taught one subject by the verb, read back from what it wrote, and judged."""
    source, settings = bench.source(model), subject.settings(way)
    images, out = bench.subject_folder(subject), bench.work / "learnt" / f"{subject.name}-{model}-{way}"
    others = bench.class_folder(subject, model, load_pipeline(source), source)
    found = personalise(source, images, out, settings, class_images=others, force=True).learnt
    if way == "whole":
        pipeline = load_pipeline(resolve_model(str(out)))
    else:
        pipeline = load_pipeline(source)
        pipeline.load_lora_weights(out)
    scores = bench.judged(pipeline, subject, f"{model}-{way}")
    numbers = (*found.subject_loss, found.trained, found.peak_bytes, found.seconds)
    how = (STEPS, BATCH, settings.rate, settings.lora, _TORCH)
    return (subject.name, model, way, bench.plan_id(model), *scores, *numbers, *(_NONE,) * 3, *how)


def carried(bench: Bench, subject: Subject, model: str) -> tuple[object, ...]:
    """The LoRA that the teacher learnt, fitted to a student by ``prune-lab convert lora``."""
    lora = bench.work / "learnt" / f"{subject.name}-{TEACHER}-lora" / "pytorch_lora_weights.safetensors"
    student = student_of(str(bench.work / "students" / model))
    out = bench.work / "carried" / f"{subject.name}-{model}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    fitted = CONVERSIONS["lora"](student, lora, out)
    pipeline = load_pipeline(bench.source(model))
    pipeline.load_lora_weights(out)
    scores = bench.judged(pipeline, subject, f"{model}-carried")
    counts, how = (fitted.parts, fitted.kept, fitted.renamed), (STEPS, BATCH, RATES["lora"], RANK, _TORCH)
    return (subject.name, model, "carried", student.plan.id, *scores, *(_NONE,) * 5, *counts, *how)


def timed(bench: Bench, number: int) -> Iterator[tuple[object, ...]]:
    """Steps per second of every model and way in turn, and processor seconds of a step."""
    subject = SUBJECTS[0]
    pictures = read_pictures(bench.subject_folder(subject))
    for way in WAYS:
        for model in MODELS:
            pipeline = load_pipeline(bench.source(model))
            settings = subject.settings(way, TIMED_STEPS)
            own, other = (
                encode_data(pipeline, pictures, [text] * len(pictures))
                for text in (settings.prompt, settings.class_prompt)
            )
            start = time.process_time()
            found = learn_subject(model_of(pipeline), pipeline.scheduler, own, other, settings)
            spent = (time.process_time() - start) / TIMED_STEPS
            yield (model, way, number, found.steps_per_second, spent, found.peak_bytes, BATCH, _TORCH)


def changed(bench: Bench, name: str, prompt: str) -> Iterator[tuple[object, ...]]:
    """One sketch changed by all models at all strengths."""
    path = bench.work / "sketches" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sketch(name).save(path)
    settings = SweepSettings(prompt=prompt, strengths=STRENGTHS, seeds=SEEDS[:2], steps=20, guidance=GUIDANCE)
    sources = [bench.source(model) for model in MODELS]
    frame = sweep(sources, path, settings, bench.work / "changed" / name, force=True).frame
    for row in frame.itertuples():
        values: Any = row
        model = MODELS[[source.text for source in sources].index(values.model)]
        yield (
            *(name, model, values.strength, values.seed, prompt, values.passes, values.clip, values.likeness),
            *(values.pixel_error, values.from_first, values.seconds, _TORCH),
        )


# All of it ------------------------------------------------------------------------------------------------------------


def students(work: Path) -> None:
    """The students of the teacher, distilled where they are not there."""
    if (work / "students").is_dir():
        return
    settings = with_settings(
        RunConfig(model="reference"),
        {
            "distill.steps": DISTILLED["steps"],
            "distill.batch": DISTILLED["batch"],
            "distill.learning_rate": 2e-4,
            "distill.warmup": 20,
            "distill.ema_decay": 0.98,
            "distill.checkpoint_every": 50,
            "distill.validate_every": 100,
            "distill.seed": 0,
        },
    )
    Model(settings, work / "students.run").distill(*PLANS, out=work / "students")


def measure_subject(bench: Bench, subject: Subject) -> None:
    """What of one subject is not in the table yet."""
    personal = bench.out / "personal.csv"
    for way in ("untouched", *WAYS, "carried"):
        for model in MODELS:
            if way == "carried" and model == TEACHER:
                continue
            if is_done(known(personal, PERSONAL), subject=subject.name, model=model, way=way):
                continue
            if way == "untouched":
                row = untouched(bench, subject, model)
            elif way == "carried":
                row = carried(bench, subject, model)
            else:
                row = learnt(bench, subject, model, way)
            append(personal, PERSONAL, [row])
            note(f"{subject.name}, {model}, {way}: {row[4]:.3f}, {row[6]:.3f}")


def measure(bench: Bench) -> None:
    """All units that are not in the tables yet: a subject, a picture changed and times first, then the others."""
    speed, moved = bench.out / "speed.csv", bench.out / "changed.csv"
    first, *others = SUBJECTS
    measure_subject(bench, first)
    for sketches in (SKETCHES[:1], SKETCHES):
        for name, prompt in sketches:
            if not is_done(known(moved, CHANGED), picture=name):
                append(moved, CHANGED, list(changed(bench, name, prompt)))
        for number in range(ROUNDS):
            if not is_done(known(speed, SPEED), round=number):
                append(speed, SPEED, list(timed(bench, number)))
    for subject in others:
        measure_subject(bench, subject)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where students and pictures are kept")
    parser.add_argument("--out", type=Path, default=Path("reports/applications"))
    parser.add_argument(
        "--page", action="store_true", help="draw the page and its figures from what is there"
    )
    asked = parser.parse_args()
    with progress_shown():
        if not asked.page:
            students(asked.work)
            measure(Bench(asked.work, asked.out, load_scorer()))
        write_page(asked.out, asked.work)


if __name__ == "__main__":
    main()
