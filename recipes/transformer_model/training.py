"""How the transformer is trained: to predict the velocity in noisy latents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0

from recipes.reference_model.denoiser import Float32Attention
from recipes.reference_model.noising import draw_noisy
from recipes.reference_model.settings import Recipe
from recipes.reference_model.steps import step_generator, train
from recipes.transformer_model.captioned import Captioned
from recipes.transformer_model.settings import NoiseLevels, TransformerShape
from recipes.transformer_model.transformer import build_transformer, predicted, start_as_pixart

_SAVE_EVERY = 100


def linear_precision(device: str) -> contextlib.AbstractContextManager[object]:
    """bfloat16 autocast on an accelerator and on a CPU that multiplies in bfloat16; else float32.

    A transformer is linear layers almost alone: AVX-512's bfloat16 dot products take a third off the time of a step.
    """
    kind = torch.device(device).type
    able = torch.cpu.get_capabilities()
    pays = kind != "cpu" or bool(able.get("amx_tile", False) or able.get("avx512_bf16", False))
    return torch.autocast(kind, torch.bfloat16, enabled=pays)


def velocity_loss(
    transformer: PixArtTransformer2DModel,
    captioned: Captioned,
    size: int,
    noisier: float,
    seed: int,
    step: int,
) -> torch.Tensor:
    """Mean squared error of the velocity on the rows of a step, a function of seed and step alone."""
    rows = draw_noisy(captioned.data, size, noisier, step_generator(seed, step))
    device = transformer.device
    # The longest caption of the batch decides how many tokens there are: what is behind is masked anyway.
    mask = captioned.mask[rows.caption]
    length = int(mask.sum(1).max())
    text, mask = captioned.text[rows.caption, :length], mask[:, :length]
    with linear_precision(device.type):
        found = predicted(
            transformer, rows.noisy.to(device), rows.times.to(device), text.to(device), mask.to(device)
        )
    return F.mse_loss(found.float(), rows.velocity.to(device))


@contextlib.contextmanager
def _quick_attention(transformer: PixArtTransformer2DModel) -> Iterator[None]:
    if transformer.device.type == "cpu":
        transformer.set_attn_processor(Float32Attention())
    try:
        yield
    finally:
        transformer.set_attn_processor(AttnProcessor2_0())


def train_transformer(
    captioned: Captioned,
    shape: TransformerShape,
    noise: NoiseLevels,
    recipe: Recipe,
    folder: Path,
    *,
    device: str = "cpu",
    say: Callable[[str], None] | None = None,
    until: int | None = None,
) -> PixArtTransformer2DModel:
    """The transformer trained to predict the velocity in the latents; averaged weights, float32."""
    torch.manual_seed(recipe.seed)
    transformer = build_transformer(shape).to(device)
    start_as_pixart(transformer)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        return {
            "loss": velocity_loss(transformer, captioned, recipe.batch, noise.at(step), recipe.seed, step)
        }

    with _quick_attention(transformer):
        average = train(
            transformer, loss_at, recipe, folder, "transformer", say=say, until=until, save_every=_SAVE_EVERY
        )
    transformer.load_state_dict(average, strict=False)
    return transformer.eval()
