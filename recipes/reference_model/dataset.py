"""Picture-caption pairs at 64 px, built from four freely licensed picture sets published as public packages.

A caption composes style x subject x tone ("noto emoji, woman firefighter, dark skin tone"), so whole combinations
can be held out: their style and their subject were each seen in training, never together.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from prune_lab.assets import COLUMNS, PICTURE_SIZE
from prune_lab.runtime import atomic_write
from recipes.reference_model.packages import PACKAGES, debian_files, fetch_package, npm_files

TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}

# CLDR's group numbers, in the words the held-out prompts are grouped by.
GROUPS = {
    0: "faces",
    1: "people",
    3: "animals",
    4: "food",
    5: "places",
    6: "activities",
    7: "objects",
    8: "symbols",
    9: "flags",
}

CLIP_ART_TOPICS = frozenset(
    [
        "animals",
        "buildings",
        "containers",
        "electronics",
        "food",
        "office",
        "people",
        "plants",
        "recreation",
        "tools",
        "transportation",
        "science",
        "education",
        "computer",
        "signs_and_symbols",
        "shapes",
        "decorations",
        "special",
    ]
)
CLIP_ART_MAX_REPEATS = (
    6  # a title on more pictures than this names a series ("Etiquette Icons"), not a picture
)
CLIP_ART_MAX_WORDS = 5
CLIP_ART_MAX_PIXELS = 25_000_000  # some drawings were rendered at 600 megapixels; not worth decoding

_QUALITY = 90  # lossy WebP: about 1.2 kB for a 64 px picture
_HELD_OUT_PAIRS = 0.045  # share of (style, subject) pairs held out with all their tones
_HELD_OUT_ROWS = 0.02  # share of single pictures held out besides


@dataclass(frozen=True, slots=True)
class Source:
    """One picture set: the style word its captions carry, its licence and whom to thank."""

    style: str
    licence: str
    credit: str


SOURCES = {
    "noto": Source("noto emoji", "Apache-2.0", "Noto Emoji, Google LLC"),
    "twemoji": Source("twemoji emoji", "CC-BY-4.0", "Twemoji, Twitter, Inc and other contributors"),
    "fluent": Source("fluent emoji", "MIT", "Fluent Emoji, Microsoft Corporation"),
    "openclipart": Source("clip art", "public-domain", "Open Clip Art Library and its contributors"),
}


@dataclass(frozen=True, slots=True)
class EmojiName:
    """What an emoji shows: base subject, skin tones in words ("" where there are none), prompt group."""

    subject: str
    tone: str
    group: str


def emoji_key(name: str) -> str:
    """Code points in lower case without variation selectors: vendors disagree on where to put those."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def plain_subject(label: str) -> str:
    """CLDR's short name as the words of a caption: "flag: Egypt" gives "flag of egypt"."""
    subject = re.sub(r"^flag: ", "flag of ", label)
    return re.sub(r"[:“”]", "", subject).lower().strip()


def tone_words(key: str) -> str:
    """The skin tones in an emoji's code points, in caption words; "" where it has none."""
    tones = [TONES[part] for part in key.split("-") if part in TONES]
    return " and ".join(dict.fromkeys(tones)) + " skin tone" if tones else ""


def read_names(archive: Path) -> tuple[dict[str, EmojiName], set[str]]:
    """Emoji by code points, and every word CLDR uses in names and keywords (to judge other captions by)."""
    (_, raw), *_ = npm_files(archive, "package/en/data.json")
    names: dict[str, EmojiName] = {}
    words: set[str] = set()
    for entry in json.loads(raw):
        words.update(re.findall(r"[a-z]+", " ".join([entry["label"], *entry.get("tags", [])]).lower()))
        if entry.get("group") not in GROUPS:
            continue
        subject, group = plain_subject(entry["label"]), GROUPS[entry["group"]]
        for one in [entry, *entry.get("skins", [])]:
            key = emoji_key(one["hexcode"])
            # Two tones in order matter ("light and dark" is not "dark and light"): keep the code points' order.
            names[key] = EmojiName(subject, tone_words(key), group)
    return names, words


