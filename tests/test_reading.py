"""Models as people have them: pipelines of many classes, variants, checkpoints, and what goes wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import TINY_UNET, BuiltOnce, build_unet
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from prune_lab.blocks import architecture_of
from prune_lab.cli import app
from prune_lab.errors import ModelFormatError, ModelNotFoundError, PruneLabError
from prune_lab.models import load_model, load_pipeline, model_digest, resolve_model
from prune_lab.models.files import chosen_variant, shards_among, variants_among

pytestmark = pytest.mark.usefixtures("blank_figures")

WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same_weights(first: Any, second: Any) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def pipeline(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder of its own, free to be damaged."""
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline"))


@pytest.fixture
def model_folder(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    """A U-Net folder of its own, free to be damaged."""
    return Path(shutil.copytree(tiny_pipeline_folder / "unet", tmp_path / "unet"))


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# Pipelines -------------------------------------------------------------------------------------------------------


def save_controlnet(folder: Path) -> None:
    diffusers.ControlNetModel.from_unet(build_unet(TINY_UNET)).save_pretrained(folder)


def save_image_encoder(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**small, image_size=32, patch_size=8, projection_dim=16)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)


def save_depth_estimator(folder: Path) -> None:
    from transformers import DPTConfig, DPTForDepthEstimation

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"backbone_out_indices": [0, 0, 1, 1], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    DPTForDepthEstimation(DPTConfig(**small, **more, image_size=32, patch_size=8)).save_pretrained(folder)


def save_picture_settings(name: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": name}))

    return save


Part = tuple[str, str, Callable[[Path], None]]
IMAGE_ENCODER: Part = ("transformers", "CLIPVisionModelWithProjection", save_image_encoder)
PICTURES: Part = ("transformers", "CLIPImageProcessor", save_picture_settings("CLIPImageProcessor"))
DEPTH: Part = ("transformers", "DPTForDepthEstimation", save_depth_estimator)
DEPTH_PICTURES: Part = ("transformers", "DPTImageProcessor", save_picture_settings("DPTImageProcessor"))
NORMALIZER: Part = (
    "stable_diffusion",
    "StableUnCLIPImageNormalizer",
    lambda folder: diffusers.pipelines.stable_diffusion.StableUnCLIPImageNormalizer(16).save_pretrained(
        folder
    ),
)
NOISING: Part = (
    "diffusers",
    "DDPMScheduler",
    lambda folder: diffusers.DDPMScheduler().save_pretrained(folder),
)

# Class, what its U-Net has otherwise, and its parts beyond those of StableDiffusionPipeline.
PIPELINES: dict[str, tuple[dict[str, Any], dict[str, Part]]] = {
    "StableDiffusionImg2ImgPipeline": ({}, {}),
    "StableDiffusionInpaintPipeline": ({"in_channels": 9}, {}),
    "StableDiffusionInstructPix2PixPipeline": ({"in_channels": 8}, {}),
    "LatentConsistencyModelPipeline": ({"time_cond_proj_dim": 8}, {}),
    "StableDiffusionControlNetPipeline": (
        {},
        {"controlnet": ("diffusers", "ControlNetModel", save_controlnet)},
    ),
    "StableDiffusionDepth2ImgPipeline": (
        {"in_channels": 5},
        {"depth_estimator": DEPTH, "feature_extractor": DEPTH_PICTURES},
    ),
    "StableUnCLIPImg2ImgPipeline": (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 32},
        {
            "image_encoder": IMAGE_ENCODER,
            "feature_extractor": PICTURES,
            "image_normalizer": NORMALIZER,
            "image_noising_scheduler": NOISING,
        },
    ),
}


def save_kind(folder: Path, plain: Path, name: str) -> None:
    """A pipeline of the class ``name``, made of the parts of ``plain`` and those that its class has besides."""
    changes, parts = PIPELINES[name]
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("unet") if changes else None)
    if changes:
        build_unet({**TINY_UNET, **changes}).save_pretrained(folder / "unet")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": name}
    for part, (library, part_class, save) in parts.items():
        save(folder / part)
        index[part] = [library, part_class]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture
