"""Single files of other people: read offline, as the folder that they were made from."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPES, TINY_UNET, BuiltOnce, build_unet
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prune_lab.blocks import architecture_of
from prune_lab.errors import ModelFormatError, UnsupportedModelError
from prune_lab.export import export_single_file
from prune_lab.models import load_pipeline, preset_config, resolve_model
from prune_lab.models.clip_vocabulary import NUM_TOKENS, clip_tokenizer
from prune_lab.models.single_file import configs_of, unpack
from prune_lab.plans import parse_plan
from prune_lab.surgery import prune_pipeline

# Widths that 32 groups and heads of 64 channels divide, as every reader of such files takes for granted.
WIDE = {"norm_num_groups": 32, "sample_size": 64}
ONE_OF_THEM = ["sd-v1", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("sd-v2", "sdxl"))]
UNETS: dict[str, dict[str, Any]] = {
    "sd-v1": {
        **TINY_UNET,
        **WIDE,
        "block_out_channels": [32, 64, 64, 64],
        "attention_head_dim": 8,
        "cross_attention_dim": 64,
    },
    "sd-v2": {
        **TINY_UNET,
        **WIDE,
        "block_out_channels": [64, 64, 128, 128],
        "attention_head_dim": [1, 1, 2, 2],
        "use_linear_projection": True,
        "cross_attention_dim": 64,
    },
    "sdxl": {
        **SHAPES["sdxl"],
        **WIDE,
        "sample_size": 128,
        "block_out_channels": [64, 64, 128],
        "attention_head_dim": [1, 1, 2],
        "transformer_layers_per_block": [1, 2, 3],
        "cross_attention_dim": 64 + 128,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 128,
    },
}


def text_encoder(width: int, act: str, layers: int = 2, *, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=act,
        projection_dim=width,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def save_pipeline(folder: Path, kind: str, *, in_channels: int = 4) -> None:
    import diffusers

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[32, 32, 64, 64],
            layers_per_block=2,
            scaling_factor=0.13025 if kind == "sdxl" else 0.18215,
        ).eval()
        unet = build_unet({**UNETS[kind], "in_channels": in_channels})
        parts: dict[str, Any] = {"vae": vae, "unet": unet, "tokenizer": clip_tokenizer()}
        if kind == "sdxl":
            pipeline = diffusers.StableDiffusionXLPipeline(
                text_encoder=text_encoder(64, "quick_gelu"),
                text_encoder_2=text_encoder(128, "gelu", projected=True),
                tokenizer_2=clip_tokenizer(pad_token="!"),
                scheduler=diffusers.EulerDiscreteScheduler(**betas, timestep_spacing="leading"),
                **parts,
            )
        else:
            name = "StableDiffusionPipeline" if in_channels == 4 else "StableDiffusionInpaintPipeline"
            act = "quick_gelu" if kind == "sd-v1" else "gelu"
            if kind == "sd-v2":
                parts["tokenizer"] = clip_tokenizer(pad_token="!")
            pipeline = getattr(diffusers, name)(
                text_encoder=text_encoder(64, act),
                scheduler=diffusers.PNDMScheduler(**betas, skip_prk_steps=True),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
                **parts,
            )
    pipeline.save_pretrained(folder, safe_serialization=True)


# diffusers' Euler scheduler hands torch's tensors to numpy in an old way
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def folder_of(built_once: BuiltOnce) -> Callable[[str], Path]:
    return lambda kind: built_once(f"single-{kind}", lambda folder: save_pipeline(folder, kind))


@pytest.fixture(scope="module")
def file_of(built_once: BuiltOnce, folder_of: Callable[[str], Path]) -> Callable[[str], Path]:
    """The pipeline of a kind as we export it; do not change it."""

    def build(kind: str, folder: Path) -> None:
        folder.mkdir()
        export_single_file(resolve_model(str(folder_of(kind))), folder / "model.safetensors")

    return lambda kind: built_once(f"single-file-{kind}", partial(build, kind)) / "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def single_file(
    source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None] = lambda _: None
) -> Path:
    """A pipeline, or the file that we export of it, as other programs write it: the tensors alone, some more of a
    training, and no configs of ours.
    """
    if source.is_dir():
        source = export_single_file(resolve_model(str(source)), out).path
    tensors = load_file(source)
    tensors["model_ema.decay"] = torch.ones(())
    tensors["alphas_cumprod"] = torch.ones(1000)
    change(tensors)
    save_file(tensors, out)
    return out


def drawn(pipeline: Any) -> torch.Tensor:
    for part in pipeline.components.values():
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
            parameter.data = parameter.data.clone()
    pipeline.set_progress_bar_config(disable=True)
    more = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    return torch.as_tensor(pipeline("a red cat", generator=torch.Generator().manual_seed(0), **more).images)


def assert_same_pipeline(found: Path, wanted: Path) -> None:
    import diffusers

    one, other = (diffusers.DiffusionPipeline.from_pretrained(folder) for folder in (found, wanted))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(other, part, None) is not None:
            tensors, theirs = getattr(one, part).state_dict(), getattr(other, part).state_dict()
            assert tensors.keys() == theirs.keys()
            assert all(torch.equal(tensors[key], tensor) for key, tensor in theirs.items()), part
    assert torch.equal(drawn(one), drawn(other))


@pytest.mark.long
@pytest.mark.parametrize("kind", ONE_OF_THEM)
def test_the_folder_of_a_single_file_is_the_one_it_was_made_from(
    kind: str, file_of: Any, folder_of: Any, tmp_path: Path
) -> None:
    source = resolve_model(str(single_file(file_of(kind), tmp_path / "model.safetensors")))
    assert source.kind == "pipeline"
    assert architecture_of(source.config).signature == architecture_of(UNETS[kind]).signature
    assert source.folder is not None
    assert_same_pipeline(source.folder, folder_of(kind))


@pytest.mark.parametrize(
    "plan",
    [
        "bk-small",
        *(
            pytest.param(plan, marks=pytest.mark.long)
            for plan in ("bk-base", "bk-tiny", "-Md.A1 -Md.R2", "-Dn1.A1 -Dn1.A2")
        ),
    ],
)
def test_a_student_of_somebody_else_is_read_by_its_shapes(plan: str, folder_of: Any, tmp_path: Path) -> None:
    teacher = resolve_model(str(folder_of("sd-v1")))
    student = prune_pipeline(teacher, parse_plan(plan, teacher.architecture), tmp_path / "student")
    source = resolve_model(str(single_file(student, tmp_path / "model.safetensors")))
    wanted = json.loads((student / "unet" / "config.json").read_text())
    assert architecture_of(source.config).signature == architecture_of(wanted).signature
    assert source.model_folder is not None
    tensors, theirs = (
        load_file(folder / "diffusion_pytorch_model.safetensors")
        for folder in (source.model_folder, student / "unet")
    )
    assert tensors.keys() == theirs.keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in theirs.items())


def test_our_own_export_keeps_its_settings(folder_of: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("sd-v1"), tmp_path / "own"))
    config = folder / "unet" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"attention_head_dim": 4, "sample_size": 8})
    )
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    file = export_single_file(resolve_model(str(folder)), tmp_path / "model.safetensors").path
    source = resolve_model(str(file))
    assert source.config["attention_head_dim"] == 4
    assert source.config["sample_size"] == 8
    assert source.folder is not None
    settings = json.loads((source.folder / "scheduler" / "scheduler_config.json").read_text())
    assert settings["prediction_type"] == "v_prediction"


def test_it_is_written_once_and_again_when_the_file_changes(
    file_of: Any, tmp_path: Path, cache: Path
) -> None:
    file = single_file(file_of("sd-v1"), tmp_path / "model.safetensors")
    first = resolve_model(str(file)).folder
    assert resolve_model(str(file)).folder == first
    folders = cache / "prune_lab" / "single_files"
    assert [path.name for path in folders.iterdir()] == [Path(str(first)).name]
    os.utime(file, (1, 1))
    assert resolve_model(str(file)).folder != first


OFFLINE = """
import sys
from prune_lab.models import load_pipeline, resolve_model
pipeline = load_pipeline(resolve_model(sys.argv[1]))
print(pipeline("a cat", num_inference_steps=1, height=64, width=64, output_type="pt").images.shape)
"""


@pytest.mark.long
def test_a_fresh_process_without_network_or_cache_draws(file_of: Any, tmp_path: Path) -> None:
    file = single_file(file_of("sd-v1"), tmp_path / "model.safetensors")
    empty = tmp_path / "empty"
    places = {"HF_HOME": str(empty), "HOME": str(empty), "XDG_CACHE_HOME": str(empty), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(file)],
        env={**os.environ, **places, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    assert "(1, 64, 64, 3)" in found.stdout or "[1, 3, 64, 64]" in found.stdout


def test_each_part_keeps_its_number_format(file_of: Any, tmp_path: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            if not key.startswith("first_stage_model."):  # as many files have it: a VAE overflows easily
                tensors[key] = tensor.half()

    file = single_file(file_of("sd-v1"), tmp_path / "model.safetensors", halve)
    folder = resolve_model(str(file)).folder
    assert folder is not None
    for part, dtype in (("unet", torch.float16), ("vae", torch.float32), ("text_encoder", torch.float16)):
        (weights,) = (folder / part).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(weights).values()} == {dtype}


@pytest.mark.long
def test_a_model_for_inpainting(tmp_path: Path) -> None:
    import diffusers

    folder = tmp_path / "inpaint"
    save_pipeline(folder, "sd-v1", in_channels=9)
    file = single_file(folder, tmp_path / "model.safetensors")
    out = unpack(file, tmp_path / "out", preset_config)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(pipeline).__name__ == "StableDiffusionInpaintPipeline"
    assert pipeline.unet.config.in_channels == 9
    wanted = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in pipeline.unet.state_dict().items())


@pytest.mark.parametrize(("spread", "predicts"), [(0.2, "v_prediction"), (0.02, "epsilon")])
def test_what_stable_diffusion_2_predicts_shows_in_its_weights(
    spread: float, predicts: str, file_of: Any, tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
        tensors[key] = spread * torch.tensor([1.0, -1.0]).repeat(len(tensors[key]) // 2)

    configs = configs_of(single_file(file_of("sd-v2"), tmp_path / "model.safetensors", change), preset_config)
    assert configs["scheduler"].get("prediction_type", "epsilon") == predicts
    assert configs["unet"]["sample_size"] == (96 if predicts == "v_prediction" else 64)


def test_the_last_layer_of_open_clip_is_not_read(file_of: Any, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        layers = {key: tensor for key, tensor in tensors.items() if ".resblocks.1." in key}
        for number in range(2, 24):
            tensors.update({key.replace(".1.", f".{number}.", 1): t.clone() for key, t in layers.items()})

    configs = configs_of(single_file(file_of("sd-v2"), tmp_path / "model.safetensors", change), preset_config)
    assert configs["text_encoder"]["num_hidden_layers"] == 23


REFINER = "conditioner.embedders.0.model.token_embedding.weight"

# What is refused ---------------------------------------------------------------------------------------------------


def test_the_originals_have_the_configs_of_the_presets(tmp_path: Path) -> None:
    from ldm_layout import golden_shapes

    from prune_lab.families.ldm_structure import unet_config

    shapes = {f"model.diffusion_model.{key}": shape for key, shape in golden_shapes(2).items()}
    config = unet_config("sd-v1", preset_config("sd-v1.5"), shapes)
    ours = architecture_of(config).signature
    assert ours == architecture_of(preset_config("sd-v1.5")).signature


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickled_files_stay_closed(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04")
    with pytest.raises(ModelFormatError, match="pickled file, which is never opened"):
        resolve_model(str(path))


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("lora_unet_down_blocks_0.lora_up.weight", "it is a LoRA"),
        ("down_blocks.0.resnets.0.conv1.weight", "one part of a model in diffusers' layout"),
        ("something.else", "it has no U-Net"),
        ("model.diffusion_model.input_blocks.0.0.weight", "not the text encoder of"),
        (REFINER, "the refiner of Stable Diffusion XL"),
    ],
)
def test_what_is_not_a_whole_model_is_told(key: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    more = ["model.diffusion_model.input_blocks.0.0.weight"] if key == REFINER else []
    save_file({name: torch.zeros(1) for name in (key, *more)}, path)
    with pytest.raises(UnsupportedModelError, match=reason):
        resolve_model(str(path))


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"12345678")
    with pytest.raises(ModelFormatError, match="damaged"):
        resolve_model(str(path))


UNEVEN = "-Dn2.R2 -Dn2.A2 -Up3.R2 -Up3.A2"


@pytest.mark.long
@pytest.mark.parametrize("ours", [True, False], ids=["with our configs", "by its shapes"])
def test_stages_of_unequal_depth_come_back(ours: bool, folder_of: Any, tmp_path: Path) -> None:
    teacher = resolve_model(str(folder_of("sd-v1")))
    student = prune_pipeline(teacher, parse_plan(UNEVEN, teacher.architecture), tmp_path / "student")
    file = tmp_path / "model.safetensors"
    if ours:
        export_single_file(resolve_model(str(student)), file)
    else:
        single_file(student, file)
    source = resolve_model(str(file))
    assert source.config["layers_per_block"] == [2, 1, 2, 2]
    assert source.folder is not None
    assert_same_pipeline(source.folder, student)


def test_the_shipped_model_comes_back_with_its_own_tokenizer(tmp_path: Path) -> None:
    file = export_single_file(resolve_model("reference"), tmp_path / "model.safetensors").path
    source = resolve_model(str(file))
    ours, theirs = load_pipeline(source), load_pipeline(resolve_model("reference"))
    for part in ("unet", "vae", "text_encoder"):
        tensors, wanted = (getattr(pipeline, part).state_dict() for pipeline in (ours, theirs))
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in wanted.items()), part
    texts = ["a red cat", "Grinning face, medium-light skin tone", "\N{COFFIN}"]
    more = {"padding": "max_length", "truncation": True}
    assert ours.tokenizer(texts, **more)["input_ids"] == theirs.tokenizer(texts, **more)["input_ids"]


def test_a_model_with_a_tokenizer_of_its_own_is_refused(tmp_path: Path) -> None:
    file = export_single_file(resolve_model("reference"), tmp_path / "model.safetensors").path
    save_file(load_file(file), file)  # the tensors alone
    with pytest.raises(UnsupportedModelError, match="tokens and not CLIP's 49,408"):
        resolve_model(str(file))


def with_channels(number: int) -> Callable[[dict[str, torch.Tensor]], None]:
    """The change to a model that takes so many channels."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = "model.diffusion_model.input_blocks.0.0.weight"
        width, _, *sides = tensors[key].shape
        tensors[key] = torch.randn(width, number, *sides)

    return change


