"""CLIP's tokenizer from the vocabulary in the package, against ids that are known from everywhere."""

from __future__ import annotations

import hashlib

import pytest

from prune_lab.models.clip_vocabulary import NUM_TOKENS, clip_tokenizer, vocabulary_file


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("a photo of a dog", [320, 1125, 539, 320, 1929]),
        ("A   Diagram", [320, 22697]),
        ("hello world!", [3306, 1002, 256]),
    ],
)
def test_the_known_ids(text: str, ids: list[int]) -> None:
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == NUM_TOKENS
    assert tokenizer(text).input_ids == [49406, *ids, 49407]


def test_it_pads_to_77_tokens_with_the_token_of_the_model() -> None:
    options = {"padding": "max_length", "truncation": True}
    assert clip_tokenizer()("cat", **options).input_ids == [49406, 2368] + [49407] * 75
    assert clip_tokenizer(pad_token="!")("cat", **options).input_ids == [49406, 2368, 49407] + [0] * 74
    assert len(clip_tokenizer()("cat " * 100, **options).input_ids) == 77


def test_the_licence_lies_beside_it() -> None:
    assert (
        "Permission is hereby granted, free of charge" in (vocabulary_file().parent / "LICENSE").read_text()
    )
    published = (
        "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"  # as CLIP's repository has it
    )
    assert hashlib.sha256(vocabulary_file().read_bytes()).hexdigest() == published
