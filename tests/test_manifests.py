"""Done is what was made from the present inputs: damage, other weights and other settings are seen in every step."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from prune_lab.cli import app
from prune_lab.config import RunConfig, load_config
from prune_lab.errors import DataError, RunError, StorageError
from prune_lab.plans import parse_plan
from prune_lab.runs import Manifests, Part, Run
from prune_lab.runs.manifest_files import Manifest, Stamp, read_manifest
from prune_lab.runtime import write_json
from prune_lab.session import Session
from prune_lab.session.parts import STEP_NAMES, report_part
from prune_lab.workflow import ensure_distilled, ensure_plans, ensure_ranking, forget, run_all, start_run
from prune_lab.workflow.comparing import comparison
from prune_lab.workflow.starting import use_scores
from prune_lab.workflow.states import states
from prune_lab.workflow.steps import STEPS

# Timings and seconds differ whenever they are measured.
TIMED = ("median_ms", "p10_ms", "p90_ms", "latency", "seconds", "share", "milliseconds")


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(finished.folder, tmp_path / "run")))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that say what is redone and why."""
    lines: list[str] = []
    monkeypatch.setattr("prune_lab.session.parts.note", lines.append)
    return lines


def outputs(run: Run) -> dict[str, Path]:
    """Every file that a step wrote -> the manifest that names it, from the JSON alone."""
    found = {}
    for path in run.folder.rglob("manifests/*.json"):
        if path.stem != "origins":
            found |= dict.fromkeys(json.loads(path.read_text())["outputs"], path)
    return found


def tables(run: Run) -> dict[str, pd.DataFrame]:
    """The tables of a run without what is a time."""
    found = {}
    for path in [
        *run.folder.glob("*.csv"),
        *run.folder.glob("plans/*.csv"),
        *run.folder.glob("candidates/*/*.csv"),
    ]:
        if path.name not in ("steps.csv", "latency_rounds.csv", "pipeline.csv"):
            frame = pd.read_csv(path)
            kept = [name for name in frame if not str(name).startswith(TIMED)]
            found[path.relative_to(run.folder).as_posix()] = frame[kept]
    return found


# Damage ------------------------------------------------------------------------------------------------------------


def delete(path: Path, _draw: random.Random) -> None:
    path.unlink()


def empty(path: Path, _draw: random.Random) -> None:
    path.write_bytes(b"")


def truncate(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))


def replace(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(draw.randrange(1, 400)))


def into_a_folder(path: Path, _draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: tuple[Callable[[Path, random.Random], None], ...] = (
    delete,
    empty,
    truncate,
    flip,
    replace,
    into_a_folder,
)


def faults(run: Run, config: RunConfig) -> dict[Path, str]:
    """Manifest -> why its part is not done, of those that are not."""
    return {
        part.manifest: verdict.why
        for state in states(Session(run, config=config))
        for part, verdict in state.parts
        if verdict.state != "done"
    }


def test_every_file_of_a_run_is_watched(copied: Run, finished_config: RunConfig, tmp_path: Path) -> None:
    draw = random.Random(13)
    assert faults(copied, finished_config) == {}
    known = outputs(copied)
    # what nobody reads afterwards, or what is only said of the rest
    free = {"config.toml", "environment.json"}
    there = {
        path.relative_to(copied.folder).as_posix() for path in copied.folder.rglob("*") if path.is_file()
    }
    unwatched = {name for name in there - set(known) - free if "manifests/" not in name}
    assert {name.split("/")[0] for name in unwatched} <= {"scores", "curves"}
    for name in draw.sample(sorted(known), 12):
        path, manifest = copied.folder / name, known[name]
        kept = tmp_path / "kept"
        shutil.copy2(path, kept)
        damage = draw.choice(DAMAGE)
        damage(path, draw)
        found = faults(copied, finished_config)
        unsure = {"report", "ranking"} if name.startswith("plans/") else {"report"}  # who will be ranked
        assert {path.stem for path in found} - unsure <= {manifest.stem}, (name, damage)
        assert name in found[manifest], (name, damage)
        shutil.rmtree(path) if path.is_dir() else None
        kept.replace(path)
    assert faults(copied, finished_config) == {}


@pytest.mark.long
@pytest.mark.usefixtures("quick_report")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_is_damaged_is_redone_and_ends_equal(
    copied: Run, finished_config: RunConfig, said: list[str], seed: int
) -> None:
    draw, before, known = random.Random(seed), tables(copied), outputs(copied)
    chosen = {known[name]: name for name in draw.sample(sorted(known), len(known))}
    damaged = {manifest: name for manifest, name in chosen.items() if draw.random() < 0.4}
    for name in damaged.values():
        draw.choice(DAMAGE)(copied.folder / name, draw)
    run_all(finished_config, copied.folder)
    after = tables(copied)
    assert after.keys() == before.keys()
    for name, frame in before.items():
        pd.testing.assert_frame_equal(after[name], frame, rtol=1e-6, obj=name)
    steps = {json.loads(manifest.read_text())["step"] for manifest in damaged}
    assert {re.split("[ :]", line)[0] for line in said} >= steps - {"report"}
    assert all(": redone, " in line and "\n" not in line for line in said)
    assert faults(copied, finished_config) == {}


def test_a_copy_without_times_is_the_same_run(
    copied: Run, finished_config: RunConfig, said: list[str]
) -> None:
    for path in copied.folder.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(10**18, 10**18))
    assert faults(copied, finished_config) == {}
    ensure_plans(Session(copied))
    assert said == []


