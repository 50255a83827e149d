"""Captions made from words, by a seed: the same list from every version of Python."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prune_lab.assets import prompts_path
from prune_lab.runtime import atomic_write
from recipes.prompts import words

COUNT = 4000
SEED = 0


@dataclass(frozen=True, slots=True)
class Kind:
    """Captions of one kind: what is shown, what is said of it, and how many of a hundred there are."""

    name: str
    subjects: Sequence[str]
    details: Sequence[str]
    share: int


KINDS = (
    Kind("people", words.PEOPLE, words.PEOPLE_DOING, 16),
    Kind("animals", words.ANIMALS, words.ANIMALS_DOING, 16),
    Kind("objects", words.OBJECTS, words.OBJECTS_WHERE, 13),
    Kind("places", words.PLACES, words.PLACES_WHEN, 13),
    Kind("food", words.FOOD, words.FOOD_WHERE, 9),
    Kind("rooms", words.ROOMS, words.ROOMS_WITH, 7),
    Kind("plants", words.PLANTS, words.PLANTS_HOW, 6),
    Kind("vehicles", words.VEHICLES, words.VEHICLES_WHERE, 7),
    Kind("buildings", words.BUILDINGS, words.PLACES_WHEN, 5),
    Kind("fantasy", words.FANTASY, words.FANTASY_HOW, 5),
    Kind("abstract", words.ABSTRACT, words.ABSTRACT_HOW, 3),
)

# From a few words to a long description; {a} is style or photo, with its article.
TEMPLATES = (
    "{subject}",
    "{subject} {detail}",
    "{subject} {detail}",
    "{subject} {detail}, {light}",
    "{a} of {subject}",
    "{a} of {subject} {detail}",
    "{a} of {subject} {detail}",
    "{subject} {detail}, {style}",
    "{subject}, {style}, {mood}",
    "{a} of {subject} {detail}, {light}",
    "{a} of {subject} {detail}, {view}",
    "{a} of {subject} {detail}, {light}, {view}, {mood}",
    "{subject} {detail}, {style}, {light}, {mood}",
)


class Draws:
    """Choices that follow from a seed and their number alone; `random` may choose otherwise in another version."""

    def __init__(self, seed: int, name: str) -> None:
        self._start = f"{seed}/{name}"
        self._number = 0

    def choice(self, options: Sequence[str]) -> str:
        """One of ``options``."""
        self._number += 1
        digest = hashlib.sha256(f"{self._start}/{self._number}".encode()).digest()
        return options[int.from_bytes(digest[:8], "big") % len(options)]


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _caption(kind: Kind, draws: Draws) -> str:
    style = draws.choice(words.PHOTOS if draws.choice("ps") == "p" else words.STYLES)
    parts = {
        "subject": draws.choice(kind.subjects),
        "detail": draws.choice(kind.details),
        "light": draws.choice(words.LIGHTS),
        "view": draws.choice(words.VIEWS),
        "mood": draws.choice(words.MOODS),
    }
    return draws.choice(TEMPLATES).format(a=_with_article(style), style=style, **parts)


def make_prompts(count: int = COUNT, seed: int = SEED) -> list[tuple[str, str]]:
    """``count`` captions with their kinds, no two the same; kinds are mixed, so that any part has them all."""
    drawn = {kind.name: Draws(seed, kind.name) for kind in KINDS}
    places = [kind for kind in KINDS for _ in range(kind.share)]
    assert len(places) == 100
    order = sorted(range(100), key=lambda place: hashlib.sha256(f"{seed}/{place}".encode()).digest())
    found: dict[str, str] = {}
    for number in range(count):
        kind = places[order[number % 100]]
        for _ in range(1000):
            caption = _caption(kind, drawn[kind.name])
            if caption not in found:
                break
        else:
            raise AssertionError(f"no further captions of {kind.name}")
        found[caption] = kind.name
    return list(found.items())


def as_csv(prompts: Sequence[tuple[str, str]]) -> str:
    """The list as the text of a CSV with the columns prompt and kind."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("prompt", "kind"))
    writer.writerows(prompts)
    return text.getvalue()


def write_prompts(path: Path | None = None) -> Path:
    """The path of the list that ships, or of ``path``, after it was written."""
    path = path or prompts_path()
    with atomic_write(path) as temporary:
        temporary.write_bytes(gzip.compress(as_csv(make_prompts()).encode(), mtime=0))
    return path