def kind_of_pipeline(built_once: BuiltOnce, tiny_pipeline_folder: Path) -> Callable[[str], Path]:
    return lambda name: built_once(name, lambda folder: save_kind(folder, tiny_pipeline_folder, name))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_of_any_class_with_a_known_unet_is_read(
    name: str, kind_of_pipeline: Callable[[str], Path]
) -> None:
    folder = kind_of_pipeline(name)
    source = resolve_model(str(folder))
    assert (source.kind, source.is_pipeline, source.notes) == ("pipeline", True, ())
    wanted = {**TINY_UNET, **PIPELINES[name][0]}
    assert source.architecture.total_params == sum(
        tensor.numel() for tensor in load_file(folder / "unet" / WEIGHTS).values()
    )
    assert source.architecture.signature == architecture_of(wanted).signature
    pipeline = load_pipeline(source)
    assert type(pipeline).__name__ == name
    plain = getattr(diffusers, name).from_pretrained(folder)
    for part, module in plain.components.items():
        if isinstance(module, torch.nn.Module):
            assert same_weights(getattr(pipeline, part), module), part


def test_the_blocks_of_a_pipeline_for_inpainting(kind_of_pipeline: Callable[[str], Path]) -> None:
    result = CliRunner().invoke(
        app, ["blocks", str(kind_of_pipeline("StableDiffusionInpaintPipeline")), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)) == 38


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_class_name": "MyOwnPipeline"}, "'MyOwnPipeline', which the installed diffusers has not"),
        ({"_class_name": "DiffusionPipeline"}, "which the installed diffusers has not"),
        ({"_class_name": "UNet2DConditionModel"}, "which the installed diffusers has not"),
        ({"_class_name": ["pipeline", "MyPipeline"]}, "which the installed diffusers has not"),
        (
            {"_class_name": "FluxPipeline"},
            "FluxPipeline, which takes a transformer, and lists a UNet2DConditionModel as unet",
        ),
        ({"_class_name": "StableDiffusionControlNetPipeline"}, "lists no controlnet"),
        ({"unet": ["diffusers", "NoSuchUNet"]}, "code of its own for unet"),
        ({"vae": ["my_vae", "MyVAE"]}, "code of its own for vae"),
        ({"vae": ["os", "system"]}, "code of its own for vae"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "lists controlnet, but"),
    ],
)
def test_a_pipeline_that_cannot_be_read_says_why(changes: Any, named: str, pipeline: Path) -> None:
    edit_json(pipeline / "model_index.json", **changes)
    with pytest.raises(PruneLabError, match=named) as caught:
        resolve_model(str(pipeline))
    assert "\n" not in str(caught.value)


# Parts beside the U-Net ------------------------------------------------------------------------------------------


def rename_tensor(tensors: dict[str, torch.Tensor]) -> None:
    key = sorted(tensors)[0]
    tensors[f"{key}_old"] = tensors.pop(key)


def lose_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[-1]]


def reshape_tensor(tensors: dict[str, torch.Tensor]) -> None:
    key = sorted(tensors)[0]
    tensors[key] = torch.zeros(3, 3)


PARTS = {"vae": WEIGHTS, "text_encoder": "model.safetensors"}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", [rename_tensor, lose_tensor, reshape_tensor])
def test_a_part_that_would_get_random_numbers_is_refused(
    part: str, change: Callable[[dict[str, torch.Tensor]], None], pipeline: Path
) -> None:
    path = pipeline / part / PARTS[part]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelFormatError, match=rf"{part} do not fit its config.json: tensor \S+ is"):
        resolve_model(str(pipeline))