def test_a_lost_or_damaged_manifest_is_written_again(
    copied: Run, finished_config: RunConfig, said: list[str]
) -> None:
    manifests = sorted(
        path for path in copied.folder.rglob("manifests/*.json") if path.stem in ("blocks", "costs")
    )
    manifests[0].unlink()
    manifests[1].write_text('{"format": "')
    before = tables(copied)
    session = Session(copied)
    from prune_lab.workflow.measuring import ensure_blocks, ensure_costs

    ensure_blocks(session)
    ensure_costs(session)
    assert [line.split(", ")[1] for line in said] == [
        "manifests/blocks.json is not there",
        "manifests/costs.json is damaged",
    ]
    assert faults(copied, finished_config) == {}
    assert tables(copied)["costs.csv"].equals(before["costs.csv"])


def test_a_file_that_no_step_wrote_is_no_picture(copied: Run) -> None:
    shutil.copy(next(copied.teacher_pictures.glob("*.png")), copied.teacher_pictures / "99.png")
    with pytest.raises(RunError, match=r"pictures/teacher/99\.png, which no step of it has written"):
        ensure_ranking(Session(copied))


# Nothing of others is lost -----------------------------------------------------------------------------------------

OUTSIDE = ("/{}/victim", "../victim", "a/../../victim", "", ".", "a\0b", "/proc", "\ud800", "a//b", "./a")


