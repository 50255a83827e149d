"""Distillation on cached latents with many students per teacher pass, against BK-SDM's loop: what a second is worth.

The baseline does per step what BK-SDM's own script does: it encodes the pictures and captions of the batch, asks the
teacher, and trains one student. Against it the same on cached latents and text embeddings, and with more students on
each pass of the teacher. Samples are student-samples: students x batch. All ways take the same steps of the product
(forward, backward, clipping, AdamW, averaging) on the same students, in turn, so that a busy moment hits all alike.

Beside each ratio stands its bound: what it would be if time were nothing but multiply-adds, a backward pass twice those
of forward. Conservative: pictures lie decoded in memory, and students are trained without gradient checkpointing, which
the script uses. Weights and pictures do not matter and are random for presets. Last comes what the paper's full recipe
would cost; that is arithmetic, and so are the bounds for SD-v1.4. ``--runs 0`` prints the arithmetic alone.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import AutoencoderKL, PNDMScheduler
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.rows import rows_of
from prune_lab.assets import reference_folder
from prune_lab.blocks import architecture_of
from prune_lab.config import DataConfig, DistillConfig
from prune_lab.counting import count_call, count_macs, meta_copy
from prune_lab.distill import (
    DistillSetup,
    ImageSource,
    LiveData,
    Student,
    TrainingData,
    build_cache,
    draw_batch,
    feature_pairs,
    training_memory,
)
from prune_lab.distill.joint import joint_step
from prune_lab.distill.setup import StudentRun
from prune_lab.families import CLIP_TOKENS, latent_shape
from prune_lab.models import load_model, load_pipeline, resolve_model
from prune_lab.models.silence import quiet
from prune_lab.plans import PruningPlan, native_layout, parse_plan
from prune_lab.probes import random_probe
from prune_lab.processes import init_processes
from prune_lab.runtime import (
    Environment,
    pick_device,
    pick_dtype,
    seeded,
    synchronize,
    write_frame,
    write_text,
)
from prune_lab.surgery import materialise

BASELINE = "encode in the loop"
COLUMNS = ("way", "students", "samples_per_s", "step_ms", "data_ms", "ratio", "low", "high", "bound", "share")

# The encoders of Stable Diffusion, by the width of the text embedding.
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
_TEXT = {
    768: {"layers": 12, "heads": 12, "inner": 3072, "activation": "quick_gelu"},  # CLIP ViT-L/14: SD-v1
    1024: {"layers": 23, "heads": 16, "inner": 4096, "activation": "gelu"},  # OpenCLIP ViT-H/14: SD-v2
}

# BK-SDM's model card: Base, 50,000 iterations of 256 samples, about 300 hours on one A100.
PAPER_SAMPLES = 50_000 * 256
PAPER_HOURS = 300
PAPER_PICTURES = 212_776


# Models --------------------------------------------------------------------------------------------------------


def autoencoder() -> AutoencoderKL:
    """The VAE of Stable Diffusion with random weights."""
    return AutoencoderKL(**_VAE).eval()


def text_encoder(width: int) -> CLIPTextModel:
    """The text encoder of the Stable Diffusion whose embeddings are ``width`` wide, with random weights."""
    if width not in _TEXT:
        raise SystemExit(
            f"asked for a text encoder of width {width}; known are those of SD-v1 and SD-v2: 768, 1024"
        )
    shape = _TEXT[width]
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        hidden_act=shape["activation"],
        max_position_embeddings=CLIP_TOKENS,
    )
    return CLIPTextModel(config).eval()


def pipeline_of(text: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline that ``text`` names; of a preset, the same shapes with random weights."""
    source = resolve_model(text)
    if source.is_pipeline:
        return load_pipeline(source, device=device, dtype=dtype)
    with quiet():
        from diffusers import StableDiffusionPipeline
    torch.manual_seed(0)
    # Words do not matter, only how many tokens there are.
    tokenizer = CLIPTokenizer.from_pretrained(reference_folder() / "tokenizer", model_max_length=CLIP_TOKENS)
    return StableDiffusionPipeline(
        vae=autoencoder().to(device, dtype),
        text_encoder=text_encoder(source.config["cross_attention_dim"]).to(device, dtype),
        tokenizer=tokenizer,
        unet=load_model(source, device=device, dtype=dtype, random_weights=True),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# Bounds --------------------------------------------------------------------------------------------------------


class _Encoder(nn.Module):
    """The half of the VAE that training needs."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, pictures: Tensor) -> Tensor:
        encoded: Tensor = self.encoder(pictures)
        return encoded if self.quant_conv is None else self.quant_conv(encoded)


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-adds of one sample: encoding its picture and caption, and a forward pass of teacher and student."""

    encoding: int
    teacher: int
    student: int

    def sample(self, students: int = 1, *, cached: bool = True) -> float:
        """Multiply-adds that one student-sample takes when ``students`` share each pass of the teacher."""
        shared = self.teacher if cached else self.teacher + self.encoding
        return shared / students + 3 * self.student

    def bound(self, students: int) -> float:
        """How many times as fast as the paper's loop cached training can be, if multiply-adds are all that counts."""
        return self.sample(cached=False) / self.sample(students)


def work_of(config: Mapping[str, Any], plan: PruningPlan, vae: Any, encoders: Sequence[Any]) -> Work:
    """The work of one sample, counted on ``meta``."""
    side = latent_shape(config)[0] * 2 ** (len(vae.config.block_out_channels) - 1)
    tokens = encoders[0].config.max_position_embeddings
    with torch.device("meta"):
        pictures = torch.zeros(1, 3, side, side, dtype=next(vae.parameters()).dtype)
        words = torch.zeros(1, tokens, dtype=torch.long)
    encoding = count_call(meta_copy(_Encoder(vae)), {"pictures": pictures}).total
    encoding += sum(count_call(meta_copy(one), {"input_ids": words}).total for one in encoders)
    teacher = count_macs(config, tokens=tokens).total
    student = count_macs(native_layout(architecture_of(config), plan).config, tokens=tokens).total
    return Work(encoding, teacher, student)


def preset_work(preset: str, plan: str) -> Work:
    """The work of a sample of a preset, by shapes alone."""
    config = resolve_model(preset).config
    with torch.device("meta"):
        vae, encoder = autoencoder(), text_encoder(config["cross_attention_dim"])
    return work_of(config, parse_plan(plan, architecture_of(config)), vae, [encoder])


# Measuring -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Way:
    """One way of training: from which data, and how many students on each pass of the teacher."""

    name: str
    data: TrainingData
    students: int


def made_up_pictures(count: int, side: int) -> ImageSource:
    """So many pictures of noise, uncompressed: reading them, which a cache saves too, shall count for nothing."""
    pixels = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=seeded(0)).numpy()

    def content(row: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels[row]).save(file, "bmp")
        return file.getvalue()

    files = [content(row) for row in range(count)]
    captions = tuple(f"noto emoji, picture number {number}" for number in range(count))
    return ImageSource("noise", captions, f"{count:016x}", "noise {}".format, files.__getitem__)


