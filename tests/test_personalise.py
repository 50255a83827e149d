"""A model that learns a subject: whole and as a LoRA, on tiny pipelines; and what is refused, in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import subjects
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from prune_lab.api.applying import _frozen_in, personal_table
from prune_lab.applications import PersonalSettings, learn_subject
from prune_lab.applications.personal import _trained
from prune_lab.applications.pictures import read_own_pictures
from prune_lab.cli import app
from prune_lab.distill import encode_data
from prune_lab.errors import ConfigError, DataError, RunError
from prune_lab.export import student_in
from prune_lab.families import model_of
from prune_lab.models import load_pipeline, resolve_model

FEW: dict[str, Any] = {**subjects.FEW, "pictures": 0}
WORDS = subjects.words_of(FEW)


def invoke(*args: object, fails: bool = False) -> str:
    found = CliRunner().invoke(app, [str(arg) for arg in args])
    assert found.exit_code == (2 if fails else 0), found.output
    return found.output


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    """Two pictures of one size, and a third of another."""
    folder = tmp_path / "subject"
    folder.mkdir()
    for number, size in enumerate([(16, 16), (16, 16), (40, 20)]):
        Image.new("RGB", size, (200, 40 * number, 30)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def tiny(tiny_pipeline_folder: Path) -> Any:
    return load_pipeline(resolve_model(str(tiny_pipeline_folder)))


# Learning ------------------------------------------------------------------------------------------------------------


def encoded(pipeline: Any, folder: Path, prompt: str) -> Any:
    pictures, _ = read_own_pictures(folder, 16, "the subject")
    return encode_data(pipeline, pictures, [prompt] * len(pictures))


@pytest.mark.long
def test_the_subject_is_learnt_and_the_class_weighs_in(tiny: Any, subject: Path) -> None:
    """The loss on the subject falls, and the weights depend on the pictures of the class."""
    model, own, other = model_of(tiny), encoded(tiny, subject, "a red cat"), encoded(tiny, subject, "a cat")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found: dict[float, torch.Tensor] = {}
    for weight in (1.0, 0.0):
        model.load_state_dict(before)
        how = PersonalSettings(
            **FEW | {"steps": 40, "batch": 2, "learning_rate": 3e-3, "prior_weight": weight}
        )
        learnt = learn_subject(model, tiny.scheduler, own, other, how)
        assert learnt.subject_loss[1] < 0.9 * learnt.subject_loss[0]
        assert (learnt.class_loss is None) == (weight == 0)
        assert learnt.trained == sum(tensor.numel() for tensor in model.parameters())
        assert learnt.peak_bytes > 4 * 4 * learnt.trained  # weights, gradients and two moments in float32
        found[weight] = torch.cat([tensor.flatten() for tensor in model.parameters()])
    assert not torch.equal(found[1.0], found[0.0])


def test_the_same_seed_learns_the_same_and_frozen_modules_stay(tiny: Any, subject: Path) -> None:
    model, own = model_of(tiny), encoded(tiny, subject, "a red cat")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = []
    for _ in range(2):
        model.load_state_dict(before)
        how = PersonalSettings(**FEW | {"learning_rate": 1e-3})
        learn_subject(model, tiny.scheduler, own, None, how, frozen=("mid_block",))
        found.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    for name, tensor in before.items():
        assert torch.equal(found[0][name], found[1][name])
        assert torch.equal(found[0][name], tensor) == name.startswith("mid_block."), name


def test_gradient_checkpointing_changes_nothing_that_is_learnt(tiny: Any, subject: Path) -> None:
    model, own = model_of(tiny), encoded(tiny, subject, "a red cat")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = []
    for spare in (False, True):
        model.load_state_dict(before)
        how = PersonalSettings(**FEW | {"steps": 2, "learning_rate": 1e-3, "gradient_checkpointing": spare})
        learn_subject(model, tiny.scheduler, own, None, how)
        found.append(torch.cat([tensor.flatten() for tensor in model.parameters()]))
    assert torch.allclose(*found, atol=1e-6)


def test_a_loss_that_is_no_number_ends_it(tiny: Any, subject: Path) -> None:
    how = PersonalSettings(**FEW | {"steps": 30, "learning_rate": 1e18})
    with pytest.raises(DataError, match="smaller --learning-rate"):
        learn_subject(model_of(tiny), tiny.scheduler, encoded(tiny, subject, "a red cat"), None, how)


def test_losses_before_and_after_are_of_the_same_noise(tiny: Any, subject: Path) -> None:
    model, own, other = model_of(tiny), encoded(tiny, subject, "a red cat"), encoded(tiny, subject, "a cat")
    how = PersonalSettings(**FEW | {"steps": 3, "learning_rate": 1e-12})  # which changes nothing
    found = learn_subject(model, tiny.scheduler, own, other, how)
    assert found.class_loss is not None
    for before, after in (found.subject_loss, found.class_loss):
        assert before == pytest.approx(after, rel=1e-5)
    assert found.subject_loss[0] != found.class_loss[0]


class _Killed(BaseException):
    """As a signal that ends the process."""


@pytest.mark.parametrize("lora", [0, 2])
def test_stopped_and_gone_on_it_is_bit_for_bit_as_if_never_stopped(
    lora: int, tiny_pipeline_folder: Path, subject: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prune_lab.applications.personal as personal

    how = PersonalSettings(**FEW | {"steps": 5, "learning_rate": 1e-3, "lora": lora})
    calls, real, file = [], personal._drawn, tmp_path / "mine.state.safetensors"
    monkeypatch.setattr(personal, "_KEPT_EVERY", 2)

    def learnt(state: Path | None, kill: int = 0, settings: PersonalSettings = how) -> tuple[Any, Any]:
        pipeline: Any = load_pipeline(resolve_model(str(tiny_pipeline_folder)))
        own, other = (encoded(pipeline, subject, text) for text in ("a red cat", "a cat"))

        def drawn(*given: Any) -> Any:
            if given[3] <= settings.steps:  # else the loss is told by it
                calls.append(given[3])
            if given[3] == kill:
                raise _Killed
            return real(*given)

        calls.clear()
        monkeypatch.setattr(personal, "_drawn", drawn)
        model = model_of(pipeline)
        found = learn_subject(model, pipeline.scheduler, own, other, settings, state_file=state)
        return found, {name: tensor.clone() for name, tensor in model.state_dict().items()}

    whole, wanted = learnt(None)
    with pytest.raises(_Killed):
        learnt(file, kill=4)
    size = file.stat().st_size
    trained = sum(tensor.numel() for name, tensor in wanted.items() if not lora or "lora_" in name)
    assert 12 * trained <= size < 12 * trained + 2**19  # weights and two moments, of what is trained alone
    with pytest.raises(RunError, match=r"learning_rate=0.001 instead of 0.002"):
        learnt(file, settings=dataclasses.replace(how, learning_rate=2e-3))
    with pytest.raises(RunError, match="asked for 2 steps of training, found 2 taken"):
        learnt(file, settings=dataclasses.replace(how, steps=2))
    found, tensors = learnt(file)
    assert calls == [3, 4, 5]
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert (found.subject_loss, found.class_loss) == (whole.subject_loss, whole.class_loss)


# What is written ------------------------------------------------------------------------------------------------------


def test_a_whole_model_is_a_pipeline_of_plain_diffusers(
    tiny_pipeline_folder: Path, subject: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    words = ("personalise", tiny_pipeline_folder, "--images", subject, *WORDS, "--out", out)
    [row] = json.loads(
        CliRunner().invoke(app, [*map(str, words), "--learning-rate", "1e-3", "--json"]).stdout
    )
    assert (row["pictures"], row["class_pictures"], row["prompt"]) == (3, 3, "a red cat")
    plain, given = (DiffusionPipeline.from_pretrained(one) for one in (out, tiny_pipeline_folder))
    changed = [
        not torch.equal(one, other)
        for one, other in zip(plain.unet.parameters(), given.unet.parameters(), strict=True)
    ]
    assert sum(changed) > len(changed) / 2
    told = json.loads((out / "unet" / "provenance.json").read_text())
    assert told["proof"]["kind"] == "same tensors"
    assert told["personal"]["class_prompt"] == "a cat"
    assert str(tmp_path) not in json.dumps(told)
    assert "'a red cat'" in (out / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mine",
        "subject",
    ]  # no state, no pictures of the class
    assert "--force" in invoke(*words, fails=True)


def own_code_student(folder: Path, out: Path) -> Path:
    invoke("prune", folder, "--plan", "-Dn1.A1 -Up1.R1", "--form", "own", "--out", out)
    return out


@pytest.mark.long
def test_a_student_with_code_of_its_own_learns_whole(
    tiny_pipeline_folder: Path, subject: Path, tmp_path: Path
) -> None:
    student, out = own_code_student(tiny_pipeline_folder, tmp_path / "student"), tmp_path / "mine"
    invoke("personalise", student, "--images", subject, *WORDS, "--out", out)
    assert (out / "unet" / "plan.json").read_bytes() == (student / "unet" / "plan.json").read_bytes()
    assert list((out / "unet").glob("modeling_pruned_*.py"))
    assert "trust_remote_code=True" in (out / "README.md").read_text()
    invoke("generate", out, "--prompt", "a red cat", "--steps", "2", "--out", tmp_path / "a.png")


def test_blocks_that_do_nothing_stay_so(tiny_pipeline_folder: Path, subject: Path, tmp_path: Path) -> None:
    """A student in the neutral form is trained but for these, whole or by a LoRA, and is still of its plan."""
    student, out = tmp_path / "student", tmp_path / "mine"
    invoke("prune", tiny_pipeline_folder, "--plan", "-Dn1.A1", "--form", "neutral", "--out", student)
    frozen = student_in(student).layout.frozen
    assert frozen
    invoke("personalise", student, "--images", subject, *WORDS, "--learning-rate", "1e-3", "--out", out)
    given, found = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (student, out)
    )
    for name, tensor in given.items():
        inside = any(name.startswith(f"{path}.") for path in frozen)
        assert torch.equal(tensor, found[name]) or not inside, name
    assert any(not torch.equal(tensor, found[name]) for name, tensor in given.items())
    how = PersonalSettings(**FEW | {"lora": 2})
    model = model_of(load_pipeline(resolve_model(str(student))))
    layers = _trained(model, how, frozen)
    assert layers
    named = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not [name for name in named if any(name.startswith(f"{path}.") for path in frozen)]


def test_numbers_stay_in_the_format_of_the_files(
    tiny_pipeline_folder: Path, subject: Path, tmp_path: Path
) -> None:
    """Of a pipeline in float16 the model is trained in float32 and written as the other parts are."""
    half, out = tmp_path / "half", tmp_path / "mine"
    DiffusionPipeline.from_pretrained(tiny_pipeline_folder).to(torch.float16).save_pretrained(half)
    invoke("personalise", half, "--images", subject, *WORDS, "--learning-rate", "1e-3", "--out", out)
    tensors = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


@pytest.mark.parametrize("onto", ["model", "half", pytest.param("own code", marks=pytest.mark.long)])
def test_a_lora_is_loaded_by_plain_diffusers(
    onto: str, tiny_pipeline_folder: Path, subject: Path, tmp_path: Path
) -> None:
    """Onto the model, one in float16, whose parts diffusers loads in two formats where it is asked for none, or onto a
    student with code of its own, where it gives the answer that was trained.
    """
    folder = tiny_pipeline_folder
    if onto == "own code":
        folder = own_code_student(tiny_pipeline_folder, tmp_path / "student")
    elif onto == "half":
        folder = tmp_path / "half"
        DiffusionPipeline.from_pretrained(tiny_pipeline_folder).to(torch.float16).save_pretrained(folder)
    out = tmp_path / "lora"
    invoke("personalise", folder, "--images", subject, *WORDS, "--lora", "2", "--out", out)
    tensors = load_file(out / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("unet.") and ".lora_" in key for key in tensors)
    assert {tensor.shape[0] for key, tensor in tensors.items() if ".lora_A." in key} == {2}
    assert any(tensor.abs().max() > 0 for key, tensor in tensors.items() if ".lora_B." in key)
    told = json.loads((out / "personal.json").read_text())
    assert told["proof"]["kind"] == "same answer"
    assert told["training"]["trained"] == sum(tensor.numel() for tensor in tensors.values())
    said = (out / "README.md").read_text()
    assert 'load_lora_weights(".")' in said
    assert ('from_pretrained("MODEL", torch_dtype=torch.float32)' in said) == (onto == "half")
    if onto == "half":  # the lines are run to their end: the pipeline draws
        lines = said.split("```python\n")[1].split("```")[0].replace("MODEL", str(folder))
        subprocess.run([sys.executable, "-c", lines], check=True, cwd=out, capture_output=True)
        assert (out / "picture.png").is_file()


@pytest.mark.long
def test_a_lora_that_was_damaged_is_noticed(
    tiny_pipeline_folder: Path, subject: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another process reads must be what was trained."""
    from diffusers import StableDiffusionPipeline

    save = StableDiffusionPipeline.save_lora_weights

    def damaged(folder: Path, **given: Any) -> None:
        layers = {name: tensor * 1.001 for name, tensor in given.pop("unet_lora_layers").items()}
        save(folder, unet_lora_layers=layers, **given)

    monkeypatch.setattr(StableDiffusionPipeline, "save_lora_weights", damaged)
    out = tmp_path / "lora"
    said = invoke(
        *("personalise", tiny_pipeline_folder, "--images", subject, *WORDS, "--lora", "2", "--out", out),
        fails=True,
    )
    assert "not those of the LoRA that was trained" in said
    assert not out.exists()


