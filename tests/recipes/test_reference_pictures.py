"""The pictures of the reference model: captions, the split, what may be used, and what is said where a client lacks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prune_lab.assets import decode_pictures
from prune_lab.errors import DataError
from recipes.reference_model.dataset import (
    caption,
    clip_art_title,
    encode_picture,
    plain_subject,
    split_frame,
    square_picture,
    tone_words,
)
from recipes.reference_model.packages import Package, fetch_package


def test_captions_compose_style_subject_and_tone() -> None:
    assert plain_subject("flag: Åland Islands") == "flag of åland islands"
    assert plain_subject("kiss: man, man") == "kiss man, man"
    assert tone_words("1f469-1f3ff-200d-1f692") == "dark skin tone"
    assert tone_words("1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3fd") == "light and medium skin tone"
    assert tone_words("1f34e") == ""
    assert caption("noto emoji", "red apple", "") == "noto emoji, red apple"
    assert (
        caption("noto emoji", "woman firefighter", "dark skin tone")
        == "noto emoji, woman firefighter, dark skin tone"
    )


@pytest.mark.parametrize(
    ("title", "licence", "subject"),
    [
        ("Red Apple 01", "http://web.resource.org/cc/PublicDomain", "red apple"),
        ("Red Apple", "http://creativecommons.org/licenses/GPL/2.0/", None),
        ("Red Apple", "", None),
        ("Clipart by Somebody", "http://web.resource.org/cc/PublicDomain", None),
        ("xqzzt", "http://web.resource.org/cc/PublicDomain", None),
    ],
)
def test_clip_art_needs_a_public_domain_mark_and_an_english_title(
    title: str, licence: str, subject: str | None
) -> None:
    svg = f'<svg><dc:title>{title}</dc:title><cc:license rdf:resource="{licence}"/></svg>'
    path = "./usr/share/openclipart/svg/food/fruit/apple.svg"
    assert clip_art_title(svg, path, {"red", "apple"}) == subject


def test_transparent_pictures_go_on_white_in_proportion(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (100, 50), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 50, 50))
    picture.save(tmp_path / "a.png")
    square = np.asarray(square_picture((tmp_path / "a.png").read_bytes()))
    assert square.shape == (64, 64, 3)
    assert square[5, 32].tolist() == [255, 255, 255]  # above the picture
    assert square[32, 50].tolist() == [255, 255, 255]  # its transparent half
    assert square[32, 10].tolist() == [255, 0, 0]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 40), st.sampled_from(["", "dark", "light"])),
        min_size=1,
        max_size=300,
    )
)
def test_a_split_loses_nothing_and_shares_no_combination(rows: list[tuple[str, int, str]]) -> None:
    frame = pd.DataFrame(
        [(f"{s}, {n}, {t}", s, str(n), t) for s, n, t in rows],
        columns=["caption", "style", "subject", "tone"],
    )
    train, held = split_frame(frame)
    assert sorted([*train["caption"], *held["caption"]]) == sorted(frame["caption"])
    assert set(train["caption"]).isdisjoint(held["caption"])
    again, _ = split_frame(frame.iloc[::-1].reset_index(drop=True))
    assert sorted(again["caption"]) == sorted(train["caption"])  # the order of the rows does not matter


def test_a_picture_survives_storing() -> None:
    picture = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))).convert("RGB")
    frame = pd.DataFrame({"picture": [encode_picture(picture)]})
    stored = decode_pictures(frame)[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(stored - np.asarray(picture).astype(int)).mean() < 6


def test_a_missing_package_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"the client 'npm' is not installed.*--sources"):
        fetch_package(Package("npm", "some-pictures@1", "some-pictures-1.tgz"), tmp_path / "sources")
    (tmp_path / "some-pictures-1.tgz").write_bytes(b"")
    assert (
        fetch_package(Package("npm", "some-pictures@1", "some-pictures-1.tgz"), tmp_path).name
        == "some-pictures-1.tgz"
    )
