"""Models asked for in another number format: each is what plain diffusers gives, which is not what ``Module.to`` gives.

Some modules stay in float32, and what no file holds, such as the places of patches, is built and not cast.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from discovery import discover, without
from tiny_models import TINY_TRANSFORMERS, random_inputs, tiny_model
from tiny_pipelines import tiny_pipeline
from torch import Tensor, nn

from prune_lab.distill.batches import Batch
from prune_lab.distill.losses import teacher_output
from prune_lab.errors import ProofError
from prune_lab.families import as_loaded, empty_model, forward_inputs, meta_model, outline_of, plain_config
from prune_lab.models import load_model, resolve_model
from prune_lab.models.streamed import load_streamed
from prune_lab.plans import plan_of
from prune_lab.probes import random_probe
from prune_lab.profiling import profile_pipeline
from prune_lab.profiling.random_weights import random_model
from prune_lab.surgery import building, materialise, parts, prune_pipeline

# What diffusers says of its own parts; as an error inside of it, it would leave the default number format changed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
HALF = torch.bfloat16
# Some modules in float32; places of patches, angles or tables beside the weights; a tensor of numbers beside them.
ODD = (
    "WanTransformer3DModel",
    "ChromaTransformer2DModel",
    "LatteTransformer3DModel",
    "QwenImageTransformer2DModel",
)


def but(*few: str) -> list[Any]:
    """All transformers as parameters of a test, those that are not among the ``few`` for the long tests."""
    rest = sorted(TINY_TRANSFORMERS.keys() - set(few))
    return [*few, *(pytest.param(name, marks=pytest.mark.long) for name in rest)]


def inside(model: Any) -> dict[str, Tensor]:
    """Every tensor of ``model`` by its name: parameters, buffers, and those that are plain attributes."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for path, module in model.named_modules():
        found |= {f"{path}!{name}": one for name, one in vars(module).items() if isinstance(one, Tensor)}
    return found


def assert_same(ours: Any, plain: Any) -> None:
    found, wanted = inside(ours), inside(plain)
    assert found.keys() == wanted.keys()
    assert {name: one.dtype for name, one in found.items()} == {
        name: one.dtype for name, one in wanted.items()
    }
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def plainly(folder: Path, dtype: torch.dtype) -> Any:
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    if (folder / "README.md").is_file():  # code of its own
        return load_model(resolve_model(str(folder)), dtype=dtype)
    return getattr(diffusers, name).from_pretrained(folder, torch_dtype=dtype)


def answer(model: Any, inputs: Any) -> Tensor:
    for parameter in model.parameters():  # numbers in a file lie as they do there
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        found = model(**inputs, return_dict=False)[0]
    return found if isinstance(found, Tensor) else torch.stack(list(found))


