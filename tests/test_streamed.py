"""A model that is read from disk block by block answers as the whole one, reads each block once a pass, and says first
what memory that takes.
"""

from __future__ import annotations

import json
import re
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from click.testing import Result
from conftest import SHAPES, build_unet
from safetensors.torch import load_file, save_file
from tiny_pipelines import KINDS, tiny_pipeline
from typer.testing import CliRunner

from prune_lab.blocks import architecture_of
from prune_lab.cli import app
from prune_lab.errors import ModelFormatError, UnsupportedModelError
from prune_lab.families import example_inputs
from prune_lab.importance import outputs
from prune_lab.models import load_model, resolve_model, streamed
from prune_lab.models.streamed import is_streamed, load_streamed
from prune_lab.plans import plan_of
from prune_lab.prefix_sharing import needed_bytes, predict_without
from prune_lab.probes import predict, random_probe
from prune_lab.session import session
from prune_lab.surgery import bypassed, materialise

SMALL = {**SHAPES["sdxl"], "sample_size": 8, "layers_per_block": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in three files."""
    build_unet(SMALL).save_pretrained(tmp_path / "unet", max_shard_size="40KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 2
    return tmp_path / "unet"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor was read."""
    counted: Counter[str] = Counter()
    plain: Callable[..., Any] = streamed._Weights.read

    def reading(self: Any, name: str) -> Any:
        counted[name] += 1
        return plain(self, name)

    monkeypatch.setattr(streamed._Weights, "read", reading)
    return counted


def held(model: Any) -> set[str]:
    """Paths of the units whose weights are there."""
    units = [unit for unit in architecture_of(model).outline.units if not unit.inside]
    return {
        unit.path
        for unit in units
        if all(one.device.type != "meta" for one in model.get_submodule(unit.path).parameters())
    }


def test_it_answers_as_the_whole_model_and_holds_one_block(folder: Path) -> None:
    model, whole = load_streamed(folder), build_unet(SMALL)
    assert is_streamed(model)
    assert not is_streamed(whole)
    assert held(model) == set()
    probe = random_probe(whole.config, samples=2, seed=0, timesteps=2)
    assert torch.equal(predict(model, probe), predict(whole, probe))
    assert len(held(model)) == 1
    with bypassed(model, ["Md.A1"]), bypassed(whole, ["Md.A1"]):
        assert torch.equal(predict(model, probe), predict(whole, probe))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("DiTTransformer2DModel", torch.float32),  # its head reads a part of the first block
        ("WanTransformer3DModel", torch.bfloat16),  # diffusers leaves some modules in float32
    ],
)
def test_transformers_answer_as_diffusers_loads_them(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_models.tiny_model(name).save_pretrained(tmp_path)
    whole = load_model(resolve_model(str(tmp_path)), dtype=dtype)
    model = load_streamed(tmp_path, dtype=dtype)
    inputs = tiny_models.random_inputs(whole)
    inputs = {key: one.to(dtype) if torch.is_floating_point(one) else one for key, one in inputs.items()}
    with torch.no_grad():
        for _ in range(2):  # what leaves the memory comes back
            found, wanted = (one(**inputs, return_dict=False)[0] for one in (model, whole))
            assert torch.equal(found, wanted)


@pytest.mark.long
def test_a_pass_for_all_sets_reads_each_block_once(folder: Path, read: Counter[str]) -> None:
    model, whole = load_streamed(folder), build_unet(SMALL)
    probe = random_probe(whole.config, samples=2, seed=0, timesteps=2)
    blocks = architecture_of(whole).blocks
    sets = [frozenset[str](), *(frozenset({block.name}) for block in blocks)]
    ((_, found),) = predict_without(model, probe, sets)
    ((_, wanted),) = predict_without(whole, probe, sets)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max() / other.abs().max()) < 5e-5
    names = {name: unit for unit in blocks for name in read if name.startswith(f"{unit.path}.")}
    # for the sets, and for the first row alone, which is compared with them
    assert {read[name] for name in names} == {2}
    assert {count for name, count in read.items() if name not in names and "samplers" not in name} == {1}


def test_the_memory_is_known_before(folder: Path) -> None:
    model, whole = load_streamed(folder), build_unet(SMALL)
    probe = random_probe(whole.config, samples=2, seed=0, timesteps=2)

    def inputs(copies: int) -> dict[str, Any]:
        ((_, given),) = probe.rows([0, 1] * copies).batches(2 * copies, whole)
        return given

    sets = [frozenset[str](), frozenset({"Md.A1"})]
    needed = [needed_bytes(one, inputs, sets, width=2) for one in (whole, model)]
    units = [whole.get_submodule(unit.path) for unit in architecture_of(whole).units]
    largest = max(sum(4 * one.numel() for one in unit.parameters()) for unit in units)
    assert needed[0] < needed[1] <= needed[0] + largest
    assert needed_bytes(model, inputs, sets, width=1) < needed[1]


