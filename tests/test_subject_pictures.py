"""What is drawn around a subject: pictures of its class, kept for all trainings, and a sheet of before and after."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import subjects
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

from prune_lab.api.subject_page import draw_sheet
from prune_lab.applications import (
    BeforeAndAfter,
    ClassPictures,
    Personalised,
    PersonalSettings,
    class_pictures,
    personalise,
)
from prune_lab.applications.class_drawing import kept_classes
from prune_lab.cli import app
from prune_lab.errors import StorageError
from prune_lab.models import load_pipeline, resolve_model
from prune_lab.report import LIGHT, Column, draw_comparison
from prune_lab.runtime import progress_shown
from prune_lab.runtime.files import other_files
from prune_lab.runtime.holders import Holder, this_process

FEW: dict[str, Any] = {**subjects.FEW, "guidance": 2.0, "pictures": 1}
WORDS = subjects.words_of(FEW)
HOW: dict[str, Any] = {"seed": 4, "steps": 2, "guidance": 1.0, "batch": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prune_lab" / "class_pictures"


@pytest.fixture
def tiny(tiny_pipeline_folder: Path) -> Any:
    return load_pipeline(resolve_model(str(tiny_pipeline_folder)))


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    folder = tmp_path / "subject"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16), (200, 40 * number, 30)).save(folder / f"{number}.png")
    return folder


def said_by(*args: object, fails: bool = False) -> str:
    found = CliRunner().invoke(app, [str(arg) for arg in args])
    assert found.exit_code == (2 if fails else 0), found.output
    return " ".join(found.output.split())


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The seeds of each batch of pictures of a class that is drawn."""
    import prune_lab.applications.class_drawing as module

    calls: list[list[int]] = []
    real = module.generate

    def generate(pipeline: Any, prompts: Any, seeds: Any, **how: Any) -> torch.Tensor:
        calls.append(list(seeds))
        return real(pipeline, prompts, seeds, **how)

    monkeypatch.setattr(module, "generate", generate)
    return calls


# Pictures of the class ------------------------------------------------------------------------------------------------


def test_pictures_of_a_class_are_drawn_once(tiny: Any, cache: Path, drawn: list[list[int]]) -> None:
    found = class_pictures(tiny, "digest", "a cat", 3, cache, **HOW)
    assert sorted(path.name for path in found.folder.glob("*.png")) == [f"seed-{n}.png" for n in (4, 5, 6)]
    assert (found.drawn, drawn) == (3, [[4, 5], [6]])
    (found.folder / "seed-5.png").unlink()  # as where a call was stopped
    for count, more, batches in ((3, 1, [[5]]), (3, 0, []), (5, 2, [[7], [8]]), (2, 0, [])):
        drawn.clear()
        again = class_pictures(tiny, "digest", "a cat", count, cache, **HOW)
        assert (again.folder, again.drawn, drawn) == (found.folder, more, batches)
        assert torch.equal(again.pictures[:3], found.pictures[:count])
    assert [path.name for path in cache.iterdir()] == [found.folder.name]
    assert not list(found.folder.glob(".*"))


@pytest.mark.parametrize(
    "change",
    [{"model": "other"}, {"prompt": "a dog"}, {"steps": 3}, {"guidance": 2.0}],
    ids=lambda one: next(iter(one)),
)
def test_pictures_of_something_else_are_others(
    change: dict[str, Any], tiny: Any, cache: Path, drawn: list[list[int]]
) -> None:
    def made(model: str = "digest", prompt: str = "a cat", **how: Any) -> ClassPictures:
        return class_pictures(tiny, model, prompt, 1, cache, **HOW | how)

    first = made()
    assert made(**change).folder != first.folder
    assert len(drawn) == 2


