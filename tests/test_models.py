"""Finding, checking and loading models; the published sizes of the presets."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import inspect
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from prune_lab import models
from prune_lab.assets import reference_folder
from prune_lab.blocks import architecture_of
from prune_lab.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from prune_lab.families import family_of, meta_model
from prune_lab.models import (
    load_model,
    load_pipeline,
    load_scorer,
    model_digest,
    preset_config,
    resolve_model,
    weight_files,
)
from prune_lab.models.files import read_header
from prune_lab.models.sources import PRESETS

# BK-SDM, table 1 and its model cards; SDXL's own model card. PixArt-Sigma's own code counts 610,856,096, and Alpha has
# an embedding of the picture's size and ratio besides (493,056); diffusers' FLUX.1-dev has 11,901,408,320.
PARAMETERS = {
    "sd-v1.4": 859_520_964,
    "sd-v1.5": 859_520_964,
    "sd-v2.1-base": 865_910_724,
    "sd-v2.1": 865_910_724,
    "sdxl-base": 2_567_463_684,
    "pixart-alpha": 611_349_152,
    "pixart-sigma": 610_856_096,
    "sd3-medium": 2_028_328_000,
    "flux-dev": 11_901_408_320,
    "dit-xl-2-256": 749_826_464,
}


@pytest.fixture
def model_folder(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    """A U-Net folder of its own, free to be damaged."""
    return Path(shutil.copytree(tiny_pipeline_folder / "unet", tmp_path / "unet"))


@pytest.fixture
def pipeline_folder(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder of its own, free to be damaged."""
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same_weights(first: Any, second: Any) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    source = resolve_model(name)
    assert (source.kind, source.has_weights, source.is_pipeline) == ("preset", False, False)
    assert sum(parameter.numel() for parameter in meta_model(source.config).parameters()) == PARAMETERS[name]


def test_what_diffusers_counts_otherwise_than_the_authors() -> None:
    """DiT-XL/2 has 675,129,632 parameters: one embedding of timestep and class, which diffusers has in every block, and
    the places of its 256 patches. Of SD3 2,084,951,104 numbers are saved, those of its places (192 x 192) among them.
    """
    dit = meta_model(preset_config("dit-xl-2-256"))
    blocks = len(dit.transformer_blocks)
    embedding = sum(parameter.numel() for parameter in dit.transformer_blocks[0].norm1.emb.parameters())
    assert dit.num_parameters() - (blocks - 1) * embedding + 256 * 1152 == 675_129_632
    saved = meta_model(preset_config("sd3-medium")).state_dict().values()
    assert sum(tensor.numel() for tensor in saved) == 2_084_951_104


