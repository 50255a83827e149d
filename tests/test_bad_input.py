"""Every mistake of a user ends the same way: one line that shows the way out, exit code 2, nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prune_lab.cli import app
from prune_lab.errors import StorageError
from prune_lab.models.protection import check_apart
from prune_lab.runtime import atomic_folder, write_text

pytestmark = pytest.mark.usefixtures("blank_figures")

resource = pytest.importorskip("resource", reason="full disks are played with a limit on file sizes")


@pytest.fixture
def pipeline(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder of its own, free to be damaged; beside it nothing else lies in ``tmp_path``."""
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline"))


def tree(folder: Path) -> dict[str, bytes]:
    """Every path below ``folder``, hidden ones included, with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def refused(folder: Path, *arguments: object) -> str:
    """The one line that ``prune-lab arguments`` answers with, after checking that it changed nothing."""
    before = tree(folder)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in line
    assert tree(folder) == before
    return line


# Models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [["blocks"], ["profile"], ["prune", "--plan", "bk-small", "--out", "new"]])
def test_a_missing_folder(verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(tmp_path, verb[0], "./no-such-folder", *verb[1:])
    assert "'./no-such-folder'" in line
    assert "sd-v1.4" in line


def test_a_hub_name_that_cannot_be_reached(tmp_path: Path) -> None:
    line = refused(tmp_path, "blocks", "nobody-at-all/no-such-model")
    assert "cannot be reached" in line
    assert "preset" in line


def breaks_config(pipeline: Path) -> None:
    (pipeline / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel",')


def is_three_dimensional(pipeline: Path) -> None:
    path = pipeline / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "UNet3DConditionModel"}))


def makes_no_sense(pipeline: Path) -> None:
    path = pipeline / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"down_block_types": ["NoSuchBlock2D"]}))


def loses_its_end(pipeline: Path) -> None:
    path = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def loses_the_end_of_another_part(pipeline: Path) -> None:
    path = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def loses_a_part(pipeline: Path) -> None:
    shutil.rmtree(pipeline / "vae")


def is_pickled(pipeline: Path) -> None:
    path = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def brings_its_own_code(pipeline: Path) -> None:
    path = pipeline / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unet": ["my_unet", "MyUNet"]}))
    (pipeline / "unet" / "my_unet.py").write_text("raise SystemExit('this was run')")


def is_another_pipeline(pipeline: Path) -> None:
    path = pipeline / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "FluxPipeline"}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (breaks_config, ["config.json", "not JSON"]),
        (is_three_dimensional, ["UNet3DConditionModel", "supported is UNet2DConditionModel"]),
        (makes_no_sense, ["config.json", "no U-Net can be built"]),
        (loses_its_end, ["unet/diffusion_pytorch_model.safetensors", "bytes", "fetch it again"]),
        (loses_the_end_of_another_part, ["vae/diffusion_pytorch_model.safetensors", "fetch it again"]),
        (loses_a_part, ["vae", "fetch it again"]),
        (is_pickled, ["diffusion_pytorch_model.bin", "never opened", "safe_serialization=True"]),
        (brings_its_own_code, ["my_unet", "never run here"]),
        (is_another_pipeline, ["FluxPipeline", "StableDiffusionPipeline"]),
    ],
)
@pytest.mark.parametrize("verb", ["blocks", "prune"])
def test_a_damaged_or_unsupported_pipeline(
    damage: Callable[[Path], None], named: list[str], verb: str, pipeline: Path, tmp_path: Path
) -> None:
    damage(pipeline)
    more = ["--plan", "bk-small", "--out", tmp_path / "new"] if verb == "prune" else []
    line = refused(tmp_path, verb, pipeline, *more)
    for part in named:
        assert part in line


def test_a_three_dimensional_config_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"_class_name": "UNet3DConditionModel", "sample_size": 32}))
    assert "UNet3DConditionModel" in refused(tmp_path, "blocks", path)


def test_weights_are_needed_to_prune_and_a_pipeline_to_draw(pipeline: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    assert "no weights" in refused(tmp_path, "prune", "sd-v1.4", "--plan", "bk-small", "--out", new)
    drawing = ["generate", pipeline / "unet", "--prompt", "a cat", "--out", tmp_path / "cat.png"]
    assert "a pipeline folder" in refused(tmp_path, *drawing)


# Plans and budgets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        ("-Dn9.R1", ["Dn9.R1"]),
        ("-Dn1.R22", ["Dn1.R22", "Dn1.R2"]),
        ("-Dn2.R1", ["Dn2.R1", "width of the main path"]),
        ("bk-smal", ["bk-smal", "bk-small"]),
        ("Dn1.R2", ["Dn1.R2", "-BLOCK"]),
    ],
)
def test_a_plan_that_cannot_be(plan: str, named: list[str], pipeline: Path, tmp_path: Path) -> None:
    for verb in (
        ["prune", pipeline, f"--plan={plan}", "--out", tmp_path / "new"],
        ["profile", pipeline, f"--plan={plan}"],
    ):
        line = refused(tmp_path, *verb)
        for part in named:
            assert part in line


def test_a_plan_that_plain_diffusers_cannot_express(pipeline: Path, tmp_path: Path) -> None:
    # without one attention of a stage, no layers_per_block describes what is left
    line = refused(
        tmp_path, "prune", pipeline, "--plan=-Dn1.A1", "--form", "native", "--out", tmp_path / "new"
    )
    assert "Dn1" in line


@pytest.fixture
def scores(pipeline: Path, tmp_path: Path) -> Path:
    """An importance table for ``pipeline``, every block worth the same."""
    from prune_lab.blocks import architecture_of
    from prune_lab.models import resolve_model

    blocks = architecture_of(resolve_model(str(pipeline)).config).blocks
    columns = "group,kind,blocks,starred,impact,low,high,samples,criterion,probe,model"
    rows = [
        f"{block.name},block,{block.name},{block.starred},0.1,0.05,0.2,8,output-mse,x,y" for block in blocks
    ]
    path = tmp_path / "importance.csv"
    path.write_text("\n".join([columns, *rows]) + "\n")
    return path


@pytest.mark.parametrize(
    ("budget", "named"),
    [
        ("params<=1", ["params<=1"]),
        ("macs<=0%", ["macs<=0%"]),
        ("flops<=50%", ["flops<=50%", "params"]),
        ("params=10", ["params=10", "<="]),
        ("params<=bk-huge", ["bk-huge"]),
    ],
)
def test_a_budget_that_cannot_be_met_or_read(
    budget: str, named: list[str], pipeline: Path, scores: Path, tmp_path: Path
) -> None:
    line = refused(tmp_path, "search", pipeline, "--set", f"search.budgets={budget}", "--importance", scores)
    for part in named:
        assert part in line


@pytest.mark.parametrize(
    "budget",
    [
        ("--latency", "nonsense"),
        ("--latency", "0.7x@"),
        ("--latency", "30GiB"),
        ("--memory", "nonsense"),
        ("--memory", "1e400GiB"),
        ("--memory", "0.7x@cpu"),
    ],
)
def test_a_budget_that_is_measured_is_read_before_any_work(
    budget: tuple[str, str], pipeline: Path, tmp_path: Path
) -> None:
    assert budget[1] in refused(tmp_path, "run", pipeline, *budget, "--dry-run", "--device", "cpu")


# Settings and runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[distill]\nstep = 5\n", "did you mean distill.steps?"),
        ("[distill]\nsteps = -5\n", "distill.steps = -5"),
        ("[distill\n", "not TOML"),
        ('device = "gpu"\n', "cuda:N"),
    ],
)
def test_wrong_settings(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    line = refused(tmp_path, "run", "--config", path, "--run", tmp_path / "run")
    assert "run.toml" in line
    assert named in line


def test_a_report_of_nothing(tmp_path: Path) -> None:
    assert "found nothing there" in refused(tmp_path, "report", tmp_path / "no-run")
    assert "config.toml" in refused(tmp_path, "report", tmp_path)


# Writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_file_may_grow_beyond(size: int) -> Iterator[None]:
    """Inside, the system itself refuses to make a file longer than ``size`` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1_000, 100_000, 500_000], ids=["tokenizer", "copied part", "pruned U-Net"])
