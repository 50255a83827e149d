"""Who writes: leftovers of killed processes, the lock of a run, the shards of a cache, and an end by SIGTERM."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import tree
from typer.testing import CliRunner

import prune_lab as pl
import prune_lab.distill.sharding as sharding
from prune_lab.cli import app
from prune_lab.config import DataConfig, RunConfig
from prune_lab.distill import build_cache, source_of
from prune_lab.distill.shard_locks import claimed, clear, make_all
from prune_lab.errors import RunError, StorageError
from prune_lab.runs import Run, writing
from prune_lab.runtime import atomic_write, progress_shown
from prune_lab.runtime.files import output_folder
from prune_lab.runtime.holders import (
    Holder,
    alone_in,
    is_temporary,
    lock_holder,
    release_lock,
    remove_leftovers,
    state_of,
    take_lock,
    this_process,
)

FAR = Holder("another-host", 1, 7, "2026-01-01")


@pytest.fixture(scope="module")
def gone() -> Holder:
    """A process of this host that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    holder = dataclasses.replace(this_process(), process=child.pid, started=1)
    child.wait()
    return holder


@pytest.fixture(scope="module")
def alive() -> Iterator[Holder]:
    """Another process of this host that goes on until the tests are done."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        yield dataclasses.replace(this_process(), process=child.pid, started=int(fields[19]))
        child.kill()


def write_lock(path: Path, holder: Holder) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(holder)))


# Processes -----------------------------------------------------------------------------------------------------------


def test_which_processes_still_work(gone: Holder, alive: Holder) -> None:
    assert state_of(this_process()) == "live"
    assert state_of(alive) == "live"
    assert state_of(gone) == "gone"
    assert state_of(FAR) == "elsewhere"
    # its number was given to another process since
    assert state_of(dataclasses.replace(alive, started=alive.started - 1)) == "gone"
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        holder = dataclasses.replace(this_process(), process=child.pid, started=int(fields[19]))
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert state_of(holder) == "gone"  # ended, though nobody has asked for it yet


# Leftovers -----------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    names=st.lists(
        st.sampled_from(("a", "b.csv", ".c", "d e", "x.tmp", "y.123.tmp")), min_size=1, unique=True
    ),
    who=st.sampled_from(("gone", "alive", "this", "far")),
    folder=st.booleans(),
    deep=st.booleans(),
    of=st.booleans(),
)
def test_only_what_a_dead_process_of_this_host_left_is_removed(
    names: list[str],
    who: str,
    folder: bool,
    deep: bool,
    of: bool,
    gone: Holder,
    alive: Holder,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("left")
    holder = {"gone": gone, "alive": alive, "this": this_process(), "far": FAR}[who]
    inner = root / "inner"
    inner.mkdir()
    for name in names:  # files of people, whatever they are called, and ours
        (root / name).write_text("of somebody")
        for place in (root, inner):
            left = place / f".{name}.{holder.mark}-0a1b2c.tmp"
            if folder:
                left.mkdir()
                (left / "half").write_text("half")
            else:
                left.write_text("half")
    before = tree(root)
    remove_leftovers(root, of=names[0] if of else "", deep=deep and not of)
    cleaned = who == "gone"
    for path in before:
        first, *rest = path.split("/")
        ours = next((name for name in names if first.startswith(f".{name}.{holder.mark}")), None)
        inside = first == "inner" and bool(rest)
        away = cleaned and (
            (ours is not None and (not of or ours == names[0])) or (inside and deep and not of)
        )
        assert (root / path).exists() != away, path


def test_a_folder_that_was_about_to_be_replaced_comes_back(gone: Holder, tmp_path: Path) -> None:
    for name in ("lost", "kept"):
        old = tmp_path / f".{name}.{gone.mark}-0a1b2c.old"
        old.mkdir()
        (old / "weights").write_text("whole")
    (tmp_path / "kept").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(tree(tmp_path)) == ["kept", "lost", "lost/weights"]


@pytest.mark.parametrize("write", ["file", "folder"])
def test_what_a_killed_writer_left_goes_with_the_next_one(write: str, gone: Holder, tmp_path: Path) -> None:
    target = tmp_path / "model"
    left = tmp_path / f".model.{gone.mark}-aaaaaa.tmp"
    other = tmp_path / f".other.{gone.mark}-aaaaaa.tmp"  # of another output: not ours to judge here
    left.mkdir()
    other.mkdir()
    if write == "folder":
        with output_folder(target) as temporary:
            assert is_temporary(temporary.name)
    else:
        from prune_lab.models.protection import check_file

        check_file(target, {}, "scores")
    assert not left.exists()
    assert other.is_dir()


def test_temporary_files_are_ordinary_results_when_done(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "table") as temporary:
            temporary.write_text("x")
        with output_folder(tmp_path / "model") as temporary:
            (temporary / "x").write_text("x")
    finally:
        os.umask(mask)
    assert oct((tmp_path / "table").stat().st_mode)[-3:] == "640"
    assert oct((tmp_path / "model").stat().st_mode)[-3:] == "750"


# The lock of a folder ------------------------------------------------------------------------------------------------


def test_a_folder_is_of_one_process_at_a_time_and_goes_where_nothing_came_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with alone_in(folder, "steps", "asked to compare"):
        assert (lock_holder(folder / ".steps.lock") or FAR).same_process(this_process())
    assert not folder.exists()
    with alone_in(folder, "steps", "asked to compare"):
        (folder / "table").touch()
    write_lock(folder / ".steps.lock", FAR)
    with (
        pytest.raises(StorageError, match=r"^asked to compare, which process .* remove .steps.lock there"),
        alone_in(folder, "steps", "asked to compare"),
    ):
        pytest.fail("two at once")
    assert sorted(path.name for path in folder.iterdir()) == [".steps.lock", "table"]
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StorageError, match="cannot write the lock file"), alone_in(file, "steps", "asked"):
        pytest.fail("no folder")


# The lock of a run ---------------------------------------------------------------------------------------------------


def test_one_writer_at_a_time(alive: Holder, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    for holder, said in (
        (alive, f"process {alive.process} on {socket.gethostname()} writes now"),
        (FAR, f"remove {run.lock}"),
    ):
        write_lock(run.lock, holder)
        line = str(_refusal(run)).replace(f" since {holder.since}", "")
        assert said in line
        assert holder.host in line
        assert lock_holder(run.lock) == holder


def _refusal(run: Run) -> RunError:
    with pytest.raises(RunError) as caught, writing(run):
        pytest.fail("two writers")
    return caught.value


@pytest.mark.parametrize("far", [False, True])
def test_a_second_run_is_refused_before_it_says_anything(
    far: bool, alive: Holder, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run")
    write_lock(run.lock, FAR if far else alive)
    asked = ["run", str(tiny_pipeline_folder), "--params", "80%", "--run", str(run.folder)]
    found = CliRunner().invoke(app, asked)
    assert (found.exit_code, found.output.count("\n")) == (2, 1)
    assert "asked to write the run" in found.output


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"host": 1}', '{"host": "x", "process": "y"}', "\x00" * 50]
)
def test_a_lock_that_cannot_be_read_is_named(content: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.lock.write_text(content)
    assert f"remove {run.lock}" in str(_refusal(run))
    assert run.lock.read_text() == content


LOCK_FIELDS: dict[str, tuple[str, ...]] = {  # as JSON, the right one first
    "host": (
        json.dumps(socket.gethostname()),
        "1",
        "[]",
        '"a\\u0000b"',
        '"\\ud800"',
        '"a\\nb"',
        f'"{"x" * 999}"',
        '""',
    ),
    "process": (
        "<gone>",
        "1e400",
        str(2**31 + 5),
        str(10**30),
        "-1",
        "0",
        "true",
        "NaN",
        '"7"',
        "null",
        "7.5",
    ),
    "started": ("1", "-1", "1e400", str(10**30), "true", "[]", "7" * 5000),
    "since": ('"then"', "7", '"a\\nb"', '"\\ud800"', "{}"),
}
NO_LOCKS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "nowhere": lambda path: path.symlink_to("nowhere"),
    "folder": lambda path: path.mkdir(),
    "brackets": lambda path: path.write_text("[" * 200_000),
    "long": lambda path: path.write_bytes(b" " * 10**7),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe\x00"),
}


@settings(max_examples=60, deadline=None)
@given(
    fields=st.one_of(
        st.sampled_from(sorted(NO_LOCKS)),
        st.tuples(*map(st.sampled_from, LOCK_FIELDS.values())),
    )
)
def test_a_lock_that_we_cannot_have_written_is_refused_by_name(
    fields: str | tuple[str, ...], gone: Holder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("locks")
    (root / "outside").write_text("of somebody")
    run = Run(root / "run")
    shard = root / "cache" / "shard-00000.safetensors"
    lock = shard.with_name(f".{shard.name}.lock")
    ours = fields == tuple(values[0] for values in LOCK_FIELDS.values())
    for path in (run.lock, lock):
        path.parent.mkdir()
        if isinstance(fields, str):
            NO_LOCKS[fields](path)
        else:
            text = ", ".join(f'"{name}": {value}' for name, value in zip(LOCK_FIELDS, fields, strict=True))
            path.write_text(f"{{{text}}}".replace("<gone>", str(gone.process)))
        assert (state_of(lock_holder(path) or gone) == "gone") == ours
    if not ours:
        lines = [str(_refusal(run))]
        assert f"remove {run.lock}" in lines[0]
        for work in (
            lambda: clear(shard.parent),
            lambda: make_all([shard], lambda path: False, _claim),
        ):
            with pytest.raises(StorageError, match="once you are sure") as caught:
                work()
            lines.append(str(caught.value))
            assert f"remove {lock}" in lines[-1]
        assert all(len(line.splitlines()) == 1 and len(line) < 2000 for line in lines)
        assert os.path.lexists(run.lock)
        assert os.path.lexists(lock)
    assert sorted(path.name for path in root.iterdir()) == ["cache", "outside", "run"]


def _claim(shard: Path) -> Holder | None:
    with claimed(shard, {}) as other:
        return other


@pytest.mark.parametrize("process", [0, 2**31 + 5, 10**30])
def test_a_temporary_file_of_no_process_stays(process: int, tmp_path: Path) -> None:
    left = tmp_path / f".x.{dataclasses.replace(this_process(), process=process).mark}-0a1b2c.tmp"
    left.touch()
    remove_leftovers(tmp_path)
    assert left.exists()


def test_the_lock_of_a_dead_process_is_taken_over_and_said(
    gone: Holder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run")
    write_lock(run.lock, gone)
    half = run.folder / "candidates" / "x" / f".checkpoint.safetensors.{gone.mark}-0a1b2c.tmp"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"gigabytes")
    with progress_shown(), writing(run):
        found = lock_holder(run.lock)
        assert found is not None
        assert found.same_process(this_process())
        assert not half.exists()
    assert f"process {gone.process}" in capsys.readouterr().err
    assert not run.lock.exists()


def test_one_process_joins_its_own_lock_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "a" / "run")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with writing(run), writing(Run(tmp_path / "link" / "run")):
        assert run.lock.is_file()
        with pytest.raises(ZeroDivisionError), writing(run):
            _ = 1 / 0
        assert run.lock.is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    # the others of a launch write under the lock of their main process
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with writing(run):
        assert not run.lock.exists()


def _racing(path: Path, start: Path, won: Path) -> None:
    while not start.exists():
        pass
    holder, _ = take_lock(path)
    if holder is None:
        (won / str(os.getpid())).touch()
        time.sleep(0.3)  # the others look at it meanwhile
        release_lock(path)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("left", [False, True])
def test_of_many_that_come_at_once_one_writes(left: bool, gone: Holder, tmp_path: Path) -> None:
    won, start = tmp_path / "won", tmp_path / "start"
    won.mkdir()
    if left:
        write_lock(tmp_path / "lock", gone)
    children = []
    for _ in range(6):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                _racing(tmp_path / "lock", start, won)
            os._exit(0)
        children.append(child)
    start.touch()
    for child in children:
        os.waitpid(child, 0)
    assert len(list(won.iterdir())) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["start", "won"]


@pytest.mark.long
def test_readers_neither_lock_nor_clean(finished: Run, gone: Holder, alive: Holder, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(finished.folder, tmp_path / "run")))
    left = run.folder / f".costs.csv.{gone.mark}-0a1b2c.tmp"
    left.write_text("half")
    write_lock(run.lock, alive)
    results = pl.open_run(run.folder)
    assert len(results.ranking) > 1
    assert results.report().is_file()
    compared = CliRunner().invoke(app, ["compare", str(run.folder), "--json"])
    assert compared.exit_code == 0, compared.output
    assert left.exists()
    assert lock_holder(run.lock) == alive
    before = tree(run.folder)
    refused = CliRunner().invoke(app, ["rank", str(run.folder)])
    assert refused.exit_code == 2
    assert f"process {alive.process}" in refused.stderr
    assert tree(run.folder) == before
    run.lock.unlink()
    with writing(run):
        assert not left.exists()


# Shards of a cache ---------------------------------------------------------------------------------------------------

SMALL = DataConfig(shard=2, batch=2)


def shard_lock(folder: Path, number: int) -> Path:
    return folder / f".shard-{number:05d}.safetensors.lock"


@pytest.fixture
def alone(tiny_pipeline: Any, image_folder: Path, tmp_path: Path) -> dict[str, bytes]:
    """What one builder writes by itself."""
    build_cache(tiny_pipeline, source_of(DataConfig(source=str(image_folder))), SMALL, tmp_path / "alone")
    return tree(tmp_path / "alone")


def building(pipeline: Any, images: Path, out: Path, *, force: bool = False) -> int:
    """How many pictures this build has encoded itself."""
    source = source_of(DataConfig(source=str(images)))
    return build_cache(pipeline, source, SMALL, out, force=force).encoded


def begun(alone: dict[str, bytes], out: Path) -> None:
    """The folder as another builder of the same cache has begun it."""
    out.mkdir()
    (out / ".prune_lab_files.json").write_bytes(alone[".prune_lab_files.json"])


def test_builders_share_a_cache(
    alone: dict[str, bytes],
    tiny_pipeline: Any,
    image_folder: Path,
    tmp_path: Path,
    alive: Holder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prune_lab.distill.shard_locks._PAUSE", 0.01)
    out = tmp_path / "shared"
    begun(alone, out)
    names = [name for name in alone if name.startswith("shard-")]
    half = out / f".{names[0]}.{alive.mark}-0a1b2c.tmp"
    half.write_bytes(b"half")
    write_lock(shard_lock(out, 0), alive)
    rest_is_done = threading.Event()
    whole = sharding._write_shard

    def seen(path: Path, *more: Any) -> None:
        whole(path, *more)
        if len(list(out.glob("shard-*"))) == len(names) - 1:
            rest_is_done.set()

    def other() -> None:
        rest_is_done.wait(60)
        time.sleep(0.1)
        half.write_bytes(alone[names[0]])
        half.replace(out / names[0])
        shard_lock(out, 0).unlink()

    monkeypatch.setattr(sharding, "_write_shard", seen)
    helper = threading.Thread(target=other)
    helper.start()
    encoded = building(tiny_pipeline, image_folder, out)
    helper.join()
    assert encoded == 7 - 2
    assert tree(out) == alone


def test_the_shard_of_a_builder_that_died_is_made_by_another(
    alone: dict[str, bytes], tiny_pipeline: Any, image_folder: Path, tmp_path: Path, gone: Holder
) -> None:
    out = tmp_path / "shared"
    begun(alone, out)
    write_lock(shard_lock(out, 1), gone)
    (out / f".shard-00001.safetensors.{gone.mark}-0a1b2c.tmp").write_bytes(b"half")
    assert building(tiny_pipeline, image_folder, out) == 7
    assert tree(out) == alone


def test_the_shard_of_another_host_is_named_when_all_else_is_done(
    alone: dict[str, bytes], tiny_pipeline: Any, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shared"
    begun(alone, out)
    write_lock(shard_lock(out, 2), FAR)
    with pytest.raises(StorageError, match="another-host") as caught:
        building(tiny_pipeline, image_folder, out)
    assert str(shard_lock(out, 2)) in str(caught.value)
    assert len(list(out.glob("shard-*"))) == 3
    with pytest.raises(StorageError, match="another-host"):
        building(tiny_pipeline, image_folder, out, force=True)
    assert len(list(out.glob("shard-*"))) == 3
    shard_lock(out, 2).unlink()
    assert building(tiny_pipeline, image_folder, out) == 2
    assert tree(out) == alone


def test_two_different_caches_are_not_mixed(
    alone: dict[str, bytes], tiny_pipeline: Any, image_folder: Path, tmp_path: Path, alive: Holder
) -> None:
    out = tmp_path / "shared"
    begun(alone, out)
    write_lock(shard_lock(out, 0), alive)
    before = tree(out)
    for other in (dataclasses.replace(SMALL, flip=True), dataclasses.replace(SMALL, shard=3)):
        source = source_of(DataConfig(source=str(image_folder)))
        with pytest.raises(pl.errors.DataError, match="made otherwise"):
            build_cache(tiny_pipeline, source, other, out)
    assert tree(out) == before
    shard_lock(out, 0).unlink()  # nothing was made yet, so the folder is free
    build_cache(
        tiny_pipeline,
        source_of(DataConfig(source=str(image_folder))),
        dataclasses.replace(SMALL, shard=3),
        out,
    )


@pytest.mark.long
def test_two_commands_build_one_cache(
    tiny_pipeline_folder: Path, image_folder: Path, tmp_path: Path, alone: dict[str, bytes]
) -> None:
    words = ["data", str(tiny_pipeline_folder), "--data", str(image_folder), "--device", "cpu"]
    words += ["--set", "data.shard=2", "--set", "data.batch=2", "--json", "--out", str(tmp_path / "shared")]
    code = f"import sys; sys.argv = {['prune-lab', *words]!r}; from prune_lab.cli import main; main()"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(3)]
    encoded = 0
    for child in children:
        answer, said = child.communicate(timeout=300)
        assert child.returncode == 0, said
        encoded += json.loads(answer)[0]["encoded"]
    assert encoded == 7
    assert tree(tmp_path / "shared") == alone


# SIGTERM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["search", "MODEL", "--macs", "65%"],
            "terminated; the same command again starts anew; with --run DIR it",
        ),
        (
            ["search", "RUN", "--macs", "65%"],
            "terminated; the same command again starts anew; with --run DIR it",
        ),
        (["search", "--run", "RUN", "--macs", "65%"], "terminated; finished files are kept"),
        (["score", "RUN"], "terminated; finished files are kept"),
        (
            ["personalise", "MODEL", "--images", "i", "--token", "t", "--class", "c", "--out", "RUN"],
            "terminated; finished files are kept",
        ),
        (
            ["prune", "MODEL", "--plan", "bk-small", "--out", "RUN"],
            "terminated; the same command again starts anew\n",
        ),
    ],
)
def test_files_are_said_to_be_kept_where_they_are(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    (tmp_path / "config.toml").touch()
    places = ("search.settings_of", "score.settings_of", "prune.model_of", "personalise.model_of")
    for place in (f"cli.{one}" for one in places):
        monkeypatch.setattr(f"prune_lab.{place}", ended)
    monkeypatch.setattr("prune_lab.surgery.get_ready_to_prove", lambda: None)
    plain = tmp_path / "out" if words[0] in ("prune", "personalise") else tmp_path
    named = [{"RUN": str(plain), "MODEL": "reference"}.get(word, word) for word in words]
    found = CliRunner().invoke(app, named)
    assert found.exit_code == 143, found.output
    assert said in found.stderr


def test_sigterm_ends_as_an_interrupt_does(
    small_run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prune_lab.config import to_toml

    run = Run(tmp_path / "run")
    (tmp_path / "job.toml").write_text(to_toml(small_run_config()))
    before = signal.getsignal(signal.SIGTERM)

    def ended(*_: object) -> None:
        with atomic_write(run.costs) as temporary:
            temporary.write_text("half")
            assert run.lock.is_file()
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # as a launcher and its group do
            time.sleep(5)

    monkeypatch.setattr("prune_lab.workflow.pipeline.check_settings", ended)
    found = CliRunner().invoke(app, ["run", "--config", str(tmp_path / "job.toml"), "--run", str(run.folder)])
    assert found.exit_code == 143
    *said, line = found.stderr.strip().splitlines()
    assert all(one.startswith("estimate:") for one in said), said
    assert line.startswith("terminated; finished files are kept")
    left = tree(run.folder)
    assert "config.toml" in left
    assert not [
        name for name in left if is_temporary(Path(name).name) or name in ("writer.lock", "costs.csv")
    ]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.long
def test_a_process_that_is_terminated_leaves_nothing_half_written(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    code = (
        "import sys, time; sys.argv = sys.argv[:1] + sys.argv[1:]\n"
        "import prune_lab.surgery.writing as writing\n"
        "def slow(*more, **named):\n"
        "    print('begun', flush=True); time.sleep(60)\n"
        "writing.prove = slow\n"
        "from prune_lab.cli import main; main()"
    )
    words = ["prune", str(tiny_pipeline_folder), "--plan", "bk-base", "--out", str(out)]
    for number, code_of in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        with subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "begun\n"
            child.send_signal(number)
            _, said = child.communicate(timeout=300)
            assert child.returncode == code_of, said
            assert "Traceback" not in said
        left = [path.name for path in tmp_path.iterdir()]
        assert [is_temporary(name) for name in left] == ([True] if number == signal.SIGKILL else [])
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0, again.output
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