def test_the_parts_of_other_pipelines_are_checked_too(
    kind_of_pipeline: Callable[[str], Path], tmp_path: Path
) -> None:
    parts = {
        "controlnet": "StableDiffusionControlNetPipeline",
        "image_encoder": "StableUnCLIPImg2ImgPipeline",
    }
    for part, name in parts.items():
        folder = Path(shutil.copytree(kind_of_pipeline(name), tmp_path / part))
        (path,) = (folder / part).glob("*.safetensors")
        tensors = load_file(path)
        rename_tensor(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(ModelFormatError, match=part):
            resolve_model(str(folder))


def test_names_that_the_libraries_know_from_old_files_are_read(pipeline: Path) -> None:
    # as SD-v1 files of 2022 have them: counters that are computed today, a prefix, other names in the VAE's attention
    path = pipeline / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{key}": tensor for key, tensor in load_file(path).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(tensors, path, metadata={"format": "pt"})
    path = pipeline / "vae" / WEIGHTS
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, tensor in load_file(path).items():
        new_name = next((name for name in names if f".{name}." in key), "")
        old[key.replace(new_name, names[new_name]) if new_name else key] = tensor
    assert any(".proj_attn." in key for key in old)
    save_file(old, path, metadata={"format": "pt"})
    before = load_pipeline(resolve_model(str(pipeline)))
    plain = diffusers.StableDiffusionPipeline.from_pretrained(pipeline)
    assert same_weights(before.vae, plain.vae)
    assert same_weights(before.text_encoder, plain.text_encoder)


# Variants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "asked", "chosen"),
    [
        (["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"], "", ""),
        (["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"], "fp16", "fp16"),
        (["diffusion_pytorch_model.bf16.safetensors"], "", "bf16"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "", None),
        (["model.fp16.safetensors", "model.non_ema.safetensors"], "", "fp16"),
        (["model.non_ema.safetensors"], "", None),
        (["model.non_ema.safetensors"], "non_ema", "non_ema"),
        (["model.fp16.non_ema.safetensors"], "fp16.non_ema", "fp16.non_ema"),
        (["model.fp16.safetensors"], "bf16", None),
        (["diffusion_pytorch_model.safetensors.index.fp16.json"], "", "fp16"),
        (["diffusion_pytorch_model.fp16.safetensors.index.json"], "", "fp16"),
        (["diffusion_pytorch_model.safetensors.index.json"], "", ""),
        (["diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], "", None),
        (["diffusion_pytorch_model-00001-of-00002.safetensors"], "", None),
        (["diffusion_pytorch_model.bin", "config.json", "pytorch_lora_weights.safetensors"], "", None),
        ([], "", None),
    ],
)
def test_which_weights_are_read(names: list[str], asked: str, chosen: str | None) -> None:
    assert chosen_variant(names, asked) == chosen


@given(
    names=st.sets(
        st.builds(
            "{}{}.safetensors{}".format,
            st.sampled_from(["diffusion_pytorch_model", "model", "unet"]),
            st.sampled_from(
                ["", ".fp16", ".bf16", ".non_ema", ".fp16-00001-of-00002", "-00001-of-00002.fp16"]
            ),
            st.sampled_from(["", ".index.json", ".index.fp16.json"]),
        )
    ),
    asked=st.sampled_from(["", "fp16", "non_ema"]),
)
def test_plain_weights_are_never_passed_over_and_shards_never_taken_for_a_model(
    names: set[str], asked: str
) -> None:
    found = variants_among(names)
    assert set(found.values()) <= names
    assert not any("00001" in name for name in found.values())
    chosen = chosen_variant(names, asked)
    assert chosen is None or chosen in found
    if not asked and any(f"{stem}.safetensors" in names for stem in ("diffusion_pytorch_model", "model")):
        assert chosen == ""
    shards = {name for name in names if "00001" in name and name.endswith("tensors")}
    assert set(shards_among(names, "fp16")) == {
        name for name in shards if "fp16" in name and not name.startswith("unet")
    }


def as_variant(folder: Path, variant: str, part: str = "unet") -> None:
    """Rename the weights of a part as its owner would who only has this variant."""
    (path,) = (folder / part).glob("*.safetensors")
    path.rename(path.with_name(path.name.replace(".safetensors", f".{variant}.safetensors")))


def in_shards(folder: Path, index: str, shard: str) -> None:
    """Split the weights in ``folder`` into two files, named as the templates say."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    keys = sorted(tensors)
    halves = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    weight_map = {}
    for number, half in enumerate(halves, 1):
        name = shard.format(number)
        save_file({key: tensors[key] for key in half}, folder / name)
        weight_map |= dict.fromkeys(half, name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("{}.safetensors.index.json", "{}-0000{{}}-of-00002.safetensors"),
        ("{}.safetensors.index.fp16.json", "{}.fp16-0000{{}}-of-00002.safetensors"),
        ("{}.safetensors.index.fp16.json", "{}-0000{{}}-of-00002.fp16.safetensors"),
        ("{}.fp16.safetensors.index.json", "{}.fp16-0000{{}}-of-00002.safetensors"),
        ("{}.bf16.safetensors.index.json", "{}-0000{{}}-of-00002.bf16.safetensors"),
    ],
)
def test_shards_are_read_by_every_name(index: str, shard: str, model_folder: Path) -> None:
    wanted = load_model(resolve_model(str(model_folder)))
    stem = "diffusion_pytorch_model"
    in_shards(model_folder, index.format(stem), shard.format(stem))
    source = resolve_model(str(model_folder))
    assert source.variant == next((name for name in ("fp16", "bf16") if name in index), "")
    assert len(source.weight_paths) == 2
    assert same_weights(load_model(source), wanted)


@pytest.mark.parametrize(
    "variants", [{"unet": "bf16"}, {"unet": "fp16", "vae": "fp16", "text_encoder": "fp16"}]
)
def test_a_pipeline_with_variants_alone_is_read_and_says_so(variants: dict[str, str], pipeline: Path) -> None:
    wanted = load_pipeline(resolve_model(str(pipeline)))
    for part, variant in variants.items():
        as_variant(pipeline, variant, part)
    source = resolve_model(str(pipeline))
    assert source.variant == variants["unet"]
    (note,) = source.notes
    assert f"variant {source.variant}, the only one" in note
    found: Any = load_pipeline(source)
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(found, part), getattr(wanted, part))
    assert Path(found.config["_name_or_path"]) == pipeline


def test_what_an_average_left_out_is_read_on_request(pipeline: Path) -> None:
    plain = load_file(pipeline / "unet" / WEIGHTS)
    raw = {name: tensor + 1 for name, tensor in plain.items()}
    save_file(raw, pipeline / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    usual, asked = resolve_model(str(pipeline)), resolve_model(str(pipeline), variant="non_ema")
    assert (usual.variant, asked.variant, asked.notes) == ("", "non_ema", ())
    assert model_digest(usual) != model_digest(asked)
    assert asked.origin == {"source": pipeline.name, "variant": "non_ema"}
    for source, tensors in ((usual, plain), (asked, raw)):
        loaded: Any = load_pipeline(source)
        found = loaded.unet.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_variant_that_is_asked_for_is_what_students_and_exports_hold(
    pipeline: Path, tmp_path: Path
) -> None:
    raw = {name: tensor / 2 for name, tensor in load_file(pipeline / "unet" / WEIGHTS).items()}
    save_file(raw, pipeline / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    out, file = tmp_path / "out", tmp_path / "model.safetensors"
    written = invoke("prune", pipeline, "--plan", "bk-base", "--out", out, "--read-variant", "non_ema")
    assert written.exit_code == 0, written.output
    found = load_file(out / "unet" / WEIGHTS)
    assert torch.equal(found["conv_in.weight"], raw["conv_in.weight"])
    assert json.loads((out / "unet" / "provenance.json").read_text())["variant"] == "non_ema"
    written = invoke("export", pipeline, "--to", "single-file", "--out", file, "--variant", "non_ema")
    assert written.exit_code == 0, written.output
    key = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(load_file(file)[key], raw["conv_in.weight"])


def test_a_variant_that_is_not_there_names_those_that_are(pipeline: Path) -> None:
    as_variant(pipeline, "fp16")
    with pytest.raises(ModelFormatError, match="no variant bf16; there is fp16"):
        resolve_model(str(pipeline), variant="bf16")
    half = pipeline / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(half, half.with_name("diffusion_pytorch_model.bf16.safetensors"))
    with pytest.raises(ModelFormatError, match="the variants bf16, fp16 and no plain ones"):
        resolve_model(str(pipeline))


# Subfolders, training checkpoints, structure alone ----------------------------------------------------------------


@pytest.fixture
def checkpoint(model_folder: Path, tmp_path: Path) -> Path:
    """What a training script leaves: the U-Net, its moving average with settings of its own, and its optimizer."""
    folder = tmp_path / "checkpoint-500"
    shutil.copytree(model_folder, folder / "unet")
    shutil.copytree(model_folder, folder / "unet_ema")
    average = {"decay": 0.9999, "optimization_step": 500, "use_ema_warmup": False, "inv_gamma": 1.0}
    edit_json(folder / "unet_ema" / "config.json", **average, power=0.66, update_after_step=0, min_decay=0.0)
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (folder / name).write_bytes(b"\x80\x02")
    return folder


def test_a_training_checkpoint_says_which_folder_to_give(checkpoint: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"--subfolder unet_ema, or --subfolder unet$"):
        resolve_model(str(checkpoint))


def test_the_average_of_a_training_is_read_without_a_word(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    source = resolve_model(str(checkpoint), subfolder="unet_ema")
    assert (source.kind, source.folder, source.subfolder) == ("model", checkpoint / "unet_ema", "unet_ema")
    load_model(source)
    assert (
        source.architecture.total_params == resolve_model(str(checkpoint / "unet")).architecture.total_params
    )
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"subfolder": "unet_emma"}, "subfolder unet_emma of .*, which has unet, unet_ema"),
        ({"subfolder": "../unet"}, "a folder inside of the model"),
        ({"subfolder": "unet", "variant": "fp16"}, "no variant fp16; there is the plain one"),
        ({"subfolder": "unet", "revision": "main"}, "on this machine and has none; leave --revision out"),
    ],
)
def test_a_place_that_is_not_there_is_told(how: dict[str, str], named: str, checkpoint: Path) -> None:
    with pytest.raises(PruneLabError, match=named):
        resolve_model(str(checkpoint), **how)


@pytest.mark.parametrize("text", ["reference", "sd-v1.4"])
def test_what_has_no_variants_refuses_to_be_asked_for_one(text: str) -> None:
    with pytest.raises(ModelNotFoundError, match="leave --variant out"):
        resolve_model(text, variant="fp16")


def test_random_weights_follow_seed_and_structure_alone(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY_UNET))
    source = resolve_model(str(config), random_weights=True, seed=3)
    assert (source.kind, source.random_seed, source.has_weights) == ("config", 3, False)
    assert "random (seed 3)" in source.notes[0]
    assert same_weights(load_model(source), build_unet(TINY_UNET, seed=3))
    digests = {model_digest(resolve_model(str(config), random_weights=True, seed=seed)) for seed in (3, 4)}
    assert len(digests | {model_digest(resolve_model(str(config)))}) == 3


def test_weights_that_are_there_are_left_alone_when_random_ones_are_asked_for(model_folder: Path) -> None:
    source = resolve_model(str(model_folder), random_weights=True)
    assert (source.kind, source.folder, source.weight_paths) == ("config", None, ())
    assert same_weights(load_model(source), build_unet(source.config))


def test_structure_alone_is_scored_with_random_weights_when_asked(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY_UNET))
    small = ("--set", "probe.samples=2", "--set", "probe.timesteps=2", "--set", "score.bootstrap=10")
    scoring = ("score", config, "--groups", "blocks", "--device", "cpu", *small)
    without = invoke(*scoring)
    assert without.exit_code == 2
    assert "--random-weights" in without.stderr
    found = invoke(*scoring, "--random-weights", "--run", tmp_path / "run")
    assert found.exit_code == 0, found.output
    assert "random weights" in found.stdout
    assert "are random (seed 0)" in found.stderr
    assert "random_weights = true" in (tmp_path / "run" / "config.toml").read_text()
    again = invoke("search", tmp_path / "run", "--params", "80%", "--json")
    assert again.exit_code == 0, again.output


def test_students_of_a_unet_alone_are_refused_before_any_work(model_folder: Path, tmp_path: Path) -> None:
    found = invoke("distill", model_folder, "--plan", "bk-small", "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert "give a pipeline folder" in found.stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.long
def test_the_latent_size_that_a_config_lacks_is_stated(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**TINY_UNET, "sample_size": None}))
    found = invoke("blocks", config, "--json")
    assert found.exit_code == 0, found.output
    assert "64 x 64 latent" in invoke("blocks", config).stdout
    config.write_text(json.dumps({**TINY_UNET, "sample_size": 64}))
    assert invoke("blocks", config, "--json").stdout == found.stdout
