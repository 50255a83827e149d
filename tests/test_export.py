"""Single files in the LDM layout: equal to the bit through diffusers' own loader, for originals and students."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPES, TINY_UNET, BuiltOnce, build_text_encoder, build_tokenizer, build_unet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from prune_lab.assets import reference_folder
from prune_lab.blocks import architecture_of
from prune_lab.cli import app
from prune_lab.errors import DataError, ModelFormatError, StorageError, UnsupportedModelError
from prune_lab.export import EXPORT_TARGETS, export_single_file
from prune_lab.export.single_file import _tokenizers
from prune_lab.families import plain_config
from prune_lab.families.ldm_readers import reader_notes
from prune_lab.forms import exists_in
from prune_lab.models import ModelSource, preset_config, resolve_model
from prune_lab.models.single_file import TOKENIZER_FILES
from prune_lab.plans import parse_plan
from prune_lab.runtime import write_json
from prune_lab.surgery import TEACHER, materialise, prune_pipeline, writing

ExportOf = Callable[..., Path]


def narrow_vae() -> Any:
    """Four levels, as the first stage model of Stable Diffusion: latents are an eighth of the picture."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 16, 32, 32],
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=128,
    )


def text_encoder(**changes: Any) -> Any:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    config = copy.deepcopy(build_text_encoder().config)
    with_projection = changes.pop("with_projection", False)
    for name, value in changes.items():
        setattr(config, name, value)
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)


def save_pipeline(folder: Path, kind: str) -> None:
    """A pipeline of the full topology of ``kind`` (sd-v1, sd-v2 or sdxl), narrow, with random weights."""
    import diffusers

    tokenizer = build_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts: dict[str, Any] = {
            "vae": narrow_vae().eval(),
            "tokenizer": tokenizer,
            "scheduler": diffusers.DDIMScheduler(
                beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False, clip_sample=False
            ),
        }
        if kind == "sdxl":
            second = text_encoder(
                hidden_size=32, projection_dim=32, hidden_act="gelu", with_projection=True
            ).eval()
            widths = {"cross_attention_dim": 16 + 32, "projection_class_embeddings_input_dim": 6 * 8 + 32}
            unet = build_unet({**SHAPES["sdxl"], **widths})
            pipeline = diffusers.StableDiffusionXLPipeline(
                unet=unet,
                text_encoder=text_encoder().eval(),
                text_encoder_2=second,
                tokenizer_2=tokenizer,
                **parts,
            )
        else:
            act = "gelu" if kind == "sd-v2" else "quick_gelu"
            pipeline = diffusers.StableDiffusionPipeline(
                unet=build_unet(SHAPES[kind]),
                text_encoder=text_encoder(hidden_act=act).eval(),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
                **parts,
            )
    pipeline.save_pretrained(folder, safe_serialization=True)


@pytest.fixture(scope="module")
def pipeline_of(built_once: BuiltOnce) -> Callable[[str], Path]:
    return lambda kind: built_once(f"export-{kind}", lambda folder: save_pipeline(folder, kind))


def student_of(folder: Path, plan: str, out: Path) -> Path:
    source = resolve_model(str(folder))
    return prune_pipeline(source, parse_plan(plan, source.architecture), out)


def exported(folder: Path, out: Path, **options: Any) -> Path:
    return export_single_file(resolve_model(str(folder)), out, **options).path


def from_single_file(file: Path, folder: Path) -> Any:
    """What diffusers' own loader reads from ``file``, with the configs in ``folder``, offline."""
    import diffusers

    name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    more = {} if "XL" in name else {"safety_checker": None, "feature_extractor": None}
    return getattr(diffusers, name).from_single_file(
        str(file), config=str(folder), local_files_only=True, dtype=torch.float32, **more
    )


def from_folder(folder: Path) -> Any:
    import diffusers

    return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


def drawn(pipeline: Any) -> torch.Tensor:
    """A picture of one step; the weights are copied, since kernels round otherwise at odd addresses in a file's map."""
    for part in pipeline.components.values():
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
            parameter.data = parameter.data.clone()
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64}
    found = pipeline(
        "a red cat",
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **size,
    )
    return torch.as_tensor(found.images)


