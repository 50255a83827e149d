"""Whether the parts of a model answer: something, and not the same to every input.

Weights that were overwritten with zeros, or a vocabulary without words, load without a word and draw one and the same
picture. So each part is asked twice, about small inputs that differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.errors import ModelFormatError, PruneLabError
from prune_lab.families import (
    example_inputs,
    family_of,
    filled_with_noise,
    outline_of,
    picture_scale,
    plain_config,
)
from prune_lab.models.components import reason_of
from prune_lab.models.silence import quiet
from prune_lab.runtime import seeded

_TOKENS = 8
_PATCHED = 8  # rows and columns of a latent that is cut into patches, of at most that side
_CAPTION = "two boats on 7 blue seas"
_FEWEST_WORDS = 6  # so many make two captions that differ
_LONGEST = 77  # tokens, of an encoder that takes any number
_SIDES = 64  # pixels of the pictures and of what is drawn, about; every VAE halves them three times or so


# The model -------------------------------------------------------------------------------------------------------


def _small_latent(model: Any) -> int:
    """Rows and columns of a small latent: one that every stage can halve and double, or a few patches."""
    outline = outline_of(model)
    down = {stage.name for stage in outline.stages if stage.lane == "left"}
    if not down:
        return _PATCHED
    samplers = [unit for unit in outline.units if unit.kind == "sampler" and unit.stage in down]
    return int(2 * 2 ** len(samplers))


def random_inputs(model: Any, seed: int = 0) -> dict[str, Any]:
    """Random inputs of ``model``, a model of any family, float32 on the CPU and of a small size."""
    blank = example_inputs(plain_config(model), latent=_small_latent(model), tokens=_TOKENS)
    filled: dict[str, Any] = filled_with_noise(blank, seeded(seed))
    return filled


def placed(value: Any, model: Any) -> Any:
    """``value``, and every tensor in it, on the device and in the number format of ``model``."""
    if isinstance(value, Mapping):
        return {name: placed(inner, model) for name, inner in value.items()}
    if isinstance(value, list):
        return [placed(inner, model) for inner in value]
    if isinstance(value, Tensor):
        return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
    return value


def _model_answers(model: Any) -> list[list[Tensor]]:
    one, latents = random_inputs(model), family_of(model).latents
    other = one | {latents: random_inputs(model, seed=1)[latents]}
    answers = (model(**placed(inputs, model), return_dict=False)[0] for inputs in (one, other))
    return [answer if isinstance(answer, list) else [answer] for answer in answers]


# Other parts -----------------------------------------------------------------------------------------------------


def _captions(config: Any, tokenizer: Any) -> Tensor:
    """Two captions (2, L) as numbers of words; between their first words they differ in three places."""
    length = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or _LONGEST)
    settings = {"padding": "max_length", "max_length": length, "truncation": True}
    tokens: Tensor = tokenizer([_CAPTION] * 2, return_tensors="pt", **settings).input_ids
    words = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    words = [word for word in words if word < config.vocab_size]
    for row in range(2):
        tokens[row, 1:4] = torch.tensor(words[row : row + 6 : 2])
    return tokens


def _text_answers(encoder: Any, tokenizer: Any) -> list[list[Tensor]]:
    found = []
    for tokens in _captions(encoder.config, tokenizer):
        answer = encoder(tokens[None].to(encoder.device))
        names = ("last_hidden_state", "text_embeds")
        found.append([answer[name] for name in names if answer.get(name) is not None])
    return found


def _of_one_frame(vae: Any, channels: int, side: int) -> tuple[int, ...]:
    """The shape of one square picture for ``vae``, which may be one of videos."""
    of_videos = any(isinstance(part, nn.Conv3d) for part in vae.modules())
    return (1, channels, 1, side, side) if of_videos else (1, channels, side, side)


def _setting(config: Any, *names: str, default: int) -> int:
    return next((config[name] for name in names if config.get(name) is not None), default)


def _decoder_answers(vae: Any) -> list[list[Tensor]]:
    side = max(1, _SIDES // (picture_scale(vae.config) or 8))
    channels = _setting(vae.config, "latent_channels", "z_dim", default=4)
    shape = _of_one_frame(vae, channels, side)
    latents = (torch.randn(shape, generator=seeded(seed)) for seed in (0, 1))
    return [[vae.decode(placed(one, vae), return_dict=False)[0]] for one in latents]


def _encoder_answers(vae: Any) -> list[list[Tensor]]:
    shape = _of_one_frame(vae, _setting(vae.config, "in_channels", default=3), _SIDES)
    pictures = (torch.rand(shape, generator=seeded(seed)) * 2 - 1 for seed in (0, 1))
    found = [vae.encode(placed(one, vae), return_dict=False)[0] for one in pictures]
    return [[one.mode() if hasattr(one, "mode") else one] for one in found]


def _picture_answers(encoder: Any) -> list[list[Tensor]]:
    side = encoder.config.image_size
    pictures = (torch.randn((1, 3, side, side), generator=seeded(seed)) for seed in (0, 1))
    return [[encoder(placed(one, encoder))[0]] for one in pictures]


# What is wrong ---------------------------------------------------------------------------------------------------


def _verdict(answers: Sequence[Sequence[Tensor]], what: str, *, must: bool) -> str:
    for one, other in zip(*answers, strict=True):
        if torch.equal(one, other):
            return f"gives the same answer to {what}"
        # half precision overflows in a few good models
        if must and one.dtype == torch.float32 and one.isnan().all() and other.isnan().all():
            return f"answers {what} with NaN (not a number)"
    return ""


def _complaint(ask: Callable[[], Sequence[Sequence[Tensor]]], what: str, *, must: bool = False) -> str:
    """What is wrong with the answers to ``what``; with ``must`` also that there is none, or no number."""
    try:
        with quiet(), torch.no_grad():
            return _verdict(ask(), what, must=must)
    except PruneLabError:
        return ""  # a network whose inputs are not known here is told where it is used
    except Exception as error:
        return f"cannot answer {what}: {reason_of(error)}" if must else ""


def model_complaint(model: Any) -> str:
    """What is wrong with the answers of ``model`` to random latents; empty where nothing is."""
    return _complaint(partial(_model_answers, model), "every latent")


def _vocabulary_complaint(config: Any, tokenizer: Any) -> str:
    """What is wrong with the ``tokenizer`` of a text encoder of this ``config``."""
    try:
        with quiet():
            largest = max(tokenizer(_CAPTION).input_ids)
            words = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    except Exception as error:
        return f"has a tokenizer that cannot read a caption: {reason_of(error)}"
    if len(words) < _FEWEST_WORDS:
        return f"has a tokenizer that knows {len(words)} words: its vocabulary is damaged"
    if largest >= config.vocab_size:
        return (
            f"knows {config.vocab_size:,} words, its tokenizer gives the number {largest:,}: "
            "they do not belong together"
        )
    return ""


def _text_complaint(encoder: Any, tokenizer: Any) -> str:
    if found := _vocabulary_complaint(encoder.config, tokenizer):
        return found
    positions = getattr(encoder.config, "max_position_embeddings", None)
    if isinstance(positions, int) and tokenizer.model_max_length > positions:
        return (
            f"takes {positions} tokens, its tokenizer cuts captions at {tokenizer.model_max_length:,} "
            "(model_max_length in its tokenizer_config.json): they do not belong together"
        )
    must = type(encoder).__module__.startswith("transformers.")  # others may want more than the words
    return _complaint(partial(_text_answers, encoder, tokenizer), "every caption", must=must)


def _complaints(pipeline: Any) -> Iterator[tuple[str, str]]:
    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        main = getattr(part, "main_input_name", "")
        if name.startswith("text_encoder"):
            tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"), None)
            if tokenizer is not None and main == "input_ids" and hasattr(part.config, "vocab_size"):
                yield name, _text_complaint(part, tokenizer)
        elif main == "pixel_values" and name == "image_encoder":
            yield name, _complaint(partial(_picture_answers, part), "every picture")
        elif hasattr(part, "decode") and hasattr(part, "encode"):
            yield name, _complaint(partial(_decoder_answers, part), "every latent")
            yield name, _complaint(partial(_encoder_answers, part), "every picture")


def complaint_of_parts(pipeline: Any) -> str:
    """The first part of ``pipeline`` beside its model whose answers are wrong, and how; empty where all are right."""
    found = _complaints(pipeline)
    return next((f"its {name} {complaint}" for name, complaint in found if complaint), "")


def scorer_complaint(model: Any, tokenizer: Any, prepared: Callable[[Tensor], Tensor]) -> str:
    """What is wrong with a CLIP ``model``, its ``tokenizer``, or the pictures (uint8) as ``prepared`` for it."""
    if found := _vocabulary_complaint(model.config.text_config, tokenizer):
        return found
    shape = (1, 3, _SIDES, _SIDES)

    def answers(name: str) -> list[list[Tensor]]:
        texts = _captions(model.config.text_config, tokenizer).to(model.device)
        pictures = [prepared(torch.randint(256, shape, generator=seeded(seed)).byte()) for seed in (0, 1)]
        return [
            [model(input_ids=text[None], pixel_values=picture.to(model.device))[name]]
            for text, picture in zip(texts, pictures, strict=True)
        ]

    asked = {"text_embeds": "every caption", "image_embeds": "every picture"}
    complaints = (_complaint(partial(answers, name), what, must=True) for name, what in asked.items())
    return next(filter(None, complaints), "")


def refuse_silent(complaint: str, named: str) -> None:
    """Raise ModelFormatError where there is a ``complaint`` about what is ``named``."""
    if complaint:
        raise ModelFormatError(
            f"asked for {named}: {complaint}; its files are damaged: fetch the model again, or take another "
            "checkpoint of it"
        )
