"""A pipeline of any known family: found, checked part by part, loaded, and pruned to one that draws in plain diffusers.

A model without a pipeline, and the structure of one, as well.
"""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import figures_left_blank
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config
from tiny_pipelines import DRAWN_WITH, KINDS, drawn
from torch import nn
from typer.testing import CliRunner

from prune_lab.cli import app
from prune_lab.counting import count_call, meta_copy
from prune_lab.errors import ModelFormatError, UnsupportedModelError
from prune_lab.export import student_in
from prune_lab.families import family_of, model_of
from prune_lab.families.drawing import text_length
from prune_lab.models import load_model, load_pipeline, resolve_model
from prune_lab.models.parts import component_of
from prune_lab.probes import picture_side, pixels_per_latent
from prune_lab.profiling import profile_pipeline
from prune_lab.runtime import read_json

pytestmark = pytest.mark.usefixtures("blank_figures")

Folders = Callable[[str], Path]


def others_long(names: Iterable[str], *few: str) -> list[Any]:
    """The names as parameters of a test, of which all but a ``few`` are for the long tests."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.long) for name in names]


NEW = tuple(kind for kind in KINDS if kind != "sd")
PLANS: Mapping[str, str] = {
    "pixart": "-B2",
    "sd3": "-B4",  # the last block, which others follow in its place
    "flux": "-D2 -S1",
    "wan": "-B3",
    "ddpm": "-Md.A1",
    "dit": "-B2",
}


def component(folder: Path) -> str:
    return component_of(read_json(folder / "model_index.json"))  # type: ignore[arg-type]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def invoke(*args: object, fails: bool = False) -> str:
    found = CliRunner().invoke(app, [str(arg) for arg in args])
    assert found.exit_code == (2 if fails else 0), found.output
    return found.output


@pytest.fixture
def copied(pipeline_folder: Folders, tmp_path: Path) -> Folders:
    """``copied(kind)``: a pipeline folder of its own, free to be damaged."""
    return lambda kind: Path(shutil.copytree(pipeline_folder(kind), tmp_path / kind))


# Found and loaded -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", others_long(KINDS, *NEW))
def test_the_model_of_a_pipeline_is_found_and_draws_as_in_plain_diffusers(
    kind: str, pipeline_folder: Folders
) -> None:
    folder = pipeline_folder(kind)
    source = resolve_model(str(folder))

    assert source.kind == "pipeline"
    assert source.component == ("unet" if kind in ("sd", "ddpm") else "transformer")
    assert source.model_folder == folder / source.component
    assert source.weight_paths
    plain = DiffusionPipeline.from_pretrained(folder)
    assert source.architecture.total_params == getattr(plain, source.component).num_parameters()
    assert torch.equal(drawn(load_pipeline(source), kind), drawn(plain, kind))


def test_texts_are_as_long_as_the_pipeline_makes_them(pipeline_folder: Folders, copied: Folders) -> None:
    found = {kind: resolve_model(str(pipeline_folder(kind))).tokens for kind in KINDS}
    assert found == {"sd": 16, "pixart": 120, "sd3": 77 + 256, "flux": 512, "wan": 512, "ddpm": 0, "dit": 0}
    short = copied("pixart")  # a text encoder that takes fewer, as CLIP does
    edit(short / "text_encoder" / "config.json", max_position_embeddings=24)
    assert resolve_model(str(short)).tokens == 24


@pytest.mark.parametrize("kind", others_long(["pixart", "dit"], "pixart"))
def test_a_published_folder_that_names_the_class_of_before_is_read_as_todays(
    kind: str, copied: Folders, tmp_path: Path
) -> None:
    """PixArt-Alpha and DiT were published as a Transformer2DModel, which diffusers loads as what they are."""
    folder = copied(kind)
    todays = resolve_model(str(folder))
    edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    former = {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "only_cross_attention": False}
    edit(folder / "transformer" / "config.json", **former)
    if kind == "pixart":  # the caption of no words, which training left there
        path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        edit_tensors(path, lambda tensors: tensors.update({"caption_projection.y_embedding": torch.ones(2)}))

    source = resolve_model(str(folder))

    assert source.config["_class_name"] == todays.config["_class_name"]
    assert source.architecture.signature == todays.architecture.signature
    assert torch.equal(drawn(load_pipeline(source), kind), drawn(load_pipeline(todays), kind))
    invoke("prune", folder, "--plan", PLANS[kind], "--out", tmp_path / "small")
    index: Any = read_json(tmp_path / "small" / "model_index.json")
    assert index["transformer"] == ["diffusers", todays.config["_class_name"]]
    assert drawn(DiffusionPipeline.from_pretrained(tmp_path / "small"), kind).isfinite().all()


# Refused --------------------------------------------------------------------------------------------------------------


def loses_a_tensor(folder: Path, part: str) -> None:
    path = next((folder / part).glob("*.safetensors"))
    edit_tensors(path, lambda tensors: tensors.__delitem__(max(tensors)))


def has_a_tensor_of_another_shape(folder: Path, part: str) -> None:
    path = next((folder / part).glob("*.safetensors"))
    edit_tensors(path, lambda tensors: tensors.update({sorted(tensors)[0]: torch.zeros(3, 5)}))


def is_gone(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)


def ends_early(folder: Path, part: str) -> None:
    path = next((folder / part).glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = (loses_a_tensor, has_a_tensor_of_another_shape, is_gone, ends_early)


def weighty(folder: Path) -> list[str]:
    """Names of the parts that have weights."""
    return sorted(path.name for path in folder.iterdir() if list(path.glob("*.safetensors")))


@pytest.mark.parametrize("kind", NEW)
def test_files_that_do_not_fit_are_refused_by_the_name_of_their_part(kind: str, copied: Folders) -> None:
    whole = copied(kind)
    for number, part in enumerate(weighty(whole), start=NEW.index(kind)):
        damage = DAMAGES[number % len(DAMAGES)]
        folder = Path(shutil.copytree(whole, whole.with_name(f"{part}-damaged")))
        damage(folder, part)
        with pytest.raises(ModelFormatError, match=f"/{part}\\b") as caught:
            resolve_model(str(folder))
        assert "\n" not in str(caught.value)


_HEADS = ("proj_out.weight", "proj_out.bias", "proj_out_2.weight", "proj_out_2.bias", "conv_out.weight")
_WORDS = ("shared.weight", "token_embedding.weight")


def say_nothing(tensors: dict[str, torch.Tensor]) -> None:
    """Nothing of what goes in comes out: the last matrix is zero, or all words are one."""
    for name, tensor in tensors.items():
        if name.endswith(_HEADS):
            tensors[name] = torch.zeros_like(tensor)
        elif name.endswith(_WORDS):
            tensors[name] = torch.ones_like(tensor)


def are_no_numbers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[max(tensors)].fill_(float("nan"))


@pytest.mark.parametrize("kind", NEW)
def test_weights_that_are_no_numbers_or_say_nothing_are_refused_by_the_name_of_their_part(
    kind: str, copied: Folders
) -> None:
    whole = copied(kind)
    source = resolve_model(str(whole))
    model = load_model(source)
    for part in weighty(whole):
        path = next((whole / part).glob("*.safetensors"))
        content = path.read_bytes()
        for change, why in ((are_no_numbers, "not a number|NaN"), (say_nothing, "gives the same answer")):
            edit_tensors(path, change)
            with pytest.raises(ModelFormatError, match=why) as caught:
                load_pipeline(source, model=None if part == source.component else model)
            assert (source.called if part == source.component else part) in str(caught.value)
            path.write_bytes(content)


def words_are_gone(folder: Path) -> None:
    for name in ("tokenizer.json", "spiece.model"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)


REFUSED: Mapping[str, tuple[str, Callable[[Path], None], str]] = {
    "a transformer of another class": (
        "pixart",
        lambda folder: edit(folder / "model_index.json", transformer=["diffusers", "DiTTransformer2DModel"]),
        "lists as transformer a DiTTransformer2DModel, .*PixArtTransformer2DModel",
    ),
    "a pipeline of another class": (
        "pixart",
        lambda folder: edit(folder / "model_index.json", _class_name="DiTPipeline"),
        "PixArtTransformer2DModel, where a DiTPipeline takes a DiTTransformer2DModel",
    ),
    "a U-Net where a transformer belongs": (
        "ddpm",
        lambda folder: edit(folder / "model_index.json", _class_name="FluxPipeline"),
        "FluxPipeline, which takes a transformer, and lists a UNet2DModel as unet",
    ),
    "a conditional U-Net's pipeline": (
        "ddpm",
        lambda folder: edit(folder / "model_index.json", unet=["diffusers", "UNet2DConditionModel"]),
        "lists as unet a UNet2DConditionModel, .*is of a UNet2DModel",
    ),
    "two experts": (
        "wan",
        lambda folder: edit(
            folder / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"]
        ),
        "lists transformer and transformer_2, where one transformer is known",
    ),
    "no words": ("pixart", words_are_gone, "tokenizer"),
    "betas where flow matching belongs": (
        "sd3",
        lambda folder: edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"]),
        "DDIMScheduler, works by betas, where the model of such a pipeline goes by flow matching",
    ),
    "flow matching where betas belong": (
        "dit",
        lambda folder: edit(
            folder / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]
        ),
        "does not work by betas",
    ),
    "a shift of nothing": (
        "flux",
        lambda folder: edit(folder / "scheduler" / "scheduler_config.json", base_shift=-0.5),
        "whose base_shift is -0.5",
    ),
    "a scale of nothing": (
        "wan",
        lambda folder: edit(folder / "vae" / "config.json", latents_std=[0.0, 1.0, 1.0, 1.0]),
        "latents_std",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_pipeline_that_cannot_draw_says_why(name: str, copied: Folders) -> None:
    kind, damage, why = REFUSED[name]
    folder = copied(kind)
    damage(folder)
    with pytest.raises((ModelFormatError, UnsupportedModelError), match=why) as caught:
        load_pipeline(resolve_model(str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "StableCascadeDecoderPipeline",
            "decoder a StableCascadeUNet, which has stages of blocks of its own",
        ),
        ("StableVideoDiffusionPipeline", "unet a UNetSpatioTemporalConditionModel, which mixes the frames"),
        ("HiDreamImagePipeline", "transformer a HiDreamImageTransformer2DModel, which gives every block"),
        (
            "UnCLIPPipeline",
            "PriorTransformer, which makes the embedding of a picture|has no model whose blocks",
        ),
    ],
)
def test_a_pipeline_whose_model_is_not_known_is_refused_with_the_reason(
    name: str, why: str, copied: Folders
) -> None:
    folder = copied("dit")
    edit(folder / "model_index.json", _class_name=name)
    with pytest.raises(UnsupportedModelError, match=why):
        resolve_model(str(folder))


# Pruned ---------------------------------------------------------------------------------------------------------------

_DRAWS = """
import json, sys
import numpy, torch
from diffusers import DiffusionPipeline
for folder, asked in json.loads(sys.argv[1]).items():
    pipeline = DiffusionPipeline.from_pretrained(folder)
    found = pipeline(**asked, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    picture = found.frames[0] if hasattr(found, "frames") else found.images[0]
    print(int(numpy.isfinite(picture).all() and picture.max() > picture.min()))
assert "prune_lab" not in sys.modules
"""


@pytest.fixture(scope="session")
def pruned(built_once: Callable[..., Path], pipeline_folder: Folders) -> Path:
    """The folder with a student of each kind, by its name, as the command line wrote it; do not change it."""

    def build(folder: Path) -> None:
        with figures_left_blank():
            for kind, plan in PLANS.items():
                invoke("prune", pipeline_folder(kind), "--plan", plan, "--out", folder / kind)

    return built_once("pruned-kinds", build)


@pytest.mark.long
def test_a_student_of_each_kind_draws_in_plain_diffusers_in_a_process_of_its_own(pruned: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", _DRAWS, json.dumps({str(pruned / kind): DRAWN_WITH[kind] for kind in PLANS})],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.split() == ["1"] * len(PLANS)


@pytest.mark.parametrize("kind", PLANS)
def test_a_student_is_a_model_like_others(kind: str, pruned: Path, pipeline_folder: Folders) -> None:
    source, teacher = resolve_model(str(pruned / kind)), resolve_model(str(pipeline_folder(kind)))
    removed = len(PLANS[kind].split())

    assert len(source.architecture.blocks) == len(teacher.architecture.blocks) - removed
    assert source.architecture.total_params < teacher.architecture.total_params
    assert student_in(pruned / kind).plan.text == PLANS[kind]
    assert f"in the {source.called}: " in (pruned / kind / "README.md").read_text(encoding="utf-8")
    load_pipeline(source)  # nothing of it is silent
    assert drawn(DiffusionPipeline.from_pretrained(pruned / kind), kind).isfinite().all()


FEW_PIXELS = "num_inference_steps=2, height=32, width=32"


@pytest.mark.parametrize("kind", PLANS)
def test_the_lines_on_the_card_draw(
    kind: str, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (pruned / kind / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0].replace('"."', repr(str(pruned / kind)))
    small = FEW_PIXELS if kind in ("flux", "wan") else "num_inference_steps=2"
    more = ", num_frames=5, max_sequence_length=16" if kind == "wan" else ""
    for steps in (25, 50):
        code = code.replace(f"num_inference_steps={steps}", small + more)
    monkeypatch.chdir(tmp_path)

    exec(compile(code, "card", "exec"), {})

    (written,) = tmp_path.iterdir()
    assert written.name == ("video.gif" if kind == "wan" else "picture.png")


@pytest.mark.parametrize("kind", ["flux", "ddpm"])
def test_what_is_known_of_stable_diffusion_alone_is_refused_by_name(
    kind: str, pruned: Path, pipeline_folder: Folders, tmp_path: Path
) -> None:
    name = resolve_model(str(pruned / kind)).config["_class_name"]
    one = ["export", pipeline_folder(kind), "--to", "single-file", "--out", tmp_path / "one.safetensors"]
    save_file({"a": torch.zeros(1)}, tmp_path / "lora.safetensors")
    lora = [
        "convert",
        "lora",
        tmp_path / "lora.safetensors",
        "--plan",
        pruned / kind,
        "--out",
        tmp_path / "new",
    ]
    for asked in (one, lora):
        assert f"found a {name}; this is known of a UNet2DConditionModel alone" in " ".join(
            invoke(*asked, fails=True).split()
        )


# What a picture costs -------------------------------------------------------------------------------------------------


class _Decoding(nn.Module):
    """The VAE, called as pipelines call it."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.vae.decode(z, return_dict=False)[0]
        return found


def calls_of_plain_diffusers(pipeline: Any, **more: Any) -> dict[str, list[dict[str, Any]]]:
    """By part of a pipeline the tensors of each call of it, on ``meta``, while plain diffusers draws one picture."""
    found: dict[str, list[dict[str, Any]]] = {}
    model, vae, handles = model_of(pipeline), getattr(pipeline, "vae", None), []

    def on_meta(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: on_meta(one) for name, one in value.items()}
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    def watching(name: str, takes: inspect.Signature) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            given = dict(takes.bind(*args, **kwargs).arguments)
            found.setdefault(name, []).append(
                {key: on_meta(one) for key, one in given.items() if isinstance(one, (torch.Tensor, dict))}
            )

        return hook

    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and part is not vae:
            hook = watching(
                family_of(model).component if part is model else name, inspect.signature(part.forward)
            )
            handles.append(part.register_forward_pre_hook(hook, with_kwargs=True))
    if vae is not None:
        decode = vae.decode
        vae.decode = lambda z, **rest: (
            found.setdefault("vae_decoder", []).append({"z": z.to("meta")}) or decode(z, **rest)
        )
    pipeline.set_progress_bar_config(disable=True)
    pipeline(**more, generator=torch.Generator().manual_seed(0))
    for handle in handles:
        handle.remove()
    if vae is not None:
        del vae.decode
    return found


@pytest.mark.parametrize("kind", others_long([kind for kind in KINDS if kind != "ddpm"], "wan"))
def test_the_shares_of_a_pipeline_are_those_of_plain_diffusers(kind: str, pipeline_folder: Folders) -> None:
    """What each part does for a picture of 32 pixels: as many multiply-adds as its calls by the plain pipeline."""
    pipeline, steps = DiffusionPipeline.from_pretrained(pipeline_folder(kind)), 3
    asked: dict[str, Any] = dict(DRAWN_WITH[kind]) | {"num_inference_steps": steps}
    if (length := text_length(pipeline)) is not None:  # as it is drawn with here
        asked["max_sequence_length"] = length
    frames = 1
    if "height" in inspect.signature(type(pipeline).__call__).parameters:
        asked |= {"height": 32, "width": 32}
    if kind == "wan":
        asked["num_frames"], frames = 5, 2
    side = 32 if "height" in asked else picture_side(pipeline)
    calls = calls_of_plain_diffusers(pipeline, **asked)
    latent = side // pixels_per_latent(pipeline)
    table = profile_pipeline(
        pipeline, steps=steps, latent=latent, tokens=None, frames=frames, runs=2, warmup=0
    ).set_index("part")
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    parts["vae_decoder"] = _Decoding(parts.pop("vae"))
    assert set(table.index) == {*calls, "total"}
    for name, given in calls.items():
        theirs = sum(count_call(meta_copy(parts[name]), one).total for one in given)
        ours = int(table["calls"][name]) * int(table["macs"][name])
        assert ours == pytest.approx(theirs, rel=0.02), (name, ours / theirs)


# Without a pipeline ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", others_long(NEW, "sd3", "ddpm"))
def test_a_model_alone_is_found_and_pruned(kind: str, pipeline_folder: Folders, tmp_path: Path) -> None:
    whole = resolve_model(str(pipeline_folder(kind)))
    assert whole.model_folder is not None
    alone = Path(shutil.copytree(whole.model_folder, tmp_path / "alone"))
    source = resolve_model(str(alone))

    assert not source.is_pipeline
    assert source.architecture.signature == whole.architecture.signature
    invoke("prune", alone, "--plan", PLANS[kind], "--out", tmp_path / "small")
    plain = type(load_model(source)).from_pretrained(tmp_path / "small")
    assert plain.num_parameters() == resolve_model(str(tmp_path / "small")).architecture.total_params


@pytest.mark.parametrize(
    "name",
    others_long(
        ["SD3Transformer2DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel"],
        "WanTransformer3DModel",
    ),
)
def test_the_structure_alone_has_blocks_and_costs(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config(name)))
    listed = CliRunner().invoke(app, ["blocks", str(path), "--json"])
    assert [row["name"] for row in json.loads(listed.stdout)] == ["B1", "B2", "B3", "B4"]
    found = CliRunner().invoke(app, ["profile", str(path), "--plan", "-B2", "--no-latency", "--json"])
    teacher, student = json.loads(found.stdout)
    assert student["params"] < teacher["params"]
    drawn_weights = load_model(resolve_model(str(path), random_weights=True, seed=3))
    assert type(drawn_weights).__name__ == name
