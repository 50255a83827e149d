"""What the transformer can do, measured on the held-out pictures beside the reference U-Net, and its report."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from diffusers import PixArtAlphaPipeline, StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from prune_lab.assets import assets_folder, decode_pictures, load_pictures, reference_folder, scorer_folder
from prune_lab.assets.assembling import assembled
from prune_lab.runtime import Environment, write_frame, write_json, write_text
from recipes.reference_model.autoencoder import encode
from recipes.reference_model.captions import CaptionedLatents
from recipes.reference_model.clip import embed_pairs
from recipes.reference_model.evaluate import (
    GRID_PROMPTS,
    RETRIEVAL_PROMPTS,
    Sampling,
    as_float32,
    by_timestep,
    generated_matches,
    held_out_prompts,
    thinned,
    weights_megabytes,
)
from recipes.reference_model.report import draw_curves, draw_prompt_grid
from recipes.reference_model.steps import slices
from recipes.transformer_model.captioned import Captioned
from recipes.transformer_model.losses import by_transformer, by_unet, caption_losses, errors, held_out_rows
from recipes.transformer_model.report import MODELS, report_page

_BATCH = 16


def draw(
    pipeline: PixArtAlphaPipeline | StableDiffusionPipeline, prompts: Sequence[str], sampling: Sampling
) -> torch.Tensor:
    """Pictures (N, 3, H, W), uint8, one for each prompt, each from the noise of the same seed."""
    found, own = [], {}
    if isinstance(pipeline, PixArtAlphaPipeline):
        own = {"max_sequence_length": pipeline.tokenizer.model_max_length}
        own |= {"use_resolution_binning": False, "clean_caption": False}
    for part in slices(len(prompts), _BATCH):
        some = list(prompts[part])
        pictures = pipeline(
            some,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            generator=[torch.Generator().manual_seed(sampling.seed) for _ in some],
            output_type="np",
            **own,
        ).images
        found.append(torch.from_numpy(np.rint(pictures * 255).astype(np.uint8)).permute(0, 3, 1, 2))
    return torch.cat(found)


def captioned_rows(pipeline: PixArtAlphaPipeline, frame: pd.DataFrame) -> Captioned:
    """Latents and captions of the pictures of the rows, by the parts of the pipeline."""
    captions = frame["caption"].tolist()
    latents = encode(pipeline.vae, decode_pictures(frame))
    data = CaptionedLatents.of(latents, captions, captions, torch.ones(len(frame)), pipeline.tokenizer)
    return Captioned.of(data, pipeline.text_encoder, pipeline.tokenizer)


@dataclass(frozen=True, slots=True)
class _Shipped:
    """The pipeline under test, and the held-out pictures it is tested on."""

    pipeline: PixArtAlphaPipeline
    heldout: pd.DataFrame
    real: torch.Tensor  # (N, 3, H, W) uint8
    captioned: Captioned

    @classmethod
    def load(cls, own: Path) -> _Shipped:
        folder = assembled(own, reference_folder())
        pipeline = PixArtAlphaPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        heldout = load_pictures("heldout")
        return cls(pipeline, heldout, decode_pictures(heldout), captioned_rows(pipeline, heldout))


def _drawn_figures(
    shipped: _Shipped, reference: StableDiffusionPipeline, sampling: Sampling, sheet: Path
) -> dict[str, Any]:
    """How both models' pictures of held-out prompts are matched; some of the transformer's go into `sheet`."""
    captions = shipped.heldout["caption"].tolist()
    prompts = held_out_prompts(shipped.heldout, RETRIEVAL_PROMPTS)
    real = shipped.real[[captions.index(prompt) for prompt in prompts]]
    scorer = CLIPModel.from_pretrained(scorer_folder(), dtype=torch.float32, local_files_only=True).eval()
    tokenizer = CLIPTokenizer.from_pretrained(scorer_folder(), local_files_only=True)
    figures: dict[str, Any] = {"prompts": len(prompts), **dataclasses.asdict(sampling)}
    pipelines = (shipped.pipeline, reference)
    drawn = dict(zip(MODELS, (draw(pipeline, prompts, sampling) for pipeline in pipelines), strict=True))
    for name, pictures in (*drawn.items(), ("real", real)):
        seen, said = embed_pairs(scorer, tokenizer, pictures, prompts)
        figures[name] = {"clip_score": float((seen * said).sum(1).mean())}
    for name, pictures in drawn.items():
        figures[name]["matches"] = generated_matches(scorer, tokenizer, pictures, real, prompts)
    ours = drawn[MODELS[0]]
    draw_prompt_grid(sheet, prompts[:GRID_PROMPTS], ours[:GRID_PROMPTS], real[:GRID_PROMPTS])
    return figures


def evaluate_transformer(
    out: Path,
    *,
    assets: Path | None = None,
    rounds: int = 2,
    sampling: Sampling | None = None,
) -> dict[str, Any]:
    """Every measured number of the transformer, after writing the page, tables and figures of its report into `out`.

    `assets` is what `train` wrote, laid out as the package's own (the default); curves and the losses of both ways of
    storing are taken from there, or else those in `out` stay.
    """
    assets = assets_folder() if assets is None else assets
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted((assets / "curves").glob("*.csv")):
        shutil.copyfile(path, out / path.name)
    own = assets / "transformer"
    shipped = _Shipped.load(own)
    rows = held_out_rows(shipped.captioned, rounds)
    reference = as_float32(reference_folder())
    predictions = (by_transformer(shipped.pipeline.transformer), by_unet(reference.unet))
    models = dict(zip(MODELS, predictions, strict=True))
    tables, figures = [], {}
    for name, predict in models.items():
        error = errors(predict, shipped.captioned, rows)
        tables.append(by_timestep(error, rows.times).assign(model=name))
        figures[name] = {
            "loss": float(error.mean()),
            "captions": caption_losses(predict, shipped.captioned, rows),
        }
    losses = pd.concat(tables, ignore_index=True)
    curve = None
    if (out / "transformer.csv").is_file():
        curve = thinned(pd.read_csv(out / "transformer.csv"))
        write_frame(out / "transformer.csv", curve)
        draw_curves(out / "curves.png", {"transformer": curve})
    stored = out / "stored.csv"
    metrics: dict[str, Any] = {
        "pictures": {"train": len(load_pictures("train")), "heldout": len(shipped.heldout)},
        "parameters": sum(value.numel() for value in shipped.pipeline.transformer.parameters()),
        "megabytes": weights_megabytes(own),
        "rows": len(rows.times),
        "models": figures,
        "drawn": _drawn_figures(shipped, reference, sampling or Sampling(), out / "sheet.png"),
        "stored": pd.read_csv(stored).set_index("form")["loss"].to_dict() if stored.is_file() else {},
        "training": None
        if curve is None
        else {
            "steps": int(curve["step"].iloc[-1]) + 1,
            "loss": float(curve.loc[curve["step"] > curve["step"].iloc[-1] - 100, "loss"].mean()),
        },
        "environment": Environment.capture("cpu", "float32").as_dict(),
    }
    write_frame(out / "loss_by_timestep.csv", losses)
    write_json(out / "metrics.json", metrics)
    write_text(out / "README.md", report_page(metrics, losses))
    return metrics
