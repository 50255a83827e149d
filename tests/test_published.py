"""What is written for others names no folder of this machine, nobody who uses it, and not the machine itself."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from conftest import build_unet
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from synthetic_run import PLANS, plan_id, write_run
from test_convert import peft_file
from traces import traces
from typer.testing import CliRunner

from prune_lab.cli import app
from prune_lab.report import write_report
from prune_lab.runs import Run
from prune_lab.runtime.places import copied_without_folders, names_alone, without_folders

USER, HOST = "ada-l-1815", "analytical-engine-7"
CELLAR = "stored in the cellar"  # a folder; its name has spaces
SECRETS = (USER, HOST, CELLAR)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of a user of this machine, by whose name nothing may be called that is written."""
    folder = tmp_path / "homes" / USER
    (folder / CELLAR).mkdir(parents=True)
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, USER)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.setattr(platform, "node", lambda: HOST)
    monkeypatch.chdir(folder)
    return folder


def plant(path: Path, secret: str) -> None:
    """Let the JSON object ``path`` name ``secret`` where the libraries, and others, write such things."""
    value = json.loads(path.read_text())
    value |= {"_name_or_path": secret, "name_or_path": secret, "vocab_file": f"{secret}/vocab.json"}
    value["trained"] = {"on": [f"{secret}/pictures", "plain words"], "by": f"file://{secret}/log.txt"}
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def model(home: Path, tiny_pipeline_folder: Path) -> Path:
    """A pipeline in the user's home whose own files name folders there, and of another machine."""
    folder = home / CELLAR / "kolibri"
    shutil.copytree(tiny_pipeline_folder, folder)
    for path in folder.rglob("*.json"):
        if path.name not in ("vocab.json", "tokenizer.json"):
            plant(path, str(folder.parent) if path.parent.name != "vae" else f"C:\\Users\\{USER}\\kolibri")
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(vae), vae, {"format": "pt", "trained_on": f"/home/{USER}/pictures"})
    (folder / "README.md").write_text(
        f"---\nlicense: other\nlicense_name: own\nlicense_link: /home/{USER}/LICENCE\n---\n"
    )
    return folder


def called(*arguments: object) -> None:
    found: Any = CliRunner().invoke(app, [str(one) for one in arguments])
    assert found.exit_code == 0, found.output


# The verbs ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_what_is_made_of_a_model_in_other_ways(model: Path, home: Path) -> None:
    out = home / "out"
    called("prune", model / "unet", "--plan", "bk-small", "--out", out / "unet")
    called(
        "prune", model, "--plan", "bk-small", "--dtype", "float16", "--variant", "fp16", "--out", out / "half"
    )
    called("export", model, "--to", "single-file", "--out", out / "teacher.safetensors")
    assert traces(out, SECRETS) == []


@pytest.mark.long
def test_what_is_made_of_a_model(model: Path, home: Path) -> None:
    """prune, export, convert and generate, each of the model that names folders."""
    out = home / "out"
    called("prune", model, "--plan", "bk-small", "--out", out / "pruned")
    called("export", out / "pruned", "--to", "single-file", "--out", out / "student.safetensors")
    lora = peft_file(
        build_unet(json.loads((model / "unet" / "config.json").read_text())), home / "lora.safetensors"
    )
    tensors = load_file(lora)
    noted = {"ss_train_data_dir": str(home), "ss_datasets": json.dumps([{"image_dir": f"D:\\{USER}\\cats"}])}
    save_file(tensors, lora, {"format": "pt", **noted})
    called("convert", "lora", lora, "--plan", out / "pruned", "--out", out / "lora.safetensors")
    called("generate", out / "pruned", "--prompt", "a red cat", "--steps", 1, "--out", out / "cat.png")
    assert len(list(out.iterdir())) == 4
    assert traces(out, SECRETS) == []
    told = json.loads((out / "pruned" / "unet" / "provenance.json").read_text())
    assert told["source"] == "kolibri"


@pytest.mark.long
def test_what_is_measured_of_a_model(model: Path, home: Path) -> None:
    """score, search and data: tables, plans and pictures that are passed on."""
    out, few = home / "out", ("--set", "probe.samples=2", "--set", "score.bootstrap=2", "--device", "cpu")
    out.mkdir()
    called("score", model, "--data", "reference", *few, "--out", out / "scores.csv")
    called(
        *(
            "search",
            model,
            "--params",
            "bk-tiny",
            "--importance",
            out / "scores.csv",
            "--out",
            out / "plans.json",
        ),
        *("--set", 'data.source="reference"'),
    )
    drawn = ("--prompts", "default", "--count", 2, "--steps", 1, "--pictures", 1)
    called("data", model, *drawn, "--out", out / "drawn")
    assert traces(out, SECRETS) == []


def test_what_a_run_leaves(finished: Run, tmp_path: Path) -> None:
    """All but what it goes on by (settings, sources, manifests), and the curves: TensorBoard names the machine."""
    shared = str(finished.folder.parent)
    machine = [name for name in (socket.gethostname(), os.environ.get("USER", "")) if len(name) > 5]
    secrets = [shared, str(Path.home()), str(Path.cwd()), *machine]
    assert traces(finished.folder, secrets, but=("config.toml", "sources.json", "manifests", "curves")) == []
    assert traces(finished.report_dir, secrets) == []
    assert "_name_or_path" not in "".join(path.read_text() for path in finished.folder.rglob("config.json"))
    out = tmp_path / "students"
    called("distill", finished.folder, "--plan", "bk-tiny", "--out", out)
    assert traces(out, secrets) == []


