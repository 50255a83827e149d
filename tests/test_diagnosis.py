"""What is wrong with a model that cannot be read: one line that names it and shows the way out."""

from __future__ import annotations

import codecs
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_UNET
from huggingface_hub import export_folder_as_dduf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_bad_input import refused

from prune_lab.config import load_config
from prune_lab.errors import ModelFormatError, PruneLabError
from prune_lab.models import load_pipeline, resolve_model
from prune_lab.plans import read_plans

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LFS = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 3438167534\n"
)


@pytest.fixture
def pipeline(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder of its own, free to be damaged; beside it nothing else lies in ``tmp_path``."""
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline"))


Damage = Callable[[Path], object]


def written(name: str, content: str | bytes) -> Damage:
    """Puts ``content`` in place of a file of the pipeline."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def renamed(old: str, new: str) -> Damage:
    return lambda folder: (folder / old).rename((folder / old).with_name(new))


def changed_json(name: str, **changes: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / name
        found = json.loads(path.read_text())
        found = {key: value for key, value in (found | changes).items() if value is not ...}
        path.write_text(json.dumps(found))

    return change


def changed_tensors(change: Callable[[dict[str, Any]], dict[str, Any]], name: str = WEIGHTS) -> Damage:
    return lambda folder: save_file(
        change(load_file(folder / name)), folder / name, metadata={"format": "pt"}
    )


def prefixed(prefix: str) -> Damage:
    return changed_tensors(lambda tensors: {f"{prefix}{key}": tensor for key, tensor in tensors.items()})


def first_in(dtype: torch.dtype, name: str = WEIGHTS) -> Damage:
    return changed_tensors(lambda found: {**found, (key := min(found)): found[key].to(dtype)}, name)


MERGED = '{\n<<<<<<< HEAD\n  "sample_size": 64\n=======\n  "sample_size": 96\n>>>>>>> theirs\n}\n'
PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"

DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "pointer": (written(WEIGHTS, LFS), [WEIGHTS, "Git LFS pointer", "git lfs pull"]),
    "pointer of the VAE": (
        written("vae/diffusion_pytorch_model.safetensors", LFS),
        ["vae/", "Git LFS pointer"],
    ),
    "pointer as config": (written("unet/config.json", LFS), ["unet/config.json", "Git LFS pointer"]),
    "pointer as index": (written("model_index.json", LFS), ["model_index.json", "Git LFS pointer"]),
    "pointer as vocabulary": (written("tokenizer/tokenizer.json", LFS), ["tokenizer/", "Git LFS pointer"]),
    "near miss": (
        renamed(WEIGHTS, "diffusion_pytorch_model.safetensor"),
        ["found diffusion_pytorch_model.safetensor,", "rename it to diffusion_pytorch_model.safetensors"],
    ),
    "another name": (renamed(WEIGHTS, "unet.safetensors"), ["found unet.safetensors", "rename it"]),
    "unfinished": (
        renamed(WEIGHTS, "diffusion_pytorch_model.safetensors.incomplete"),
        ["a download that did not end"],
    ),
    "shards without index": (
        renamed(WEIGHTS, "diffusion_pytorch_model-00001-of-00002.safetensors"),
        ["shards without their index"],
    ),
    "pickled": (
        renamed(WEIGHTS, "diffusion_pytorch_model.bin"),
        ["never opened", "convert them to safetensors"],
    ),
    "compiled": (prefixed("_orig_mod."), ["'_orig_mod.'", "saved while compiled"]),
    "parallel": (prefixed("module."), ["'module.'", "unwrap"]),
    "adapter attached": (
        changed_tensors(lambda found: {**found, "conv_in.lora_A.default.weight": torch.zeros(1)}),
        ["a LoRA is attached", "merge"],
    ),
    "IP-Adapter attached": (
        changed_tensors(lambda found: {**found, "mid.attn2.processor.to_k_ip.0.weight": torch.zeros(1)}),
        ["an IP-Adapter is attached", "unload_ip_adapter"],
    ),
    "quantised by config": (
        changed_json(
            "unet/config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
        ),
        ["quantised (4 bits, bitsandbytes)", "float16"],
    ),
    "quantised to bytes": (first_in(torch.uint8), ["quantised", "U8"]),
    "quantised to fp8": (first_in(torch.float8_e4m3fn), ["quantised", "F8_E4M3"]),
    "quantised by scales": (
        changed_tensors(lambda found: {**found, "conv_in.weight.absmax": torch.zeros(1)}),
        ["quantised", "absmax"],
    ),
    "quantised text encoder": (
        first_in(torch.int8, "text_encoder/model.safetensors"),
        ["text_encoder", "quantised", "I8"],
    ),
    "merge markers": (
        written("unet/config.json", MERGED),
        ["unet/config.json", "line 2 is a merge marker", "<<<<<<<"],
    ),
    "merge markers in the index": (written("model_index.json", MERGED), ["model_index.json", "line 2"]),
    "page": (written("unet/config.json", PAGE), ["web page"]),
    "page as weights": (written(WEIGHTS, PAGE), ["web page"]),
    "empty config": (written("unet/config.json", ""), ["unet/config.json", "empty (0 bytes)"]),
    "empty weights": (written(WEIGHTS, ""), ["empty (0 bytes)"]),
    "zip as weights": (
        written(WEIGHTS, b"PK\x03\x04\x00\x00\x08\x08" + bytes(200)),
        ["pickled PyTorch file"],
    ),
    "list": (written("unet/config.json", "[1, 2]"), ["a JSON list, not an object"]),
    "deep": (written("unet/config.json", "[" * 100_000), ["not JSON"]),
    "no class": (
        changed_json("unet/config.json", _class_name=...),
        ['add "_class_name": "UNet2DConditionModel", or what else its class is'],
    ),
    "class of no text": (changed_json("unet/config.json", _class_name=["UNet"]), ["supported is"]),
    "both kinds of heads": (
        changed_json("unet/config.json", num_attention_heads=8),
        ["leave num_attention_heads out"],
    ),
    "no config of the VAE": (lambda folder: (folder / "vae/config.json").unlink(), ["vae", "no config.json"]),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGES.values(), ids=list(DAMAGES))
def test_what_is_wrong_is_named_in_one_line(
    damage: Damage, named: list[str], pipeline: Path, tmp_path: Path
) -> None:
    damage(pipeline)
    line = refused(tmp_path, "blocks", pipeline)
    for part in named:
        assert part in line


# Folders that are no model ---------------------------------------------------------------------------------------


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "owner/base", "peft_type": "LORA"})
    )
    save_file(
        {"base_model.model.conv_in.lora_A.weight": torch.zeros(1)}, folder / "adapter_model.safetensors"
    )


