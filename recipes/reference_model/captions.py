"""The captions as the networks read them: a byte-pair tokenizer, token ids, and latents with their captions.

CLIP's own 49,408 words would make an embedding larger than the rest of the text tower; the captions need a tenth. The
tokenizer is written in the two files that CLIP's reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextModel, CLIPTokenizer

from prune_lab.runtime import atomic_folder, atomic_write
from recipes.reference_model.steps import slices

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's own splitting

_NO_CAPTION = 0.1  # share of pictures drawn without a caption, for classifier-free guidance
_STYLELESS = 0.1  # share of captions drawn without their style word


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


def tokens(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> torch.Tensor:
    """Token ids (N, L), int64, padded and cut to the tokenizer's length as the pipeline does it."""
    found = tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    ids = found.input_ids
    assert isinstance(ids, torch.Tensor)
    return ids


def without_style(captions: Sequence[str], styles: Sequence[str]) -> list[str]:
    """The captions with their leading "style, " taken off."""
    return [caption.removeprefix(f"{style}, ") for caption, style in zip(captions, styles, strict=True)]


@dataclass(frozen=True, slots=True)
class CaptionedLatents:
    """Latents (N, C, h, w) of pictures and, by caption number, the token ids (M, L) of every wording.

    `full` and `plain` give a row's caption number with and without the style word; number 0 is the empty caption.
    `weight` is how often a row is drawn, relative to the others.
    """

    latents: torch.Tensor
    ids: torch.Tensor
    full: torch.Tensor
    plain: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(
        cls,
        latents: torch.Tensor,
        captions: Sequence[str],
        plain: Sequence[str],
        weight: torch.Tensor,
        tokenizer: CLIPTokenizer,
    ) -> CaptionedLatents:
        """The latents with their captions, each distinct wording kept once."""
        number = {caption: index for index, caption in enumerate(dict.fromkeys(["", *captions, *plain]))}
        return cls(
            latents=latents,
            ids=tokens(tokenizer, list(number)),
            full=torch.tensor([number[caption] for caption in captions]),
            plain=torch.tensor([number[caption] for caption in plain]),
            weight=weight,
        )

    def draw(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """(size,) rows by weight, and (size,) numbers of the captions they are shown with."""
        rows = torch.multinomial(self.weight, size, replacement=True, generator=generator)
        share = torch.rand(size, generator=generator)
        caption = torch.where(share < _NO_CAPTION + _STYLELESS, self.plain[rows], self.full[rows])
        return rows, caption.masked_fill(share < _NO_CAPTION, 0)

    def save(self, path: Path) -> None:
        """Write the tensors as safetensors."""
        tensors = {name: getattr(self, name).contiguous() for name in CaptionedLatents.__slots__}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary)

    @classmethod
    def load(cls, path: Path) -> CaptionedLatents:
        """The latents saved at `path`."""
        return cls(**load_file(path))


@torch.no_grad()
def embed_tokens(tower: CLIPTextModel, ids: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """Last hidden states (M, L, D) of token ids (M, L), float32 on the CPU: what the pipeline's U-Net attends to."""
    parts = [
        tower(ids[part].to(tower.device)).last_hidden_state.float().cpu() for part in slices(len(ids), batch)
    ]
    return torch.cat(parts)
