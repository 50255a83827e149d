"""Where results may be written: whatever ``--out`` names, nothing that was there is lost, and no work is done first."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_bad_input import refused, tree
from typer.testing import CliRunner

from prune_lab.cli import app
from prune_lab.distill.cache import FORMAT, INDEX
from prune_lab.distill.shard_locks import check_cache_folder, clear
from prune_lab.errors import RunError, StorageError
from prune_lab.models.protection import check_apart, check_file, check_folder, check_run_folder, sources_of
from prune_lab.runtime.files import FILE_LIST, check_replaceable, listed_files, output_folder

pytestmark = pytest.mark.usefixtures("blank_figures")

# The verbs that write where a person says: what follows the place, which comes last.
MODEL, DATA, LORA, PART = "<model>", "<data>", "<lora>", "<part>"
BY_PLAN = ("--plan", "bk-tiny", "--model", MODEL)
VERBS: dict[str, tuple[str, ...]] = {
    "prune": ("prune", MODEL, "--plan", "bk-tiny", "--force", "--out"),
    "prune U-Net": ("prune", PART, "--plan", "bk-tiny", "--force", "--out"),
    "export": ("export", MODEL, "--to", "single-file", "--force", "--out"),
    "lora": ("convert", "lora", LORA, *BY_PLAN, "--force", "--out"),
    "controlnet": ("convert", "controlnet", MODEL, *BY_PLAN, "--force", "--out"),
    "drawn": ("data", MODEL, "--prompts", "default", "--count", "2", "--force", "--out"),
    "encoded": ("data", MODEL, "--data", DATA, "--force", "--out"),
    "distill": ("distill", MODEL, "--plan", "bk-tiny", "--data", DATA, "--force", "--out"),
    "score": ("score", MODEL, "--data", DATA, "--force", "--out"),
    "compare": ("score", MODEL, "--data", DATA, "--compare", "--force", "--out"),
    "search": ("search", MODEL, "--data", DATA, "--params", "60%", "--force", "--out"),
    "generate": ("generate", MODEL, "--prompt", "a cat", "--force", "--out"),
    "run": ("run", MODEL, "--data", DATA, "--force", "--run"),
    "score in a run": ("score", MODEL, "--data", DATA, "--force", "--run"),
}
ENDINGS = {"export": ".safetensors", "lora": ".safetensors", "generate": ".png"}


class World:
    """Sources in several layouts, a run, and folders with what else people have."""

    def __init__(self, root: Path, pipeline: Path, images: Path) -> None:
        self.root = root
        self.plain = Path(shutil.copytree(pipeline, root / "home" / "model"))
        self.linked = Path(shutil.copytree(pipeline, root / "linked" / "model"))
        self.real = root / "parts" / "unet"  # behind a link in the model
        self.real.parent.mkdir()
        shutil.move(self.linked / "unet", self.real)
        (self.linked / "unet").symlink_to(self.real)
        self.data = Path(shutil.copytree(images, root / "photos" / "mine"))
        self.lora = root / "addition" / "lora.safetensors"
        self.lora.parent.mkdir()
        self.lora.write_bytes(b"not read before the place is known to be free")
        self.run = root / "runs" / "old"
        self.run.mkdir(parents=True)
        (self.run / "config.toml").write_text('model = "reference"\n')
        (self.run / "environment.json").write_text('{"format": 2}')
        self.letters = root / "letters"  # of somebody
        (self.letters / "2024").mkdir(parents=True)
        (self.letters / "2024" / "to-mother.txt").write_text("dear mother")
        for name, target in {"to-model": self.plain, "to-root": root, "to-data": self.data}.items():
            (root / name).symlink_to(target)

    def forbidden(self, layout: str, draw: random.Random, ending: str) -> str:
        """A place to which nothing may be written by a verb that reads the model in this ``layout``."""
        model = {"plain": self.plain, "linked": self.linked}[layout]
        part = self.real if layout == "linked" else model / "unet"
        new = f"new{ending}"
        existing = draw.choice([path for path in model.rglob("*") if path.is_file()])
        places = {
            "equal": model,
            "holds it": model.parent,
            "holds all": self.root,
            "root": Path("/"),
            "in it": model / new,
            "deep in it": model / "a" / "b" / new,
            "a part": model / draw.choice(("vae", "unet", "text_encoder", "scheduler")),
            "in a part": model / "unet" / new,
            "a file of it": existing,
            "under a file of it": existing / new,
            "behind its link": part,
            "in what is behind its link": part / new,
            "in the run": self.run / draw.choice(("candidates", "report", new)),
            "a file of the run": self.run / "config.toml",
            "a link to it": self.root / "to-model",
            "through a link": self.root / "to-root" / model.relative_to(self.root) / new,
            "by another way": model / "vae" / ".." / ".." / model.name / new,
            "not ours": self.letters,
            "not ours, deep": self.letters / "2024" / "to-mother.txt",
            "name too long": self.root / ("x" * draw.randint(256, 5000) + ending),
            "path too long": self.root / "/".join(["x" * 100] * 60) / new,
            "no file system": Path("/proc") / new,
        }
        if layout == "linked":  # reached from the plain one by no link
            del places["a link to it"]
        place = places[draw.choice(sorted(places))]
        return os.path.relpath(place) if draw.random() < 0.3 else str(place)


@pytest.fixture
def world(tiny_pipeline_folder: Path, image_folder: Path, tmp_path: Path) -> World:
    """A world of its own for one test."""
    return World(tmp_path / "world", tiny_pipeline_folder, image_folder)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are read and no network answers: whoever begins to work fails."""

    def working(*_: object, **__: object) -> None:
        raise AssertionError("worked before the place was checked")

    import diffusers
    import torch

    whole = torch.nn.Module.__call__

    def only_on_meta(
        module: Any, *more: Any, **named: Any
    ) -> Any:  # where configs are checked and blocks counted
        if any(not parameter.is_meta for parameter in module.parameters()):
            working()
        return whole(module, *more, **named)

    monkeypatch.setattr(torch.nn.Module, "__call__", only_on_meta)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", working)
    monkeypatch.setattr(diffusers.ModelMixin, "from_pretrained", working)
    monkeypatch.setattr("prune_lab.runs.lock.take_lock", working)


