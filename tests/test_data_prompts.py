"""Prompts: the general list that ships, and files of prompts as people write them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from prune_lab.assets import prompts_path
from prune_lab.errors import DataError
from prune_lab.prompts import Prompts, read_prompts
from prune_lab.text_tables import read_text
from recipes.prompts.making import KINDS, as_csv, make_prompts

# Artists and brands that lists of prompts from the web are full of; words.py has no name at all.
DENIED = (
    *("rutkowski", "artgerm", "mucha", "van gogh", "picasso", "monet", "ghibli", "disney", "pixar", "marvel"),
    *("rembrandt", "dali", "klimt", "hokusai", "banksy", "warhol", "kahlo", "beksinski", "wlop", "loish"),
    *(
        "artstation",
        "deviantart",
        "unreal engine",
        "octane",
        "lego",
        "pokemon",
        "star wars",
        "nike",
        "ferrari",
    ),
    *("coca", "barbie", "batman", "trump", "obama", "einstein", "polaroid", "leica", "kodak", "midjourney"),
)


def test_the_list_that_ships_is_what_its_recipe_makes() -> None:
    assert read_text(prompts_path()) == as_csv(make_prompts())
    assert prompts_path().stat().st_size < 150_000


def test_the_list_is_general_and_names_nobody() -> None:
    prompts = read_prompts("default")
    assert len(set(prompts.texts)) == len(prompts.texts) == 4000
    assert Counter(prompts.kinds) == {kind.name: 40 * kind.share for kind in KINDS}
    assert set(prompts.kinds[:200]) == set(prompts.kinds)
    text = "\n".join(prompts.texts)
    assert not [name for name in DENIED if name in text.lower()]
    assert not [word for word in text.split() if word != "3D" and word[0].isupper()]
    assert not [line for line in prompts.texts if line != line.strip() or "  " in line or "{" in line]
    lengths = [len(line.split()) for line in prompts.texts]
    assert min(lengths) <= 3
    assert max(lengths) >= 20
    assert max(lengths) < 45  # 77 tokens of CLIP hold it


def test_any_part_of_the_list_is_the_same_for_another_length() -> None:
    assert make_prompts(50) == make_prompts(4000)[:50]
    assert make_prompts(50, seed=1) != make_prompts(50)


TWO = Prompts(("a cat; black", "two dogs"), ("animals", "animals"))
NO_KINDS = Prompts(TWO.texts, ("", ""))


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.txt", b"a cat; black\n\n  two dogs \n", NO_KINDS),
        ("a.TXT", b"\xef\xbb\xbfa cat; black\r\ntwo dogs", NO_KINDS),
        ("a.txt", "a cat; black\ntwo dogs\n".encode("utf-16"), NO_KINDS),
        ("a.csv", b"prompt,kind\na cat; black,animals\ntwo dogs,animals\n", TWO),
        ("a.csv", b'\xef\xbb\xbfKind;Prompt\nanimals;"a cat; black"\nanimals;two dogs\n', TWO),
        ("a.CSV", b"Caption\na cat; black\ntwo dogs\n", NO_KINDS),
        ("a.csv", b'sep=;\nkind;prompt\nanimals;"a cat; black"\nanimals;two dogs\n', TWO),
        ("a.tsv", b"TEXT\tgroup\na cat; black\tanimals\ntwo dogs\tanimals\n", TWO),
        ("a.csv", b"id|caption|kind\n1|a cat; black|animals\n2|two dogs|animals\n", TWO),
        ("a.jsonl", b'{"Prompt": "a cat; black"}\n\n{"Prompt": "two dogs"}\n', NO_KINDS),
        ("a.jsonl", b'{"captions": ["a cat; black", "two dogs"], "kind": "animals"}\n', TWO),
    ],
)
def test_prompts_are_read_as_people_write_them(
    name: str, content: bytes, wanted: Prompts, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_prompts(tmp_path / name) == wanted


def test_prompts_in_parquet(tmp_path: Path) -> None:
    frame = pd.DataFrame({"PROMPT": [["a cat; black", "two dogs"]], "group": ["animals"]})
    frame.to_parquet(tmp_path / "a.parquet")
    assert read_prompts(str(tmp_path / "a.parquet")) == TWO
    assert TWO.digest == NO_KINDS.digest != Prompts(TWO.texts[::-1], ("", "")).digest


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.md", b"x", r"a name ending in '\.md'"),
        ("a.txt", b"\n \n", "found no prompts"),
        ("a.txt", b"\xff\x00\xd8", r"other bytes than UTF-8 at byte 0; save it as UTF-8"),
        ("a.csv", b"prompt\n", "found no prompts"),
        ("a.csv", b"", "found no prompts"),
        ("a.csv", b"kind,prompt\nx,a cat, black\n", r"line 2 has 3 columns and the first line 2; put quotes"),
        ("a.csv", b"prompt,prompt\nx,y\n", "two columns are called 'prompt'"),
        ("a.csv", b"file,size\nx,1\n", "found columns file, size"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt"\n', "cannot read it .line 2"),
        ("a.jsonl", b"[1]\n", "line 1 holds no object"),
        ("a.jsonl", json.dumps({"prompt": 3}).encode(), "no prompts in column prompt"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    name: str, content: bytes, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_prompts(tmp_path / name)
    with pytest.raises(DataError, match=r"cannot read it \(No such file"):
        read_prompts(tmp_path / "gone.txt")


@pytest.mark.parametrize("content", [b"\n \n", b"\xff\x00\xd8"])
def test_a_refusal_says_what_was_asked_once(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_prompts(tmp_path / "a.txt")
    assert str(caught.value).count("asked for") == 1
