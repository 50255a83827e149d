"""The transformer from what ships with the package to the folder that ships, one resumable step after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from diffusers import AutoencoderKL, PixArtTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer

from prune_lab.assets import load_pictures, reference_folder
from prune_lab.runtime import atomic_folder
from recipes.reference_model.build import captioned_latents
from recipes.reference_model.captions import embed_tokens
from recipes.transformer_model.settings import TransformerRecipe, read_recipe
from recipes.transformer_model.training import Captioned, train_rounded, train_transformer

_log = logging.getLogger(__name__)


def shipped_captions(work: Path, device: str) -> Captioned:
    """The shipped training pictures as latents with the states of their captions; the latents are kept in `work`."""
    folder = reference_folder()
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True).eval().to(device)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True).eval().to(device)
    work.mkdir(parents=True, exist_ok=True)
    data = captioned_latents(work / "latents.safetensors", load_pictures("train"), autoencoder, tokenizer)
    return Captioned.of(data, embed_tokens(encoder, data.ids), tokenizer.eos_token_id)


def _kept(folder: Path, make: Callable[[], PixArtTransformer2DModel]) -> PixArtTransformer2DModel:
    if not folder.is_dir():
        model = make()
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
    found = PixArtTransformer2DModel.from_pretrained(folder, local_files_only=True)
    assert isinstance(found, PixArtTransformer2DModel)
    return found.eval()


def trained_transformers(
    work: Path, captioned: Captioned, recipe: TransformerRecipe, device: str, say: Callable[[str], None]
) -> tuple[PixArtTransformer2DModel, PixArtTransformer2DModel]:
    """The transformer in float32, and the one whose weights are as stored; each trained first where it is not there."""
    full = _kept(
        work / "transformer",
        lambda: train_transformer(
            captioned, recipe.transformer, recipe.noise, recipe.training, work, device=device, say=say
        ),
    )
    rounded = _kept(
        work / "rounded",
        lambda: train_rounded(full, captioned, recipe.rounding, work, device=device, say=say),
    )
    return full, rounded


def train_shipped_transformer(
    work: Path,
    *,
    config: Path | None = None,
    device: str = "cpu",
    out: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Build the transformer's folder into `out` (default: `work`/assets), laid out as the package's own assets.

    Latents, training, training with rounded weights, export: each step's finished file in `work` is recognised, and the
    trainings go on from their last checkpoint, so the same command resumes. `config` is a recipe other than the
    committed one, which takes about two hours on two idle CPU cores. Raises DataError and ConfigError.
    """
    say = _log.info if say is None else say
    recipe = read_recipe(config)
    out = work / "assets" if out is None else out
    captioned = shipped_captions(work, device)
    say(f"{len(captioned.data.latents)} training pictures")
    trained_transformers(work, captioned, recipe, device, say)
