"""Whole jobs on a tiny pipeline of every kind, and one step of a flow's distillation against plain diffusers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from families_seen import Seen
from PIL import Image
from tiny_pipelines import CAPTION_LENGTH, DRAWN_WITH
from training_images import png_image

from prune_lab.blocks import architecture_of
from prune_lab.config import DistillConfig, RunConfig
from prune_lab.distill import DistillSetup, Student, distill_together, encode_data, feature_pairs
from prune_lab.distill.batches import min_snr_weights
from prune_lab.distill.conditioning import other_captions
from prune_lab.errors import ConfigError
from prune_lab.plans import parse_plan
from prune_lab.probes import make_probe, schedule_of
from prune_lab.runs import Run
from prune_lab.runtime import generator_for, seeded
from prune_lab.session import Session, data_roles
from prune_lab.surgery import materialise
from prune_lab.workflow import run_all, save_students

pytestmark = pytest.mark.usefixtures("one_thread", "blank_figures")

SIDES = {"pixart": 16, "sd3": 16, "flux": 16, "wan": 32, "ddpm": 16}
PLANS = {
    "pixart": ("-B2", "-B3 -B4"),
    "sd3": ("-B2", "-B3 -B4"),
    "flux": ("-D2", "-S2 -S3"),
    "wan": ("-B2", "-B3 -B4"),
    "ddpm": ("-Md.A1", "-Md"),
}


@pytest.fixture
def job(
    small_run_config: Callable[..., RunConfig], pipeline_folder: Callable[[str], Path]
) -> Callable[..., RunConfig]:
    """``job(kind, source, plans)``: the settings of a whole job with so many candidates; without a source the model
    draws.
    """

    def config(kind: str, source: str = "", plans: int = 2) -> RunConfig:
        resolution = SIDES[kind] if kind in ("flux", "wan") else 0  # the others have a size of their own
        drawn = {"count": 12, "steps": 2, "guidance": 1.5, "resolution": resolution}
        prompts = () if kind == "ddpm" else ("a red cat", "two blue dogs")
        return small_run_config(
            model=str(pipeline_folder(kind)),
            probe={"samples": 4, "timesteps": 2, "drawn": 4, "steps": 2},
            data={"source": source, **drawn},
            search={"budgets": (), "controls": PLANS[kind][:plans]},
            distill={"steps": 3, "grid_every": 3},
            evaluate={"prompts": prompts, "steps": 2, "guidance": 1.5, "scorer": "none"},
        )

    return config


def check_run(run: Run, kind: str, asked: tuple[str, ...]) -> None:
    """The students ``asked`` for were trained and ranked, and pictures are there in size and number."""
    ranking = pd.read_csv(run.ranking)
    assert ranking["status"].tolist() == ["teacher", *["ranked"] * len(asked)]
    plans = run.plan_ids()
    assert len(plans) == len(asked)
    named = pd.read_csv(run.picture_prompts)
    assert len(named) == (8 if kind == "ddpm" else 2)
    folders = [run.teacher_pictures]
    for plan in plans:
        paths = run.candidate(plan)
        folders += [paths.pictures_pruned, paths.pictures_distilled]
        assert len(list(paths.grids.glob("*.png"))) == 1
        losses = pd.read_csv(paths.recovery)
        assert losses["step"].tolist() == [0, 1, 2, 3]
        assert np.isfinite(losses[["task", "output", "feature", "total"]].iloc[1:]).all(axis=None)
    pictures = {}
    for one in folders:
        files = sorted(one.glob("*.png"))
        assert [file.name for file in files] == sorted(named["file"])
        pictures[one] = [np.asarray(Image.open(file)) for file in files]
        assert {picture.shape for picture in pictures[one]} == {(SIDES[kind], SIDES[kind], 3)}
        assert len({picture.tobytes() for picture in pictures[one]}) == len(files)  # no two are the same
    assert len({pictures[one][0].tobytes() for one in folders}) == len(folders)
    assert run.report.is_file()


def check_student(run: Run, kind: str, seen: Seen) -> None:
    """Plain diffusers loads a student's folder and draws with it."""
    (saved,) = save_students(Session(run), run.folder.with_name("student"), only=(PLANS[kind][0],))
    student = DiffusionPipeline.from_pretrained(saved)
    student.set_progress_bar_config(disable=True)
    drawn = student(**DRAWN_WITH[kind], num_inference_steps=2, generator=seeded(0))
    assert np.isfinite(np.asarray(drawn.frames if kind == "wan" else drawn.images)).all()
    for verb in ("blocks", "profile", "score", "prune", "distill", "draw"):
        seen(Session(run).architecture.config, verb)


