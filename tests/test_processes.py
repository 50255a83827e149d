"""One student on many processes: as in one process at the same batch, one of them writes, killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, gather_object
from process_distillation import PLANS, main
from safetensors.torch import load_file

import prune_lab
from prune_lab.config import RunConfig, to_toml
from prune_lab.distill import load_heldout, load_recovery
from prune_lab.errors import DeviceError
from prune_lab.processes import init_processes, is_main, num_processes
from prune_lab.schemas import RECOVERY_COLUMNS

SCRIPT = Path(__file__).parent / "process_distillation.py"
TIMELESS = [name for name in RECOVERY_COLUMNS if name != "seconds"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launched(
    processes: int, script: Path | str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What came of ``script`` in so many processes of an ``accelerate launch`` on the CPU, one thread each."""
    # Not --cpu, with which accelerate starts one process whatever it is asked for, unless there is mpirun.
    launch = ["--multi_gpu"] if processes > 1 else []
    launch += [f"--num_processes={processes}", f"--main_process_port={free_port()}"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", *launch, str(script), *arguments]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, env=given, check=False, capture_output=True, text=True, timeout=240)


def distilled(processes: int, folder: Path, settings: dict[str, Any], **environment: str) -> str:
    """What was said on the way, after checking that it came to its end."""
    found = launched(processes, SCRIPT, str(folder), json.dumps(settings), **environment)
    assert found.returncode == 0, found.stderr
    return found.stdout + found.stderr


def assert_close(one: Path, other: Path) -> None:
    """Loss curves, held-out losses and final weights are equal up to rounding."""
    left, right = load_recovery(one), load_recovery(other)
    assert left is not None
    assert right is not None
    assert (left.status, left.steps) == (right.status, right.steps) == ("done", 6)
    for mine, yours in zip(left.rows, right.rows, strict=True):
        assert mine[: len(TIMELESS)] == pytest.approx(yours[: len(TIMELESS)], rel=1e-4, nan_ok=True)
    assert load_heldout(one).to_numpy() == pytest.approx(load_heldout(other).to_numpy(), rel=1e-4)
    weights, others = (
        load_file(folder / "distilled" / "model" / "diffusion_pytorch_model.safetensors")
        for folder in (one, other)
    )
    assert weights.keys() == others.keys()
    # All together: AdamW divides each gradient by its own size, so one that is all rounding moves its weight at random.
    vector, expected = (torch.cat([found[name].flatten() for name in others]) for found in (weights, others))
    assert float((vector - expected).norm() / expected.norm()) < 1e-5  # six steps move them by 1e-2


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The students distilled by this process."""
    folder = tmp_path_factory.mktemp("alone")
    main(folder, {})
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    "settings", [{"trackers": ["tensorboard"]}, {"micro_batch": 1}], ids=["whole", "micro"]
)
def test_two_processes_make_what_one_makes(alone: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    said = distilled(2, tmp_path, settings)  # a process that writes and is not the main one dies
    assert "warn" not in said.lower()
    for plan in PLANS:
        assert_close(tmp_path / plan, alone / plan)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.long
def test_killed_processes_go_on_from_their_checkpoint(alone: Path, tmp_path: Path) -> None:
    settings = json.dumps({"validate_every": 2})
    assert launched(2, SCRIPT, str(tmp_path), settings, KILL_AT="4").returncode != 0
    checkpoint = tmp_path / PLANS[0] / "distilled" / "checkpoint.safetensors"
    assert checkpoint.is_file()
    distilled(2, tmp_path, {})
    for plan in PLANS:
        recovery, whole = load_recovery(tmp_path / plan), load_recovery(alone / plan)
        assert recovery is not None
        assert whole is not None
        assert [row[0] for row in recovery.rows] == list(range(7))
        assert recovery.after == pytest.approx(whole.after, rel=1e-4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    distilled(2, tmp_path, {})  # what has ended is read back
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.long
def test_a_batch_that_cannot_be_shared_is_one_line(tmp_path: Path) -> None:
    found = launched(2, SCRIPT, str(tmp_path), json.dumps({"steps": 1}), BATCH="3")
    assert found.returncode != 0
    lines = {line for line in found.stderr.splitlines() if line.startswith("error: ")}
    assert lines == {"error: setting distill.batch = 3 cannot be shared by 2 processes; give a multiple of 2"}


@pytest.mark.long
def test_processes_that_do_not_see_the_same_files_stop(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path / "0")
    found = launched(2, SCRIPT, str(tmp_path), "{}", APART="1")
    assert found.returncode != 0
    assert found.stderr.count("error: asked to distil by 2 processes, found that not all of them see") == 2


# The command line ---------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_distill_under_accelerate_launch_prints_and_writes_once(
    small_run_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    settings = small_run_config(search={"controls": PLANS}, distill={"batch": 4, "pictures": 6})
    config = tmp_path / "settings.toml"
    config.write_text(to_toml(settings), encoding="utf-8")
    prune_lab_command = Path(sys.executable).parent / "prune-lab"
    words = ["distill", "--config", str(config), "--json", "--run"]
    found = launched(2, prune_lab_command, *words, str(tmp_path / "two"))
    assert found.returncode == 0, found.stderr
    rows = json.loads(found.stdout)  # one table, not two
    assert [row["plan"] for row in rows] == list(PLANS)
    one = subprocess.run(
        [prune_lab_command, *words, tmp_path / "one"], check=True, capture_output=True, text=True
    )
    for row, other in zip(rows, json.loads(one.stdout), strict=True):
        assert row["loss_after"] == pytest.approx(other["loss_after"], rel=1e-4)
    files = [
        sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*"))
        for name in ("one", "two")
    ]
    assert files[0] == files[1]
    refused = launched(2, prune_lab_command, "blocks", "reference")
    assert refused.returncode != 0
    assert refused.stdout == ""
    assert "error: asked to blocks in 2 processes; only data and distill share their work" in refused.stderr


# What is refused, and what is shipped -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_sharded_weights_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str, name: str) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(DeviceError, match=f"asked to distil under {name}.*MULTI_GPU"):
        init_processes()


def test_alone_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (num_processes(), is_main(), gather_object([3])) == (1, True, [3])
    with PartialState().main_process_first():
        pass
    monkeypatch.setenv("WORLD_SIZE", "4")  # of a batch system, without a launch
    assert num_processes() == 1
    for name, value in (("LOCAL_RANK", "1"), ("RANK", "3")):
        monkeypatch.setenv(name, value)
    assert (num_processes(), is_main()) == (4, False)


LAUNCH = sorted((Path(prune_lab.__file__).parent / "launch").glob("*.yaml"))


def test_there_are_configurations_to_launch_with() -> None:
    assert [path.name for path in LAUNCH] == ["ddp-1x8.yaml", "ddp-2x8.yaml"]


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_accelerate_takes_the_shipped_configurations(path: Path) -> None:
    found = load_config_from_file(str(path))  # raises for a key it does not know
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert found.distributed_type == DistributedType.MULTI_GPU
    assert found.num_processes == 8 * found.num_machines
    assert found.mixed_precision == "bf16"
    assert {
        name: getattr(found, name)
        for name in given
        if name not in ("compute_environment", "distributed_type")
    } == {
        name: value
        for name, value in given.items()
        if name not in ("compute_environment", "distributed_type")
    }
