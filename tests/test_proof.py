"""Proofs: what is wrong with a written folder is found by the process that loads it, and nothing is left of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prune_lab.blocks import architecture_of
from prune_lab.errors import ProofError
from prune_lab.models import load_model, resolve_model
from prune_lab.plans import parse_plan
from prune_lab.surgery import Original, digest_of, materialise, prove, prune_pipeline, save_model, writing
from prune_lab.surgery import proof as proof_module


def prune(folder: Path, out: Path, plan: str = "bk-base") -> dict[str, Any]:
    """The proof of ``folder`` pruned into ``out``."""
    source = resolve_model(str(folder))
    prune_pipeline(source, parse_plan(plan, source.architecture), out)
    provenance: dict[str, Any] = json.loads((out / "unet" / "provenance.json").read_text())
    return dict(provenance["proof"])


def change_a_weight(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"][0] += 1e-4
    save_file(tensors, path, {"format": "pt"})


def lose_layers(folder: Path) -> None:
    """The fault of nested depths: a config that builds fewer layers than the weights have."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"transformer_layers_per_block": 0}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def after_writing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``after_writing(change)``: a mistake in what is written of the U-Net, as a fault of ours would make it."""
    written = writing._write_model

    def with_mistake(change: Any) -> None:
        def write(unet: Any, folder: Path, *more: Any) -> None:
            written(unet, folder, *more)
            change(folder)

        monkeypatch.setattr(writing, "_write_model", write)

    return with_mistake


def test_the_proof_of_a_pruned_pipeline(tiny_pipeline_folder: Path, tiny_unet: Any, tmp_path: Path) -> None:
    found = prune(tiny_pipeline_folder, tmp_path / "out")
    student = materialise(tiny_unet, parse_plan("bk-base", architecture_of(tiny_unet)))
    parameters = sum(parameter.numel() for parameter in student.parameters())
    assert (found["kind"], found["parameters"], found["largest_difference"]) == (
        "bypassed teacher",
        parameters,
        0.0,
    )
    assert found["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (change_a_weight, r"its answer differs from that of the original without these blocks by \d"),
        (lose_layers, r"tensor \S*transformer_blocks\S* is missing and \d+ more"),
    ],
)
def test_a_wrong_student_is_refused_and_leaves_nothing(
    change: Any, says: str, tiny_pipeline_folder: Path, tmp_path: Path, after_writing: Any
) -> None:
    after_writing(change)
    with pytest.raises(ProofError, match=says) as refused:
        prune(tiny_pipeline_folder, tmp_path / "out")
    assert f"asked to write {tmp_path / 'out'};" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert ".tmp" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_memory_is_compared_tensor_by_tensor(
    tiny_unet: Any, tmp_path: Path, after_writing: Any
) -> None:
    plan = parse_plan("bk-tiny", architecture_of(tiny_unet))
    student = materialise(tiny_unet, plan)
    save_model(student, tmp_path / "good", plan, {})
    found = json.loads((tmp_path / "good" / "provenance.json").read_text())["proof"]
    assert (found["kind"], found["largest_difference"]) == ("same tensors", None)
    after_writing(change_a_weight)
    with pytest.raises(ProofError, match="its tensors are not those of the model that was saved"):
        save_model(student, tmp_path / "bad", plan, {})
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_a_model_that_was_loaded_does_not_name_its_folder(tiny_unet: Any, tmp_path: Path) -> None:
    plan = parse_plan("bk-tiny", architecture_of(tiny_unet))
    save_model(materialise(tiny_unet, plan), tmp_path / "once", plan, {})
    save_model(load_model(resolve_model(str(tmp_path / "once"))), tmp_path / "twice", plan, {})
    assert "_name_or_path" not in (tmp_path / "twice" / "config.json").read_text()


@pytest.mark.long
def test_a_distilled_student_is_proved_to_be_the_one_that_was_trained(distilled_alone: Path) -> None:
    folder = distilled_alone / "bk-tiny" / "distilled" / "model"
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["proof"]["kind"] == "same tensors"
    assert provenance["steps"] == 6


def test_another_set_of_blocks_is_another_function(
    tiny_unet: Any, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    """Two students of equal shape differ by their answers alone."""
    architecture = architecture_of(tiny_unet)
    plan = parse_plan("-Dn2.R2 -Dn2.A2 -Up3.R2 -Up3.A2", architecture)
    student = materialise(tiny_unet, plan)
    with torch.no_grad():  # as if Up3.R3 had gone and R2 stayed
        student.up_blocks[2].attentions[1].load_state_dict(tiny_unet.up_blocks[2].attentions[1].state_dict())
    source = resolve_model(str(tiny_pipeline_folder))
    assert source.model_folder is not None
    files = tuple(source.model_folder.glob("*.safetensors"))
    with pytest.raises(ProofError, match="its answer differs"):
        save_model(student, tmp_path / "out", plan, {}, original=Original(source.config, files, plan.removed))


def test_parts_of_different_formats_are_refused(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(tiny_pipeline_folder, folder)
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float16"}))
    with pytest.raises(ProofError, match=r"different number formats .*text_encoder \['torch.float16'\]"):
        prove(folder)


def test_it_loads_is_a_proof_too(tiny_pipeline_folder: Path) -> None:
    assert prove(tiny_pipeline_folder).kind == "loads"
    with pytest.raises(ProofError, match="tensor extra is missing"):
        prove(tiny_pipeline_folder / "unet", shapes={"extra": (1,)})


def test_numbers_are_the_same_in_every_format_that_holds_them(tiny_unet: Any) -> None:
    digest = digest_of(tiny_unet.half())
    assert digest_of(tiny_unet.float()) == digest
    tiny_unet.conv_out.bias.data[0] += 1
    assert digest_of(tiny_unet) != digest


# The other process -------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_it_knows_nothing_of_a_launch_and_starts_again_when_it_was_killed(
    tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "7")
    prover = proof_module._Prover()
    monkeypatch.setattr(proof_module, "_PROVER", prover)
    try:
        prove(tiny_pipeline_folder / "unet")
        first = prover.start()
        environment = Path(f"/proc/{first.pid}/environ")
        if environment.exists():
            found = environment.read_text().split("\0")
            assert not [entry for entry in found if entry.endswith("=7")]
            assert "OMP_NUM_THREADS=1" in found
        first.kill()
        first.wait()
        assert prove(tiny_pipeline_folder / "unet").kind == "loads"
        assert prover.start().pid != first.pid
    finally:
        prover.stop()


def test_what_ended_it_is_said(tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof_module, "_PROVER", proof_module._Prover())
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ProofError, match="the process that loads what was written ended with 1"):
        prove(tiny_pipeline_folder)


LONE = """
import os
from prune_lab.surgery.proof import _PROVER
print(_PROVER.start().pid, flush=True)
os._exit(9)  # as if it was killed: nothing is cleaned up
"""


@pytest.mark.long
def test_it_ends_with_the_process_that_asked_it() -> None:
    found = subprocess.run([sys.executable, "-c", LONE], capture_output=True, text=True, check=False)
    assert found.returncode == 9
    for _ in range(300):
        try:
            os.kill(int(found.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("it goes on alone")
