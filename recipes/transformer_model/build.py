"""The transformer from what ships with the package to the folder that ships, one resumable step after the other."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer

from prune_lab.assets import load_pictures, reference_folder
from prune_lab.runtime import atomic_folder, write_frame
from recipes.reference_model.build import captioned_latents
from recipes.transformer_model.captioned import Captioned
from recipes.transformer_model.losses import losses_as_stored
from recipes.transformer_model.settings import TransformerRecipe, read_recipe
from recipes.transformer_model.storage import export_transformer
from recipes.transformer_model.training import train_transformer

_log = logging.getLogger(__name__)


def captioned_split(work: Path, split: str, device: str) -> Captioned:
    """The shipped pictures of a split with the states of their captions; their latents are kept in `work`."""
    folder = reference_folder()
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True).eval().to(device)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True).eval().to(device)
    work.mkdir(parents=True, exist_ok=True)
    name = "latents" if split == "train" else f"latents-{split}"
    data = captioned_latents(work / f"{name}.safetensors", load_pictures(split), autoencoder, tokenizer)
    return Captioned.of(data, encoder, tokenizer)


def trained_transformer(
    work: Path, recipe: TransformerRecipe, device: str, say: Callable[[str], None]
) -> PixArtTransformer2DModel:
    """The finished transformer in the work folder, float32, trained first where it is not there."""
    folder = work / "transformer"
    if not folder.is_dir():
        captioned = captioned_split(work, "train", device)
        say(f"{len(captioned.data.latents)} training pictures")
        model = train_transformer(
            captioned, recipe.transformer, recipe.noise, recipe.training, work, device=device, say=say
        )
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
    found = PixArtTransformer2DModel.from_pretrained(folder, local_files_only=True)
    assert isinstance(found, PixArtTransformer2DModel)
    return found.eval()


def train_shipped_transformer(
    work: Path,
    *,
    config: Path | None = None,
    device: str = "cpu",
    out: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Build the transformer's folder into `out` (default: `work`/assets), laid out as the package's own assets.

    Latents, training, export: each step's finished file in `work` is recognised, and the training goes on from its last
    checkpoint, so the same command resumes. `config` is a recipe other than the committed one, which takes about two
    hours on two idle CPU cores. Raises DataError and ConfigError.
    """
    say = _log.info if say is None else say
    recipe = read_recipe(config)
    out = work / "assets" if out is None else out
    transformer = trained_transformer(work, recipe, device, say)
    losses = losses_as_stored(transformer, captioned_split(work, "heldout", "cpu"))
    say("held-out loss as stored: " + ", ".join(f"{name} {value:.5f}" for name, value in losses.items()))
    export_transformer(out / "transformer", transformer)
    curves = out / "curves"
    curves.mkdir(parents=True, exist_ok=True)
    write_frame(curves / "stored.csv", pd.DataFrame({"form": list(losses), "loss": list(losses.values())}))
    for curve in sorted(work.glob("*.csv")):
        shutil.copyfile(curve, curves / curve.name)
    say(f"the transformer is in {out}")