def measure(
    ways: Sequence[Way], setup: DistillSetup, student_runs: Sequence[StudentRun], runs: int
) -> tuple[dict[Way, list[float]], dict[Way, list[float]]]:
    """Seconds of every step of every way, and how many of them went into getting the batch; the ways take turns."""
    settings, device = setup.settings, torch.device(setup.device)
    whole: dict[Way, list[float]] = {way: [] for way in ways}
    data: dict[Way, list[float]] = {way: [] for way in ways}
    micro = settings.micro_batch or settings.batch
    for run in range(runs + 1):  # the first warms up
        for way in ways:
            synchronize(device)
            start = time.perf_counter()
            batch = draw_batch(way.data, setup.scheduler, settings, run + 1, device)
            synchronize(device)
            drawn = time.perf_counter()
            chosen = student_runs[: way.students]
            _, micro = joint_step(setup, chosen, batch, micro)
            synchronize(device)
            if failure := next((student_run.failure for student_run in chosen if student_run.failure), ""):
                raise SystemExit(f"a step was not taken, its time means nothing: {failure}")
            if run:
                data[way].append(drawn - start)
                whole[way].append(time.perf_counter() - start)
    return whole, data


def comparison(
    whole: Mapping[Way, Sequence[float]], data: Mapping[Way, Sequence[float]], batch: int, work: Work
) -> pd.DataFrame:
    """A row per way, columns COLUMNS; ratios are medians over the rounds, each against the baseline of its round."""
    (baseline,) = (seconds for way, seconds in whole.items() if way.name == BASELINE)
    rows = []
    for way, seconds in whole.items():
        ratios = [way.students * slow / fast for slow, fast in zip(baseline, seconds, strict=True)]
        ratio, bound = statistics.median(ratios), 1.0 if way.name == BASELINE else work.bound(way.students)
        middle = statistics.median(seconds)
        rows.append(
            (
                *(way.name, way.students, way.students * batch / middle, 1e3 * middle),
                1e3 * statistics.median(data[way]),
                *(ratio, min(ratios), max(ratios), bound, ratio / bound),
            )
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


# Words ---------------------------------------------------------------------------------------------------------


def as_markdown(frame: pd.DataFrame, formats: Mapping[str, str], titles: Sequence[str]) -> str:
    """``frame`` as a Markdown table, figures to the right."""
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    for row in frame.to_dict("records"):
        cells = [formats.get(str(name), "{}").format(value) for name, value in row.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measured_words(frame: pd.DataFrame) -> str:
    """The measured ways as a table."""
    shown = frame.assign(
        spread=[f"{low:.2f} to {high:.2f}" for low, high in zip(frame.low, frame.high, strict=True)]
    )
    shown = shown[
        ["way", "students", "samples_per_s", "step_ms", "data_ms", "ratio", "spread", "bound", "share"]
    ]
    formats = {
        "samples_per_s": "{:.1f}",
        "step_ms": "{:.0f}",
        "data_ms": "{:.0f}",
        "ratio": "{:.2f}",
        "bound": "{:.2f}",
        "share": "{:.0%}",
    }
    titles = (
        "way",
        "students",
        "samples/s",
        "ms a step",
        "for data",
        "times the loop",
        "min to max",
        "bound",
        "reached",
    )
    return as_markdown(shown, formats, titles)


def bounds_words(students: Sequence[int]) -> str:
    """What the ratios can be at most in SD-v1.4's proportions, by multiply-adds; nothing is run."""
    rows = []
    for plan in ("bk-base", "bk-small", "bk-tiny"):
        work = preset_work("sd-v1.4", plan)
        parts = (f"{count / 1e9:.0f}" for count in (work.encoding, work.teacher, work.student))
        rows.append((plan, *parts, *(f"{work.bound(count):.2f}" for count in students)))
    titles = ("SD-v1.4", "encoders, GMACs", "teacher", "student", *(f"{count} cached" for count in students))
    return as_markdown(pd.DataFrame(rows), {}, titles)


def recipe_words(ratios: Mapping[int, float], shares: Mapping[int, float]) -> str:
    """What the paper's full recipe would cost with ratios (by students at once) measured here; arithmetic only."""
    work = preset_work("sd-v1.4", "bk-base")
    pace = PAPER_SAMPLES / PAPER_HOURS / 3600
    lines = [
        f"The full recipe is 50,000 x 256 = {PAPER_SAMPLES / 1e6:.1f} M samples. BK-SDM's model card gives about "
        f"{PAPER_HOURS} hours on one A100 for Base, {pace:.1f} samples/s. What follows is arithmetic, not measured:",
    ]
    for students in (1, 3):
        who = "one student alone" if students == 1 else f"each of {students} trained together"
        if students not in ratios:
            lines.append(f"- {who}: not measured here (--students {students})")
            continue
        ways = (
            ("the ratio measured here", ratios[students]),
            ("SD-v1.4's bound times the share reached here", work.bound(students) * shares[students]),
        )
        for basis, ratio in ways:
            hours = PAPER_HOURS / ratio
            many = ", ".join(f"{hours / gpus:.0f} on {gpus} GPUs" for gpus in (8, 16))
            lines.append(f"- {who}, by {basis} ({ratio:.2f}): {hours:.0f} hours; at linear scaling {many}")
    # once per picture and variant, against once per sample
    encoding = 2 * PAPER_PICTURES * work.encoding / (PAPER_SAMPLES * work.sample(cached=False))
    lines.append(
        f"- encoding {PAPER_PICTURES:,} pictures once, each as it is and mirrored: {encoding:.1%} of the multiply-adds "
        f"of the paper's loop, {PAPER_HOURS * encoding:.1f} of its {PAPER_HOURS} hours; that serves all students"
    )
    return "\n".join(lines)


# All together --------------------------------------------------------------------------------------------------


def benchmark(arguments: argparse.Namespace, counts: Sequence[int]) -> tuple[pd.DataFrame, str]:
    """The measured ways, and the conditions they were measured under."""
    device = pick_device(arguments.device)
    dtype = pick_dtype(arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    pipeline = pipeline_of(arguments.model, device, dtype)
    pipeline.set_progress_bar_config(disable=True)
    teacher = pipeline.unet.eval()
    architecture = architecture_of(teacher)
    plan = parse_plan(arguments.plan, architecture)
    encoders = [one for one in (pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)) if one]
    work = work_of(dict(teacher.config), plan, pipeline.vae, encoders)
    settings = DistillConfig(steps=arguments.runs + 1, batch=arguments.batch, trackers=())
    pictures = DataConfig(flip=True, batch=arguments.batch)
    source = made_up_pictures(2 * arguments.batch, teacher.config.sample_size * pipeline.vae_scale_factor)
    build: Callable[[], nn.Module] = partial(materialise, teacher, plan)
    pairs = feature_pairs(architecture, plan)
    with tempfile.TemporaryDirectory() as folder:
        cached = build_cache(pipeline, source, pictures, Path(folder)).cache
        validation = random_probe(teacher.config, samples=2, seed=0)
        setup = DistillSetup(teacher, cached, pipeline.scheduler, settings, validation, device)
        init_processes()
        student_runs = [
            StudentRun.of(setup, Student(build, pairs, Path(folder) / str(number)), build(), {})
            for number in range(max(counts))
        ]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        ways = [Way(BASELINE, LiveData.of(pipeline, source, pictures), 1)]
        ways += [Way("cached", cached, count) for count in counts]
        whole, data = measure(ways, setup, student_runs, arguments.runs)
    memory = training_memory(
        teacher,
        student_runs[0].state.student,
        tokens=validation.embeddings.shape[1],
        device=device,
    )
    machine = Environment.capture(str(device), str(dtype).removeprefix("torch."))
    millions = (f"{count / 1e6:.0f} M" for count in (work.encoding, work.teacher, work.student))
    said = [
        f"{arguments.model}, {arguments.plan}, batch {arguments.batch}, {machine.dtype} on {device} "
        f"({machine.device_name}), {torch.get_num_threads()} threads, torch {machine.torch}, medians of "
        f"{arguments.runs} rounds; multiply-adds of a sample in encoders, teacher and student: {', '.join(millions)}",
        *(memory.describe(count, arguments.batch) for count in dict.fromkeys((counts[0], counts[-1]))),
    ]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        said.append(f"peak of the GPU's memory with {max(counts)} students: {peak:.1f} GiB")
    return comparison(whole, data, arguments.batch, work), "\n".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="reference", help="reference, a folder, or a preset (random weights)"
    )
    parser.add_argument("--plan", default="bk-base")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--students", default="1,2,3,4,8", help="how many on one pass of the teacher, each in turn"
    )
    parser.add_argument("--runs", type=int, default=5, help="rounds of all ways; 0: only the arithmetic")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own")
    parser.add_argument("--dtype", default="", help="of teacher and encoders; default bfloat16 on CUDA")
    parser.add_argument("--out", type=Path, help="folder for distillation.csv and distillation.md")
    arguments = parser.parse_args()
    counts = sorted({int(count) for count in arguments.students.split(",")})
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    parts = []
    frame = pd.DataFrame(columns=list(COLUMNS))
    if arguments.runs:
        frame, conditions = benchmark(arguments, counts)
        parts += [conditions, measured_words(frame)]
    cached = list(rows_of(frame[frame["way"] == "cached"]))
    ratios, shares = (
        {int(row.students): float(getattr(row, name)) for row in cached} for name in ("ratio", "share")
    )
    parts += [
        "Bounds in SD-v1.4's proportions (512 pixels, 77 tokens), counted and not run:",
        bounds_words(counts),
        recipe_words(ratios, shares),
    ]
    text = "\n\n".join(parts)
    print(text)
    if arguments.out:
        write_frame(arguments.out / "distillation.csv", frame)
        write_text(arguments.out / "distillation.md", text + "\n")


if __name__ == "__main__":
    main()
