"""Kind ``corrupt``: a file of a finished run is damaged, and then read by a verb, or the run is done again."""

from __future__ import annotations

import csv
import io
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.faults import comparing
from tests.faults.forking import Answer, answer
from tests.faults.stage import NAME, READERS, Stage, copied, said
from tests.faults.verdicts import Fault, Verdict, faults_of, left_behind, mistake_line, words

# Damages of one file: each changes what is at ``path`` and returns what it did, or "" where it does not apply.
Damage = Callable[[random.Random, Path, Stage, Path], str]


def _truncate(rng: random.Random, path: Path, stage: Stage, run: Path) -> str:
    size = path.stat().st_size
    left = rng.randrange(size) if size else 0
    os.truncate(path, left)
    return f"cut to {left} of {size} bytes"


def _empty(rng: random.Random, path: Path, stage: Stage, run: Path) -> str:
    path.write_bytes(b"")
    return "emptied"


def _delete(rng: random.Random, path: Path, stage: Stage, run: Path) -> str:
    path.unlink()
    return "deleted"


def _flip(rng: random.Random, path: Path, stage: Stage, run: Path) -> str:
    content = bytearray(path.read_bytes())
    if not content:
        return ""
    place = rng.randrange(min(len(content), 2048) if rng.random() < 0.5 else len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"a bit flipped in byte {place}"


def _scribble(rng: random.Random, path: Path, stage: Stage, run: Path) -> str:
    content = bytearray(path.read_bytes())
    if not content:
        return ""
    begin = rng.randrange(len(content))
    content[begin : begin + 64] = rng.randbytes(len(content[begin : begin + 64]))
    path.write_bytes(content)
    return f"64 random bytes at {begin}"


def _digit(rng: random.Random, path: Path, stage: Stage, run: Path) -> str:
    if path.suffix not in (".csv", ".json", ".toml"):
        return ""
    text = path.read_text(encoding="utf-8")
    places = [found.start() for found in re.finditer(r"\d", text)]
    if not places:
        return ""
    place = rng.choice(places)
    other = rng.choice([digit for digit in "0123456789" if digit != text[place]])
    path.write_text(text[:place] + other + text[place + 1 :], encoding="utf-8")
    return f"digit {text[place]} became {other} at {place}"


def _cell(rng: random.Random, path: Path, stage: Stage, run: Path) -> str:
    value = rng.choice(["nan", "inf", "-inf", "", "x", "1e400", "-1", "true", "'", "\ufeff", "0x10", "1_0"])
    if path.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
        if len(rows) < 2:
            return ""
        row, column = rng.randrange(1, len(rows)), rng.randrange(len(rows[0]))
        was, rows[row][column] = rows[row][column], value
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        return f"{rows[0][column]} in row {row} became {value!r}" if was != value else ""
    if path.suffix == ".json":
        text = path.read_text(encoding="utf-8")
        found = list(re.finditer(r"(?<=: )(-?[\d.]+|true|false|null|\"[^\"]*\")", text))
        if not found:
            return ""
        match = rng.choice(found)
        value = rng.choice(
            ["NaN", "Infinity", "null", '"x"', "[]", "{}", "-1", "1e400", "true", "[[1]]", "9" * 400]
        )
        path.write_text(text[: match.start()] + value + text[match.end() :], encoding="utf-8")
        return f"{match[0][:30]} became {value[:20]}" if value != match[0] else ""
    return ""


def _rows(rng: random.Random, path: Path, stage: Stage, run: Path) -> str:
    if path.suffix != ".csv":
        return ""
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) < 2:
        return ""
    what, place = rng.choice(["dropped", "twice", "only the head"]), rng.randrange(1, len(lines))
    lines = {
        "dropped": lines[:place] + lines[place + 1 :],
        "twice": [*lines[: place + 1], *lines[place:]],
        "only the head": lines[:1],
    }[what]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"row {place}: {what}"


def _column(rng: random.Random, path: Path, stage: Stage, run: Path) -> str:
    if path.suffix != ".csv":
        return ""
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
    if not rows:
        return ""
    column, what = rng.randrange(len(rows[0])), rng.choice(["dropped", "renamed", "twice"])
    name = rows[0][column]
    if what == "renamed":
        rows[0][column] = "other"
    for row in rows:
        if what == "dropped":
            del row[column]
        elif what == "twice":
            row.append(row[column])
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return f"column {name} {what}"


