"""Where a written file names the machine it was made on: in its text, its header, its pictures or its own name."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

from PIL import Image

_DATA_URI = re.compile(rb"data:[\w/+.-]+;base64,([A-Za-z0-9+/=]+)")


def _spellings(secret: str) -> set[bytes]:
    """``secret`` as it may stand in a file: plain, in JSON, in an address."""
    texts = {secret, json.dumps(secret)[1:-1], quote(secret)}
    return {text.encode(code) for text in texts for code in ("utf-8", "utf-16-le")}


def _contents(path: Path) -> Iterator[bytes]:
    """What ``path`` holds, also where it is packed: what pages embed, the notes in a picture."""
    content = path.read_bytes()
    yield content
    for embedded in _DATA_URI.findall(content):
        yield base64.b64decode(embedded)
    if path.suffix == ".png":
        with Image.open(path) as picture:
            yield repr(picture.info).encode()


def traces(place: Path, secrets: Iterable[str], *, but: Iterable[str] = ()) -> list[str]:
    """A line for each file at or below ``place`` that holds one of ``secrets``, but for those called ``but``."""
    known = {secret: _spellings(secret) for secret in secrets}
    found = []
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        name = path.relative_to(place.parent)
        if not path.is_file() or set(name.parts) & set(but):
            continue
        for content in (str(name).encode(), *_contents(path)):
            for secret, spellings in known.items():
                for spelling in spellings:
                    if (at := content.find(spelling)) >= 0:
                        found.append(f"{name}: {secret} in {content[max(0, at - 50) : at + 50]!r}")
    return found