@pytest.mark.long
def test_a_model_of_pixels_without_text_goes_through_all_steps(
    job: Callable[..., RunConfig],
    tmp_path: Path,
    quick_report: None,
) -> None:
    for row in range(8):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / f"{row}.png").write_bytes(png_image(row))  # no captions: nobody would read them
    run_all(job("ddpm", str(tmp_path / "mine"), plans=1), tmp_path / "run")
    run = Run(tmp_path / "run")
    roles = {role.name: role for role in data_roles(Session(run)).roles}
    assert roles["train"].count == 4
    assert roles["train"].size == 16
    assert "none" in roles["scorer"].source
    check_run(run, "ddpm", PLANS["ddpm"][:1])


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "drawn"),
    [
        ("ddpm", True),
        ("pixart", False),
        ("sd3", False),
        *(("flux", drawn) for drawn in (True, False)),  # packed latents
        *(("wan", drawn) for drawn in (True, False)),  # latents of frames
    ],
)
def test_a_pipeline_of_every_kind_goes_through_all_steps(
    kind: str,
    drawn: bool,
    job: Callable[..., RunConfig],
    tmp_path: Path,
    seen: Seen,
) -> None:
    folder = tmp_path / "mine"
    for row in range(0 if drawn else 12):
        folder.mkdir(exist_ok=True)
        (folder / f"{row}.png").write_bytes(png_image(row))
        (folder / f"{row}.txt").write_text(f"a picture of number {row}")
    run_all(job(kind, "" if drawn else str(folder)), tmp_path / "run")
    check_run(Run(tmp_path / "run"), kind, PLANS[kind])
    check_student(Run(tmp_path / "run"), kind, seen)


# One step of a flow, by hand ------------------------------------------------------------------------------------------

STEP = DistillConfig(
    steps=1,
    batch=3,
    learning_rate=1e-3,
    warmup=0,
    ema_decay=0.0,
    clip_norm=0.0,
    caption_dropout=0.5,
    trackers=(),
)


