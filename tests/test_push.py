"""Pushing to a hub on this machine with the real client: private, the exact list, the exact bytes, and refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_uploads import Received, serve_uploads
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from prune_lab.cli import app
from prune_lab.errors import HubError, StorageError
from prune_lab.export import check_repository, push_folder, uploads_of

# of the client itself, about how it hands bytes to its transport
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_a_secret_that_nobody_may_see"


@pytest.fixture
def student(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    """A copy of a pipeline folder with what training and programs leave in such folders."""
    folder = tmp_path / "student"
    shutil.copytree(tiny_pipeline_folder, folder)
    litter = (
        *(".cache/huggingface/x.json", ".git/config", ".gitattributes", "__pycache__/a.pyc", "unet/.x.tmp"),
        *("optimizer.bin", "optimizer.safetensors", "random_states_0.pkl", "checkpoints/state.safetensors"),
        *("vae/diffusion_pytorch_model.bin", "student.run/config.toml", "logs/events.out", "unet/half.tmp"),
    )
    for name in litter:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def wanted(original: Path) -> dict[str, bytes]:
    """Every file of the pipeline by its name: what a push has to send."""
    return {
        path.relative_to(original).as_posix(): path.read_bytes()
        for path in original.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Received]:
    """A hub for this process; the client decides about being offline when it is imported, hence the constants."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve_uploads() as (address, received):
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield received