def _swap(rng: random.Random, path: Path, stage: Stage, run: Path) -> str:
    """The same file of another run, or another file of the same ending of this one."""
    name = path.relative_to(run)
    same = [one for one in run.rglob(f"*{path.suffix}") if one.is_file() and one != path]
    there = [stage.other / name] if (stage.other / name).is_file() else []
    choice = rng.choice([*there * 3, *sorted(same)] or [path])
    content = choice.read_bytes()
    if content == path.read_bytes():
        return ""
    path.write_bytes(content)
    whose = "the other run's" if choice.is_relative_to(stage.other) else choice.relative_to(run)
    return f"replaced by {whose}"


def _folder(rng: random.Random, path: Path, stage: Stage, run: Path) -> str:
    path.unlink()
    path.mkdir()
    return "replaced by an empty folder"


def _link(rng: random.Random, path: Path, stage: Stage, run: Path) -> str:
    path.unlink()
    target = rng.choice([path.name, "nowhere", "/dev/zero", "/dev/null", ".."])
    path.symlink_to(target)
    return f"replaced by a link to {target}"


def _fifo(rng: random.Random, path: Path, stage: Stage, run: Path) -> str:
    path.unlink()
    os.mkfifo(path)
    return "replaced by a FIFO"


def _other_text(rng: random.Random, path: Path, stage: Stage, run: Path) -> str:
    name, content = rng.choice(
        [
            ("bytes that are not UTF-8", path.read_bytes()[:40] + b"\xff\xfe\xfd" + path.read_bytes()[40:]),
            ("UTF-16", path.read_bytes().decode("utf-8", "replace").encode("utf-16")),
            ("zeros", bytes(max(1, path.stat().st_size))),
            ("an LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
            ("deep brackets", b"[" * 200_000),
            ("a web page", b"<!doctype html><html>not found</html>"),
            ("a long line", b"1," * 3_000_000),
            ("a JSON of another kind", b"[]"),
            ("a JSON number", b"7"),
        ]
    )
    path.write_bytes(content)
    return f"replaced by {name}"


def _huge(rng: random.Random, path: Path, stage: Stage, run: Path) -> str:
    with path.open("r+b") as file:
        file.truncate(8 * 2**30)  # sparse: takes no room on the disk
    return "made 8 GiB long"


def _unreadable(rng: random.Random, path: Path, stage: Stage, run: Path) -> str:
    if os.geteuid() == 0:
        return ""
    path.chmod(0)
    return "made unreadable"


DAMAGES: dict[str, Damage] = {
    "truncate": _truncate,
    "empty": _empty,
    "delete": _delete,
    "flip": _flip,
    "scribble": _scribble,
    "digit": _digit,
    "cell": _cell,
    "rows": _rows,
    "column": _column,
    "swap": _swap,
    "folder": _folder,
    "link": _link,
    "fifo": _fifo,
    "other-text": _other_text,
    "huge": _huge,
    "unreadable": _unreadable,
}


def _pick(rng: random.Random, run: Path) -> Path:
    """A file of the run: each name counts as often, however many candidates there are."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and not path.is_symlink())
    kinds: dict[str, list[Path]] = {}
    for path in files:
        name = path.relative_to(run).as_posix()
        if name.startswith("report/") and rng.random() < 0.9:
            continue
        kinds.setdefault(re.sub(r"[0-9a-f]{12,}", "ID", name), []).append(path)
    return rng.choice(kinds[rng.choice(sorted(kinds))])


def _names(text: str, name: str) -> bool:
    """Whether ``text`` names the file ``name``, or the folder that it lies in."""
    parts = name.split("/")
    return parts[-1] in text or any(part in text for part in parts[:-1] if len(part) > 5)


def _read(
    stage: Stage, reader: str, damaged: Path, name: str, what: str, place: Path
) -> tuple[Answer, list[Fault]]:
    command = stage.reader(reader, damaged)
    found = answer(command, place)
    codes = (0, 1, 2) if reader == "doctor" else (0, 2)
    faults = faults_of(found, command, codes=codes)
    shape = re.sub(r"[0-9a-f]{12,}", "ID", name)
    if faults:
        return found, faults
    if found.code == 2 and not _names(mistake_line(found), name):
        faults.append(
            Fault("the line does not name the file", f"{reader}: {shape}", f"{what}: {mistake_line(found)}")
        )
    if found.code == 0 and reader in stage.known() and reader not in ("doctor", "dry-run"):
        now, before = said(reader, found, damaged), stage.known()[reader]
        unfinished = reader in ("report", "compare") and what.endswith(
            (" deleted", " emptied")
        )  # of what is there
        if now != before and not unfinished and not _names(found.err, name):
            faults.append(
                Fault(
                    "another answer without a word",
                    f"{reader}: {shape}",
                    f"{what}; {words(command)}: {comparing.first_change(now, before)}",
                )
            )
    return found, faults


def _seen_by_doctor(stage: Stage, damaged: Path, name: str, what: str, place: Path) -> list[Fault]:
    """A damage that doctor does not see."""
    if "doctor" not in stage.known() or name.startswith("report/"):
        return []
    command = stage.reader("doctor", damaged)
    found = answer(command, place)
    faults = faults_of(found, command, codes=(0, 1, 2))
    if not faults and found.code == 0:
        shape = re.sub(r"[0-9a-f]{12,}", "ID", name)
        faults.append(Fault("doctor finds nothing", shape, what))
    return faults


def _done_again(stage: Stage, damaged: Path, name: str, what: str, place: Path) -> tuple[int, list[Fault]]:
    """How the run ends when it is done again; where it is refused, once more without the file that it names."""
    command = ["run", "--config", stage.job, "--run", damaged]
    shape, path = re.sub(r"[0-9a-f]{12,}", "ID", name), damaged / name
    count, found = 1, answer(command, place)
    faults = faults_of(found, command)
    if not faults and found.code == 2:
        line = mistake_line(found)
        if not _names(line, name):
            return count, [Fault("the line does not name the file", f"run: {shape}", f"{what}: {line}")]
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        count, found = 2, answer(command, place)
        faults = faults_of(found, command)
        if not faults and found.code == 2 and not _names(mistake_line(found), name):
            faults.append(
                Fault("no way back", f"run: {shape}", f"{what}, then deleted: {mistake_line(found)}")
            )
    if not faults and found.code == 0:
        expected, unsteady = stage.contents()
        differs = comparing.difference(comparing.contents(damaged), expected, unsteady)
        if differs:
            faults.append(Fault("a run done again differs", f"run: {shape}", f"{what}: {differs}"))
        faults += [Fault("left behind", "run", f"{what}: {one}") for one in left_behind(damaged)[:1]]
    return count, faults


def _damaged(stage: Stage, seed: int, place: Path) -> tuple[Path, str, str]:
    """A copy of the run in ``place`` with one damage, the same for the same seed; the file, and what was done to it."""
    rng, done = random.Random(seed), ""
    run = copied(stage.run, place / NAME)
    while not done:
        path, damage = _pick(rng, run), rng.choice(sorted(DAMAGES))
        done = DAMAGES[damage](rng, path, stage, run)
    return run, path.relative_to(run).as_posix(), done


def corrupted_run(stage: Stage, seed: int, place: Path) -> Verdict:
    """A damaged run is read by two verbs, each on a copy of its own; and in some cases it is done again."""
    rng = random.Random(seed)
    damaged, name, done = _damaged(stage, seed, place / "again")
    what = f"{re.sub(r'[0-9a-f]{12,}', 'ID', name)} {done}"
    faults: list[Fault] = []
    refused = count = 0
    readers = [one for one in READERS if one in stage.known() and one != "doctor"]
    for reader in rng.sample(readers, 2):
        copy, _, _ = _damaged(stage, seed, place / f"for-{reader}")
        found, seen = _read(stage, reader, copy, name, what, place)
        faults += seen
        count, refused = count + 1, refused + (found.code == 2)
    faults += _seen_by_doctor(stage, damaged, name, what, place)
    if rng.random() < 0.25:
        more, seen = _done_again(stage, damaged, name, what, place)
        count, faults = count + more, faults + seen
    return Verdict(what, count, tuple(faults), refused)