@pytest.mark.parametrize(
    "kind",
    ["pixart", pytest.param("sd3", marks=pytest.mark.long), pytest.param("flux", marks=pytest.mark.long)],
)
def test_transformers_learn_too(
    kind: str, pipeline_folder: Callable[[str], Path], subject: Path, tmp_path: Path
) -> None:
    folder = pipeline_folder(kind)
    shown = ("--pictures", 1, "--out", tmp_path / "mine")
    invoke("personalise", folder, "--images", subject, *WORDS, *shown)
    DiffusionPipeline.from_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "pictures.png").is_file()
    lora = ("personalise", folder, "--images", subject, *WORDS, "--lora", "2", "--out", tmp_path / "lora")
    if kind == "pixart":
        assert "loads none; leave --lora away" in " ".join(invoke(*lora, fails=True).split())
    else:
        invoke(*lora)
        assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"token": " "}, "words that are to mean the subject"),
        ({"subject_class": ""}, "what the subject is one of"),
        ({"template": "a photo"}, "one {} in it"),
        ({"lora": -1}, "a rank from 1"),
        ({"steps": 0}, "a whole number from 1"),
        ({"seed": 2**40}, "a whole number from 0 to 2,147,483,647"),
        ({"learning_rate": float("nan")}, "a number from 0 to 1e+30"),
        ({"precision": "float16"}, "float32 or bfloat16"),
        ({"pictures": -1}, "from 0, for none, to 16"),
        ({"context": "at sea"}, "one {} in it"),
    ],
)
def test_a_bad_setting_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=r"^asked for") as caught:
        PersonalSettings(**FEW | wrong)
    assert said in str(caught.value)