def test_there_is_a_file_for_every_preset_and_no_other() -> None:
    folder = Path(models.__file__).parent.parent / "presets"
    assert sorted(path.stem for path in folder.glob("*.json")) == sorted(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_diffusers_knows_every_setting_of_a_preset(name: str) -> None:
    # from_config drops what it does not know without a word, so a misspelt key would go unseen
    config = preset_config(name)
    known = inspect.signature(family_of(config).model_class().__init__).parameters
    assert {key for key in config if not key.startswith("_")} <= set(known)


def test_the_two_sizes_of_v2_differ_as_published() -> None:
    base, large = preset_config("sd-v2.1-base"), preset_config("sd-v2.1")
    assert {key for key in large if large[key] != base.get(key)} == {"sample_size", "upcast_attention"}
    assert (base["sample_size"], large["sample_size"], preset_config("sdxl-base")["sample_size"]) == (
        64,
        96,
        128,
    )


# Finding ---------------------------------------------------------------------------------------------------------


def test_a_pipeline_folder_is_found(tiny_pipeline_folder: Path) -> None:
    source = resolve_model(str(tiny_pipeline_folder))
    assert (source.kind, source.folder, source.has_weights) == ("pipeline", tiny_pipeline_folder, True)
    assert source.model_folder == tiny_pipeline_folder / "unet"
    assert source.config["block_out_channels"] == [8, 16, 32, 32]


def test_the_shipped_model_is_a_whole_pipeline() -> None:
    source = resolve_model("reference")
    assert (source.kind, source.has_weights, source.is_pipeline) == ("shipped", True, True)
    assert source.folder == reference_folder()
    shape = (len(source.config["down_block_types"]), source.config["layers_per_block"])
    assert shape == (4, 2)  # Stable Diffusion's


def test_a_unet_folder_is_found(model_folder: Path) -> None:
    source = resolve_model(str(model_folder))
    assert (source.kind, source.model_folder, source.is_pipeline) == ("model", model_folder, False)


def test_a_config_is_structure_only(model_folder: Path) -> None:
    source = resolve_model(str(model_folder / "config.json"))
    assert (source.kind, source.folder, source.has_weights) == ("config", None, False)
    with pytest.raises(UnsupportedModelError, match="structure only"):
        load_model(source)
    with pytest.raises(UnsupportedModelError, match="a U-Net alone"):
        load_pipeline(source)


@pytest.mark.parametrize("text", ["/no/such/folder", "./missing", "sd-1.4", "", "a/b/c"])
def test_what_is_not_there_is_not_found(text: str) -> None:
    with pytest.raises(ModelNotFoundError, match="asked for the model") as caught:
        resolve_model(text)
    assert "\n" not in str(caught.value)
    assert "sd-v2.1-base" in str(caught.value)


def test_a_near_miss_is_met_with_the_preset() -> None:
    with pytest.raises(ModelNotFoundError, match=r"did you mean sd-v1.4\?"):
        resolve_model("sd-v1-4")


def test_a_hub_name_without_a_network_is_one_clear_line() -> None:
    with pytest.raises(ModelNotFoundError, match="cannot be reached") as caught:
        resolve_model("nobody-at-all/no-such-model")
    assert "\n" not in str(caught.value)
    assert "'nobody-at-all/no-such-model'" in str(caught.value)


# Files -----------------------------------------------------------------------------------------------------------


def test_headers_say_what_the_tensors_are(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(5, dtype=torch.float16), "c": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert read_header(tmp_path / "x.safetensors") == {
        "a": ("F32", (2, 3)),
        "b": ("F16", (5,)),
        "c": ("F32", ()),
    }


@settings(max_examples=40)
@given(kept=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_anywhere_is_seen(tmp_path_factory: pytest.TempPathFactory, kept: float) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.safetensors"
    save_file({"a": torch.zeros(20, 3), "b": torch.ones(5)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ModelFormatError, match="fetch it again"):
        read_header(path)


@settings(max_examples=60)
@given(content=st.binary(max_size=64))
def test_any_bytes_are_refused_politely(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError):
        read_header(path)


def test_whole_files_are_preferred_to_variants_and_shards_are_all_found(model_folder: Path) -> None:
    whole = model_folder / "diffusion_pytorch_model.safetensors"
    half = model_folder / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(whole, half)
    assert weight_files(model_folder) == (whole,)
    whole.unlink()
    assert weight_files(model_folder) == (half,)


def test_only_pickled_weights_are_refused(model_folder: Path) -> None:
    (model_folder / "diffusion_pytorch_model.safetensors").rename(
        model_folder / "diffusion_pytorch_model.bin"
    )
    with pytest.raises(ModelFormatError, match=r"only pickled files \(diffusion_pytorch_model.bin\)"):
        resolve_model(str(model_folder))


def test_a_shard_cannot_point_out_of_its_folder(model_folder: Path) -> None:
    whole = model_folder / "diffusion_pytorch_model.safetensors"
    whole.rename(model_folder.parent / whole.name)
    index = model_folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": f"../{whole.name}"}}))
    with pytest.raises(ModelFormatError, match="does not list the shards"):
        resolve_model(str(model_folder))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop("conv_in.bias"), "conv_in.bias is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra is not part of that U-Net"),
        (
            lambda tensors: tensors.update({"conv_in.bias": torch.zeros(9)}),
            r"conv_in.bias is \[9\] instead of \[8\]",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(model_folder: Path, change: Any, named: str) -> None:
    path = model_folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ModelFormatError, match=named):
        resolve_model(str(model_folder))


def test_the_digest_follows_every_byte(model_folder: Path) -> None:
    before = model_digest(resolve_model(str(model_folder)))
    path = model_folder / "diffusion_pytorch_model.safetensors"
    # by hand: the plain settings, then the hash of each file
    config = {k: v for k, v in json.loads((model_folder / "config.json").read_text()).items() if k[0] != "_"}
    by_hand = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    by_hand.update(hashlib.sha256(path.read_bytes()).digest())
    assert before == by_hand.hexdigest()[:16]

    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert model_digest(resolve_model(str(model_folder))) != before


def test_the_digest_of_a_preset_is_that_of_its_structure() -> None:
    digests = {name: model_digest(resolve_model(name)) for name in PRESETS}
    assert digests["sd-v1.4"] == digests["sd-v1.5"]  # the same architecture twice
    assert len(set(digests.values())) == len(PRESETS) - 1


# Loading ---------------------------------------------------------------------------------------------------------


def test_a_loaded_unet_is_the_saved_one(model_folder: Path, tiny_unet: UNet2DConditionModel) -> None:
    unet = load_model(resolve_model(str(model_folder)))
    assert same_weights(unet, tiny_unet)
    assert not unet.training
    assert unet.dtype == torch.float32


def test_half_precision_is_asked_for_by_dtype(model_folder: Path, tiny_unet: UNet2DConditionModel) -> None:
    unet = load_model(resolve_model(str(model_folder)), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in unet.state_dict().values()} == {torch.bfloat16}
    assert same_weights(unet, tiny_unet.to(torch.bfloat16))


@pytest.mark.parametrize("form", [{"max_shard_size": "400KB"}, {"variant": "fp16"}])
def test_shards_and_variants_load_alike(tmp_path: Path, tiny_unet: UNet2DConditionModel, form: Any) -> None:
    tiny_unet.save_pretrained(tmp_path, safe_serialization=True, **form)
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    assert len(weight_files(tmp_path)) == (1 if "variant" in form else 6)
    assert same_weights(load_model(resolve_model(str(tmp_path))), tiny_unet)


def test_a_missing_shard_is_named(tmp_path: Path, tiny_unet: UNet2DConditionModel) -> None:
    tiny_unet.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="400KB")
    gone = weight_files(tmp_path)[2]
    gone.unlink()
    with pytest.raises(ModelFormatError, match=f"lacks 1 of 6 shards.*{gone.name}"):
        resolve_model(str(tmp_path))


def test_random_weights_follow_the_seed_and_leave_the_global_state(model_folder: Path) -> None:
    source = resolve_model(str(model_folder / "config.json"))
    state = torch.get_rng_state()
    first, again, other = (load_model(source, random_weights=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(first, again)
    assert not same_weights(first, other)
    assert not first.training


def test_a_pipeline_draws_and_says_nothing(
    tiny_pipeline_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline = load_pipeline(resolve_model(str(tiny_pipeline_folder)))
    generator = torch.Generator().manual_seed(0)
    drawn = pipeline("a cat", num_inference_steps=2, generator=generator, output_type="np").images
    assert drawn.shape == (1, 32, 32, 3)
    assert np.isfinite(drawn).all()
    assert capfd.readouterr() == ("", "")


def test_a_given_unet_takes_the_place_of_the_saved_one(
    pipeline_folder: Path, tiny_unet: UNet2DConditionModel
) -> None:
    source = resolve_model(str(pipeline_folder))
    shutil.rmtree(pipeline_folder / "unet")  # so it is not read at all
    pipeline = load_pipeline(source, model=tiny_unet)
    assert pipeline.unet is tiny_unet


def test_the_safety_checker_is_left_out(pipeline_folder: Path) -> None:
    # SD-v1.x lists one; its 1.2 GB say nothing about the U-Net
    edit_json(
        pipeline_folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    pipeline = load_pipeline(resolve_model(str(pipeline_folder)))
    assert pipeline.safety_checker is None


def test_the_libraries_get_their_voices_back(tiny_pipeline_folder: Path) -> None:
    import diffusers
    import transformers

    logs = (diffusers.utils.logging, transformers.utils.logging)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    load_pipeline(resolve_model(str(tiny_pipeline_folder)))
    assert [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs] == before


def memory(name: str) -> int:
    """A line of Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def peak_of(load: Callable[[], Any]) -> int:
    """How far memory rises above its level while ``load`` runs and everything it returns is read, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would otherwise be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    kept = load()
    assert all(tensor.isfinite().all() for tensor in kept)  # files may be mapped: touch every page
    return memory("VmHWM") - before


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/proc/self/clear_refs").exists(),
    reason="memory is measured through Linux's /proc and glibc",
)
def test_loading_never_holds_two_copies(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    wide = tiny_config | {"block_out_channels": [32, 64, 128, 128], "norm_num_groups": 32}
    UNet2DConditionModel.from_config(wide).save_pretrained(tmp_path)
    source = resolve_model(str(tmp_path))
    (file,) = weight_files(tmp_path)
    size = file.stat().st_size

    def twice() -> list[Tensor]:
        tensors = list(load_file(file).values())
        return tensors + [tensor.clone() for tensor in tensors]

    assert peak_of(lambda: load_model(source).parameters()) < 1.5 * size
    assert peak_of(twice) > 1.8 * size  # the measurement does see a second copy


# The scorer ------------------------------------------------------------------------------------------------------


def pictures(height: int, width: int, count: int = 2) -> Tensor:
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    )


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (100, 37), (20, 30)])
@pytest.mark.parametrize(
    "settings_", [{}, {"do_center_crop": False, "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3}]
)
def test_pictures_are_prepared_as_transformers_does(
    tiny_scorer_folder: Path, tmp_path: Path, size: tuple[int, int], settings_: dict[str, Any]
) -> None:
    from transformers import CLIPImageProcessorPil

    folder = Path(shutil.copytree(tiny_scorer_folder, tmp_path / "scorer"))
    edit_json(folder / "preprocessor_config.json", **settings_)
    _, inputs = load_scorer(str(folder))
    given = pictures(*size)
    expected = CLIPImageProcessorPil.from_pretrained(folder)(images=list(given.numpy()), return_tensors="pt")
    ours = inputs.pictures(given)
    assert ours.shape == expected.pixel_values.shape == (2, 3, 32, 32)
    torch.testing.assert_close(ours, expected.pixel_values, rtol=0, atol=1e-5)


def test_captions_are_cut_and_padded(tiny_scorer_folder: Path) -> None:
    model, inputs = load_scorer(str(tiny_scorer_folder))
    batch = inputs.captions(["a cat", "a very long caption about a red firefighter, dark skin tone"])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 16)
    with torch.no_grad():
        out = model(pixel_values=inputs.pictures(pictures(40, 40)), **batch)
    norms = torch.stack([out.image_embeds.norm(dim=-1), out.text_embeds.norm(dim=-1)])
    torch.testing.assert_close(norms, torch.ones(2, 2))
    assert not model.training


def test_a_scorer_must_be_clip(tiny_scorer_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_scorer_folder, tmp_path / "scorer"))
    edit_json(folder / "config.json", model_type="siglip")
    with pytest.raises(UnsupportedModelError, match="siglip"):
        load_scorer(str(folder))
    with pytest.raises(ModelNotFoundError, match="no folder of that name"):
        load_scorer("/no/such/scorer")


def test_picture_settings_that_lack_something_are_named(tiny_scorer_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_scorer_folder, tmp_path / "scorer"))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 32}}))
    with pytest.raises(ModelFormatError, match="crop_size"):
        load_scorer(str(folder))


def test_a_config_that_diffusers_refuses_is_one_line(tiny_config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="leave num_attention_heads out"):
        architecture_of({**tiny_config, "num_attention_heads": 8})
