"""The second model that ships: its weights in a byte a number, its pipeline of pieces, and its use, as of the first.

How well it was trained is looked at in tests/recipes/test_transformer_model.py.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import discovery
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    PixArtAlphaPipeline,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import prune_lab as pl
import prune_lab.assets
from prune_lab.assets import SHIPPED_MODELS, assets_folder, reference_folder, transformer_folder
from prune_lab.assets.assembling import PACKED, SHARED, WEIGHTS, assembled, kept_in
from prune_lab.assets.packing import packed, unpacked
from prune_lab.cli import app
from prune_lab.config import RunConfig
from prune_lab.errors import ConfigError, ModelNotFoundError, StorageError
from prune_lab.families import plain_config
from prune_lab.models import choose_scorer, load_model, of_shipped_family, resolve_model, shipped_like
from prune_lab.models.parts import why_no_text_to_image
from prune_lab.models.protection import check_apart, check_run_folder
from prune_lab.plans import is_native, plan_of
from prune_lab.prefix_sharing import predict_without
from prune_lab.probes import random_probe
from prune_lab.session.session import origin_of
from prune_lab.workflow import kind_of_target

# Stored in pieces --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(1, 5), columns=st.integers(1, 9), power=st.integers(-5, 3)
)
def test_a_packed_number_is_off_by_half_a_step_of_its_row_at_most(
    seed: int, rows: int, columns: int, power: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator) * 10.0**power
    matrix[0] *= torch.randint(0, 2, (), generator=generator)  # at times a row of zeros
    tensors = {"a.weight": matrix, "a.bias": torch.randn(rows, generator=generator)}
    small = packed(tensors, {"a.weight"})
    assert small["a.weight"].dtype == torch.int8
    found = unpacked(small)
    assert found.keys() == tensors.keys()
    assert {value.dtype for value in found.values()} == {torch.float16}
    step = matrix.abs().amax(1, keepdim=True) / 127
    # Half a step, and what float16 does to the number: its last bit, or half of its smallest number.
    off = (found["a.weight"].float() - matrix).abs()
    assert (off <= 0.501 * step + 2**-10 * matrix.abs() + 2**-25).all()
    assert torch.equal(found["a.bias"], tensors["a.bias"].half())


def _pieces(folder: Path) -> tuple[Path, Path]:
    own, shared = folder / "small", folder / "shared"
    (own / "transformer").mkdir(parents=True)
    (own / "model_index.json").write_text("{}")
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    save_file(packed({"w": matrix}, {"w"}), own / "transformer" / PACKED)
    for part in (*SHARED, "unet"):
        (shared / part).mkdir(parents=True)
        (shared / part / "config.json").write_text(json.dumps(part))
    return own, shared


def test_a_pipeline_is_put_together_once_and_anew_when_a_piece_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own, shared = _pieces(tmp_path)
    folder = assembled(own, shared)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {
        "model_index.json",
        f"transformer/{WEIGHTS}",
        *(f"{part}/config.json" for part in SHARED),
    }
    weights = folder / "transformer" / WEIGHTS
    assert torch.equal(load_file(weights)["w"], unpacked(load_file(own / "transformer" / PACKED))["w"])
    before = weights.stat().st_mtime_ns
    assert assembled(own, shared) == folder
    assert weights.stat().st_mtime_ns == before
    (folder / "vae" / "config.json").unlink()  # as one clears a cache
    weights.unlink()
    assert assembled(own, shared) == folder
    assert (folder / "vae" / "config.json").is_file()
    assert weights.is_file()
    (shared / "vae" / "config.json").write_text("other")
    assert assembled(own, shared) != folder
    assert (folder / "vae" / "config.json").read_text() == '"vae"'


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(StorageError, match=r"cache.*named by XDG_CACHE_HOME"):
        assembled(*_pieces(tmp_path))


# Used as the reference is ------------------------------------------------------------------------------------------


def test_it_is_a_model_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve_model("transformer")
    assert (source.kind, source.component, source.name, source.tokens) == (
        *("shipped", "transformer", "transformer"),
        24,
    )
    assert (source.has_weights, source.is_pipeline, source.notes) == (True, True, ())
    assert source.folder == transformer_folder()
    assert of_shipped_family(source)
    assert choose_scorer("", source).text == choose_scorer("reference", source).text == "reference"
    assert origin_of(RunConfig(model="transformer"), source) == "shipped"
    assert (
        str(pl.load("transformer"))
        == "transformer: 7,498,960 parameters, 12 blocks, 12 of them can be removed"
    )
    with pytest.raises(ModelNotFoundError, match="a shipped model and has none; leave --variant out"):
        resolve_model("transformer", variant="fp16")
    with pytest.raises(ModelNotFoundError, match="did you mean transformer"):
        resolve_model("transfomer")
    # A folder of that name, as every pipeline of a transformer has one, is not read without a word.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "transformer").mkdir()
    (note,) = resolve_model("transformer").notes
    assert note.endswith("the one in the folder here is ./transformer")


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_an_installation_without_it_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune_lab.assets, "assets_folder", lambda: tmp_path)
    with pytest.raises(ModelNotFoundError, match=f"^the model '{name}' is not part of this installation"):
        resolve_model(name)


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_nothing_is_written_over_a_model_that_ships(name: str, tmp_path: Path) -> None:
    model = {"the model": (name,)}
    places = [reference_folder(), assets_folder()]
    if name == "transformer":
        places += [assets_folder() / name / "new", transformer_folder(), kept_in() / "new"]
    for place in places:
        with pytest.raises(StorageError, match="the model that it is made from"):
            check_apart(place, model)
    check_apart(tmp_path / name, model)
    (tmp_path / name).mkdir()
    check_run_folder(tmp_path / name, RunConfig(model=name))


def test_every_subset_of_its_blocks_is_a_plain_config() -> None:
    architecture = resolve_model("transformer").architecture
    names = [block.name for block in architecture.blocks]
    sets = [some for size in range(1, 12) for some in itertools.combinations(names, size)]
    assert len(sets) == 2**12 - 2
    assert all(is_native(architecture, plan_of(architecture, some)) for some in sets)


def test_its_replay_is_a_plain_loop_bit_for_bit() -> None:
    source = resolve_model("transformer")
    model, units = load_model(source), source.architecture.outline.units
    probe = random_probe(plain_config(model), samples=2, seed=0, timesteps=2)
    inputs = next(probe.batches(2, model))[1]
    with torch.no_grad():
        sites = discovery.discover(model, [unit.path for unit in units], lambda: model(**inputs))
    by_name = {unit.name: site for unit, site in zip(units, sites, strict=True)}
    draw = random.Random(0)
    sets = [frozenset({name}) for name in by_name]
    sets += [frozenset(draw.sample(list(by_name), draw.randint(0, 12))) for _ in range(12)]
    ((_, alone),) = predict_without(model, probe, sets, batch=2, width=1)
    ((_, wide),) = predict_without(model, probe, sets, batch=2, width=5)
    for gone, one, other in zip(sets, alone, wide, strict=True):
        with torch.no_grad(), discovery.without(model, [by_name[name] for name in gone]):
            wanted = model(**inputs, return_dict=False)[0]
        assert torch.equal(one, wanted), sorted(gone)
        assert float((other - one).abs().max() / one.abs().max()) < 5e-5


def test_a_model_alone_is_judged_in_the_shipped_pipeline_of_its_class() -> None:
    folders = {name: resolve_model(name).model_folder for name in SHIPPED_MODELS}
    for name, folder in folders.items():
        assert shipped_like(resolve_model(str(folder))) == name
    assert shipped_like(resolve_model("flux-dev")) == "reference"
    alone = pl.load(str(folders["transformer"]), settings={"probe.samples": 2, "evaluate.steps": 2})
    (row,) = alone.evaluate("fluent emoji, fox").records()
    assert 0 < row["loss"] < 2
    with pytest.raises(
        ConfigError, match=r"a PixArtTransformer2DModel, in the pipeline reference.*its own class"
    ):
        alone.evaluate("fluent emoji, fox", base="reference")


def test_a_scheduler_that_takes_a_solvers_place_draws_too() -> None:
    assert why_no_text_to_image(PixArtAlphaPipeline, DPMSolverMultistepScheduler) == ""
    assert why_no_text_to_image(PixArtAlphaPipeline, DDIMScheduler) == ""
    for pipeline, scheduler in (
        (PixArtAlphaPipeline, FlowMatchEulerDiscreteScheduler),
        (LatentConsistencyModelPipeline, DDIMScheduler),  # it hands its scheduler more than others take
    ):
        found = why_no_text_to_image(pipeline, scheduler)
        assert re.fullmatch(rf"steps by a \w+, found a {scheduler.__name__}", found)


_DRAWS = """
import sys
import torch
from diffusers import PixArtAlphaPipeline
for folder, out in zip(sys.argv[1::2], sys.argv[2::2]):
    pipe = PixArtAlphaPipeline.from_pretrained(folder)
    asked = {"max_sequence_length": 24, "use_resolution_binning": False, "clean_caption": False}
    noise = torch.Generator().manual_seed(7)
    drawn = pipe("fluent emoji, fox", num_inference_steps=3, guidance_scale=4, generator=noise, **asked)
    drawn.images[0].save(out)