def test_a_student_whose_zeros_would_be_trained_away_learns_by_a_lora_alone(
    tiny_pipeline_folder: Path, subject: Path, tmp_path: Path
) -> None:
    student, out = tmp_path / "student", tmp_path / "mine"
    shutil.copytree(tiny_pipeline_folder, student)
    (student / "unet" / "plan.json").write_text(json.dumps({"form": "padded"}))
    source = resolve_model(str(student))
    with pytest.raises(RunError, match="padded form, whose zeros would be trained away"):
        personal_table(source, subject, out, PersonalSettings(**FEW), None, torch.device("cpu"), force=False)
    assert _frozen_in(source, PersonalSettings(**FEW | {"lora": 2})) == ()
    assert not out.exists()


def test_bad_pictures_are_refused_before_anything_is_drawn(
    tiny_pipeline_folder: Path, subject: Path, tmp_path: Path
) -> None:
    def said(*words: object) -> str:
        found = invoke("personalise", tiny_pipeline_folder, *words, "--out", tmp_path / "out", fails=True)
        assert not (tmp_path / "out").exists()
        return " ".join(found.split())

    (tmp_path / "empty").mkdir()
    assert "found none; give files of" in said("--images", tmp_path / "empty", *WORDS)
    assert "found no such folder" in said("--images", tmp_path / "nowhere", *WORDS)
    assert "count nothing" in said(
        "--images", subject, *WORDS, "--class-images", subject, "--prior-weight", 0
    )
    assert "lora = 0" in said("--images", subject, *WORDS, "--lora", 0)
    (subject / "phone.HEIC").write_bytes(b"a picture that is not read")
    (subject / "broken.png").write_bytes((subject / "0.png").read_bytes()[:40])
    last = said("--images", subject, *WORDS)
    assert "broken.png, found none that can be read" in last
    assert "of the pictures of the subject are left out 1; the first:" in last
    assert "phone.HEIC: no image" in last
    assert not list(tmp_path.glob("out.class*"))


def test_models_that_read_no_text_are_refused(
    pipeline_folder: Callable[[str], Path], subject: Path, tmp_path: Path
) -> None:
    words = ("--images", subject, *WORDS, "--out", tmp_path / "out")
    assert "reads no text" in invoke("personalise", pipeline_folder("ddpm"), *words, fails=True)
    alone = pipeline_folder("pixart") / "transformer"
    assert "a model alone" in invoke("personalise", alone, *words, fails=True).replace(
        "transformer alone", "model alone"
    )