def test_a_file_with_more_channels_is_a_model_for_inpainting(
    file_of: Any, folder_of: Any, tmp_path: Path
) -> None:
    file = single_file(file_of("sd-v1"), tmp_path / "model.safetensors", with_channels(9))
    source = resolve_model(str(file))
    assert source.config["in_channels"] == 9
    pipeline: Any = load_pipeline(source)
    assert type(pipeline).__name__ == "StableDiffusionInpaintPipeline"
    wanted = load_file(folder_of("sd-v1") / "unet" / "diffusion_pytorch_model.safetensors")
    wanted["conv_in.weight"] = load_file(file)["model.diffusion_model.input_blocks.0.0.weight"]
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in pipeline.unet.state_dict().items())


@pytest.mark.long
@pytest.mark.parametrize("kind", list(UNETS))
def test_models_for_inpainting_are_read_as_any_other(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "inpaint"
    save_pipeline(folder, kind, in_channels=9)
    if kind == "sdxl":
        edit_index(folder, "StableDiffusionXLInpaintPipeline")
    file = single_file(folder, tmp_path / "model.safetensors")
    source = resolve_model(str(file))
    assert source.config["in_channels"] == 9
    pipeline: Any = load_pipeline(source)
    assert type(pipeline).__name__ == f"StableDiffusion{'XL' if kind == 'sdxl' else ''}InpaintPipeline"
    wanted = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in pipeline.unet.state_dict().items())