# The pages ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_what_a_report_says(home: Path) -> None:
    """Of a run that was made with folders in its settings and its tables, by whatever version of prune-lab."""
    run = Run(write_run(home / "run"))
    secret = home / CELLAR
    text = run.config.read_text().replace('model = "reference"', f'model = "{secret}/kolibri"')
    text = text.replace("guidance = 4.0", f'guidance = 4.0\nscorer = "~/{USER}/clip"')
    text += '\n[data]\nsource = "../stored here/cats"\n'
    text = text.replace('title = "Made-up run <for> tests & typography"\n', "")
    run.config.write_text(text)
    for path in (run.importance, run.reductions):
        path.write_text(path.read_text().replace("reference", f"{secret}/kolibri"))
    reason = f"asked to read {secret}/cats and dogs/1.png, found nothing; see file:///home/{USER}/log, {home}"
    run.ranking.write_text(
        run.ranking.read_text().replace("distillation stopped at step 40", reason.replace(",", ";"))
    )
    roles = [
        {
            "name": "scorer",
            "source": f"{secret}/clip (named by evaluate.scorer)",
            "count": None,
            "size": None,
        },
        {"name": "train", "source": f"{home}", "count": 3, "size": 64},
        {"name": "validate", "source": "../stored here/cats", "count": 3, "size": 64},
    ]
    run.sources.write_text(json.dumps(roles))
    environment = json.loads(run.environment.read_text()) | {"python": f"/home/{USER}/bin/python"}
    run.environment.write_text(json.dumps(environment))
    write_report(run)
    assert traces(run.report_dir, (*SECRETS, "stored here")) == []
    words = run.report.read_text()
    for kept in ("kolibri", "cats", "clip (named by evaluate.scorer)", "Pruning kolibri"):
        assert kept in words


@pytest.mark.long
def test_a_report_keeps_what_only_looks_like_a_path(home: Path) -> None:
    run = Run(write_run(home / "run"))
    reason = "w/o the loss at 1/2 of the steps; see https://arxiv.org/abs/2305.15798 and /r/aww or and/or"
    run.ranking.write_text(run.ranking.read_text().replace("distillation stopped at step 40", reason))
    write_report(run)
    assert reason in run.report.read_text()
    for path in (run.ranking, run.importance, run.candidate(plan_id(next(iter(PLANS)))).recovery):
        name = path.name if path.name != "recovery.csv" else f"recovery-{plan_id(next(iter(PLANS)))}.csv"
        assert (run.report_dir / name).read_bytes() == path.read_bytes()


# Names alone -------------------------------------------------------------------------------------------------------

_PART = (
    st.text("abcXYZ019 _.-+()é", min_size=1, max_size=12)
    .map(str.strip)
    .filter(lambda part: part.strip(". -"))
)


@given(
    st.lists(_PART.map(lambda part: f"q{part}q"), min_size=1, max_size=5),
    st.sampled_from(["", "/", "/x.png"]),
)
@settings(max_examples=40)
def test_of_a_known_place_its_name_alone_is_left(parts: list[str], rest: str) -> None:
    place = "/" + "/".join(["qq-root", *parts])
    for text in (place, f"found {place}{rest}, and no more", f"'{place}'", json.dumps({"a": [place]})):
        said = without_folders(text, (place,))
        assert "qq-root" not in said
        assert (parts[-1] if rest != "/x.png" or "found" not in text else "x.png") in said


@given(
    st.sampled_from(
        ["/home", "/Users", "/mnt/disk", "C:\\Users", "D:", "/content/drive", "~", "file:///home"]
    )
)
@settings(max_examples=10)
def test_of_any_path_the_last_part_is_left(root: str) -> None:
    slash = "\\" if ":" in root and "/" not in root else "/"
    path = slash.join([root, USER, "models", "kolibri-1.5"])
    assert without_folders(path) == "kolibri-1.5"
    assert without_folders(f"cut from {path}, then {path}.") == "cut from kolibri-1.5, then kolibri-1.5."
    assert without_folders(json.dumps([path])) == '["kolibri-1.5"]'
    assert names_alone({"a": [path, 1, None, "a b"], "_name_or_path": path, "b": {"name_or_path": path}}) == {
        "a": ["kolibri-1.5", 1, None, "a b"],
        "b": {},
    }


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "/",
            "//",
            "a/b",
            "owner/name",
            "1/2",
            "and/or",
            "https://host.org/home/x/y",
            "s3://home/x",
            "</w>",
        ),
        *("/b", "/ b", "a \\ b", "R1 + A1 / 2", "C: drive", "\\frac{a}{b}", "3:/4", "noto emoji, red apple"),
    ],
)
def test_what_is_no_path_stays(text: str) -> None:
    assert without_folders(text) == text
    assert names_alone({"x": text}) == {"x": text}


def test_weights_are_copied_to_the_byte_but_for_paths_in_their_notes(tmp_path: Path) -> None:
    import torch

    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.int64)}
    plain, noted, out = (tmp_path / f"{name}.safetensors" for name in ("plain", "noted", "out"))
    save_file(tensors, plain, {"format": "pt", "title": "a/b of 1/2"})
    copied_without_folders(plain, out)
    assert out.read_bytes() == plain.read_bytes()
    save_file(tensors, noted, {"format": "pt", "from": f"/home/{USER}/x", "n": "1"})
    copied_without_folders(noted, out)
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "from": "x", "n": "1"}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(out).items())
    (length,) = struct.unpack("<Q", out.read_bytes()[:8])
    assert length % 8 == 0
