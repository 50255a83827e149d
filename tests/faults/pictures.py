"""Kind ``data``: good pictures with captions, among them what people's folders hold; the good ones are always used."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.faults.forking import Limits, answer
from tests.faults.stage import Stage
from tests.faults.verdicts import Fault, Verdict, faults_of, left_behind, mistake_line

_SIDE = 40


def gradient(rng: random.Random, *, grey: bool = False) -> np.ndarray[Any, Any]:
    """A smooth picture of 8 bits, (40, 40, 3); of three equal channels where ``grey``."""
    x, y = np.meshgrid(np.linspace(0, 1, _SIDE), np.linspace(0, 1, _SIDE))
    planes = [rng.uniform(20, 90) * x + rng.uniform(20, 90) * y + rng.uniform(0, 60) for _ in range(3)]
    if grey:
        planes = planes[:1] * 3
    return np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)


def _png16(grey: np.ndarray[Any, Any]) -> bytes:
    """A 16-bit grey PNG whose high bytes are ``grey``: white is 65535."""
    buffer = io.BytesIO()
    Image.fromarray(grey.astype(np.uint16) * 257).save(buffer, "PNG")
    return buffer.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png_of_size(width: int, height: int, kind: int = 2) -> bytes:
    """A PNG whose head promises a size, and whose data is a few bytes."""
    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", head)
        + _chunk(b"IDAT", zlib.compress(bytes(1000)))
        + _chunk(b"IEND", b"")
    )


def _saved(image: Image.Image, kind: str, **named: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **named)
    return buffer.getvalue()


# The same picture in another form: name -> (ending, bytes, whether it must be grey). The row must come out the same.
def _forms(pixels: np.ndarray[Any, Any], grey: np.ndarray[Any, Any]) -> dict[str, tuple[str, bytes, bool]]:
    image, plain = Image.fromarray(pixels), Image.fromarray(grey[..., 0])
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter to the right
    alpha = image.copy()
    alpha.putalpha(255)
    with_alpha = plain.convert("LA")
    palette = plain.convert("P")
    shown = Image.fromarray(255 - pixels)
    return {
        "16-bit grey": (".png", _png16(grey[..., 0]), True),
        "grey with alpha": (".png", _saved(with_alpha, "PNG"), True),
        "opaque RGBA": (".png", _saved(alpha, "PNG"), False),
        "palette": (".png", _saved(palette, "PNG"), True),
        "EXIF-turned": (".png", _saved(turned, "PNG", exif=exif), False),
        "TIFF": (".tif", _saved(image, "TIFF"), False),
        "animated": (
            ".webp",
            _saved(image, "WEBP", lossless=True, save_all=True, append_images=[shown]),
            False,
        ),
        "BMP": (".bmp", _saved(image, "BMP"), False),
        "upper case ending": (".PNG", _saved(image, "PNG"), False),
    }


# What is no picture, or none that may be read: (ending, bytes); None: something that is no file.
def _rubbish(rng: random.Random, pixels: np.ndarray[Any, Any]) -> dict[str, tuple[str, bytes]]:
    good = _saved(Image.fromarray(pixels), "PNG")
    return {
        "cut short": (".png", good[: rng.randrange(20, len(good) // 2)]),
        "empty": (".png", b""),
        "text": (".png", b"hello"),
        "zeros": (".png", bytes(5000)),
        "1 x 3,000,000": (".png", _png_of_size(1, 3_000_000)),
        "60,000 x 60,000": (".png", _png_of_size(60_000, 60_000)),
        "2^31 wide": (".png", _png_of_size(2**31 - 1, 1)),
        "0 x 0": (".png", _png_of_size(0, 0)),
        "a web page": (".jpg", b"<!doctype html>"),
        "an LFS pointer": (".png", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        "a flipped byte": (".png", good[:60] + bytes([good[60] ^ 255]) + good[61:]),
        "SVG": (".svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    }


_CAPTIONS = (
    "a cat",
    "NA",
    "null",
    "None",
    "007",
    "1e5",
    "true",
    "nan",
    "a, b",
    'say "x"',
    "é",
    "日本の猫",
    "-",
    "=1+1",
    "3.0",
    " x ",
)


def _as_csv(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


def _table(rng: random.Random, kind: str, rows: list[tuple[str, str]]) -> tuple[str, bytes]:
    """Name and bytes of a table of files and captions."""
    mark = rng.choice([b"", b"", b"\xef\xbb\xbf"])
    if kind == "jsonl":
        text = "\n".join(
            json.dumps({"file_name": name, "text": caption}, ensure_ascii=False) for name, caption in rows
        )
        return "metadata.jsonl", mark + text.encode()
    lines = ["file_name,text", *(f"{_as_csv(name)},{_as_csv(caption)}" for name, caption in rows)]
    return "metadata.csv", mark + rng.choice(["\n", "\r\n"]).join(lines).encode()


def hostile_data(stage: Stage, seed: int, place: Path) -> Verdict:
    """Good and bad rows in a folder or archive are encoded: the good ones are there with their captions, no other."""
    rng = random.Random(seed)
    data, outside = place / "data", place / "outside"
    data.mkdir()
    outside.mkdir()
    (outside / "secret.png").write_bytes(_saved(Image.fromarray(gradient(rng)), "PNG"))
    (outside / "secret.txt").write_text("SECRET")
    pixels, grey = gradient(rng), gradient(rng, grey=True)
    rows: list[tuple[str, str]] = []  # good ones
    bad: list[tuple[str, str]] = []
    done: list[str] = []
    for number in range(rng.randint(1, 3)):
        (data / f"good{number}.png").write_bytes(_saved(Image.fromarray(pixels), "PNG"))
        rows.append((f"good{number}.png", rng.choice(_CAPTIONS)))
    (data / "grey.png").write_bytes(_saved(Image.fromarray(grey), "PNG"))
    rows.append(("grey.png", rng.choice(_CAPTIONS)))
    same: dict[str, str] = {}  # caption of a form -> the file that it must be equal to
    forms = _forms(pixels, grey)
    for form in rng.sample(sorted(forms), rng.randint(0, 3)):
        ending, content, is_grey = forms[form]
        name = f"form-{len(same)}{ending}"
        (data / name).write_bytes(content)
        rows.append((name, f"form {form}"))
        same[f"form {form}"] = "grey.png" if is_grey else "good0.png"
        done.append(form)
    rubbish = _rubbish(rng, pixels)
    for what in rng.sample(sorted(rubbish), rng.randint(0, 3)):
        ending, content = rubbish[what]
        name = f"bad-{len(bad)}{ending}"
        (data / name).write_bytes(content)
        bad.append((name, f"bad {what}"))
        done.append(what)
    layout = rng.choice(["csv", "jsonl", "txt", "tar", "csv", "jsonl"])
    if layout in ("csv", "jsonl"):
        strange = [
            ("../outside/secret.png", "bad relative"),
            (str(outside / "secret.png"), "bad absolute"),
            ("not-there.png", "bad missing"),
            ("", "bad empty name"),
            ("a\x00b.png", "bad NUL"),
            ("x" * 5000 + ".png", "bad long name"),
            (".", "bad folder"),
            ("~/secret.png", "bad home"),
        ]
        for name, caption in rng.sample(strange, rng.randint(0, 2)):
            if not (layout == "csv" and "\x00" in name):
                bad.append((name, caption))
                done.append(caption)
        for name, content in (("link.png", "link"), ("pipe.png", "FIFO")):
            if rng.random() < 0.15:
                if content == "link":
                    (data / name).symlink_to(rng.choice(["link.png", "nowhere.png", "/dev/zero"]))
                else:
                    os.mkfifo(data / name)
                bad.append((name, f"bad {content}"))
                done.append(content)
        mixed = [*rows, *bad]
        rng.shuffle(mixed)
        name, content = _table(rng, layout, mixed)
        (data / name).write_bytes(content)
    if rng.random() < 0.3:
        for hidden in (".ipynb_checkpoints", "__MACOSX"):
            (data / hidden).mkdir()
            (data / hidden / "hidden.png").write_bytes(_saved(Image.fromarray(pixels), "PNG"))
            (data / hidden / "hidden.txt").write_text("HIDDEN")
        (data / "._good0.png").write_bytes(b"\x00\x05\x16\x07" + bytes(100))
        (data / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
        done.append("hidden files")
    source = data
    if layout in ("txt", "tar"):
        rows = [(name, caption) for name, caption in rows if caption.strip()]
        for name, caption in [*rows, *bad]:
            (data / name).with_suffix(".txt").write_bytes(
                rng.choice([b"", b"\xef\xbb\xbf"]) + caption.encode()
            )
        if layout == "tar":
            source = place / "data.tar"
            with tarfile.open(source, "w") as archive:
                for path in sorted(data.rglob("*")):
                    archive.add(path, path.relative_to(data).as_posix(), recursive=False)
                if rng.random() < 0.4:
                    link = tarfile.TarInfo("secret.png")
                    link.type, link.linkname = tarfile.SYMTYPE, str(outside / "secret.png")
                    archive.addfile(link)
                    done.append("a link in the archive")
            if rng.random() < 0.2:
                content = source.read_bytes()
                source.write_bytes(content[: rng.randrange(len(content))])
                done.append("the archive cut short")
    what = f"{layout}: {', '.join(done) or 'good pictures'}"
    out = place / "out"
    command = ["data", str(stage.pipeline), "--data", str(source), "--out", str(out), "--json"]
    found = answer(command, place, limits=Limits(seconds=120.0))
    faults = [Fault(one.kind, one.signature, f"{what}: {one.detail}") for one in faults_of(found, command)]
    cut = "the archive cut short" in done
    if not faults and found.code == 2:
        if not cut:
            why = mistake_line(found)
            faults.append(Fault("a whole set is refused for some of it", _kind_of(why), f"{what}: {why}"))
        faults += [Fault("left behind", "data", f"{what}: {one}") for one in left_behind(place)[:1]]
    if not faults and found.code == 0:
        faults += _rows_are_right(out, rows, same, what, all_there=not cut)
    return Verdict(what, 1, tuple(faults), int(found.code == 2))


def _kind_of(line: str) -> str:
    """The line without names and numbers."""
    return " ".join(
        word for word in line.split() if "/" not in word and not any(one.isdigit() for one in word)
    )[:90]


def _rows_are_right(
    out: Path, rows: list[tuple[str, str]], same: dict[str, str], what: str, *, all_there: bool
) -> list[Fault]:
    """What is wrong with the captions and latents of a cache."""
    from safetensors import safe_open

    latents: list[tuple[str, Any]] = []
    for path in sorted(out.glob("shard-*.safetensors")):
        with safe_open(path, framework="np") as file:
            captions = json.loads(file.metadata()["prune_lab"])["captions"]
            means = file.get_tensor("mean")
            latents += list(zip(captions, means, strict=True))
    faults = []
    wanted = sorted(caption.strip() for _, caption in rows)
    found = sorted(caption.strip() for caption, _ in latents)
    foreign = [caption for caption in found if caption not in wanted]
    if foreign:
        hidden = [one for one in foreign if "SECRET" in one or "HIDDEN" in one or one.startswith("bad ")]
        kind = "a row that may not be read" if hidden else "a caption is other words"
        faults.append(Fault(kind, (hidden or ["words"])[0][:40], f"{what}: {foreign[:3]}"))
    missing = [caption for caption in wanted if caption not in found]
    if missing and all_there:
        faults.append(Fault("a good row is left out", missing[0][:40], f"{what}: {missing[:3]}"))
    by_caption = dict(latents)
    first = dict(reversed(rows))
    counts = [caption for caption, _ in latents]
    for caption, name in same.items():
        twin = first.get(name, "")
        if caption not in by_caption or twin not in by_caption or counts.count(twin) > 1:
            continue
        one, other = by_caption[caption].astype(float), by_caption[twin].astype(float)
        wrong = float(np.abs(one - other).max())
        if wrong > 0.05 * float(np.abs(other).max()) + 0.02:
            faults.append(
                Fault("a picture is read wrongly", caption, f"{what}: latents differ by {wrong:.3f}")
            )
    return faults