@pytest.mark.long
def test_a_model_that_follows_instructions_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "instructions"
    save_pipeline(folder, "sd-v1", in_channels=8)
    edit_index(folder, "StableDiffusionInstructPix2PixPipeline")
    source = resolve_model(str(single_file(folder, tmp_path / "model.safetensors")))
    assert source.config["in_channels"] == 8
    assert type(load_pipeline(source)).__name__ == "StableDiffusionInstructPix2PixPipeline"


def edit_index(folder: Path, class_name: str) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": class_name}))


@pytest.mark.parametrize("channels", [5, pytest.param(7, marks=pytest.mark.long)])
def test_a_model_for_depth_or_another_purpose_says_what_to_give(
    channels: int, file_of: Any, tmp_path: Path
) -> None:
    file = single_file(file_of("sd-v2"), tmp_path / "model.safetensors", with_channels(channels))
    with pytest.raises(UnsupportedModelError, match=f"takes {channels} channels; .*diffusers folder"):
        resolve_model(str(file))


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b""]
)
def test_a_file_that_is_not_the_file_is_told(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match="git lfs pull" if content else "empty"):
        resolve_model(str(path))


def test_weights_of_eight_bits_are_told(file_of: Any, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = "model.diffusion_model.out.2.weight"
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)

    file = single_file(file_of("sd-v1"), tmp_path / "model.safetensors", change)
    with pytest.raises(UnsupportedModelError, match=r"quantised .*out\.2\.weight is in F8_E4M3"):
        resolve_model(str(file))