def assert_same_pipeline(found: Any, wanted: Any) -> None:
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(wanted, part, None) is None:
            continue
        tensors, ours = getattr(wanted, part).state_dict(), getattr(found, part).state_dict()
        assert ours.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(ours[key], tensor), f"{part}: {key}"
    assert torch.equal(drawn(found), drawn(wanted))


@pytest.mark.parametrize("kind", ["sd-v1", pytest.param("sd-v2", marks=pytest.mark.long), "sdxl"])
def test_diffusers_reads_the_file_back_to_the_bit(kind: str, pipeline_of: Any, tmp_path: Path) -> None:
    folder = pipeline_of(kind)
    file = exported(folder, tmp_path / "model.safetensors")
    assert_same_pipeline(from_single_file(file, folder), from_folder(folder))


@pytest.mark.parametrize(
    "plan",
    [
        "bk-tiny",
        *(
            pytest.param(plan, marks=pytest.mark.long)
            for plan in ("bk-base", "bk-small", "-Md.A1 -Md.R2", "-Dn1.A1 -Dn1.A2")
        ),
    ],
)
def test_diffusers_reads_students_that_it_can_express(plan: str, pipeline_of: Any, tmp_path: Path) -> None:
    student = student_of(pipeline_of("sd-v1"), plan, tmp_path / "student")
    file = exported(student, tmp_path / "model.safetensors")
    assert_same_pipeline(from_single_file(file, student), from_folder(student))


def test_a_student_of_stable_diffusion_2(pipeline_of: Any, tmp_path: Path) -> None:
    student = student_of(pipeline_of("sd-v2"), "bk-small", tmp_path / "student")
    file = exported(student, tmp_path / "model.safetensors")
    assert_same_pipeline(from_single_file(file, student), from_folder(student))


def test_a_student_of_unequal_depth_holds_the_same_tensors_as_its_folder(
    pipeline_of: Any, tmp_path: Path
) -> None:
    student = student_of(pipeline_of("sd-v1"), "-Dn2.R2 -Dn2.A2 -Up3.R2 -Up3.A2", tmp_path / "student")
    found = load_file(exported(student, tmp_path / "model.safetensors"))
    unet = load_file(student / "unet" / "diffusion_pytorch_model.safetensors")
    assert json.loads((student / "unet" / "config.json").read_text())["layers_per_block"] == [2, 1, 2, 2]
    # Dn2 keeps one layer: its sampler is the fifth input block, and the first layer of Dn3 the sixth
    pairs = {
        "input_blocks.4.0.in_layers.2.weight": "down_blocks.1.resnets.0.conv1.weight",
        "input_blocks.5.0.op.weight": "down_blocks.1.downsamplers.0.conv.weight",
        "input_blocks.6.1.proj_in.weight": "down_blocks.2.attentions.0.proj_in.weight",
        "output_blocks.7.2.conv.weight": "up_blocks.2.upsamplers.0.conv.weight",
        "output_blocks.8.0.skip_connection.bias": "up_blocks.3.resnets.0.conv_shortcut.bias",
        "output_blocks.10.1.proj_out.bias": "up_blocks.3.attentions.2.proj_out.bias",
    }
    for theirs, ours in pairs.items():
        assert torch.equal(found[f"model.diffusion_model.{theirs}"], unet[ours]), theirs
    assert sum(key.startswith("model.diffusion_model.") for key in found) == len(unet)


def test_half_precision_halves_the_file(pipeline_of: Any, tmp_path: Path) -> None:
    folder = pipeline_of("sd-v1")
    whole = load_file(exported(folder, tmp_path / "whole.safetensors"))
    half = load_file(exported(folder, tmp_path / "half.safetensors", dtype=torch.float16))
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    assert all(torch.equal(half[key], tensor.half()) for key, tensor in whole.items())


