"""Models on a hub: only what is read is fetched, of the revision asked for, and found again without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_server import REVISION, TAGGED, serve
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from prune_lab.cli import app
from prune_lab.models.hub import files_to_fetch

WEIGHTS = "diffusion_pytorch_model.safetensors"
HALF = "diffusion_pytorch_model.fp16.safetensors"

READ = """
import json, sys
from prune_lab.errors import PruneLabError
from prune_lab.models import load_pipeline, load_model, model_digest, resolve_model
found = []
for text, how in json.loads(sys.argv[1]):
    try:
        source = resolve_model(text, **how)
    except PruneLabError as error:
        found.append({"error": str(error)})
        continue
    (load_pipeline if source.is_pipeline else load_model)(source)
    root = source.folder.parent if source.subfolder else source.folder
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    known = {name: getattr(source, name) for name in ("revision", "variant", "kind", "origin")}
    found.append(known | {"files": files, "digest": model_digest(source)})
print(json.dumps(found))
"""


def read(asked: list[tuple[str, dict[str, str]]], home: Path, **environment: str) -> list[dict[str, Any]]:
    """What a fresh process finds for each model that is asked for."""
    reader = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(asked)],
        env={**os.environ, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert reader.returncode == 0, reader.stderr
    return list(json.loads(reader.stdout))


@pytest.fixture
def hub(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    """Repositories as their owners keep them: everything at once, half precision alone, a training, a later version."""
    owner = tmp_path / "hub" / "someone"
    plain = Path(shutil.copytree(tiny_pipeline_folder, owner / "plain"))
    index = json.loads((plain / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (plain / "model_index.json").write_text(json.dumps(index))
    (plain / "safety_checker").mkdir()
    for name in (
        "v1-pruned.safetensors",
        "safety_checker/model.safetensors",
        "unet/flax_model.msgpack",
        "run.py",
    ):
        (plain / name).write_bytes(b"large")
    tensors = load_file(plain / "unet" / WEIGHTS)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, plain / "unet" / HALF)
    save_file(tensors, plain / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    later = Path(shutil.copytree(tiny_pipeline_folder, owner / "plain@v2"))
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, later / "unet" / WEIGHTS)
    half = Path(shutil.copytree(tiny_pipeline_folder, owner / "half"))
    for path in half.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    for name in ("unet", "unet_ema"):
        shutil.copytree(tiny_pipeline_folder / "unet", owner / "training" / name)
    return owner.parent


@pytest.mark.long
def test_a_hub_is_read_by_revision_variant_and_subfolder(hub: Path, tmp_path: Path) -> None:
    home, plain = tmp_path / "home", "someone/plain"
    asked: list[tuple[str, dict[str, str]]] = [
        (plain, {}),
        (plain, {"revision": "v2"}),
        (plain, {"revision": "missing"}),
        ("someone/half", {}),
        ("someone/training", {}),
        ("someone/training", {"subfolder": "unet_ema"}),
        ("someone/nothing", {}),
    ]
    with serve(hub) as address:
        online = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
        first, tagged, missing, half, training, average, nothing = read(asked, home, **online)
        (reduced,) = read([(plain, {"variant": "fp16"})], tmp_path / "other", **online)
    wanted = {path.relative_to(hub / plain).as_posix() for path in (hub / plain).rglob("*") if path.is_file()}
    wanted -= {
        name for name in wanted if name.endswith((".py", ".msgpack")) or "safety" in name or "v1-" in name
    }
    wanted -= {f"unet/{HALF}", "unet/diffusion_pytorch_model.non_ema.safetensors"}
    assert set(first["files"]) == wanted
    assert (first["kind"], first["variant"], first["revision"]) == ("pipeline", "", REVISION)
    assert first["origin"] == {"source": plain, "revision": REVISION}
    assert tagged["revision"] == TAGGED
    assert tagged["digest"] != first["digest"]
    assert "no such branch, tag or commit" in missing["error"]
    assert half["variant"] == "fp16"
    assert "--subfolder unet_ema" in training["error"]
    assert (average["kind"], average["revision"]) == ("model", REVISION)
    assert not [name for name in average["files"] if name.startswith("unet/") and name.endswith("tensors")]
    assert "it answered 404" in nothing["error"]
    assert set(reduced["files"]) == wanted - {f"unet/{WEIGHTS}"} | {f"unet/{HALF}"}

    offline = read(asked[:2], home, HF_HUB_OFFLINE="1")
    assert [one["digest"] for one in offline] == [first["digest"], tagged["digest"]]
    assert offline[1]["revision"] == TAGGED


@pytest.mark.parametrize(
    ("names", "how", "fetched"),
    [
        (["config.json", WEIGHTS, HALF, "model.py"], {}, ["config.json", WEIGHTS]),
        (["config.json", WEIGHTS, HALF], {"variant": "fp16"}, ["config.json", HALF]),
        (["unet/config.json", f"unet/{WEIGHTS}"], {}, ["unet/config.json"]),
        (
            ["unet/config.json", f"unet/{WEIGHTS}", "unet_ema/config.json", f"unet_ema/{WEIGHTS}"],
            {"subfolder": "unet"},
            ["unet/config.json", f"unet/{WEIGHTS}"],
        ),
        (
            [
                "config.json",
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "pytorch_model.bin",
            ],
            {},
            [
                "config.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
        ),
    ],
)
def test_what_is_fetched_of_a_repository(names: list[str], how: dict[str, str], fetched: list[str]) -> None:
    assert files_to_fetch(names, None, **how) == fetched


@pytest.mark.parametrize(
    "arguments", [["blocks"], ["personalise", "--token", "a", "--class", "b", "--images", "c", "--out", "d"]]
)
def test_a_name_that_no_hub_can_be_asked_for_is_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens there; the client decides about being offline when it is imported, hence the constants."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = CliRunner().invoke(app, [*arguments, "somebody/nothere"])
    assert (found.exit_code, found.output.count("\n")) == (2, 1), found.output
    assert "somebody/nothere" in found.output