@pytest.mark.parametrize("where", ["outputs", "inputs"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_names_what_lies_outside_is_damaged(tmp_path: Path, name: str, where: str) -> None:
    name = name.format(tmp_path) if name.startswith("/{}") else name
    run, victim = tmp_path / "run", tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.md").write_text("precious")
    part = Part("costs", "costs", run, (run / "costs.csv",))
    inputs = {name: "ab"} if where == "inputs" else {}
    manifest = Manifest("costs", {name: Stamp(1, 1, "00")} if where == "outputs" else {}, inputs, {}, {})
    run.mkdir()
    part.manifest.parent.mkdir()
    part.manifest.write_text(json.dumps(manifest.as_dict()))
    assert read_manifest(part.manifest) is None
    manifests = Manifests(run)
    manifests.clear(part, manifests.verdict(part))
    assert (victim / "thesis.md").read_text() == "precious"


def test_links_in_a_run_are_not_followed_when_a_part_is_made_again(tmp_path: Path) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    part = Part("report", "report", run, (run / "report",))
    victim.mkdir()
    for folder in (run / "report", victim):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.html").write_text("page")
    Manifests(run).record(part)
    shutil.move(run / "report", tmp_path / "moved")
    (run / "report").symlink_to(victim)
    (victim / "index.html").write_text("precious")
    manifests = Manifests(run)
    with pytest.raises(RunError, match="a link leads out of the run folder"):
        manifests.clear(part, manifests.verdict(part))
    assert (victim / "index.html").read_text() == "precious"
    (run / "report").unlink()
    (run / "report").mkdir()
    (run / "report" / "index.html").symlink_to(victim / "index.html")
    manifests = Manifests(run)
    manifests.clear(part, manifests.verdict(part))
    assert not (run / "report").exists()
    assert (victim / "index.html").read_text() == "precious"


FOREIGN = (".git/HEAD", "notes.md", "mine/photo.jpg", ".hidden", "\u6587.txt", "index.html.bak")


@pytest.mark.parametrize("seed", range(4))
def test_what_others_put_into_a_run_is_never_removed(copied: Run, seed: int) -> None:
    draw = random.Random(seed)
    paths = copied.candidate(copied.plan_ids()[0])
    folders = [
        copied.report_dir,
        paths.pruned,
        paths.distilled,
        paths.pictures_pruned,
        copied.teacher_pictures,
    ]
    foreign = draw.choice(folders) / draw.choice(FOREIGN)
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_text("precious")
    before = {path for path in copied.folder.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"no step has written.*move them out"):
        forget(copied, "blocks")
    assert {path for path in copied.folder.rglob("*") if path.is_file()} == before
    foreign.unlink()
    shutil.rmtree(foreign.parent) if foreign.parent.name in (".git", "mine") else None
    forget(copied, "blocks")
    left = {path.name for path in copied.folder.rglob("*") if path.is_file()}
    assert not {path.name for path in copied.candidates_dir.rglob("*") if path.is_file()}
    assert "index.html" not in left
    assert not copied.plan_ids()


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("lost", ["report/index.html", "manifests/report.json"])
def test_a_report_with_files_of_others_is_not_made_again(copied: Run, name: str, lost: str) -> None:
    foreign = copied.report_dir / name
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_text("precious")
    (copied.folder / lost).unlink()
    manifests, part = Manifests(copied.folder), report_part(copied)
    with pytest.raises(RunError, match=r"move (it|them) out"):
        manifests.verdict(part)
    assert foreign.read_text() == "precious"


def test_files_of_others_stop_a_run_before_its_first_step(
    copied: Run, finished_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random()
    paths = copied.candidate(draw.choice(copied.plan_ids()))
    late = draw.choice([paths.distilled, paths.distilled_model, paths.pictures_distilled, copied.report_dir])
    foreign = late / draw.choice([".git/HEAD", ".hidden", "\u6587.txt"])
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("precious")
    copied.costs.unlink()  # of an early step, and something of the late part
    (late / next(file.name for file in sorted(late.iterdir()) if file.is_file() and file != foreign)).unlink()
    before = {path: path.stat().st_mtime_ns for path in copied.folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(
        "prune_lab.workflow.pipeline.check_settings", lambda _session: pytest.fail("too late")
    )
    with pytest.raises(RunError, match=r"no step.* has written.*move (it|them) out"):
        run_all(finished_config, copied.folder)
    assert {path: path.stat().st_mtime_ns for path in before} == before


# What it was made from ---------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_ranking_of_an_interrupted_run_is_made_again(copied: Run, said: list[str]) -> None:
    forget(copied, "distilled")
    early = ensure_ranking(Session(copied))
    assert {entry.status for entry in early.entries} == {"teacher", "left out"}
    ensure_distilled(Session(copied))
    ranking = ensure_ranking(Session(copied))
    assert "left out" not in {entry.status for entry in ranking.entries}
    assert [line for line in said if line.startswith("ranking: redone, candidates/")]


def other_weights(model: Path, draw: random.Random) -> None:
    """Another number in one tensor of a part that the run works with, under the old time of change."""
    part = draw.choice(("unet", "vae", "text_encoder"))
    (path,) = (model / part).glob("*.safetensors")
    tensors = load_file(path)
    name = draw.choice([name for name, tensor in sorted(tensors.items()) if tensor.is_floating_point()])
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def moved(copied: Run, finished_config: RunConfig, tmp_path: Path) -> tuple[Run, RunConfig, Path]:
    """A finished run whose model lies elsewhere, where it may be changed."""
    model = Path(shutil.copytree(finished_config.model, tmp_path / "model"))
    config = dataclasses.replace(finished_config, model=str(model))
    text = copied.config.read_text()
    copied.config.write_text(text.replace(finished_config.model, str(model)))
    assert load_config(copied.config) == config
    return copied, config, model


@pytest.mark.parametrize("lost", [(), ("environment.json",), ("environment.json", "manifests/origins.json")])
def test_other_weights_of_the_teacher_are_refused_by_every_verb(
    moved: tuple[Run, RunConfig, Path], lost: tuple[str, ...]
) -> None:
    run, _, model = moved
    assert Session(run).source.folder == model  # moved, it is the same model
    other_weights(model, random.Random(len(lost)))
    for name in lost:
        (run.folder / name).unlink()
    folder = str(run.folder)
    for asked in (
        ["search", folder, "--params", "60%"],
        ["evaluate", "--run", folder],
        ["rank", folder],
        ["distill", folder],
        ["score", folder],
        ["run", "--run", folder],
        ["run", "--run", folder, "--dry-run"],
        ["compare", folder, "bk-tiny"],
    ):
        found = CliRunner().invoke(app, asked)
        assert (found.exit_code, "other weights" in found.stderr) == (2, True), (asked, found.output)
        assert "--force" in found.stderr
    found = CliRunner().invoke(app, ["doctor", folder, "--json"])
    assert found.exit_code == 1
    assert any(row["state"] == "refused" for row in json.loads(found.stdout))


def test_other_weights_under_the_old_size_and_time_are_seen(
    moved: tuple[Run, RunConfig, Path],
) -> None:
    run, _, model = moved
    session = Session(run)
    assert session.teacher
    session.manifests.save_origins()
    (path,) = (model / "unet").glob("*.safetensors")
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(RunError, match="other weights"):
        _ = Session(run).teacher


def test_what_compares_or_lends_says_what_is_damaged(copied: Run) -> None:
    profile = copied.candidate(copied.plan_ids()[0]).profile
    profile.write_text(profile.read_text() + " ")
    found = CliRunner().invoke(app, ["compare", str(copied.folder)])
    assert (found.exit_code, "profile.json" in found.stderr) == (2, True), found.output
    copied.choices.write_text("[1]")
    found = CliRunner().invoke(app, ["search", str(copied.folder), "--params", "60%"])
    assert (found.exit_code, "choices.json" in found.stderr) == (2, True), found.output


# Settings and plans by hand ----------------------------------------------------------------------------------------


def test_a_candidate_is_compared_by_its_own_files(copied: Run, finished_config: RunConfig) -> None:
    candidate = str(copied.candidate(copied.plan_ids()[0]).folder)
    before = comparison(finished_config.model, [candidate])
    for path in (copied.costs, copied.ranking, copied.latency_rounds, copied.blocks, copied.steps):
        path.write_bytes(random.Random().randbytes(64))
    pd.testing.assert_frame_equal(comparison(finished_config.model, [candidate]), before)


def test_a_copy_that_is_cut_short_leaves_nothing(
    copied: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Path(shutil.copy(copied.importance, tmp_path / "scores.csv"))
    before = copied.importance.read_bytes()

    def full(_source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("prune_lab.workflow.starting.shutil.copyfile", full)
    with pytest.raises(StorageError, match="No space left"):
        use_scores(Session(copied), table)
    assert copied.importance.read_bytes() == before
    assert not list(copied.folder.rglob(".*.tmp"))


def test_lost_settings_are_written_anew(copied: Run, finished_config: RunConfig) -> None:
    copied.config.unlink()
    copied.environment.unlink()
    other = dataclasses.replace(finished_config, seed=5)
    with pytest.raises(RunError, match=r"other settings of seed"):
        start_run(other, copied.folder)
    start_run(finished_config, copied.folder)
    assert load_config(copied.config) == finished_config
    assert json.loads(copied.environment.read_text())["format"]
    assert faults(copied, finished_config) == {}


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [("bootstrap = 20", "bootstrap = 30", "score.bootstrap"), ("steps = 2\n", "", "distill.steps")],
)
def test_edited_settings_are_refused(copied: Run, old: str, new: str, name: str) -> None:
    text = copied.config.read_text()
    assert old in text
    copied.config.write_text(text.replace(old, new))
    for asked in (["run", "--run"], ["evaluate", "--run"], ["rank"], ["search"]):
        more = ["--params", "60%"] if asked == ["search"] else []
        found = CliRunner().invoke(app, [*asked, str(copied.folder), *more])
        assert (found.exit_code, name in found.stderr) == (2, True), (asked, found.output)


@pytest.mark.long
@pytest.mark.usefixtures("quick_report")
def test_a_plan_put_into_a_finished_run_is_built_and_ranked(copied: Run, finished_config: RunConfig) -> None:
    plan = parse_plan("-Dn1.R2 -Dn1.A2 -Up4.R2 -Up4.A2", Session(copied).architecture)
    copied.plan(plan.id).write_text(json.dumps(plan.to_json()))
    state = {state.step.name: state.text for state in states(Session(copied))}
    assert (state["plans"], state["ranking"]) == ("done", "redo")
    ranking = run_all(finished_config, copied.folder)
    (found,) = [entry for entry in ranking.entries if entry.result.plan_id == plan.id]
    assert found.result.steps == finished_config.distill.steps
    assert copied.done(copied.candidate(plan.id).pictures_distilled)
    copied.plan(plan.id).unlink()
    state = {state.step.name: state.text for state in states(Session(copied))}
    assert (state["plans"], state["ranking"]) == ("done", "redo")


@pytest.mark.parametrize("name", ["0" * 12, "12e456789012"])
def test_a_plan_in_a_file_of_another_id_is_refused(copied: Run, name: str) -> None:
    shutil.copy(copied.plan(copied.plan_ids()[0]), copied.plan(name))
    with pytest.raises(DataError, match=rf"{name}\.json, found the id {name}.*delete it"):
        ensure_plans(Session(copied))
    found = CliRunner().invoke(app, ["doctor", str(copied.folder)])
    assert found.exit_code == 1
    assert name in found.stdout


def test_a_listed_plan_that_is_gone_is_found_again(copied: Run, said: list[str]) -> None:
    plan_id = copied.plan_ids()[-1]
    before = json.loads(copied.plan(plan_id).read_text())
    copied.plan(plan_id).unlink()
    assert plan_id in {plan.id for plan in ensure_plans(Session(copied))}
    assert json.loads(copied.plan(plan_id).read_text()) == before
    assert said == [f"plans: redone, plans/{plan_id}.json is missing"]


# The manifest itself -----------------------------------------------------------------------------------------------


def test_steps_are_named_in_their_order() -> None:
    assert tuple(step.name for step in STEPS) == STEP_NAMES


@settings(max_examples=25)
@given(
    contents=st.dictionaries(st.sampled_from("abcdef"), st.binary(max_size=20), min_size=1),
    reads=st.dictionaries(st.sampled_from("uvw"), st.binary(max_size=20)),
    change=st.tuples(st.sampled_from("abcdefuvw"), st.one_of(st.none(), st.binary(max_size=20))),
)
def test_a_part_is_done_until_something_of_it_changes(
    tmp_path_factory: pytest.TempPathFactory,
    contents: dict[str, bytes],
    reads: dict[str, bytes],
    change: tuple[str, bytes | None],
) -> None:
    folder = tmp_path_factory.mktemp("part")
    for name, content in (contents | reads).items():
        (folder / name).write_bytes(content)
    own, read = (tuple(folder / name for name in names) for names in ("abcdef", "uvw"))
    part = Part("scores", "scores", folder, own, reads=read, inputs={"teacher": "1"}, settings={"seed": 0})
    assert Manifests(folder).verdict(part).state == "redo"
    Manifests(folder).record(part)
    assert Manifests(folder).verdict(part).state == "done"
    name, content = change
    path = folder / name
    before = path.read_bytes() if path.exists() else None
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    # an output that was not there is none of its own
    same = before == content or (name in "abcdef" and before is None)
    found = Manifests(folder).verdict(part)
    assert (found.state == "done") == same
    assert same or name in found.why
    for changed in ({"inputs": {"teacher": "2"}}, {"settings": {"seed": 1}}):
        other: Any = dataclasses.replace(part, **changed)
        assert Manifests(folder).verdict(other).state == "redo"


@pytest.mark.parametrize("seed", range(3))
def test_the_manifest_of_another_part_or_run_is_damaged(
    copied: Run, finished_config: RunConfig, seed: int
) -> None:
    draw = random.Random(seed)
    first, other = draw.sample(sorted((copied.folder / "manifests").glob("*.json")), 2)
    kept = first.read_bytes()
    first.write_bytes(other.read_bytes())
    if first.stem != "origins":
        assert first in faults(copied, finished_config)
    assert Manifests(copied.folder).started
    manifest = read_manifest(other)
    assert manifest is not None
    first.write_bytes(kept)
    write_json(other, dataclasses.replace(manifest, run="f" * 16).as_dict())
    if other.stem != "origins":
        assert other in faults(copied, finished_config)
    else:
        assert Manifests(copied.folder).without_origins


@settings(max_examples=60)
@given(at=st.integers(0, 10_000), to=st.binary(min_size=1, max_size=3))
def test_a_manifest_that_was_changed_is_none(
    tmp_path_factory: pytest.TempPathFactory, at: int, to: bytes
) -> None:
    path = tmp_path_factory.mktemp("manifest") / "costs.json"
    stamps = {"costs.csv": Stamp(7, 1_700_000_000_000_000_001, "5f")}
    manifest = Manifest(
        "costs", stamps, {"teacher": "ab"}, {"device": "cpu", "seeds": [0, 1]}, {"torch": "2"}
    )
    write_json(path, manifest.as_dict())
    assert read_manifest(path) == manifest
    content = path.read_bytes()
    at %= len(content)
    path.write_bytes(content[:at] + to + content[at + len(to) :])
    # a changed blank between two words of JSON says the same
    assert read_manifest(path) in (None, manifest)
    if json.loads(content) != _value_of(path):
        assert read_manifest(path) is None


def _value_of(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def test_an_endless_manifest_is_none(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    with path.open("wb") as file:
        file.truncate(2**33)
    assert read_manifest(path) is None