def test_each_part_keeps_its_own_format(pipeline_of: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(pipeline_of("sd-v1"), folder)
    rewrite(folder / "text_encoder" / "model.safetensors", lambda key, tensor: (key, tensor.half()))
    rewrite(
        folder / "vae" / "diffusion_pytorch_model.safetensors", lambda key, tensor: (key, tensor.bfloat16())
    )
    found = load_file(exported(folder, tmp_path / "model.safetensors"))
    assert found["cond_stage_model.transformer.text_model.final_layer_norm.bias"].dtype == torch.float16
    assert found["first_stage_model.quant_conv.weight"].dtype == torch.bfloat16
    assert found["model.diffusion_model.out.2.weight"].dtype == torch.float32


def rewrite(path: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    tensors = dict(change(key, tensor) for key, tensor in load_file(path).items())
    save_file(tensors, path, metadata={"format": "pt"})


def old_name(key: str) -> str:
    """How diffusers called the attention of a VAE before version 0.12, as the files of Stable Diffusion 1 still do."""
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        key = key.replace(f".{new}.", f".{old}.")
    return key


def test_files_with_older_names_give_the_same_file(pipeline_of: Any, tmp_path: Path) -> None:
    folder, old = pipeline_of("sd-v1"), tmp_path / "old"
    shutil.copytree(folder, old)
    rewrite(old / "vae" / "diffusion_pytorch_model.safetensors", lambda key, tensor: (old_name(key), tensor))
    text = load_file(old / "text_encoder" / "model.safetensors")
    older = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in text.items()}
    older["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(older, old / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    found = load_file(exported(old, tmp_path / "old.safetensors"))
    wanted = load_file(exported(folder, tmp_path / "model.safetensors"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_the_plan_and_where_it_came_from_go_along(pipeline_of: Any, tmp_path: Path) -> None:
    student = student_of(pipeline_of("sd-v1"), "bk-base", tmp_path / "student")
    text = (
        student / "text_encoder" / "config.json"
    )  # older versions of transformers write where a model was read
    text.write_text(json.dumps(json.loads(text.read_text()) | {"_name_or_path": str(tmp_path)}))
    with safe_open(exported(student, tmp_path / "model.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["prune_lab.plan"])["names"] == ["bk-base"]
    assert json.loads(metadata["prune_lab.provenance"])["plan"].startswith("-Dn1.R2")
    configs = json.loads(metadata["prune_lab.configs"])
    assert configs["unet"]["layers_per_block"] == 1
    assert configs["scheduler"]["_class_name"] == "DDIMScheduler"
    assert not [value for value in metadata.values() if str(tmp_path) in value or "/shared/" in value]


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a": "\xe9"}', b"", b"{'a': 1}"])
@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_a_file_of_a_tokenizer_that_is_no_text_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / name).write_bytes(content)
    source = ModelSource("m", "pipeline", tmp_path, {})
    settings = name.endswith(".json") and name != "vocab.json"
    refused: Any = (
        pytest.raises(DataError, match="asked ") if settings or b"\xe9" in content else nullcontext()
    )
    with refused:
        _tokenizers(source, {"text_encoder": {"vocab_size": 7}})


def test_a_unet_folder_gives_the_unet_alone(pipeline_of: Any, tmp_path: Path) -> None:
    found = load_file(exported(pipeline_of("sd-v1") / "unet", tmp_path / "unet.safetensors"))
    assert all(key.startswith("model.diffusion_model.") for key in found)
    assert len(found) == 686


def test_nothing_is_replaced_unasked_and_nothing_is_left_half_written(
    pipeline_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = pipeline_of("sd-v1"), tmp_path / "model.safetensors"
    out.write_text("mine")
    with pytest.raises(StorageError, match="--force"):
        exported(folder, out)
    with pytest.raises(StorageError, match="did not write"):
        exported(folder, out, force=True)
    assert out.read_text() == "mine"
    out.unlink()
    whole = exported(folder, out).read_bytes()
    monkeypatch.setattr("prune_lab.export.single_file.track", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exported(folder, out, force=True)
    assert out.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    monkeypatch.undo()
    assert len(load_file(exported(folder, out, force=True))) > 686


def interrupted(items: Any, *_: Any, **__: Any) -> Any:
    yield items[0]
    raise KeyboardInterrupt


def test_the_weights_of_the_model_itself_are_never_replaced(pipeline_of: Any, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pipeline_of("sd-v1"), folder)
    with pytest.raises(StorageError, match="the model that it is made from"):
        exported(folder, folder / "unet" / "diffusion_pytorch_model.safetensors", force=True)


def test_what_lies_behind_a_link_is_never_replaced(pipeline_of: Any, tmp_path: Path) -> None:
    folder, real = tmp_path / "copy", tmp_path / "real"
    shutil.copytree(pipeline_of("sd-v1"), folder)
    shutil.move(folder / "unet", real)
    (folder / "unet").symlink_to(real)
    with pytest.raises(StorageError, match="model that it is made from"):
        exported(folder, real / "diffusion_pytorch_model.safetensors", force=True)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e6, torch.float16, r"conv_out\.bias.*float16.*give float32 or bfloat16"),
        (float("nan"), None, r"conv_out\.bias.*not a number.*fetch the model again"),
    ],
)
def test_numbers_that_are_none_are_not_written(
    value: float, dtype: torch.dtype | None, message: str, pipeline_of: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pipeline_of("sd-v1"), folder)
    rewrite(
        folder / "unet" / "diffusion_pytorch_model.safetensors",
        lambda key, tensor: (key, tensor.fill_(value) if key == "conv_out.bias" else tensor),
    )
    with pytest.raises(ModelFormatError, match=message):
        exported(folder, tmp_path / "model.safetensors", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("name", ["model.ckpt", "model"])
def test_the_name_says_what_it_is(name: str, pipeline_of: Any, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"ends in \.safetensors"):
        exported(pipeline_of("sd-v1"), tmp_path / name)


def test_structure_alone_has_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no weights"):
        exported(Path("sd-v1.4"), tmp_path / "model.safetensors")


def test_the_shipped_model_is_read_back(tmp_path: Path) -> None:
    file = exported(Path("reference"), tmp_path / "model.safetensors")
    assert_same_pipeline(from_single_file(file, reference_folder()), from_folder(reference_folder()))


def tiny_t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


def tiny_autoencoder() -> Any:
    import diffusers

    few: Any = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    widths: Any = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return diffusers.AutoencoderTiny(**few, **widths)


OTHER_PARTS: dict[str, Callable[[], Any]] = {"AutoencoderTiny": tiny_autoencoder, "T5EncoderModel": tiny_t5}


@pytest.mark.parametrize(("part", "wrong"), [("vae", "AutoencoderTiny"), ("text_encoder", "T5EncoderModel")])
def test_a_part_without_a_place_is_named(part: str, wrong: str, pipeline_of: Any, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pipeline_of("sd-v1"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index[part][1] = wrong
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / part)
    OTHER_PARTS[wrong]().save_pretrained(folder / part)
    with pytest.raises(UnsupportedModelError, match=f"{part}, a {wrong}.*U-Net alone"):
        exported(folder, tmp_path / "model.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_renamed_tensor_of_the_text_encoder_is_named(pipeline_of: Any, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pipeline_of("sd-v1"), folder)
    rewrite(
        folder / "text_encoder" / "model.safetensors",
        lambda key, tensor: (key.replace("final_layer_norm.bias", "final.bias"), tensor),
    )
    with pytest.raises(ModelFormatError, match=r"final_layer_norm\.bias is missing \(final\.bias is there"):
        exported(folder, tmp_path / "model.safetensors")


NEUTRAL = {
    **TINY_UNET,
    "transformer_layers_per_block": [[1, 0], [1, 1], [1, 1], [1, 1]],
    "reverse_transformer_layers_per_block": [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]],
}


def neutral_folder(folder: Path, *, zero: bool) -> Path:
    unet = build_unet(NEUTRAL)
    for attention in (unet.down_blocks[0].attentions[1], unet.up_blocks[2].attentions[2]):
        if zero:
            torch.nn.init.zeros_(attention.proj_out.weight)
            torch.nn.init.zeros_(attention.proj_out.bias)
    unet.save_pretrained(folder)
    return folder


def test_attention_that_is_the_identity_is_left_out(tmp_path: Path) -> None:
    source = resolve_model(str(neutral_folder(tmp_path / "unet", zero=True)))
    found = load_file(export_single_file(source, tmp_path / "unet.safetensors").path)
    assert not [key for key in found if ".input_blocks.2.1." in key]
    assert "model.diffusion_model.output_blocks.8.1.conv.weight" in found


def test_attention_without_layers_that_is_not_the_identity_is_refused(tmp_path: Path) -> None:
    source = resolve_model(str(neutral_folder(tmp_path / "unet", zero=False)))
    with pytest.raises(UnsupportedModelError, match=r"down_blocks\.0\.attentions\.1"):
        export_single_file(source, tmp_path / "unet.safetensors")


def test_what_the_layout_cannot_hold_is_told(pipeline_of: Any, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pipeline_of("sd-v2"), folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}
    scheduler.write_text(json.dumps(settings))
    student = student_of(folder, "bk-small", tmp_path / "student")
    notes = export_single_file(resolve_model(str(student)), tmp_path / "model.safetensors").notes
    assert [note.split(";")[0] for note in notes] == [
        "norm_num_groups is 4",
        "attention heads are [1, 2, 4, 4] by stage",
        "the model predicts v, which the layout does not say",
        "the U-Net has no mid stage",
    ]


@pytest.mark.parametrize("preset", ["sd-v1.4", "sd-v1.5", "sd-v2.1-base", "sd-v2.1", "sdxl-base"])
def test_the_originals_are_what_the_readers_assume(preset: str) -> None:
    assert reader_notes({"unet": preset_config(preset)}) == ()


def test_the_verb_writes_the_file_and_says_what_is_in_it(pipeline_of: Any, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    asked = ["export", str(pipeline_of("sd-v1")), "--to", "single-file", "--out", str(out), "--json"]
    found = CliRunner().invoke(app, [*asked, "--dtype", "float16"])
    assert found.exit_code == 0, found.output
    (row,) = json.loads(found.stdout)
    assert row["bytes"] == out.stat().st_size
    assert row["tensors"] == len(load_file(out))
    assert "norm_num_groups" in found.stderr
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 2
    assert "--force" in again.stderr


def test_another_format_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["export", "reference", "--to", "gguf", "--out", str(tmp_path / "x")])
    assert found.exit_code == 2
    assert all(name in found.stderr for name in EXPORT_TARGETS)


# A neutral mid stage -------------------------------------------------------------------------------------------------


def with_whole_middle(folder: Path, out: Path) -> Path:
    """The configs of the pipeline in ``folder``, those of a U-Net with a whole mid stage."""
    shutil.copytree(folder, out)
    path = out / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mid_block_type": "UNetMidBlock2DCrossAttn"}))
    return out


@pytest.mark.parametrize(
    ("kind", "plan"),
    [
        ("sd-v1", "-Md.A1 -Md.R2"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("sd-v1", "bk-small"), ("sd-v1", "bk-tiny"), ("sdxl", "-Md"))
        ),
    ],
)
def test_a_neutral_mid_stage_changes_no_bit(kind: str, plan: str, pipeline_of: Any, tmp_path: Path) -> None:
    student = student_of(pipeline_of(kind), plan, tmp_path / "student")
    native = export_single_file(resolve_model(str(student)), tmp_path / "native.safetensors")
    neutral = export_single_file(
        resolve_model(str(student)), tmp_path / "neutral.safetensors", form="neutral"
    )
    found, without = load_file(neutral.path), load_file(native.path)
    added = {key: tensor for key, tensor in found.items() if key not in without}
    assert all(".middle_block." in key and not tensor.any() for key, tensor in added.items())
    assert all(torch.equal(found[key], tensor) for key, tensor in without.items())
    middle = {key.split(".")[3] for key in found if ".middle_block." in key}
    assert middle == {"0", "1", "2"}
    num_bytes = sum(tensor.numel() * 4 for tensor in added.values())
    assert neutral.num_bytes > native.num_bytes + num_bytes
    assert "of zeros" in neutral.notes[-1]
    assert not any("no mid stage" in note for note in neutral.notes)
    read = from_single_file(neutral.path, with_whole_middle(student, tmp_path / "configs"))
    assert read.unet.mid_block is not None
    assert torch.equal(drawn(read), drawn(from_folder(student)))


def test_a_neutral_file_of_a_whole_model_is_the_native_one(pipeline_of: Any, tmp_path: Path) -> None:
    folder = pipeline_of("sd-v1")
    native, neutral = (
        exported(folder, tmp_path / f"{form}.safetensors", form=form) for form in ("native", "neutral")
    )
    assert load_file(native).keys() == load_file(neutral).keys()
    assert exported(folder, tmp_path / "half.safetensors", form="neutral", dtype=torch.float16).is_file()


def test_neutral_keys_of_small_are_those_of_base(tmp_path: Path) -> None:
    # Small is Base without a mid stage: by the public layout's own loop the neutral file has the names of Base
    from ldm_layout import GOLDEN, read_golden

    from prune_lab.blocks import architecture_of
    from prune_lab.families.ldm_keys import unet_places, unet_shapes, with_middle
    from prune_lab.plans import native_layout

    architecture = architecture_of(preset_config("sd-v1.4"))
    config = with_middle(native_layout(architecture, parse_plan("bk-small", architecture)).config)
    shapes = unet_shapes(config)
    found = {place.key: place.shape([shapes[key] for key in place.sources]) for place in unet_places(config)}
    assert found == read_golden(GOLDEN / "ldm_bk_base.txt")


def test_an_unknown_form_is_refused(pipeline_of: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="native or neutral"):
        exported(pipeline_of("sd-v1"), tmp_path / "x.safetensors", form="padded")


def test_no_path_of_this_machine_goes_along(pipeline_of: Any, tmp_path: Path) -> None:
    student = student_of(pipeline_of("sd-v1"), "bk-base", tmp_path / "student")
    provenance = student / "unet" / "provenance.json"
    told = json.loads(provenance.read_text()) | {"more": {"files": [str(tmp_path / "a.safetensors")]}}
    provenance.write_text(json.dumps(told))
    config = student / "text_encoder" / "config.json"
    nested = {"notes": {"_name_or_path": str(tmp_path)}}
    config.write_text(json.dumps(json.loads(config.read_text()) | nested))
    with safe_open(exported(student, tmp_path / "model.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["prune_lab.provenance"])["more"] == {"files": ["a.safetensors"]}
    assert not [value for value in metadata.values() if str(tmp_path) in value]


@pytest.mark.parametrize(
    ("plan", "advice", "form"),
    [
        ("-Dn1.A1", "--form neutral", "neutral"),
        ("~Dn3.A1.heads=1@0", "--form padded", "padded"),
        ("-Dn1.R1 ~Dn3.A1.heads=1@0", "leave out the widths", ""),
    ],
)
def test_what_is_advised_in_place_of_code_of_its_own_can_be_built(
    tiny_unet: Any, tmp_path: Path, plan: str, advice: str, form: Any
) -> None:
    cut = parse_plan(plan, architecture_of(tiny_unet)).built("own")
    writing._write_model(materialise(tiny_unet, cut), tmp_path, cut, "")
    told = {
        TEACHER: {"_class_name": "UNet2DConditionModel", **plain_config(architecture_of(tiny_unet).config)}
    }
    write_json(tmp_path / "provenance.json", told)
    with pytest.raises(UnsupportedModelError, match=advice) as error:
        exported(tmp_path, tmp_path / "own.safetensors")
    assert "\n" not in str(error.value)
    assert not form or exists_in(architecture_of(tiny_unet), cut, form)
    assert exists_in(architecture_of(tiny_unet), cut, "padded") == (form == "padded")


@pytest.mark.parametrize(("widths", "form"), [({}, "neutral"), ({"up_blocks.0": {"heads": 1}}, "padded")])
def test_a_student_with_code_of_its_own_is_refused_by_its_config_alone(
    tmp_path: Path, widths: dict[str, Any], form: str
) -> None:
    write_json(tmp_path / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    (tmp_path / "unet").mkdir()
    own = {"_class_name": "PrunedUNet2DConditionModel", "widths": widths, "removed": {}}
    write_json(tmp_path / "unet" / "config.json", own)  # there is no other file
    for model in (tmp_path, tmp_path / "unet"):
        asked = ["export", str(model), "--to", "single-file", "--out", str(tmp_path / "out.safetensors")]
        result = CliRunner().invoke(app, asked)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: asked to export {model}, a student with code of its own ")
        assert f"--plan {model} --form {form} --out DIR" in result.stderr
        assert "openvino" in result.stderr
        assert len(result.stderr.splitlines()) == 1