def lora(folder: Path) -> None:
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(1)}, folder / "pytorch_lora_weights.safetensors")


def one_level_up(folder: Path) -> None:
    shutil.copytree(folder.parent / "pipeline", folder / "model")


def hub_cache(folder: Path) -> None:
    shutil.copytree(folder.parent / "pipeline", folder / "snapshots" / "abc")


def part_of_a_pipeline(folder: Path) -> None:
    for path in (folder.parent / "pipeline" / "tokenizer").iterdir():
        shutil.copy(path, folder / path.name)
    (folder.parent / "model_index.json").write_text("{}")


FOLDERS: dict[str, tuple[Damage, list[str]]] = {
    "empty": (lambda _: None, ["an empty folder"]),
    "PEFT": (adapter, ["adapter_config.json", "an addition to a model", "owner/base"]),
    "LoRA": (lora, ["pytorch_lora_weights.safetensors", "an addition to a model"]),
    "one level up": (one_level_up, ["did you mean", "found/model?"]),
    "hub cache": (hub_cache, ["did you mean", "found/snapshots/abc?"]),
    "single file": (
        lambda folder: save_file({"x": torch.zeros(1)}, folder / "model-v1.safetensors"),
        ["did you mean", "model-v1.safetensors?"],
    ),
    "weights alone": (
        lambda folder: save_file({"x": torch.zeros(1)}, folder / "model.safetensors"),
        ["model.safetensors", "without their config.json"],
    ),
    "pickled": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"\x80\x02"),
        ["only pickled files"],
    ),
    "DDUF": (written("model.dduf", b"PK\x03\x04"), ["found model.dduf", "packed as DDUF", "give the folder"]),
    "GGUF": (written("model-Q4.gguf", b"GGUF"), ["found model-Q4.gguf", "quantised"]),
    "a part": (part_of_a_pipeline, ["a part of the pipeline", "did you mean"]),
    "something": (lambda folder: (folder / "notes.txt").write_text("x"), ["found notes.txt"]),
}


@pytest.mark.parametrize(("fill", "named"), FOLDERS.values(), ids=list(FOLDERS))
def test_a_folder_without_a_model_is_described(
    fill: Damage, named: list[str], pipeline: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "found"
    folder.mkdir()
    fill(folder)
    line = refused(tmp_path, "blocks", folder)
    for part in named:
        assert part in line


def test_a_packed_pipeline_is_refused_and_read_where_it_is_unpacked(pipeline: Path, tmp_path: Path) -> None:
    packed = tmp_path / "model.dduf"
    export_folder_as_dduf(packed, pipeline)
    line = refused(tmp_path, "blocks", packed)
    assert "packed as DDUF" in line
    assert "give the folder" in line
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(tmp_path / "model")
    assert resolve_model(str(tmp_path / "model")).is_pipeline


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("vae/config.json", "a model of class AutoencoderKL"),
        ("text_encoder/config.json", "a config of transformers"),
        ("vae", "did you mean"),
    ],
)
def test_another_part_of_a_pipeline_is_told(part: str, named: str, pipeline: Path, tmp_path: Path) -> None:
    assert named in refused(tmp_path, "blocks", pipeline / part)


