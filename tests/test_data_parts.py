"""Disjoint parts of training data: probe, validation and training share neither image nor caption."""

from __future__ import annotations

import pytest
import torch
from distilling import made_up_data
from hypothesis import given
from hypothesis import strategies as st

from prune_lab.distill import LatentData, Subset, split_rows
from prune_lab.errors import DataError

ROWS = st.lists(
    st.tuples(st.sampled_from(["", "a", "b", " B", "c", "d", "e"]), st.sampled_from("123456789")), max_size=30
)


def connected(rows: list[tuple[str, str]]) -> int:
    """The number of groups of rows that share a caption or an image, by repeated joining."""
    groups: list[tuple[set[str], set[str]]] = []
    for caption, picture in rows:
        texts, names = {caption.strip().lower()} - {""}, {picture}
        apart = []
        for other in groups:
            if other[0] & texts or other[1] & names:
                texts, names = texts | other[0], names | other[1]
            else:
                apart.append(other)
        groups = [*apart, (texts, names)]
    return len(groups)


@given(rows=ROWS, probe=st.integers(1, 8), validate=st.integers(1, 8), seed=st.integers(0, 3))
def test_no_part_shares_an_image_or_a_caption_with_another(
    rows: list[tuple[str, str]], probe: int, validate: int, seed: int
) -> None:
    captions, pictures = [row[0] for row in rows], [row[1] for row in rows]
    if len(set(pictures)) < 3:
        with pytest.raises(DataError, match="at least three images"):
            split_rows(captions, pictures, probe=probe, validate=validate, seed=seed)
        return
    split = split_rows(captions, pictures, probe=probe, validate=validate, seed=seed)
    parts = [part.tolist() for part in (split.train, split.probe, split.validate)]
    every = torch.cat([split.train, split.probe, split.validate, split.unused])
    assert sorted(every.tolist()) == list(range(len(rows)))
    assert all(parts)

    def shared(values: list[str]) -> bool:
        found = [{values[row] for row in part} - {""} for part in parts]
        return sum(map(len, found)) > len(set().union(*found))

    assert not shared(pictures)
    assert split.shared_captions == (connected(rows) < 3)
    assert split.shared_captions or not shared([caption.strip().lower() for caption in captions])


def test_parts_are_as_large_as_asked_for_and_at_most_a_quarter() -> None:
    captions = [f"caption {row}" for row in range(200)]
    split = split_rows(captions, probe=30, validate=20)
    assert [len(part) for part in (split.train, split.probe, split.validate, split.unused)] == [
        150,
        30,
        20,
        0,
    ]
    few = split_rows(captions[:12], probe=64, validate=64)
    assert [len(part) for part in (few.train, few.probe, few.validate)] == [6, 3, 3]
    least = split_rows(captions[:3], probe=64, validate=64)
    assert [len(part) for part in (least.train, least.probe, least.validate)] == [1, 1, 1]


def test_the_parts_follow_the_captions_and_not_their_places() -> None:
    captions = [f"caption {row}" for row in range(40)]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()
    moved = [captions[row] for row in order]
    one, other = (split_rows(texts, probe=5, validate=5) for texts in (captions, moved))
    for part in ("train", "probe", "validate"):
        rows, places = getattr(one, part).tolist(), getattr(other, part).tolist()
        assert {captions[row] for row in rows} == {moved[row] for row in places}
    again = split_rows(captions, probe=5, validate=5, seed=1)
    assert again.probe.tolist() != one.probe.tolist()


def test_one_caption_for_all_divides_by_image() -> None:
    split = split_rows(["a photo of sks dog"] * 12, [f"{row}.png" for row in range(12)], probe=4, validate=4)
    assert split.shared_captions
    assert [len(part) for part in (split.train, split.probe, split.validate)] == [6, 3, 3]


def test_latents_in_memory_know_their_pictures() -> None:
    data = made_up_data(rows=4)
    twice = LatentData(
        data.latents[[0, 1, 2, 3, 0]], data.embeddings[[0, 1, 2, 3, 0]], data.empty_embedding, tuple("abcde")
    )
    assert twice.pictures[0] == twice.pictures[4]
    assert len(set(twice.pictures)) == 4
    part = Subset.of(twice, torch.tensor([4, 1]))
    assert part.captions == ("e", "b")
    assert part.pictures == (twice.pictures[0], twice.pictures[1])