def test_a_step_of_a_flow_is_that_of_a_loop_in_plain_diffusers(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder("sd3"))
    teacher = pipeline.transformer.eval()
    architecture = architecture_of(teacher)
    plan = parse_plan("-B2", architecture)
    pictures = torch.randint(0, 256, (4, 3, 16, 16), generator=seeded(0), dtype=torch.uint8)
    captions = ("a red cat", "a blue dog", "two ships", "rain")
    data = encode_data(pipeline, pictures, captions)
    validation = make_probe(pipeline, pictures, captions, ("",) * 4, timesteps=4, seed=1)
    setup = DistillSetup(teacher, data, pipeline.scheduler, STEP, validation)
    student = materialise(teacher, plan)
    by_hand = copy.deepcopy(student)
    one = Student(partial(copy.deepcopy, student), feature_pairs(architecture, plan), tmp_path / "student")
    (found,) = distill_together(setup, [one])

    # what is drawn, in the order that the seeds fix
    rows = torch.randperm(4, generator=generator_for(0, "epoch", 0))[:3]
    generator = generator_for(0, "step", 1)
    noise = torch.randn(3, 4, 8, 8, generator=generator)
    places = torch.randint(0, 1000, (3,), generator=generator)
    dropped = torch.rand(3, generator=generator) < 0.5
    assert dropped.any()
    assert not dropped.all()
    # what diffusers makes of it
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    timesteps = scheduler.timesteps.flip(0)[places].round()
    sigmas = (timesteps / 1000)[:, None, None, None]
    with torch.no_grad():
        mode = pipeline.vae.encode(pictures.float() / 127.5 - 1).latent_dist.mode()
        latents = (mode - 0.0609) * 1.5305
        texts = ["" if gone else captions[row] for row, gone in zip(rows.tolist(), dropped, strict=True)]
        words, _, pooled, _ = pipeline.encode_prompt(
            texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=CAPTION_LENGTH
        )
    clean = latents[rows]
    noisy = (1 - sigmas) * clean + sigmas * noise

    def run(model: Any, places: tuple[int, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        states: list[torch.Tensor] = []
        hooks = [
            model.transformer_blocks[place].register_forward_hook(lambda _m, _i, out: states.append(out[1]))
            for place in places
        ]
        out = model(noisy, timestep=timesteps, encoder_hidden_states=words, pooled_projections=pooled).sample
        for hook in hooks:
            hook.remove()
        return out, states

    by_hand.train()
    with torch.no_grad():
        wanted, its_states = run(teacher, (1, 2, 3))  # the first block of the student writes what B3 reads
    predicted, states = run(by_hand, (0, 1, 2))
    mse = torch.nn.functional.mse_loss
    task, output = mse(predicted, noise - clean), mse(predicted, wanted)
    feature = sum(mse(own, other) for own, other in zip(states, its_states, strict=True))
    loss = task + output + feature
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-3, weight_decay=1e-2)
    loss.backward()
    optimizer.step()

    step = found.frame().iloc[1]
    for name, value in (("task", task), ("output", output), ("feature", feature), ("total", loss)):
        assert step[name] == pytest.approx(float(value.detach()), rel=1e-5), name
    written = type(teacher).from_pretrained(tmp_path / "student" / "distilled" / "model").state_dict()
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.long
def test_what_a_student_leaves_out_at_random_follows_from_the_step(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A model of pixels with dropout, trained with another beside it, and alone with a stop in between."""
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder("ddpm"))
    for module in pipeline.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    pictures = torch.randint(0, 256, (4, 3, 16, 16), generator=seeded(0), dtype=torch.uint8)
    data = encode_data(pipeline, pictures, ("",) * 4)
    validation = make_probe(pipeline, pictures, ("",) * 4, ("",) * 4, timesteps=4, seed=1)
    settings = dataclasses.replace(STEP, steps=2, caption_dropout=0.0, checkpoint_every=1)
    setup = DistillSetup(pipeline.unet.eval(), data, pipeline.scheduler, settings, validation)
    architecture = architecture_of(pipeline.unet)

    def student(plan: str, name: str) -> Student:
        parsed = parse_plan(plan, architecture)
        cut = materialise(pipeline.unet, parsed)
        for module in cut.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        return Student(partial(copy.deepcopy, cut), feature_pairs(architecture, parsed), tmp_path / name)

    _, beside = distill_together(setup, [student("-Md", "other"), student("-Md.A1", "beside")])
    torch.manual_seed(5)  # nothing hangs on it
    distill_together(setup, [student("-Md.A1", "stopped")], until=1, keep_checkpoint=True)
    (stopped,) = distill_together(setup, [student("-Md.A1", "stopped")])
    losses = [one.frame()["total"].tolist()[1:] for one in (beside, stopped)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 2


def test_what_is_not_defined_for_a_kind_is_refused(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    flow = schedule_of(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    with pytest.raises(
        ConfigError, match=r"distill\.min_snr = 5, found .* kind flow; .*set distill\.min_snr = 0"
    ):
        min_snr_weights(flow, torch.tensor([10, 500]), 5.0)
    assert torch.equal(min_snr_weights(flow, torch.tensor([10, 500]), 0.0), torch.ones(2))
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder("ddpm"))
    with pytest.raises(
        ConfigError, match=r"random_conditioning with a DDPMPipeline, whose model reads no captions"
    ):
        other_captions(pipeline, ["a cat"], tmp_path / "captions.safetensors")
    assert isinstance(pipeline.scheduler, DDPMScheduler)
