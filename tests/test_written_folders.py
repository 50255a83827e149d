"""Folders of students: from every kind of source one layout, which plain diffusers loads and draws with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from prune_lab.cli import app
from prune_lab.errors import ModelFormatError, StorageError
from prune_lab.models import resolve_model
from prune_lab.plans import parse_plan
from prune_lab.surgery import pipeline_with, prune_pipeline

pytestmark = pytest.mark.usefixtures("blank_figures")

Change = Callable[[Path], None]
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def pruned(model: str | Path, out: Path, plan: str = "bk-tiny", **how: Any) -> Path:
    source = resolve_model(str(model))
    return prune_pipeline(source, parse_plan(plan, source.architecture), out, **how)


def picture(folder: Path, **arguments: Any) -> torch.Tensor:
    """One step of the pipeline in ``folder`` as a user loads it, (H, W, 3)."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline("a red cat", num_inference_steps=1, output_type="np", generator=generator).images[0]
    found = torch.from_numpy(drawn)
    assert found.isfinite().all()
    assert found.std() > 1e-3
    return found


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


# What people have --------------------------------------------------------------------------------------------------


def rename_to_fp16(folder: Path) -> None:
    """The layout of a repository that holds half-precision files only."""
    for part, stem in WEIGHTS.items():
        path = folder / part / f"{stem}.safetensors"
        halves = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(halves, path.with_name(f"{stem}.fp16.safetensors"), {"format": "pt"})
        path.unlink()
    edit(folder / "text_encoder" / "config.json", dtype="float16")


def twice(folder: Path) -> None:
    """Both precisions, pickles, a whole checkpoint and other programs' files beside them."""
    shutil.copytree(folder, folder.with_name("half"))
    rename_to_fp16(folder.with_name("half"))
    for part, stem in WEIGHTS.items():
        shutil.copy(folder.with_name("half") / part / f"{stem}.fp16.safetensors", folder / part)
        (folder / part / "pytorch_model.bin").write_bytes(b"pickled")
    shutil.rmtree(folder.with_name("half"))
    (folder / "v1-5-pruned.safetensors").write_bytes(b"whole")
    (folder / "v1-5-pruned.ckpt").write_bytes(b"whole")
    (folder / "vae_decoder").mkdir()
    (folder / "vae_decoder" / "model.onnx").write_bytes(b"onnx")
    (folder / "unet" / "openvino_model.xml").write_text("<net/>")