def test_the_index_of_a_pipeline_stands_for_its_folder(pipeline: Path) -> None:
    assert resolve_model(str(pipeline / "model_index.json")).folder == pipeline


def test_a_misspelt_folder_is_met_with_the_one_beside_it(pipeline: Path, tmp_path: Path) -> None:
    assert f"did you mean {pipeline}?" in refused(tmp_path, "blocks", tmp_path / "pipelime")


# Byte-order marks ------------------------------------------------------------------------------------------------

ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le")


@pytest.mark.parametrize("encoding", ENCODINGS[:2])
def test_configs_with_a_byte_order_mark_are_read(encoding: str, pipeline: Path) -> None:
    wanted = load_pipeline(resolve_model(str(pipeline)))
    marked = [
        *pipeline.rglob("config.json"),
        pipeline / "model_index.json",
        *pipeline.rglob("scheduler_config.json"),
    ]
    for path in marked:
        path.write_text(path.read_text(), encoding=encoding)
        assert path.read_bytes().startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    found: Any = load_pipeline(resolve_model(str(pipeline)))
    for name, module in wanted.components.items():
        if isinstance(module, torch.nn.Module):
            theirs = getattr(found, name).state_dict()
            assert all(torch.equal(theirs[key], tensor) for key, tensor in module.state_dict().items())
    assert found.scheduler.config["beta_start"] == wanted.scheduler.config["beta_start"]


def test_settings_and_plans_with_a_byte_order_mark_are_read(pipeline: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model = "sd-v1.4"\n', encoding="utf-8-sig")
    assert load_config(path).model == "sd-v1.4"
    path = tmp_path / "plans.txt"
    path.write_text("-Dn1.R2 -Dn1.A2\n", encoding="utf-8-sig")
    (plan,) = read_plans(str(path), resolve_model(str(pipeline)).architecture)
    assert plan.removed == ("Dn1.R2", "Dn1.A2")


# Anything at all -------------------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70) | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


def what_is_said_of(model: Path | str) -> str:
    """The mistake that is found in ``model``; empty where it is read."""
    try:
        resolve_model(str(model))
    except PruneLabError as error:
        return str(error)
    return ""


@settings(max_examples=60)
@given(content=JSON_VALUES.map(json.dumps) | st.text(max_size=40))
@pytest.mark.parametrize("name", ["config.json", "model_index.json"])
def test_any_json_is_refused_politely(
    name: str, content: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("anything")
    (folder / name).write_text(content, encoding="utf-8", errors="replace")
    for text in (folder, folder / name):
        with pytest.raises(PruneLabError) as caught:
            resolve_model(str(text))
        assert "\n" not in str(caught.value)


@settings(max_examples=40)
@given(key=st.sampled_from(sorted(TINY_UNET)), value=JSON_VALUES)
def test_any_setting_of_a_unet_is_read_or_refused_politely(
    key: str, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("setting") / "config.json"
    path.write_text(json.dumps({**TINY_UNET, key: value}))
    assert "\n" not in what_is_said_of(path)


@settings(max_examples=40)
@given(key=st.text(max_size=20), value=JSON_VALUES)
def test_any_entry_of_an_index_is_read_or_refused_politely(
    key: str, value: Any, tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("index")
    index = json.loads((tiny_pipeline_folder / "model_index.json").read_text())
    for part in tiny_pipeline_folder.iterdir():
        if part.is_dir():
            (folder / part.name).symlink_to(part)
    for name in (key, "vae", "_class_name"):
        (folder / "model_index.json").write_text(json.dumps({**index, name: value}))
        assert "\n" not in what_is_said_of(folder)


@given(text=st.text(max_size=30))
def test_any_name_is_found_or_refused_politely(text: str) -> None:
    said = what_is_said_of(text)
    assert "\n" not in said.replace(text, "")


def test_utf_16_without_a_mark_is_no_traceback(pipeline: Path) -> None:
    path = pipeline / "unet" / "config.json"
    path.write_bytes(path.read_text().encode("utf-16-le"))
    assert resolve_model(str(pipeline)).kind == "pipeline"  # JSON shows its own encoding
    path.write_bytes(b"\xff\xff\xff\xff")
    with pytest.raises(ModelFormatError, match="not JSON"):
        resolve_model(str(pipeline))