def asked(verb: str, world: World, layout: str, out: str) -> list[str]:
    model = {"plain": world.plain, "linked": world.linked}[layout]
    names = {MODEL: model, DATA: world.data, LORA: world.lora, PART: model / "unet"}
    return [str(names.get(word, word)) for word in VERBS[verb]] + [out]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_written_over_in_or_around_a_source_or_a_run(verb: str, world: World) -> None:
    draw = random.Random(f"{verb} {os.environ.get('PYTEST_SEED', '1')}")
    for _ in range(6):
        layout = draw.choice(("plain", "linked"))
        out = world.forbidden(layout, draw, ENDINGS.get(verb, ""))
        line = refused(world.root, *asked(verb, world, layout, out))
        assert "asked" in line, out


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("verb", [verb for verb, words in VERBS.items() if DATA in words])
def test_data_of_a_person_are_a_source_too(verb: str, world: World) -> None:
    ending = ENDINGS.get(verb, "")
    for place in (world.data, world.data.parent, world.data / f"new{ending}", world.root / "to-data" / "x"):
        line = refused(world.root, *asked(verb, world, "plain", str(place)))
        assert "that it is made from" in line or "found a folder there" in line


@pytest.mark.usefixtures("no_work")
def test_the_folder_where_one_stands(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.plain)
    for verb in ("prune", "data", "distill", "compare", "run"):
        words = asked({"data": "encoded"}.get(verb, verb), world, "plain", ".")
        assert "the model that it is made from" in refused(world.root, *words)
    monkeypatch.chdir(world.letters)
    assert "2024" in refused(world.root, *asked("prune", world, "plain", "."))


# Places by arithmetic ------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(("a", "b", "ab", "a b", "A"))
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)


