"""The reference model from public packages to shipped folders, one resumable step after the other."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from prune_lab.assets import decode_pictures, read_split
from prune_lab.runtime import atomic_folder, read_json, write_json
from recipes.reference_model.autoencoder import encode, standardise, train_autoencoder
from recipes.reference_model.captions import CaptionedLatents, build_tokenizer, embed_tokens, without_style
from recipes.reference_model.clip import processor_settings, text_tower, train_clip
from recipes.reference_model.dataset import build_pictures
from recipes.reference_model.denoiser import build_scheduler
from recipes.reference_model.denoising import train_denoiser
from recipes.reference_model.settings import ClipShape, ReferenceRecipe, read_recipe
from recipes.reference_model.steps import training_precision
from recipes.reference_model.text_encoder import train_text_encoder

_STANDARD = 2000  # pictures (in hashed order) whose latents are given zero mean and unit deviation

_log = logging.getLogger(__name__)


def draw_weights(frame: pd.DataFrame) -> torch.Tensor:
    """How often each row is drawn (N,): one over the root of the number of rows of its style and subject.

    A couple comes in 26 combinations of skin tones, an apple in one: drawn evenly, couples would be half of all.
    """
    count = frame.groupby(["style", "subject"])["caption"].transform("size")
    return torch.tensor((count**-0.5).to_numpy(), dtype=torch.float32)


def trained_autoencoder(
    work: Path, frame: pd.DataFrame, recipe: ReferenceRecipe, device: str, say: Callable[[str], None]
) -> AutoencoderKL:
    """The finished autoencoder in the work folder, trained first where it is not there."""
    folder = work / "autoencoder"
    if not folder.is_dir():
        pictures = decode_pictures(frame)
        model = train_autoencoder(
            pictures, recipe.autoencoder, recipe.autoencoder_training, work, device=device, say=say
        )
        with training_precision(device):
            standardise(model, pictures[:_STANDARD])
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
    found = AutoencoderKL.from_pretrained(folder, local_files_only=True)
    assert isinstance(found, AutoencoderKL)
    return found.eval().to(device)


def trained_clip(
    work: Path,
    frame: pd.DataFrame,
    tokenizer: CLIPTokenizer,
    recipe: ReferenceRecipe,
    device: str,
    say: Callable[[str], None],
) -> CLIPModel:
    """The finished scorer in the work folder, trained first where it is not there."""
    folder = work / "clip"
    if not folder.is_dir():
        model = train_clip(
            decode_pictures(frame),
            frame["caption"].tolist(),
            frame["style"].tolist(),
            tokenizer,
            recipe.clip,
            recipe.clip_training,
            work,
            device=device,
            say=say,
        )
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
    found = CLIPModel.from_pretrained(folder, local_files_only=True)
    assert isinstance(found, CLIPModel)
    return found.eval().to(device)


def captioned_latents(
    path: Path, frame: pd.DataFrame, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer
) -> CaptionedLatents:
    """Latents and captions of the rows, computed once and kept at `path`."""
    if not path.is_file():
        captions, styles = frame["caption"].tolist(), frame["style"].tolist()
        CaptionedLatents.of(
            encode(autoencoder, decode_pictures(frame)),
            captions,
            without_style(captions, styles),
            draw_weights(frame),
            tokenizer,
        ).save(path)
    return CaptionedLatents.load(path)


def trained_text_encoder(
    work: Path,
    tower: CLIPTextModel,
    data: CaptionedLatents,
    recipe: ReferenceRecipe,
    device: str,
    say: Callable[[str], None],
) -> CLIPTextModel:
    """The finished text encoder in the work folder, trained from the scorer's `tower` where it is not there."""
    folder = work / "text_encoder"
    if not folder.is_dir():
        model = train_text_encoder(tower, data, recipe.text_encoder_training, work, device=device, say=say)
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
    found = CLIPTextModel.from_pretrained(folder, local_files_only=True)
    assert isinstance(found, CLIPTextModel)
    return found.eval().to(device)