def test_where_weights_are_converted_both_forms_count(tmp_path: Path) -> None:
    """A block lies on disk in float32 and is computed in bfloat16: of its largest tensor both are there at once."""
    needed = []
    for dtype in (torch.float32, torch.bfloat16):
        build_unet(SMALL).to(dtype).save_pretrained(tmp_path / str(dtype))
        model: Any = load_streamed(tmp_path / str(dtype), dtype=torch.bfloat16)
        inputs = example_inputs(SMALL, batch=1, dtype=torch.bfloat16)
        needed.append(needed_bytes(model, lambda _, given=inputs: given, [frozenset()], width=1))
    largest = max(one.numel() for one in build_unet(SMALL).parameters())
    assert needed[1] < needed[0] <= needed[1] + 4 * largest


def test_everything_is_computed_on_the_device(folder: Path, read: Counter[str]) -> None:
    """On ``meta`` in place of a GPU: one tensor that stays on the CPU would be an error."""
    model: Any = load_streamed(folder, device="meta")
    assert model.device.type == "meta"
    with torch.no_grad():
        answer = model(**example_inputs(SMALL, device="meta"), return_dict=False)[0]
    assert answer.device.type == "meta"
    assert set(read) == set(model.state_dict())


@pytest.mark.parametrize(
    "kind",
    [
        "sd3",
        *(pytest.param(kind, marks=pytest.mark.long) for kind in KINDS if kind != "sd3"),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_every_kind_of_pipeline_gives_the_same_bit_for_bit(
    kind: str, pipeline_folder: Callable[[str], Path]
) -> None:
    """Also several sets at a time; the weights that are loaded and those that are read lie alike in memory."""
    source = resolve_model(str(pipeline_folder(kind)))
    assert source.model_folder is not None
    for dtype in (torch.float32, torch.bfloat16):
        whole = load_model(source, dtype=dtype)
        model = load_streamed(source.model_folder, dtype=dtype)
        probe = random_probe(whole.config, samples=2, seed=0, timesteps=2)
        sets = [frozenset[str](), *(frozenset({block.name}) for block in architecture_of(whole).blocks)]
        ((_, wanted),) = predict_without(whole, probe, sets)
        ((_, found),) = predict_without(model, probe, sets)
        assert all(map(torch.equal, found, wanted))


def test_missing_weights_are_named(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    kept = second.read_bytes()
    second.write_bytes(b"no weights at all")
    with pytest.raises(ModelFormatError, match=re.escape(second.name)):
        load_streamed(folder)
    second.write_bytes(kept)
    model: Any = load_streamed(folder)
    for path in (path for path in folder.glob("*.safetensors") if path != first):
        path.unlink()
    with pytest.raises(ModelFormatError, match="found a damaged file"):
        predict(model, random_probe(SMALL, samples=1, seed=0))
    with pytest.raises(ModelFormatError, match="shards of its weights"):
        load_streamed(folder)


def test_a_tensor_that_no_file_holds_is_named(tmp_path: Path) -> None:
    build_unet(SMALL).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    lost = next(name for name in tensors if name.startswith("mid_block.attentions.0"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file)
    with pytest.raises(ModelFormatError, match=f"found none called '{lost}'"):
        predict(load_streamed(tmp_path), random_probe(SMALL, samples=1, seed=0))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 1e6])
@pytest.mark.parametrize("place", ["conv_out", "mid_block.attentions.0", "up_blocks.1.resnets.0"])
def test_numbers_that_are_none_are_named_where_their_block_is_read(
    number: float, place: str, tmp_path: Path
) -> None:
    """As in a model that is loaded whole, each time that it is asked; 1e6 is none to float16."""
    build_unet(SMALL).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith(place))
    tensors[name].view(-1)[-1] = number
    save_file(tensors, file, {"format": "pt"})
    dtype = torch.float16 if number == 1e6 else torch.float32
    with pytest.raises(ModelFormatError, match=re.escape(name)) as whole:
        load_model(resolve_model(str(tmp_path)), dtype=dtype)
    probe = random_probe(SMALL, samples=1, seed=0)
    for _ in range(2):
        with pytest.raises(ModelFormatError, match=re.escape(name)) as read:
            predict(load_streamed(tmp_path, dtype=dtype), probe)
        assert str(read.value).split(": ", 1)[1] == str(whole.value).split(": ", 1)[1]
    if place != "conv_out":
        model = load_streamed(tmp_path, dtype=dtype)
        for _ in range(2):  # what failed is not taken for read
            with pytest.raises(ModelFormatError, match=re.escape(name)):
                predict(model, probe)


def test_weights_that_are_all_one_number_are_found_out(tmp_path: Path) -> None:
    build_unet(SMALL).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file, {"format": "pt"}
    )
    model: Any = load_streamed(tmp_path)
    with pytest.raises(ModelFormatError, match="matrices holds 0 throughout"):
        predict(model, random_probe(SMALL, samples=1, seed=0))


