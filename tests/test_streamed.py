"""A model that is read from disk block by block answers as the whole one, reads each block once a pass, and says first
what memory that takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPES, build_unet

from prune_lab.blocks import architecture_of
from prune_lab.errors import ModelFormatError
from prune_lab.models import streamed
from prune_lab.models.streamed import is_streamed, load_streamed
from prune_lab.prefix_sharing import needed_bytes, predict_without
from prune_lab.probes import predict, random_probe
from prune_lab.surgery import bypassed

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


def test_missing_weights_are_named(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors"))[1:]:
        path.unlink()
    with pytest.raises(ModelFormatError, match="found none called"):
        predict(load_streamed(folder), random_probe(SMALL, samples=1, seed=0))
    next(folder.glob("*.safetensors")).write_bytes(b"no weights at all")
    with pytest.raises(ModelFormatError, match="damaged file"):
        load_streamed(folder)