@pytest.mark.parametrize("name", but(*ODD))
def test_a_model_in_another_format_is_that_of_diffusers(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    plain = diffusers.AutoModel.from_pretrained(str(tmp_path), torch_dtype=HALF)
    assert_same(as_loaded(tiny_model(name), HALF), plain)
    assert_same(load_model(resolve_model(str(tmp_path)), dtype=HALF), plain)
    formats = {key: one.dtype for key, one in inside(plain).items()}
    config = plain_config(plain)
    for made in (empty_model(config, HALF), meta_model(config, HALF), random_model(config, dtype=HALF)):
        assert {key: one.dtype for key, one in inside(made).items()} == formats
        assert made.dtype == plain.dtype
    drawn = load_model(resolve_model(str(tmp_path / "config.json")), dtype=HALF, random_weights=True)
    drawn.save_pretrained(tmp_path / "drawn")
    assert_same(drawn, diffusers.AutoModel.from_pretrained(str(tmp_path / "drawn"), torch_dtype=HALF))
    streamed: Any = load_streamed(tmp_path, dtype=HALF)
    held = {key: one for key, one in inside(streamed).items() if not one.is_meta}
    for key, tensor in held.items():
        assert tensor.dtype == formats[key], key
        assert torch.equal(tensor, inside(plain)[key]), key
    names = [unit.name for unit in outline_of(plain).units]
    student = materialise(plain, plan_of(resolve_model(str(tmp_path)).architecture, names[1:2]).built("own"))
    same = inside(student)
    for key, tensor in inside(plain).items():
        if key in same and same[key].numel():
            assert torch.equal(same[key], tensor), key


@pytest.mark.parametrize("dtype", [HALF, torch.float16])
@pytest.mark.parametrize("name", but("WanTransformer3DModel"))
def test_a_student_in_another_format_is_the_teacher_in_it_without_the_blocks(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    teacher = tiny_model(name)
    teacher.save_pretrained(tmp_path / "teacher")
    source = resolve_model(str(tmp_path / "teacher"))
    units = outline_of(teacher).units
    inputs = random_inputs(teacher)
    with torch.no_grad():
        sites = discover(teacher, [unit.path for unit in units], lambda: teacher(**inputs))
    gone = 1 if len(units) > 1 else 0
    plan = plan_of(source.architecture, (units[gone].name,)).built("own")
    out = prune_pipeline(source, plan, tmp_path / "out", dtype=dtype)
    plain, student = plainly(tmp_path / "teacher", dtype), plainly(out, dtype)
    formats = {key: one.dtype for key, one in plain.state_dict().items()}
    assert {key: one.dtype for key, one in student.state_dict().items()}.items() <= formats.items()
    # in float32, where every class can compute, with the numbers of the other format
    for model in (plain, student):
        nn.Module.to(model, torch.float32)
    with without(plain, [sites[gone]]):
        assert torch.equal(answer(student, inputs), answer(plain, inputs))


def test_the_proof_is_against_plain_diffusers_and_not_against_our_own_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("WanTransformer3DModel").save_pretrained(tmp_path / "teacher")
    source = resolve_model(str(tmp_path / "teacher"))
    plan = plan_of(source.architecture, ("B2",))
    monkeypatch.setattr(building, "converted", lambda name, tensor, dtype, *_: tensor.to(dtype))
    with pytest.raises(ProofError, match="differs"):
        prune_pipeline(source, plan, tmp_path / "out", dtype=HALF)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float16, HALF])
def test_the_other_parts_are_converted_as_they_are_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    """T5 keeps a matrix of each block in float32 where it is asked for in float16."""
    source = tiny_pipeline("wan", tmp_path / "source")
    parts.copy_parts(source, tmp_path, model="transformer", dtype=dtype)
    for part, library in {"text_encoder": transformers, "vae": diffusers}.items():
        name = json.loads((source / "model_index.json").read_text())[part][1]
        word = "dtype" if library is transformers else "torch_dtype"
        new, old = (
            getattr(library, name).from_pretrained(place / part, **{word: dtype})
            for place in (tmp_path, source)
        )
        assert_same(new, old)


def test_a_teacher_with_modules_in_float32_is_given_inputs_in_its_own_format(tmp_path: Path) -> None:
    """Its first tensor is in float32, and its inputs are not: where it teaches, and where its parts are timed."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        tiny_pipeline("wan", tmp_path / "wan"), torch_dtype=HALF
    )
    teacher, probe = pipeline.transformer, random_probe(pipeline.transformer.config, samples=2, seed=0)
    assert next(teacher.parameters()).dtype == torch.float32
    ones = torch.ones(2)
    batch = Batch(probe.noisy, probe.target, ones, probe.timesteps, probe.embeddings, {})
    inputs = forward_inputs(teacher, probe.noisy.to(HALF), probe.timesteps, probe.embeddings.to(HALF), {})
    with torch.no_grad():
        wanted = teacher(**inputs, return_dict=False)[0].float()
    assert torch.equal(teacher_output(teacher, (), batch, torch.float32).prediction, wanted)
    formats = {name: one.dtype for name, one in inside(teacher).items()}
    frame = profile_pipeline(pipeline, steps=2, frames=1, runs=2, warmup=0)
    assert frame["median_ms"].gt(0).all()
    assert {name: one.dtype for name, one in inside(teacher).items()} == formats
