"""The reference tokenizer: a byte-pair vocabulary trained on the captions, in the two files CLIP's tokenizer reads.

CLIP's own 49,408 words would make an embedding larger than the rest of the text tower; the captions need a tenth.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from prune_lab.runtime import atomic_folder

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's own splitting


def learn_merges(captions: Iterable[str], vocabulary: int) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, that give at most `vocabulary` entries with bytes and both marks."""
    learner = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(alphabet) - 2,
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix=_WORD_END,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]


def build_tokenizer(captions: Iterable[str], folder: Path, *, vocabulary: int, length: int) -> CLIPTokenizer:
    """The tokenizer trained on `captions`, written to `folder` as CLIPTokenizer's vocab.json and merges.txt.

    Entries in CLIP's order: 256 bytes, the same at a word's end, merges, the two marks last; so any text at all has
    tokens. Prompts are padded and cut to `length` tokens.
    """
    merges = learn_merges(captions, vocabulary)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [*letters, *(letter + _WORD_END for letter in letters)]
    entries += dict.fromkeys(left + right for left, right in merges)
    entries = [*dict.fromkeys(entries), START, END]
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "model_max_length": length,
        "do_lower_case": True,
    }
    with atomic_folder(folder, force=True) as temporary:
        numbers = {word: number for number, word in enumerate(entries)}
        (temporary / "vocab.json").write_text(json.dumps(numbers, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        (temporary / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (temporary / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        (temporary / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, CLIPTokenizer)
    return tokenizer