# Of a run and from the command line --------------------------------------------------------------------------------

FEW = (
    "--set",
    "probe.samples=2",
    "--set",
    "score.bootstrap=1",
    "--set",
    "score.groups=block",
    "--device",
    "cpu",
)


def scored(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["score", *map(str, arguments), *FEW, "--json"])


def impacts_in(found: Result) -> list[float]:
    assert found.exit_code == 0, found.output
    return [row["impact"] for row in json.loads(found.stdout)]


@pytest.fixture
def never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may load the model with all of its weights."""

    def refuse(*_given: Any, **_options: Any) -> None:
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr("prune_lab.session.session.load_model", refuse)
    monkeypatch.setattr("prune_lab.models.loading.load_model", refuse)


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline("pixart", tmp_path_factory.mktemp("pixart") / "pixart")


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What encodes texts, as weak references; it must be gone when the first answer is asked for."""
    found: list[Any] = []
    load, answers = session.load_pipeline, outputs.predict_without

    def loading(*given: Any, **options: Any) -> Any:
        pipeline: Any = load(*given, **options)
        found.append(weakref.ref(pipeline.text_encoder))
        return pipeline

    def answering(*given: Any, **options: Any) -> Any:
        assert all(one() is None for one in found)
        return answers(*given, **options)

    monkeypatch.setattr(session, "load_pipeline", loading)
    monkeypatch.setattr(outputs, "predict_without", answering)
    return found


@pytest.mark.parametrize(
    ("name", "fixture"),
    [
        ("model", "folder"),
        ("sd", "tiny_pipeline_folder"),
        pytest.param("pixart", "pixart", marks=pytest.mark.long),
    ],
)
def test_scores_of_blocks_that_are_read_are_those_of_the_whole_model(
    name: str, fixture: str, request: pytest.FixtureRequest
) -> None:
    own = () if name == "model" else ("--data", "shipped")
    asked = request.getfixturevalue(fixture)
    wanted = impacts_in(scored(asked, *own))
    request.getfixturevalue("never_whole")
    encoders = request.getfixturevalue("encoders")
    found = scored(asked, *own, "--stream")
    assert impacts_in(found) == wanted
    assert re.search(r"blocks are read from disk, 1 times each.* beside the .* in use", found.stderr)
    assert len(encoders) == (name != "model")
    assert len(re.findall(r"holds beside its .* takes .* until texts", found.stderr)) == len(encoders)


@pytest.mark.usefixtures("never_whole")
def test_a_model_that_does_not_fit_is_read_block_by_block(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_lab.session.session.free_bytes", lambda _device: 1000)
    found = scored(folder)
    assert impacts_in(found)
    assert "its blocks are read from disk" in found.stderr


def test_what_cannot_be_done_with_blocks_that_are_read(folder: Path, tmp_path: Path) -> None:
    found = scored(folder, "--stream", "--criterion", "magnitude")
    assert found.exit_code == 2
    assert "error: asked to score by magnitude" in found.stderr
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SMALL))
    found = scored(config, "--random-weights", "--stream")
    assert found.exit_code == 2
    assert "found no weights there" in found.stderr
    model: Any = load_streamed(folder)
    assert model.to("meta", torch.float16) is model
    with pytest.raises(UnsupportedModelError, match="read from disk"):
        materialise(model, plan_of(architecture_of(model), ["Md.A1"]))


def test_the_files_of_a_variant_are_those_that_are_read(tmp_path: Path) -> None:
    plain, half = build_unet(SMALL), build_unet(SMALL, seed=1).half()
    plain.save_pretrained(tmp_path)
    half.save_pretrained(tmp_path, variant="fp16")
    key = "conv_in.weight"
    assert torch.equal(load_streamed(tmp_path).state_dict()[key], plain.state_dict()[key])
    found = load_streamed(tmp_path, variant="fp16").state_dict()[key]
    assert torch.equal(found, half.state_dict()[key].float())


def test_the_memory_of_a_model_that_needs_more_than_shapes() -> None:
    """Mochi counts the words of its mask and asks for ``autocast``, which plain ``meta`` does not know."""
    model = tiny_models.tiny_model("MochiTransformer3DModel")
    blocks = architecture_of(model).blocks
    sets = [frozenset[str](), *(frozenset({block.name}) for block in blocks)]

    def inputs(copies: int) -> dict[str, Any]:
        return tiny_models.random_inputs(model, batch=copies)

    needed = [needed_bytes(model, inputs, sets, width=width) for width in (1, 4)]
    assert 0 < needed[0] < needed[1]