assert "prune_lab" not in sys.modules
"""


@pytest.mark.long
def test_it_and_its_student_draw_as_in_plain_diffusers_in_a_process_of_its_own(tmp_path: Path) -> None:
    from PIL import Image

    student = tmp_path / "student"
    found = CliRunner().invoke(app, ["prune", "transformer", "--plan", "-B3 -B8", "--out", str(student)])
    assert found.exit_code == 0, found.output
    assert of_shipped_family(resolve_model(str(student)))
    provenance = json.loads((student / "transformer" / "provenance.json").read_text())
    assert (provenance["source"], provenance["proof"]["largest_difference"]) == ("transformer", 0.0)
    folders = {"transformer": transformer_folder(), str(student): student}
    plain = {name: tmp_path / f"{folder.name}.png" for name, folder in folders.items()}
    asked = [str(one) for name, folder in folders.items() for one in (folder, plain[name])]
    drawn = subprocess.run(
        [sys.executable, "-c", _DRAWS, *asked], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert drawn.returncode == 0, drawn.stderr[-2000:]
    for name, picture in plain.items():
        ours = pl.load(name).generate("fluent emoji, fox", steps=3, guidance=4, seed=7)
        with Image.open(picture) as theirs:
            assert ours.columns[0].pictures[0].tobytes() == theirs.convert("RGB").tobytes()


def test_it_is_a_model_where_things_are_compared() -> None:
    assert kind_of_target("transformer") == kind_of_target("reference") == "model"
    found = pl.compare("transformer", "-B9").frame()
    assert list(found["kind"]) == ["model", "plan"]
    assert found["params"].is_monotonic_decreasing


def test_a_loaded_student_draws_from_a_prompt_alone() -> None:
    """Its pipeline expects longer texts and larger pictures: plain diffusers raises where it is not told."""
    pipeline = pl.load_student("transformer")
    pipeline.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 1, "output_type": "pt", "guidance_scale": 1.0}

    def drawn(*said: object, **more: object) -> torch.Tensor:
        noise = torch.Generator().manual_seed(3)
        found: torch.Tensor = pipeline(*said, **asked, **more, generator=noise).images
        return found

    by_itself = drawn("fluent emoji, fox")
    whole = drawn("fluent emoji, fox", max_sequence_length=24, use_resolution_binning=False)
    assert by_itself.shape == (1, 3, 64, 64)
    assert torch.equal(by_itself, whole)
    with pytest.raises(ValueError, match="max_position_embeddings"):  # what a call says counts
        drawn("fluent emoji, fox", max_sequence_length=120)
    assert isinstance(pipeline, PixArtAlphaPipeline)
    assert type(pipeline).__name__ == "PixArtAlphaPipeline"
