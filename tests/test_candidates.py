"""Candidates: what is built from a pipeline folder, what is measured, and what a second call leaves alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from prune_lab.blocks import architecture_of
from prune_lab.candidates import build_candidate, load_candidate, load_student
from prune_lab.errors import NonNativePlanError, PlanError, RunError, UnsupportedModelError
from prune_lab.models import resolve_model
from prune_lab.plans import parse_plan
from prune_lab.surgery import bypassed


def predicted(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        found: torch.Tensor = unet(
            torch.randn(2, 4, 16, 16, generator=generator), 7, torch.randn(2, 5, 16, generator=generator)
        ).sample
    return found


def test_a_candidate_is_the_bypassed_teacher_on_disk(
    tiny_unet: Any, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    source = resolve_model(str(tiny_pipeline_folder))
    architecture = architecture_of(source.config)
    plan = parse_plan("bk-small", architecture)
    folder = tmp_path / plan.id
    candidate = build_candidate(source, plan, folder, runs=2, warmup=0)
    loaded = UNet2DConditionModel.from_pretrained(folder / "pruned").eval()
    with bypassed(tiny_unet, plan):
        assert torch.equal(predicted(loaded), predicted(tiny_unet))
    assert torch.equal(predicted(load_student(candidate)), predicted(loaded))
    profile = candidate.profile
    assert profile.params == sum(parameter.numel() for parameter in loaded.parameters())
    assert profile.disk_bytes == (folder / "pruned" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert profile.latency is not None
    assert profile.latency.runs == 2
    provenance = json.loads((folder / "pruned" / "provenance.json").read_text())
    assert (provenance["plan"], provenance["source"]) == (plan.text, tiny_pipeline_folder.name)
    proof = provenance["proof"]
    assert (proof["kind"], proof["parameters"]) == ("bypassed teacher", profile.params)
    assert proof["largest_difference"] == 0
    again = load_candidate(folder, architecture)
    assert (again.plan, again.plan.name) == (plan, "bk-small")


def test_a_unet_in_memory_is_copied_and_left_alone(tiny_unet: Any, tmp_path: Path) -> None:
    plan = parse_plan("bk-tiny", architecture_of(tiny_unet))
    before = predicted(tiny_unet)
    candidate = build_candidate(tiny_unet, plan, tmp_path / "tiny", runs=2, warmup=0)
    assert torch.equal(predicted(tiny_unet), before)
    with bypassed(tiny_unet, plan):
        assert torch.equal(predicted(load_student(candidate)), predicted(tiny_unet))


def test_only_what_is_missing_is_done_again(tiny_unet: Any, tmp_path: Path) -> None:
    plan = parse_plan("bk-base", architecture_of(tiny_unet))
    folder = tmp_path / "base"
    build_candidate(tiny_unet, plan, folder, runs=2, warmup=0)
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "pruned").iterdir()}
    measured = (folder / "profile.json").read_text()
    build_candidate(tiny_unet, plan, folder, runs=3, warmup=0)
    assert (folder / "profile.json").read_text() == measured
    (folder / "profile.json").unlink()
    with pytest.raises(RunError, match=r"lacks profile\.json"):
        load_candidate(folder, architecture_of(tiny_unet))
    again = build_candidate(tiny_unet, plan, folder, runs=3, warmup=0)
    assert again.profile.latency is not None
    assert again.profile.latency.runs == 3
    assert stamps == {path: path.stat().st_mtime_ns for path in (folder / "pruned").iterdir()}


def test_what_cannot_be_built_leaves_nothing(
    tiny_unet: Any, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    architecture = architecture_of(tiny_unet)
    with pytest.raises(NonNativePlanError):
        build_candidate(tiny_unet, parse_plan("-Dn1.A1", architecture), tmp_path / "wild")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_config))
    with pytest.raises(UnsupportedModelError, match="structure only"):
        build_candidate(resolve_model(str(config)), parse_plan("bk-base", architecture), tmp_path / "wild")
    assert not (tmp_path / "wild").exists()


def test_a_folder_belongs_to_one_plan_and_one_architecture(tiny_unet: Any, tmp_path: Path) -> None:
    architecture = architecture_of(tiny_unet)
    base, small = (parse_plan(name, architecture) for name in ("bk-base", "bk-small"))
    folder = tmp_path / "candidate"
    candidate = build_candidate(tiny_unet, base, folder, runs=2, warmup=0)
    with pytest.raises(RunError, match=f"{small.id}.*{base.id}"):
        build_candidate(tiny_unet, small, folder)
    with pytest.raises(PlanError):
        load_candidate(folder, architecture_of({**tiny_unet.config, "block_out_channels": [8, 16, 16, 16]}))
    with pytest.raises(RunError, match=r"asked for the distilled model.*prune-lab run"):
        load_student(candidate, "distilled")
    shutil.copytree(folder / "pruned", folder / "distilled" / "model")
    assert torch.equal(predicted(load_student(candidate, "distilled")), predicted(load_student(candidate)))