def square_picture(content: bytes, margin: int = 0) -> Image.Image:
    """The picture on white, sRGB, PICTURE_SIZE square, its proportions kept."""
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(ground, picture).convert("RGB")
    room = PICTURE_SIZE - 2 * margin
    if max(flat.size) != room:
        scale = room / max(flat.size)
        flat = flat.resize(
            (max(1, round(flat.width * scale)), max(1, round(flat.height * scale))), Image.Resampling.LANCZOS
        )
    square = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), "white")
    square.paste(flat, ((PICTURE_SIZE - flat.width) // 2, (PICTURE_SIZE - flat.height) // 2))
    return square


def encode_picture(picture: Image.Image) -> bytes:
    """The picture as lossy WebP bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=_QUALITY, method=6)
    return buffer.getvalue()


def caption(style: str, subject: str, tone: str) -> str:
    """The caption of a picture: style, subject and, where there is one, skin tone, joined by commas."""
    return ", ".join(part for part in (style, subject, tone) if part)


def _row(source: str, subject: str, tone: str, group: str, picture: bytes) -> dict[str, object]:
    style = SOURCES[source].style
    return {
        "picture": picture,
        "caption": caption(style, subject, tone),
        "style": style,
        "subject": subject,
        "tone": tone,
        "group": group,
        "source": source,
        "licence": SOURCES[source].licence,
    }


def emoji_rows(
    source: str, archive: Path, wanted: str, names: dict[str, EmojiName]
) -> list[dict[str, object]]:
    """Rows of one vendor's emoji; a picture CLDR has no name for is left out, never guessed."""
    rows = []
    for path, content in npm_files(archive, wanted):
        name = names.get(emoji_key(Path(path).stem))
        if name is not None:
            picture = encode_picture(square_picture(content))
            rows.append(_row(source, name.subject, name.tone, name.group, picture))
    return rows


def clip_art_title(svg: str, path: str, known: set[str]) -> str | None:
    """The subject in an SVG's title, or None where it is not English words about the picture or not public domain."""
    licences = re.findall(r'<(?:cc:)?license[^>]*rdf:resource="([^"]*)"', svg)
    if not licences or not all("publicdomain" in url.lower().replace(" ", "") for url in licences):
        return None
    title = re.search(r"<dc:title[^>]*>([^<]*)<", svg)
    if title is None or re.search(r"clipart by|collection|part of", title.group(1), re.IGNORECASE):
        return None
    if Path(path).relative_to("./usr/share/openclipart/svg").parts[0] not in CLIP_ART_TOPICS:
        return None
    text = title.group(1).lower()
    if not text.isascii():
        return None
    words = re.findall(r"[a-z]+", re.sub(r"[0-9]+", " ", text))
    words = [
        word
        for word in words
        if len(word) > 1 and word not in {"clip", "art", "clipart", "svg", "icon", "bw"}
    ]
    if not 1 <= len(words) <= CLIP_ART_MAX_WORDS or sum(word in known for word in words) * 2 < len(words) + 1:
        return None
    while words and words[-1] in {"and", "with", "of", "the", "in", "on"}:
        words.pop()
    if not words:
        return None
    subject = " ".join(words)
    return f"flag of {subject}" if "/flags/" in path and "flag" not in words else subject


def clip_art_rows(pictures: Path, about: Path, known: set[str]) -> list[dict[str, object]]:
    """Rows of public-domain clip art whose title says, in words CLDR knows, what the picture shows."""
    titles: dict[str, str] = {}
    for path, content in debian_files(about, r"\./usr/share/openclipart/svg/.*\.svg"):
        title = clip_art_title(content.decode("utf-8", "ignore"), path, known)
        if title is not None:
            titles[path.replace("/svg/", "/png/", 1).removesuffix(".svg")] = title
    count = Counter(titles.values())
    rows = []
    for path, content in debian_files(pictures, r"\./usr/share/openclipart/png/.*\.png"):
        title = titles.get(path.removesuffix(".png"))
        if title is None or count[title] > CLIP_ART_MAX_REPEATS:
            continue
        width, height = struct.unpack(">II", content[16:24])  # PNG header, read before anything is decoded
        if width * height <= CLIP_ART_MAX_PIXELS:
            picture = square_picture(content, margin=1)
            if np.asarray(picture).min() < 230:  # an (almost) empty white square shows nothing
                rows.append(_row("openclipart", title, "", "clip art", encode_picture(picture)))
    return rows


def hashed_share(text: str) -> float:
    """A number in [0, 1) fixed by the text alone, so that the split never depends on order or seed."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_frame(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(train, held out): whole (style, subject) pairs and single pictures, chosen by hash.

    A pair is held out only when its subject is in training under another style; a single picture only when no other
    picture carries the same style, subject and tone. So no held-out combination occurs in training.
    """
    pair = frame["style"] + "|" + frame["subject"]
    styles = frame.groupby("subject")["style"].nunique()
    shared = frame["subject"].map(styles) > 1
    chosen = shared & (("pair|" + pair).map(hashed_share) < _HELD_OUT_PAIRS)
    # A subject all of whose styles were drawn goes back to training: it would never be seen.
    seen = set(frame.loc[~chosen, "subject"])
    chosen &= frame["subject"].isin(seen)
    row = frame["caption"]
    single = ~row.duplicated(keep=False) & (("row|" + row).map(hashed_share) < _HELD_OUT_ROWS)
    held = chosen | single
    order = row.map(hashed_share).sort_values(kind="stable").index
    frame, held = frame.loc[order], held.loc[order]
    return frame[~held].reset_index(drop=True), frame[held].reset_index(drop=True)


def build_frame(sources: Path) -> pd.DataFrame:
    """All rows of the picture set, one per picture, from the packages in (or fetched into) `sources`."""
    files = {name: fetch_package(package, sources) for name, package in PACKAGES.items()}
    names, known = read_names(files["names"])
    rows = emoji_rows("noto", files["noto"], r"package/img/google/64/.*\.png", names)
    rows += emoji_rows("twemoji", files["twemoji"], r"package/img/twitter/64/.*\.png", names)
    rows += emoji_rows("fluent", files["fluent"], r"package/assets/.*\.webp", names)
    rows += clip_art_rows(files["clipart"], files["clipart-about"], known)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.drop_duplicates(["picture", "caption"]).reset_index(drop=True)


def attribution(train: pd.DataFrame, heldout: pd.DataFrame) -> str:
    """The Markdown page that ships beside the pictures: counts, licences, whom to thank, what was changed."""
    everything = pd.concat([train, heldout])
    lines = [
        "# Pictures: sources and licences",
        "",
        f"{len(everything):,} pictures ({len(train):,} for training, {len(heldout):,} held out), scaled to "
        f"{PICTURE_SIZE} x {PICTURE_SIZE} on white and re-encoded as lossy WebP; otherwise unchanged. "
        "Names come from Unicode CLDR by way of emojibase-data (MIT).",
        "",
        "| source | pictures | licence | credit | package |",
        "| --- | ---: | --- | --- | --- |",
    ]
    packages = {
        **{name: PACKAGES[name] for name in ("noto", "twemoji", "fluent")},
        "openclipart": PACKAGES["clipart"],
    }
    for name, source in SOURCES.items():
        count = int((everything["source"] == name).sum())
        package = packages[name]
        lines.append(
            f"| {name} | {count:,} | {source.licence} | {source.credit} | {package.client} `{package.name}` |"
        )
    lines += [
        "",
        "Twemoji graphics: copyright Twitter, Inc and other contributors, licensed under CC-BY 4.0 "
        "(Creative Commons Attribution 4.0 International).",
        "Open Clip Art: only pictures whose own metadata say public domain.",
        "",
    ]
    return "\n".join(lines)


def build_pictures(sources: Path, folder: Path) -> None:
    """Write train.parquet, heldout.parquet and ATTRIBUTION.md into `folder`; nothing to do where all three exist."""
    targets = [folder / name for name in ("train.parquet", "heldout.parquet", "ATTRIBUTION.md")]
    if all(target.is_file() for target in targets):
        return
    folder.mkdir(parents=True, exist_ok=True)
    train, heldout = split_frame(build_frame(sources))
    for target, frame in zip(targets, (train, heldout), strict=False):
        with atomic_write(target) as temporary:
            frame.to_parquet(temporary, index=False, compression="zstd")
    with atomic_write(targets[2]) as temporary:
        temporary.write_text(attribution(train, heldout), encoding="utf-8")