@settings(max_examples=60)
@given(source=PATHS, out=PATHS, link=st.none() | st.tuples(PATHS, PATHS), deep=st.booleans())
def test_which_places_overlap(
    source: str, out: str, link: tuple[str, str] | None, deep: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("places")
    (root / source).mkdir(parents=True)
    if link is not None and not (root / link[0]).exists():
        (root / link[0]).parent.mkdir(parents=True, exist_ok=True)
        (root / link[0]).symlink_to(root / link[1])
    place = root / out / ("new" if deep else "")
    mine, other = (Path(os.path.realpath(path)) for path in (place, root / source))
    inside = mine == other or other in mine.parents
    holds = mine in other.parents and mine.exists()
    found = ""
    try:
        check_apart(place, {"the model": [root / source]})
    except StorageError as error:  # also of a link that leads in a circle
        found = str(error)
    words = "which is" if mine == other else "which lies in" if inside else "which holds"
    assert (f"{words} the model that it is made from" in found) == (inside or holds)
    assert not [path for path in root.rglob("*") if path.is_file()]


def test_a_home_folder_and_names_that_only_begin_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    sources = {"the model": ["~/model"]}
    assert check_folder("~/model-small", sources) == tmp_path / "model-small"
    assert check_folder(tmp_path / "mode", sources) == tmp_path / "mode"
    for out in ("~/model", "~", "~/model/x"):
        with pytest.raises(StorageError, match="made from"):
            check_folder(out, sources)
    with pytest.raises(StorageError, match="no name of a file"):
        check_folder("a\0b", sources)
    with pytest.raises(StorageError, match="root of the file system"):
        check_apart("/", {})


def test_what_was_written_whole_is_not_replaced_in_part(tmp_path: Path) -> None:
    with output_folder(tmp_path / "student", force=False) as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "config.json").write_text("{}")
    for out in ("unet", "unet/config.json", "unet/config.json/new"):
        with pytest.raises(StorageError, match=r"a part of .*student, which prune-lab wrote as a whole"):
            check_folder(tmp_path / "student" / out, {}, force=True)
    check_folder(tmp_path / "student", {}, force=True)


def test_files_that_a_pattern_finds_are_sources(tmp_path: Path) -> None:
    (tmp_path / "one.tar").write_bytes(b"")
    sources = {"the data": [str(tmp_path / "*.tar")]}
    assert check_folder(tmp_path / "student", sources) == tmp_path / "student"
    with pytest.raises(StorageError, match="which is the data"):
        check_apart(tmp_path / "one.tar", sources)


def test_a_run_lies_neither_in_a_run_nor_around_what_it_reads(
    small_run_config: Callable[..., Any], world: World
) -> None:
    config = small_run_config(model=str(world.plain), data={"source": str(world.data)})
    assert str(world.data) in sources_of(config)["the data"]
    check_run_folder(world.root / "new", config)
    check_run_folder(world.run, config)  # to go on with it
    for folder in (world.run / "new", world.plain, world.data / "run", world.data.parent):
        with pytest.raises(RunError, match=r"found the run|that it is made from"):
            check_run_folder(folder, config)


# What --force removes ------------------------------------------------------------------------------------------------


def written(folder: Path, *names: str) -> Path:
    """An output folder with these files."""
    with output_folder(folder, force=folder.exists()) as temporary:
        for name in names:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_text(f"written here: {name}")
    return folder


def _file(path: Path) -> None:
    path.write_text("of somebody")


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("of somebody")


def _link(path: Path) -> None:
    path.symlink_to("/etc")


