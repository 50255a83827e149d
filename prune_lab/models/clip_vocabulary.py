"""CLIP's tokenizer from the vocabulary that ships in the package; single files bring none of their own."""

from __future__ import annotations

import gzip
from pathlib import Path

from transformers import CLIPTokenizer

from prune_lab.assets import assets_folder

NUM_TOKENS = 49_408  # of every CLIP text encoder that Stable Diffusion uses
MAX_TOKENS = 77
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def _byte_letters() -> list[str]:
    """A printable letter for each of the 256 bytes, those that are printable themselves first."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(256 - len(printable))]


def clip_tokenizer(*, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """The tokenizer of Stable Diffusion: 77 tokens, padded with ``pad_token`` (``!`` in SD-2, and in XL the second)."""
    with gzip.open(vocabulary_file(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    letters = _byte_letters()
    # Line 0 is a title; the last tokens of the original training were never used.
    merges = [tuple(line.split()) for line in lines[1 : NUM_TOKENS - 2 * len(letters) - len(_SPECIAL) + 1]]
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(pair) for pair in merges),
        *_SPECIAL,
    ]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        pad_token=pad_token,
        model_max_length=MAX_TOKENS,
    )


def vocabulary_file() -> Path:
    """The file of merges as OpenAI published it with CLIP; its licence lies beside it."""
    return assets_folder() / "clip" / "bpe_simple_vocab_16e6.txt.gz"