def _cut_off(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _one_byte(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 9] ^= 1
    path.write_bytes(content)


def _of_another_seed(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


def _of_somebody(path: Path, other: Path) -> None:
    Image.new("RGB", (16, 16), "blue").save(path)


def _link_to_nothing(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("gone"))


@pytest.mark.parametrize("damage", [_cut_off, _one_byte, _of_another_seed, _of_somebody, _link_to_nothing])
def test_a_damaged_picture_is_drawn_again_and_said(
    damage: Callable[[Path, Path], None],
    tiny: Any,
    cache: Path,
    drawn: list[list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = class_pictures(tiny, "digest", "a cat", 3, cache, **HOW)
    paths = sorted(found.folder.glob("*.png"))
    damage(paths[1], paths[0])
    drawn.clear()
    with progress_shown():
        again = class_pictures(tiny, "digest", "a cat", 3, cache, **HOW)
    assert drawn == [[5]]
    assert torch.equal(again.pictures, found.pictures)
    said = (
        "1 of the pictures of the class that are kept are damaged or others, and are drawn again; the first: "
    )
    assert f"{said}{paths[1]}" in capsys.readouterr().err
    drawn.clear()
    class_pictures(tiny, "digest", "a cat", 3, cache, **HOW)
    assert drawn == []


def test_what_another_process_draws_is_waited_for(
    tiny: Any, cache: Path, drawn: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """One batch is another's; what it leaves is drawn here meanwhile."""
    found = class_pictures(tiny, "digest", "a cat", 4, cache, **HOW)
    kept = {path: path.read_bytes() for path in found.folder.glob("*.png")}
    for path in kept:
        path.unlink()
    first, lock = found.folder / "seed-4.png", found.folder / ".seed-4.png.lock"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        fields = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()
        mine = this_process()
        holder = Holder(mine.host, other.pid, int(fields[19]), mine.since)
        lock.write_text(
            json.dumps({name: getattr(holder, name) for name in ("host", "process", "started", "since")})
        )

        def finish() -> None:
            for path in (first, first.with_name("seed-5.png")):
                path.write_bytes(kept[path])
            lock.unlink()

        drawn.clear()
        later = threading.Timer(0.8, finish)
        later.start()
        with progress_shown():
            again = class_pictures(tiny, "digest", "a cat", 4, cache, **HOW)
        later.join()
        other.kill()
    assert (drawn, again.drawn) == ([[6, 7]], 2)
    assert torch.equal(again.pictures, found.pictures)
    assert (
        f"waiting for pictures of the class that another builder makes: process {other.pid}"
        in capsys.readouterr().err
    )


def test_a_lock_of_another_host_is_told_and_one_of_a_dead_process_is_taken_over(
    tiny: Any, cache: Path
) -> None:
    found = class_pictures(tiny, "digest", "a cat", 1, cache, **HOW)
    lock = found.folder / ".seed-4.png.lock"
    for host, number in (("elsewhere", 7), (this_process().host, 2**22 + 1)):
        (found.folder / "seed-4.png").unlink()
        lock.write_text(json.dumps({"host": host, "process": number, "started": 1, "since": "2026"}))
        if host == "elsewhere":
            with pytest.raises(
                StorageError, match=rf"process 7 on elsewhere .*making seed-4.png.*remove {lock}"
            ):
                class_pictures(tiny, "digest", "a cat", 1, cache, **HOW)
            (found.folder / "seed-4.png").touch()
        else:
            assert class_pictures(tiny, "digest", "a cat", 1, cache, **HOW).drawn == 1
            assert not lock.exists()


def test_without_a_cache_they_are_kept_beside_what_is_written(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kept_classes(tmp_path / "out") == cache
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with progress_shown():
        assert kept_classes(tmp_path / "out") == tmp_path / "out.class"
    assert "cannot be written (Not a directory); pictures of the class are kept in" in capsys.readouterr().err


@pytest.mark.long
def test_another_training_takes_them_and_says_so(
    tiny_pipeline_folder: Path, subject: Path, tmp_path: Path, cache: Path, drawn: list[list[int]]
) -> None:
    words = ("personalise", tiny_pipeline_folder, "--images", subject, *WORDS, "--pictures", 0)
    first = said_by(*words, "--out", tmp_path / "a")
    assert "3 pictures of the class, drawn by the model: " in first
    (folder,) = cache.iterdir()
    assert json.loads((folder / "made_from.json").read_text())["prompt"] == "a cat"
    second = said_by(*words, "--lora", 2, "--out", tmp_path / "b")
    assert f"3 pictures of the class, drawn by the model, 3 of them kept already: {folder}" in second
    assert drawn == [[0, 1, 2]]
    assert (
        f"pictures of the class: {folder}; whatever learns one of this class next takes them again" in second
    )
    third = said_by(*words, "--class-count", 4, "--out", tmp_path / "c")
    assert "4 pictures of the class, drawn by the model, 3 of them kept already" in third
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "cache", "subject"]


# Before and after -----------------------------------------------------------------------------------------------------


def plain_picture(pipeline: Any, prompt: str, seed: int) -> torch.Tensor:
    """What plain diffusers draws, (3, H, W) from 0 to 255."""
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(seed)
    how = {"num_inference_steps": 2, "guidance_scale": 2.0, "generator": noise, "output_type": "pt"}
    found: torch.Tensor = pipeline(prompt, **how).images[0]
    return found * 255


@pytest.mark.long
@pytest.mark.parametrize("lora", [0, 2])
def test_before_and_after_are_what_plain_diffusers_draws(
    lora: int, tiny_pipeline_folder: Path, subject: Path, tmp_path: Path
) -> None:
    how = PersonalSettings(**FEW | {"lora": lora, "learning_rate": 3e-2 if lora else 3e-3, "pictures": 2})
    seen: list[BeforeAndAfter] = []
    source, out = resolve_model(str(tiny_pipeline_folder)), tmp_path / "out"
    found = personalise(source, subject, out, how, show=lambda _, shown: seen.append(shown))
    (shown,) = seen
    assert found.shown is shown
    assert shown.prompts == ("a red cat", "a red cat on the beach", "a cat")
    assert shown.seeds == (3, 4)  # none of the pictures of the class, 0 to 2
    assert len(shown.given) == 3
    before = DiffusionPipeline.from_pretrained(tiny_pipeline_folder)
    after = DiffusionPipeline.from_pretrained(tiny_pipeline_folder if lora else out)
    if lora:
        after.load_lora_weights(out)
    for place, prompt in enumerate(shown.prompts):
        for number, seed in enumerate(shown.seeds):
            for drawn, pipeline in ((shown.before, before), (shown.after, after)):
                wanted = plain_picture(pipeline, prompt, seed)
                assert (drawn[place, number] - wanted).abs().max() <= 1, (prompt, seed)
    assert (shown.before.float() - shown.after.float()).abs().mean() > 1


@pytest.mark.long
def test_the_folder_shows_what_was_learnt(tiny_pipeline_folder: Path, subject: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (
        "personalise",
        tiny_pipeline_folder,
        "--images",
        subject,
        *WORDS,
        "--context",
        "{} at sea",
        "--out",
        out,
    )
    said = said_by(*words)
    assert f"{out / 'pictures.png'} shows what it draws, before and after" in said
    with Image.open(out / "pictures.png") as sheet:
        assert sheet.height > sheet.width > 300  # a row of what was given, three of prompts, two columns
    page = (out / "README.md").read_text()
    assert "](pictures.png)" in page
    assert "(seed 3, 2 steps, guidance 2)" in page
    for prompt in ("a red cat", "red cat at sea", "a cat"):
        assert f"- `{prompt}`: " in page
    assert other_files(out) == []  # --force may replace it


def test_every_picture_has_its_place_on_the_sheet() -> None:
    """Pictures of one shade each: given 0 to 2, of three prompts and two seeds before 10, 11, ... and after 100, ..."""

    def shades(first: int) -> torch.Tensor:
        every = torch.tensor([[first + 10 * prompt + seed for seed in range(2)] for prompt in range(3)])
        return every.to(torch.uint8)[:, :, None, None, None].expand(3, 2, 3, 4, 4)

    given = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 4, 4)
    shown = BeforeAndAfter(given, ("it", "it elsewhere", "others"), (7, 8), shades(10), shades(100), 2, 1.0)
    (axes,) = draw_sheet(shown, LIGHT).axes
    places = {int(np.asarray(one.get_array())[0, 0, 0]): one.get_extent() for one in axes.images}
    texts = {text.get_text(): text.get_position() for text in axes.texts}
    assert list(texts) == [
        "seed 7",
        "before",
        "after",
        "seed 8",
        "it",
        "it elsewhere",
        "others",
        "what it learnt from",
    ]
    assert len(places) == 3 + 3 * 4
    lefts = [places[shade][0] for shade in (10, 100, 11, 101)]
    assert lefts == sorted(lefts)  # before and after of a seed side by side
    assert texts["seed 7"][0] == lefts[0]
    assert texts["seed 8"][0] == lefts[2]
    for row, name in enumerate(("it", "it elsewhere", "others")):
        for shade, left in zip((10, 100, 11, 101), lefts, strict=True):
            _, right, bottom, top = places[shade + 10 * row]
            assert places[shade + 10 * row][0] == left
            assert top < texts[name][1] < bottom
    for shade in range(3):  # over all of them, and not over one another
        _, right, bottom, top = places[shade]
        assert bottom < texts["seed 7"][1]
        assert top < texts["what it learnt from"][1] < bottom
        assert right <= places.get(shade + 1, (99,))[0] or shade == 2
        assert top >= axes.get_ylim()[1]  # inside of the figure


def test_many_given_pictures_are_smaller_and_then_fewer() -> None:
    column = Column("", "model", "", (np.zeros((4, 4, 3), np.uint8),))
    for count, shown, called in ((1, 1, "given"), (3, 3, "given"), (9, 4, "given (4 of 9)")):
        above = Column("", "given", "", (np.ones((4, 4, 3), np.uint8),) * count)
        (axes,) = draw_comparison([column, column], ["a cat"], {}, LIGHT, above).axes
        assert [text.get_text() for text in axes.texts][-1] == called
        strip = axes.images[2:]
        assert len(strip) == shown
        assert max(one.get_extent()[1] for one in strip) <= axes.get_xlim()[1]
        sides = {round(one.get_extent()[1] - one.get_extent()[0], 6) for one in strip}
        assert len(sides) == 1
        assert (sides.pop() < 1) == (shown > 2)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
            "CUDA out of memory. Tried to allocate 2 GiB; ",
        ),
        pytest.param(ZeroDivisionError(), "ZeroDivisionError; ", marks=pytest.mark.long),
    ],
)
def test_what_was_learnt_is_not_lost_with_its_pictures(
    error: Exception,
    said: str,
    tiny_pipeline_folder: Path,
    subject: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr("prune_lab.applications.before_and_after.generate", fail)
    out = tmp_path / "out"
    told = said_by("personalise", tiny_pipeline_folder, "--images", subject, *WORDS, "--out", out)
    assert (
        f"no pictures of what was learnt: {said}{out} is whole, and the same command again draws them alone"
        in told
    )
    DiffusionPipeline.from_pretrained(out)
    assert "## What it draws" not in (out / "README.md").read_text()
    assert not (out / "pictures.png").exists()
    assert json.loads((out / "unet" / "provenance.json").read_text())["proof"]["kind"] == "same tensors"


def test_stopped_while_drawing_it_is_whole_and_said(
    tiny_pipeline_folder: Path, subject: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_lab.applications.personal._KEPT_EVERY", 2)  # a state is written on the way

    def stop(*_: Any, **__: Any) -> torch.Tensor:
        assert not list(tmp_path.glob("out.state*"))
        raise KeyboardInterrupt

    monkeypatch.setattr("prune_lab.applications.before_and_after.generate", stop)
    out = tmp_path / "out"
    words = ("personalise", tiny_pipeline_folder, "--images", subject, *WORDS, "--lora", 2, "--out", out)
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code == 130
    said = " ".join(found.output.split())
    assert (
        f"stopped while drawing what was learnt: {out} is whole, and the same command again draws it alone"
        in said
    )
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "subject"]


@pytest.mark.long
@pytest.mark.parametrize("lora", [0, 2])
def test_the_same_command_again_draws_what_was_not_drawn(
    lora: int, tiny_pipeline_folder: Path, subject: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is learnt again, and the sheet is as if it had been drawn at once."""
    how = PersonalSettings(**FEW | {"lora": lora, "learning_rate": 3e-2 if lora else 3e-3})
    source, seen = resolve_model(str(tiny_pipeline_folder)), list[BeforeAndAfter]()

    def learn(out: Path, settings: PersonalSettings) -> Personalised:
        def show(folder: Path, shown: BeforeAndAfter) -> None:
            seen.append(shown)
            (folder / "pictures.png").touch()

        return personalise(source, subject, out, settings, show=show)

    first = learn(tmp_path / "at-once", how)
    before = learn(tmp_path / "late", dataclasses.replace(how, pictures=0))
    files = {path: path.read_bytes() for path in (tmp_path / "late").rglob("*") if path.is_file()}
    module = sys.modules["prune_lab.applications.personalise"]
    monkeypatch.setattr(module, "learn_subject", lambda *_, **__: pytest.fail("learnt again"))
    for other in ({"steps": 2}, {"token": "blue"}, {"seed": 1}):  # something else was learnt there
        with pytest.raises(StorageError, match="give another path or --force"):
            learn(tmp_path / "late", dataclasses.replace(how, **other))
    Image.new("RGB", (16, 16), "green").save(subject / "9.png")
    with pytest.raises(StorageError, match="give another path or --force"):
        learn(tmp_path / "late", how)
    (subject / "9.png").unlink()
    late = learn(tmp_path / "late", how)
    assert (late.learnt, late.pictures, late.class_pictures) == (before.learnt, 3, 3)
    assert first.learnt.subject_loss == late.learnt.subject_loss
    assert len(seen) == 2
    for name in ("before", "after", "given"):
        assert torch.equal(getattr(seen[0], name), getattr(seen[1], name)), name
    assert all(path.read_bytes() == content for path, content in files.items())
    with pytest.raises(StorageError, match=r"found a folder that is not empty"):
        learn(tmp_path / "late", how)  # it has all now