@pytest.mark.long
def test_the_verb_sends_exactly_what_the_dry_run_lists(
    student: Path, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    arguments = ["push", str(student), "--to", "someone/small", "--json"]
    listed = CliRunner().invoke(app, [*arguments, "--dry-run"])  # tests are offline: nobody is asked
    assert listed.exit_code == 0, listed.output
    with serve_uploads() as (address, received):
        environment = os.environ | {
            "HF_ENDPOINT": address,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        pushed = subprocess.run(
            [sys.executable, "-c", "from prune_lab.cli import main; main()", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert pushed.returncode == 0, pushed.stderr
    files = wanted(tiny_pipeline_folder)
    assert {row["file"]: row["bytes"] for row in json.loads(listed.stdout)} == {
        name: len(content) for name, content in files.items()
    }
    assert json.loads(pushed.stdout) == json.loads(listed.stdout)
    assert received.private == {"someone/small": True}
    assert received.files["someone/small"] == files
    assert received.tokens == {
        TOKEN,
        "",
    }  # none for the storage of large files, which has addresses of its own
    assert "someone/small/commit/" in pushed.stderr
    assert TOKEN not in pushed.stdout + pushed.stderr


def test_public_branch_and_message(student: Path, hub: Received) -> None:
    push_folder(student, "someone/open", public=True, revision="trial", message="A first one")
    assert hub.private == {"someone/open": False}
    assert hub.branches == {"someone/open": ["trial"]}
    assert hub.messages == ["A first one"]
    assert any("/commit/trial" in path for path in hub.asked)


def test_a_public_repository_is_not_written_to_unasked(student: Path, hub: Received) -> None:
    hub.private["someone/small"] = False
    with pytest.raises(HubError, match="--public"):
        push_folder(student, "someone/small")
    assert hub.files == {}
    hub.private["someone/small"] = True
    push_folder(student, "someone/small")
    assert len(hub.files["someone/small"]) == len(uploads_of(student))


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (("repos/create", 401), "answered 401.*hf auth login"),
        (("preupload", 403), "answered 403.*role write"),
        (("/large/", 403), "answered 403"),
        (("/commit/", 500), "answered 500"),
    ],
)
def test_a_refusal_is_one_line_without_the_token(
    refuse: tuple[str, int], message: str, student: Path, hub: Received
) -> None:
    hub.refuse = refuse
    found = CliRunner().invoke(app, ["push", str(student), "--to", "someone/small"])
    assert found.exit_code == 2, found.output
    (line,) = found.stderr.strip().splitlines()
    assert re.search(message, line)
    assert TOKEN not in found.output
    assert hub.files == {}


def test_a_hub_that_is_not_there(student: Path, hub: Received, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached"):
        push_folder(student, "someone/small")


def test_without_a_token_and_offline(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match="hf auth login"):
        push_folder(student, "someone/small")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match="OfflineModeIsEnabled"):  # the tests are
        push_folder(student, "someone/small")


@pytest.mark.parametrize("to", ["small", "a/b/c", "https://hub/a/b"])
def test_a_name_that_is_none(to: str, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match="owner/name"):
        push_folder(student, to)
    found = CliRunner().invoke(app, ["push", str(student), "--to", to, "--dry-run"])
    assert found.exit_code == 2
    assert "owner/name" in found.stderr


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such folder"):
        uploads_of(tmp_path / "none")
    with pytest.raises(StorageError, match="no model there"):
        uploads_of(tmp_path)
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(StorageError, match="the folder of a run"):
        uploads_of(tmp_path)
    found: Any = CliRunner().invoke(app, ["push", str(tmp_path), "--to", "a/b", "--dry-run"])
    assert found.exit_code == 2


# What is not the model's -----------------------------------------------------------------------------------------

SECRET = "/home/somebody/secret"


def cut(path: Path) -> None:
    os.truncate(path, 100)


def turned_to_nothing(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, path, {"format": "pt"})


def noted(path: Path) -> None:
    save_file(load_file(path), path, {"format": "pt", "ss_output_dir": SECRET})


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SPOILS: dict[str, Callable[[Path], object]] = {
    "a loop": lambda folder: (folder / "loop").symlink_to("."),
    "a folder elsewhere": lambda folder: (folder / "etc").symlink_to("/etc/ssl"),
    "a part elsewhere": lambda folder: (
        (folder / "vae").rename(folder.parent / "vae"),
        (folder / "vae").symlink_to(folder.parent / "vae"),
    ),
    "a file elsewhere": lambda folder: (folder / "unet" / "notes.txt").symlink_to("/etc/hostname"),
    "a link to nothing": lambda folder: (folder / "more.json").symlink_to("nothing"),
    "a pipe": lambda folder: os.mkfifo(folder / "pipe.json"),
    "a device": lambda folder: (folder / "zero.txt").symlink_to("/dev/zero"),
    "cut weights": lambda folder: cut(folder / WEIGHTS),
    "cut weights that are not read": lambda folder: cut(
        Path(shutil.copy(folder / WEIGHTS, folder / WEIGHTS.replace(".safe", ".fp16.safe")))
    ),
    "no numbers": lambda folder: turned_to_nothing(folder / WEIGHTS),
    "no config": lambda folder: (folder / "unet" / "config.json").write_text("{"),
    "no settings": lambda folder: (folder / "unet" / "plan.json").write_text("{"),
    "notes of a folder": lambda folder: noted(folder / WEIGHTS),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_folder_with_what_is_no_models_is_refused(spoil: str, student: Path) -> None:
    SPOILS[spoil](student)
    found = CliRunner().invoke(app, ["push", str(student), "--to", "me/x", "--dry-run", "--json"])
    assert found.exit_code == 2, found.output
    assert found.stdout == ""
    (line,) = found.stderr.strip().splitlines()
    assert line.startswith("error: ")


@given(data=st.data())
@settings(max_examples=5)
def test_no_folder_of_this_machine_and_no_other_file_goes(
    data: st.DataObject, tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("push") / "student"
    shutil.copytree(tiny_pipeline_folder, folder)
    places = st.sampled_from([SECRET, str(folder), f"{folder}/unet"])
    for path in [path for path in sorted(folder.rglob("*config.json")) if data.draw(st.booleans())]:
        noted = {"_name_or_path": data.draw(places), "notes": [{"from": data.draw(places)}]}
        path.write_text(json.dumps(json.loads(path.read_text()) | noted))
    (folder / "README.md").write_text(f"It was made in {data.draw(places)} of [us](https://a.b/home/c).\n")
    for name in ("secrets/key.json", "id_rsa", ".env", "unet/.token.json", "vae/more/a.json", "shell.py"):
        if data.draw(st.booleans()):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")
    uploads = uploads_of(folder)
    assert {upload.name for upload in uploads} == {*wanted(tiny_pipeline_folder), "README.md"}
    for upload in uploads:
        content = upload.path.read_bytes() if upload.content is None else upload.content
        assert upload.num_bytes == len(content)
        assert b"/home/somebody" not in content
        assert str(folder.parent).encode() not in content
        if upload.name.endswith("config.json"):
            before = json.loads((tiny_pipeline_folder / upload.name).read_text())
            after = json.loads(content)
            assert {key: after[key] for key in before if key != "_name_or_path"} == {
                key: value for key, value in before.items() if key != "_name_or_path"
            }
        if upload.name == "README.md":
            assert b"https://a.b/home/c" in content


@settings(max_examples=60)
@given(
    name=st.text(max_size=8) | st.sampled_from(["café", "a" * 97, "a--b", "a..b", "a.git", "-a", "a b"]),
    branch=st.text("ab./~ \n\\", min_size=1, max_size=8)
    | st.sampled_from(["../x", "a\n", "x.lock", "a" * 300]),
)
def test_names_are_those_that_the_hub_takes(name: str, branch: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(f"me/{name}")
    except HFValidationError:
        with pytest.raises(HubError, match="owner/name"):
            check_repository(f"me/{name}")
    else:
        check_repository(f"me/{name}")
    git = ["git", "check-ref-format", "--branch", branch]
    try:
        check_repository("me/x", branch)
    except HubError:
        pass
    else:
        assert subprocess.run(git, capture_output=True, check=False).returncode == 0