@settings(max_examples=25)
@given(
    ours=st.lists(PATHS, min_size=1, max_size=6, unique=True),
    name=st.sampled_from(("notes.txt", ".hidden", "model.safetensors", ".DS_Store", FILE_LIST + "x")),
    where=st.integers(0, 5),
    kind=st.sampled_from((_file, _folder, _link)),
)
def test_force_replaces_what_was_listed_and_nothing_else(
    ours: list[str],
    name: str,
    where: int,
    kind: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("out") / "student"
    files = [f"{one}/weights" for one in ours]
    written(folder, *files)
    assert listed_files(folder) == set(files)
    places = [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]
    other = places[where % len(places)] / name
    kind(other)
    before = tree(folder.parent)
    with pytest.raises(StorageError, match="did not write") as caught:
        written(folder, "new")
    assert other.relative_to(folder).as_posix() in str(caught.value)
    assert tree(folder.parent) == before
    shutil.rmtree(other) if kind is _folder else other.unlink()
    with pytest.raises(StorageError, match="--force"), output_folder(folder):
        pass
    written(folder, "new", "more/new")
    assert sorted(tree(folder)) == [FILE_LIST, "more", "more/new", "new"]
    assert [path.name for path in folder.parent.iterdir()] == ["student"]


def test_a_file_that_comes_while_we_work_stays(tmp_path: Path) -> None:
    folder = written(tmp_path / "student", "old")

    def meanwhile() -> None:
        with output_folder(folder, force=True) as temporary:
            (temporary / "new").write_text("new")
            (folder / "thesis.tex").write_text("years of work")

    with pytest.raises(StorageError, match=r"thesis\.tex"):
        meanwhile()
    assert sorted(tree(folder)) == [FILE_LIST, "old", "thesis.tex"]
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_many_files_are_counted(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02d}.jpg").touch()
    with pytest.raises(StorageError, match=r"00\.jpg, 01\.jpg, 02\.jpg and 37 more; give another path"):
        check_folder(tmp_path, {}, force=True)


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    written(tmp_path / "link", "one")
    written(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert sorted(tree(tmp_path / "real")) == [FILE_LIST, "two"]


def test_a_folder_that_is_a_mount_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    inode = mount.stat().st_ino
    monkeypatch.setattr(Path, "is_mount", lambda path: path == mount)
    written(mount, "one/a", "one/b")
    written(mount, "one/b", "two")
    assert mount.stat().st_ino == inode
    assert sorted(tree(mount)) == [FILE_LIST, "one", "one/b", "two"]


def _scores(path: Path) -> None:
    path.write_text("group,kind,blocks,starred,impact,low,high\n")


def _plans(path: Path) -> None:
    path.write_text(json.dumps([{"id": "0", "architecture": "x", "removed": ["Dn1.R2"], "names": []}]))


def _tensors(path: Path) -> None:
    import numpy as np

    save_file({"a": np.zeros(1)}, path, {"prune_lab.version": "1"})


def _pictures(path: Path) -> None:
    import torch

    from prune_lab.evaluation import save_grid

    save_grid(path, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


WRITERS = {"scores": _scores, "plans": _plans, "tensors": _tensors, "pictures": _pictures}


def _foreign(draw: random.Random, mine: Path) -> Iterator[bytes]:
    """What somebody else may have in a file of that name."""
    yield from (
        b"",
        b"name,age\nAda,36\n",
        b"[]x",
        b'{"id": 1}',
        b'[{"id": 1}]',
        draw.randbytes(200),
        b"[" * 9999,
    )
    whole = mine.read_bytes()
    yield b"x" + whole
    yield whole[: len(whole) // 3]


@pytest.mark.parametrize("kind", WRITERS)
def test_one_file_is_replaced_where_its_content_says_that_it_is_ours(kind: str, tmp_path: Path) -> None:
    ending = {"tensors": ".safetensors", "pictures": ".png"}.get(kind, ".x")
    path = tmp_path / f"file{ending}"
    assert check_file(path, {}, kind) == path
    WRITERS[kind](path)
    with pytest.raises(StorageError, match="another name or --force"):
        check_file(path, {}, kind)
    assert check_file(path, {}, kind, force=True) == path
    for content in list(_foreign(random.Random(kind), path)):
        if kind == "scores" and content.startswith(b"group,kind,blocks,starred,impact,"):
            continue
        path.write_bytes(content)
        with pytest.raises(StorageError, match="did not write"):
            check_file(path, {}, kind, force=True)
        assert path.read_bytes() == content
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StorageError, match="did not write"):
        check_file(path, {}, kind, force=True)


def test_a_cache_keeps_what_is_not_its_own(
    tiny_pipeline_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    words = [
        "data",
        tiny_pipeline_folder,
        "--data",
        image_folder,
        "--device",
        "cpu",
        "--pictures",
        1,
        "--out",
        out,
    ]
    (out / "pictures").mkdir(parents=True)
    (out / "pictures" / "holiday.jpg").write_text("mine")
    (out / "shard-00000.safetensors").write_text("a checkpoint of somebody")
    for more in ((), ("--force",)):
        assert "pictures, shard-00000" in refused(tmp_path, *words, *more)
    shutil.rmtree(out)

    def build(*more: object) -> None:
        result = CliRunner().invoke(app, [str(word) for word in (*words, *more)])
        assert result.exit_code == 0, result.output

    build()
    build("--force", "--flip")
    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in refused(tmp_path, *words, "--force")
    build("--flip")  # which removes nothing
    assert (out / "notes.txt").read_text() == "mine"


OUTSIDE = "outside.txt"
NAMES = (
    "",
    ".",
    "..",
    "../outside.txt",
    "sub/../../outside.txt",
    "<outside>",
    "a\0b",
    "\ud800",
    "x" * 5000,
    7,
    None,
)
HOSTILE: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "nowhere": lambda path: path.symlink_to("nowhere"),
    "folder": lambda path: path.mkdir(),
    "brackets": lambda path: path.write_text("[" * 200_000),
    "numbers": lambda path: path.write_text('{"files": [1e400], "shards": [1e400]}'),
}


@settings(max_examples=60, deadline=None)
@given(
    listed=st.one_of(st.sampled_from(sorted(HOSTILE)), st.lists(st.sampled_from(NAMES), min_size=1)),
    indexed=st.one_of(
        st.just("none"), st.sampled_from(sorted(HOSTILE)), st.lists(st.sampled_from(NAMES), min_size=1)
    ),
    linked=st.booleans(),
)
def test_a_list_that_we_cannot_have_written_removes_nothing(
    listed: str | list[object],
    indexed: str | list[object],
    linked: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("lists")
    outside, folder = root / OUTSIDE, root / "out"
    outside.write_text("of somebody")
    folder.mkdir()
    (folder / "mine").write_text("of somebody")
    (folder / "link").symlink_to(root)

    def fill(path: Path, value: str | list[object], content: Callable[[list[object]], object]) -> None:
        if isinstance(value, list):
            names = [str(outside) if one == "<outside>" else one for one in value]
            path.write_text(json.dumps(content(names)))
        elif value in HOSTILE:
            HOSTILE[value](path)

    fill(folder / FILE_LIST, listed, lambda names: {"format": 1, "files": [*names, "mine"]})
    fill(
        folder / INDEX, indexed, lambda names: {"format": FORMAT, "shards": [{"file": one} for one in names]}
    )
    assert listed_files(folder) is None
    before = sorted(folder.iterdir())
    for check in (check_replaceable, check_cache_folder):
        with pytest.raises(StorageError, match="did not write") as caught:
            check(folder, force=True)
        assert len(str(caught.value).splitlines()) == 1
    clear(folder)
    assert sorted(folder.iterdir()) == before
    # a list with names that lie inside of the folder, though a link leads out of it
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "link").symlink_to(root)
    (folder / "sub").mkdir()
    (folder / "sub" / "mine").write_text("of somebody")
    names = ["link/outside.txt", "sub", *(["link"] if linked else [])]
    (folder / FILE_LIST).write_text(json.dumps({"format": 1, "files": names}))
    with pytest.raises(StorageError, match="did not write"):
        check_cache_folder(folder, force=True)
    clear(folder)
    assert (folder / "sub" / "mine").is_file()
    assert outside.read_text() == "of somebody"


def test_force_keeps_what_somebody_put_into_a_student(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    words = ["prune", tiny_pipeline_folder, "--plan", "bk-tiny", "--out", out]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert listed_files(out) == {name for name in tree(out) if (out / name).is_file() and name != FILE_LIST}
    (out / "vae" / "mine.txt").write_text("mine")
    assert "vae/mine.txt" in refused(tmp_path, *words, "--force")
