"""Weights in a byte a number, and a pipeline put together of pieces that ship apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prune_lab.assets.assembling import PACKED, SHARED, WEIGHTS, assembled
from prune_lab.assets.packing import packed, unpacked
from prune_lab.errors import StorageError


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
    (shared / "vae" / "config.json").write_text("other")
    assert assembled(own, shared) != folder
    assert (folder / "vae" / "config.json").read_text() == '"vae"'


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(StorageError, match="cache"):
        assembled(*_pieces(tmp_path))