def trained_denoiser(
    work: Path,
    data: CaptionedLatents,
    text_encoder: CLIPTextModel,
    recipe: ReferenceRecipe,
    device: str,
    say: Callable[[str], None],
) -> UNet2DConditionModel:
    """The finished U-Net in the work folder, trained first where it is not there."""
    folder = work / "denoiser"
    if not folder.is_dir():
        model = train_denoiser(
            data,
            embed_tokens(text_encoder, data.ids),
            recipe.denoiser,
            recipe.denoiser_training,
            work,
            objective=recipe.denoiser_objective,
            device=device,
            say=say,
        )
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
    found = UNet2DConditionModel.from_pretrained(folder, local_files_only=True)
    assert isinstance(found, UNet2DConditionModel)
    return found.eval()


def export_pipeline(
    folder: Path,
    autoencoder: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> None:
    """Write `folder`, replacing what is there, as `StableDiffusionPipeline.from_pretrained` reads it."""
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(autoencoder).half(),
        text_encoder=copy.deepcopy(text_encoder).half(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet).half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with atomic_folder(folder, force=True) as temporary:
        pipeline.save_pretrained(temporary, safe_serialization=True)
        for path in temporary.rglob("config.json"):
            config = read_json(path)
            assert isinstance(config, dict)
            # Where a part was loaded from is a folder of the machine that built it and means nothing elsewhere.
            config.pop("_name_or_path", None)
            write_json(path, config)


def export_scorer(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer, shape: ClipShape) -> None:
    """Write `folder`, replacing what is there, as `CLIPModel.from_pretrained` reads it, with its tokenizer."""
    with atomic_folder(folder, force=True) as temporary:
        copy.deepcopy(model).half().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "preprocessor_config.json").write_text(
            json.dumps(processor_settings(shape), indent=2) + "\n"
        )


def train_reference(
    work: Path,
    *,
    config: Path | None = None,
    sources: Path | None = None,
    device: str = "cpu",
    out: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Build the reference model into `out` (default: `work`/assets), laid out as the package's own assets.

    Pictures, tokenizer, autoencoder, scorer, latents, text encoder, U-Net, export: each step's finished file in `work`
    is recognised, and the trainings go on from their last checkpoint, so the same command resumes. `sources` holds the
    public packages or receives them; `config` is a recipe other than the committed one, which takes about three hours
    on two CPU cores. Raises DataError and ConfigError.
    """
    say = _log.info if say is None else say
    recipe = read_recipe(config)
    out = work / "assets" if out is None else out
    build_pictures(work / "sources" if sources is None else sources, out / "pictures")
    train = read_split(out / "pictures", "train")
    say(f"{len(train)} training pictures")
    if (work / "tokenizer").is_dir():
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    else:
        shape = recipe.tokenizer
        tokenizer = build_tokenizer(
            train["caption"], work / "tokenizer", vocabulary=shape.vocabulary, length=shape.length
        )
    autoencoder = trained_autoencoder(work, train, recipe, device, say)
    clip = trained_clip(work, train, tokenizer, recipe, device, say)
    data = captioned_latents(work / "latents.safetensors", train, autoencoder, tokenizer)
    text_encoder = trained_text_encoder(work, text_tower(clip.cpu()), data, recipe, device, say)
    unet = trained_denoiser(work, data, text_encoder, recipe, device, say)
    export_pipeline(out / "reference", autoencoder.cpu(), text_encoder.cpu(), tokenizer, unet)
    export_scorer(out / "scorer", clip.cpu(), tokenizer, recipe.clip)
    for folder in (out / "reference" / "tokenizer", out / "scorer"):
        for name in ("vocab.json", "merges.txt"):  # older transformers read these two, not tokenizer.json
            shutil.copyfile(work / "tokenizer" / name, folder / name)
    for curve in sorted(work.glob("*.csv")):
        (out / "curves").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(curve, out / "curves" / curve.name)
    say(f"the reference model is in {out}")