def test_a_disk_that_fills_up_while_a_model_is_written(size: int, pipeline: Path, tmp_path: Path) -> None:
    # each limit is reached one step later: copying small files, copying the VAE, saving the U-Net itself
    vae = (pipeline / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert 100_000 < vae < 500_000
    new = tmp_path / "new"
    with no_file_may_grow_beyond(size):
        line = refused(tmp_path, "prune", pipeline, "--plan", "bk-small", "--out", new)
    assert str(new) in line
    assert "nothing was left half-written" in line


def test_a_disk_that_fills_up_while_a_table_is_written(pipeline: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.txt"
    path.write_text("what was there before")
    with no_file_may_grow_beyond(1_000), pytest.raises(StorageError, match=r"table\.txt") as caught:
        write_text(path, "x" * 1_001)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path)["table.txt"] == b"what was there before"
    assert not list(tmp_path.glob(".table*"))


def test_a_current_directory_that_was_removed(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.chdir(tmp_path)
        gone = tmp_path / "gone"
        gone.mkdir()
        elsewhere.chdir(gone)
        gone.rmdir()
        for verb in app.registered_commands:
            assert verb.callback is not None
            line = refused(tmp_path, verb.name or verb.callback.__name__, "x", "--out", "y")
            assert "current directory, which was removed" in line
        with pytest.raises(StorageError, match="current directory removed"):
            check_apart("y", {})


def test_an_old_folder_survives_a_failed_new_one(tmp_path: Path) -> None:
    old = tmp_path / "model"
    old.mkdir()
    (old / "weights").write_text("old")

    def half_a_folder() -> None:
        with atomic_folder(old, force=True) as new:
            (new / "weights").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        half_a_folder()
    assert tree(tmp_path / "model") == {"weights": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_old_folder_is_not_overwritten_unasked(pipeline: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    (new / "notes.txt").write_text("mine")
    line = refused(tmp_path, "prune", pipeline, "--plan", "bk-small", "--out", new)
    assert "--force" in line


def test_a_folder_that_cannot_be_made(pipeline: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    line = refused(tmp_path, "prune", pipeline, "--plan", "bk-small", "--out", blocker / "new")
    assert str(blocker / "new") in line