def test_a_unet_with_parts_that_are_not_known_is_refused(file_of: Any, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.diffusion_model.time_embed.cond_proj.weight"] = torch.zeros(8, 8)

    file = single_file(file_of("sd-v1"), tmp_path / "model.safetensors", change)
    with pytest.raises(UnsupportedModelError, match=r"time_embed\.cond_proj\.weight is not part"):
        resolve_model(str(file))


@pytest.mark.long
def test_the_pipeline_of_a_single_file_is_loaded_as_any_other(file_of: Any, tmp_path: Path) -> None:
    file = single_file(file_of("sdxl"), tmp_path / "model.safetensors")
    assert type(load_pipeline(resolve_model(str(file)))).__name__ == "StableDiffusionXLPipeline"


# Every tensor of the file ------------------------------------------------------------------------------------------

STRAY = ("first_stage_model.decoder.foo", "cond_stage_model.zz", "lora_unet_x.lora_up.weight", "other")
HARMLESS = (
    *("model_ema.decay", "betas", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1", "denoiser.sigmas"),
    *("first_stage_model.loss.logvar", "cond_stage_model.transformer.text_model.embeddings.position_ids"),
    *("conditioner.embedders.1.model.logit_scale", "v_pred"),
)


@pytest.mark.parametrize("kind", ONE_OF_THEM)
def test_every_tensor_of_a_file_is_used_or_named(kind: str, file_of: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with safe_open(file_of(kind), "pt") as opened:
        metadata = opened.metadata()
    whole, draw = load_file(file_of(kind)), random.Random(kind)

    def read(tensors: dict[str, torch.Tensor], notes: dict[str, str]) -> None:
        save_file(tensors, file, notes)
        configs_of(file, preset_config)

    others = [key for key in whole if not key.startswith("model.diffusion_model.")]
    for notes in (metadata, {}):
        read(whole | {key: torch.zeros(1) for key in HARMLESS}, notes)
    for key in (*draw.sample(others, 2), draw.choice(list(whole))):
        with pytest.raises(UnsupportedModelError, match="is missing"):
            read({name: tensor for name, tensor in whole.items() if name != key}, metadata)
        with pytest.raises(UnsupportedModelError, match="instead of"):
            read(whole | {key: torch.zeros(3, 5, 7)}, metadata)
    for key in STRAY:
        with pytest.raises(UnsupportedModelError, match=f"{key} is not part of"):
            read(whole | {key: torch.zeros(3)}, metadata)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        pytest.param("num_hidden_layers", 1, marks=pytest.mark.long),
        ("num_hidden_layers", 3),
        ("vocab_size", "x"),
        ("hidden_size", None),
    ],
)
def test_settings_in_a_file_that_are_not_those_of_its_tensors_are_refused(
    setting: str, value: object, file_of: Any, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    with safe_open(file_of("sd-v1"), "pt") as opened:
        metadata = opened.metadata()
    configs = json.loads(metadata["prune_lab.configs"])
    configs["text_encoder"][setting] = value
    save_file(load_file(file_of("sd-v1")), file, metadata | {"prune_lab.configs": json.dumps(configs)})
    with pytest.raises(UnsupportedModelError) as caught:
        resolve_model(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_a_folder_in_the_cache_that_lost_a_file_is_made_again(file_of: Any, tmp_path: Path) -> None:
    file = single_file(file_of("sd-v1"), tmp_path / "model.safetensors")
    folder = resolve_model(str(file)).folder
    assert folder is not None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    draw = random.Random(0)
    for path in draw.sample(files, 3):
        path.unlink()
    draw.choice([path for path in files if path.is_file()]).write_bytes(b"")
    assert resolve_model(str(file)).folder == folder
    assert all(path.stat().st_size for path in files)


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json", "nothing"])
def test_the_words_of_a_tokenizer_go_along(form: str, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline"))
    words = load_pipeline(resolve_model(str(folder))).tokenizer.get_vocab()
    model = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    if form != "tokenizer.json":
        (folder / "tokenizer" / "tokenizer.json").unlink()
    if form == "vocab.json":
        (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
        (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    file = tmp_path / "model.safetensors"
    if form == "nothing":
        with pytest.raises(ModelFormatError, match="has its words"):
            export_single_file(resolve_model(str(folder)), file)
        return
    export_single_file(resolve_model(str(folder)), file)
    assert load_pipeline(resolve_model(str(file))).tokenizer.get_vocab() == words