def shard(folder: Path) -> None:
    """U-Net and text encoder as the libraries save large ones: shards with an index."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    for part, kind in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        model = kind.from_pretrained(folder / part)
        (folder / part / f"{WEIGHTS[part]}.safetensors").unlink()
        model.save_pretrained(folder / part, max_shard_size="20KB" if part == "text_encoder" else "300KB")
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1


def move_into_hub_cache(folder: Path) -> None:
    """The cache of the hub: links to blobs, and a safety checker in the index that was never fetched."""
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    cache = folder.with_name("models--owner--tiny")
    for name in ("refs", "snapshots", "blobs"):
        (cache / name).mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    snapshot = folder.rename(cache / "snapshots" / ("a" * 40))
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(cache / "blobs" / f"{number:040d}")
        path.symlink_to(cache / "blobs" / f"{number:040d}")


KINDS: dict[str, Change] = {
    "plain": lambda _: None,
    "fp16 only": rename_to_fp16,
    "both": twice,
    "shards": shard,
    "hub": move_into_hub_cache,
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.long) if kind in ("plain", "both") else kind for kind in KINDS],
)
def test_a_student_of_every_kind_of_source_draws(
    kind: str, tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "hub" / "source"
    shutil.copytree(tiny_pipeline_folder, source)
    for path in source.rglob("*config.json"):  # as a model that was loaded and saved here remembers it
        edit(path, _name_or_path=str(path.parent))
    KINDS[kind](source)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    out = pruned("owner/tiny" if kind == "hub" else source, tmp_path / "out")
    shutil.rmtree(tmp_path / "hub")
    picture(out)
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    texts = [path for path in out.rglob("*.json") if path.name != "provenance.json"]
    assert not [
        path for path in texts if str(tmp_path) in path.read_text() or "name_or_path" in path.read_text()
    ]
    shards = kind == "shards"
    expected = {
        f"{part}/{stem}.safetensors"
        for part, stem in WEIGHTS.items()
        if not (shards and part == "text_encoder")
    }
    found = {
        path.relative_to(out).as_posix() for path in out.rglob("*") if path.suffix not in (".json", ".txt")
    }
    found = {name for name in found if (out / name).is_file()}
    assert {name for name in found if "-of-" not in name} == expected
    assert (len(found) > len(expected)) == shards
    index = json.loads((out / "model_index.json").read_text())
    for part, value in index.items():
        if isinstance(value, list):
            assert (out / part).is_dir() == (value != [None, None]), part
    assert index["requires_safety_checker"] is False
    half = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype
    assert half == (torch.float16 if kind == "fp16 only" else torch.float32)


def test_a_variant_names_all_files_and_a_format_converts_them(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["prune", str(tiny_pipeline_folder), "--plan", "bk-tiny", "--out", str(out)]
    found = CliRunner().invoke(app, [*arguments, "--variant", "fp16", "--dtype", "float16"])
    assert found.exit_code == 0, found.output
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.safetensors")}
    assert names == {f"{part}/{stem}.fp16.safetensors" for part, stem in WEIGHTS.items()}
    for name in names:
        assert {t.dtype for t in load_file(out / name).values() if t.is_floating_point()} == {torch.float16}
    picture(out, variant="fp16")
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(out, variant="fp16", dtype=torch.float16)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float16}
    proof = json.loads((out / "unet" / "provenance.json").read_text())["proof"]
    assert (proof["kind"], proof["largest_difference"]) == ("bypassed teacher", 0.0)


def test_shards_of_a_variant_are_found_again(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_pipeline_folder, source)
    shard(source)
    out = pruned(source, tmp_path / "out", variant="bf16", dtype=torch.bfloat16)
    assert (out / "text_encoder" / "model.safetensors.index.bf16.json").is_file()
    picture(out, variant="bf16")


@pytest.mark.long
def test_the_shipped_model_and_its_students_draw(tmp_path: Path) -> None:
    from prune_lab.assets import reference_folder

    picture(reference_folder())
    out = prune_pipeline(
        resolve_model("reference"),
        parse_plan("bk-tiny", resolve_model("reference").architecture),
        tmp_path / "out",
    )
    picture(out)
    distilled = pipeline_with(resolve_model("reference"), out / "unet", tmp_path / "distilled")
    assert torch.equal(picture(distilled), picture(out))
    proof = json.loads((distilled / "unet" / "provenance.json").read_text())["proof"]
    assert proof["kind"] == "same tensors"
    assert (distilled / "unet" / "plan.json").is_file()


def test_a_model_is_never_replaced_by_its_student(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "home" / "source"
    shutil.copytree(tiny_pipeline_folder, source)
    before = sorted(path for path in tmp_path.rglob("*"))
    (tmp_path / "link").symlink_to(source)
    for out in (source, source.parent, source / "unet", source / "scheduler" / "new", tmp_path / "link"):
        with pytest.raises(StorageError, match="the model that it is made from"):
            pruned(source, out, force=True)
    (tmp_path / "link").unlink()
    assert sorted(path for path in tmp_path.rglob("*")) == before
    with pytest.raises(StorageError, match="letters, digits"):
        pruned(source, tmp_path / "out", variant="../x")


def test_weights_behind_a_link_are_never_replaced(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    source, home = tmp_path / "source", tmp_path / "home"
    shutil.copytree(tiny_pipeline_folder, source)
    home.mkdir()
    for part in ("unet", "vae"):
        shutil.move(source / part, home / part)
        (source / part).symlink_to(home / part)
    before = sorted(tmp_path.rglob("*"))
    for out in (home / "unet", home / "vae", home, home / "unet" / "new"):
        with pytest.raises(StorageError, match="the model that it is made from"):
            pruned(source, out, force=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("part", "value", "dtype", "message"),
    [
        ("unet", 1e6, torch.float16, r"conv_out\.bias.*float16.*give float32 or bfloat16"),
        ("vae", 1e6, torch.float16, r"decoder\.conv_out\.bias.*float16.*give float32 or bfloat16"),
        ("unet", float("nan"), None, r"conv_out\.bias.*not a number.*fetch the model again"),
    ],
)
def test_a_tensor_that_a_format_cannot_hold_is_named(
    part: str, value: float, dtype: Any, message: str, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_pipeline_folder, source)
    file = source / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_out.bias" if part == "unet" else "decoder.conv_out.bias"].fill_(value)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelFormatError, match=message):
        pruned(source, tmp_path / "out", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
