"""What the reference model can do, measured on the held-out pictures, with the figures and tables of its report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from prune_lab.assets import assets_folder, decode_pictures, read_split
from prune_lab.blocks import architecture_of, block_groups
from prune_lab.evaluation import generate
from prune_lab.importance import ImportanceTable, ScoringContext, score
from prune_lab.probes import Probe, make_probe, predict
from prune_lab.runtime import Environment, write_frame, write_json, write_text
from recipes.reference_model.autoencoder import psnr
from recipes.reference_model.clip import embed_pairs, retrieval
from recipes.reference_model.report import draw_curves, draw_impacts, draw_prompt_grid, report_page

GRID_PROMPTS = 32
RETRIEVAL_PROMPTS = 100
IMPACT_PICTURES = 256
_GROUP_ORDER = ("faces", "animals", "food", "flags", "objects", "symbols", "places", "activities", "people")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How pictures were drawn for the report."""

    steps: int = 30
    guidance: float = 4.0
    seed: int = 0


def held_out_prompts(frame: pd.DataFrame, count: int) -> list[str]:
    """`count` captions of distinct subjects, the prompt groups in turn, in the frame's (hashed, fixed) order."""
    once = frame.drop_duplicates("subject")
    queues = {group: once.loc[once["group"] == group, "caption"].tolist() for group in _GROUP_ORDER}
    picked: list[str] = []
    while len(picked) < count and any(queues.values()):
        picked += [queue.pop(0) for queue in queues.values() if queue]
    return picked[:count]


def by_timestep(
    error: torch.Tensor, timesteps: torch.Tensor, buckets: int = 10, length: int = 1000
) -> pd.DataFrame:
    """Mean of the errors (N,) per bucket of timesteps (N,): columns bucket, first, last, loss, rows."""
    bucket = timesteps * buckets // length
    rows = []
    for number in range(buckets):
        inside = error[bucket == number]
        first, last = number * length // buckets, (number + 1) * length // buckets - 1
        loss = float(inside.mean()) if len(inside) else float("nan")
        rows.append((number, first, last, loss, len(inside)))
    return pd.DataFrame(rows, columns=["bucket", "first", "last", "loss", "rows"])


def loss_by_timestep(unet: Any, probe: Probe, buckets: int = 10, length: int = 1000) -> pd.DataFrame:
    """Mean squared error of the prediction per bucket of timesteps: columns bucket, first, last, loss, rows."""
    error = (predict(unet, probe) - probe.target).double().square().flatten(1).mean(1)
    return by_timestep(error, probe.timesteps, buckets, length)


def caption_ranks(
    scorer: CLIPModel, tokenizer: CLIPTokenizer, pictures: torch.Tensor, prompts: Sequence[str]
) -> torch.Tensor:
    """Rank (N,) of each picture's own prompt among all the prompts, 1 is best, by the scorer's cosine."""
    seen, said = embed_pairs(scorer, tokenizer, pictures, prompts)
    similarity = seen @ said.t()
    return (similarity > similarity.diagonal()[:, None]).sum(1) + 1


def _shares(ranks: torch.Tensor) -> dict[str, float]:
    return {"r1": float((ranks == 1).float().mean()), "r5": float((ranks <= 5).float().mean())}


def _coarse(pictures: torch.Tensor, size: int) -> torch.Tensor:
    return F.adaptive_avg_pool2d(pictures.float(), size)


def generated_matches(
    scorer: CLIPModel,
    tokenizer: CLIPTokenizer,
    drawn: torch.Tensor,
    real: torch.Tensor,
    prompts: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Shares ranked first and in the first five, of generated uint8 pictures and of controls that give them meaning.

    The text encoder started as the scorer's text tower, so a high share may only mean that the scorer is pleased.
    "shuffled" must be at chance; "real_blurred" keeps 4 x 4 pixels of the real pictures and shows what coarse colour
    alone earns; "pixels" asks, without the scorer, whether the prompt's own real picture is the nearest at 16 x 16.
    """
    turned = drawn.roll(len(drawn) // 2 + 1, 0)
    blurred = F.interpolate(_coarse(real, 4), size=real.shape[-2:]).round().to(torch.uint8)
    distance = torch.cdist(_coarse(drawn, 16).flatten(1), _coarse(real, 16).flatten(1))
    return {
        "generated": _shares(caption_ranks(scorer, tokenizer, drawn, prompts)),
        "shuffled": _shares(caption_ranks(scorer, tokenizer, turned, prompts)),
        "real": _shares(caption_ranks(scorer, tokenizer, real, prompts)),
        "real_blurred": _shares(caption_ranks(scorer, tokenizer, blurred, prompts)),
        "pixels": _shares((distance < distance.diagonal()[:, None]).sum(1) + 1),
    }


def score_everything(unet: Any, probe: Probe) -> ImportanceTable:
    """Removal impacts of all blocks, pairs and stages on the probe, with 95 % bootstrap intervals."""
    architecture = architecture_of(unet)
    groups = [group for kind in ("block", "pair", "stage") for group in block_groups(architecture, kind)]
    return score(ScoringContext(unet, probe, seed=0), groups, bootstrap=1000, model="reference")


def weights_megabytes(folder: Path) -> float:
    """Size of all safetensors files under the folder, in megabytes (1e6 bytes)."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6


def as_float32(folder: Path) -> StableDiffusionPipeline:
    """The pipeline in the folder with float32 weights, offline and quiet."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, StableDiffusionPipeline)
    return pipeline


@dataclass(frozen=True, slots=True)
class _Shipped:
    """The model under test with the held-out pictures it is tested on."""

    pipeline: StableDiffusionPipeline
    scorer: CLIPModel
    tokenizer: CLIPTokenizer
    heldout: pd.DataFrame
    real: torch.Tensor  # (N, 3, H, W) uint8, the held-out pictures

    @classmethod
    def load(cls, assets: Path) -> _Shipped:
        heldout = read_split(assets / "pictures", "heldout")
        scorer = CLIPModel.from_pretrained(assets / "scorer", dtype=torch.float32, local_files_only=True)
        return cls(
            pipeline=as_float32(assets / "reference"),
            scorer=scorer.eval(),
            tokenizer=CLIPTokenizer.from_pretrained(assets / "scorer", local_files_only=True),
            heldout=heldout,
            real=decode_pictures(heldout),
        )

    @property
    def captions(self) -> list[str]:
        return self.heldout["caption"].tolist()

    def probe(self, count: int, timesteps: int) -> Probe:
        """The first `count` held-out pictures at one timestep each."""
        some = self.heldout.iloc[:count]
        return make_probe(
            self.pipeline,
            self.real[: len(some)],
            some["caption"].tolist(),
            some["group"].tolist(),
            timesteps=min(timesteps, len(some)),
            seed=0,
        )


def _drawn_figures(shipped: _Shipped, sampling: Sampling, grid: Path) -> dict[str, Any]:
    """How generated pictures of held-out prompts are matched; draws some of them beside the real ones into `grid`."""
    prompts = held_out_prompts(shipped.heldout, RETRIEVAL_PROMPTS)
    drawn = generate(
        shipped.pipeline, prompts, [sampling.seed], steps=sampling.steps, guidance=sampling.guidance
    )
    real = shipped.real[[shipped.captions.index(prompt) for prompt in prompts]]
    draw_prompt_grid(grid, prompts[:GRID_PROMPTS], drawn[:GRID_PROMPTS], real[:GRID_PROMPTS])
    matches = generated_matches(shipped.scorer, shipped.tokenizer, drawn, real, prompts)
    return {"prompts": len(prompts), **matches, **dataclasses.asdict(sampling)}


def _impact_figures(impacts: pd.DataFrame, probe: Probe) -> dict[str, Any]:
    single = impacts[(impacts["kind"] == "block") & ~impacts["starred"]]
    mid = impacts[(impacts["kind"] == "stage") & (impacts["group"] == "Md")].iloc[0]
    return {
        "rows": len(probe),
        "removable": len(single),
        "above_1e-3": int((single["impact"] >= 1e-3).sum()),
        "above_1e-4": int((single["impact"] >= 1e-4).sum()),
        "above_zero": int((single["low"] > 0).sum()),
        "mid_stage": float(mid["impact"]),
        "mid_stage_low": float(mid["low"]),
        "mid_stage_high": float(mid["high"]),
        "probe": probe.digest,
    }


def thinned(curve: pd.DataFrame, every: int = 10) -> pd.DataFrame:
    """Means of `every` steps, at the last of them; a curve that is that sparse already stays as it is."""
    block = curve["step"] // every
    if block.is_unique:
        return curve
    groups = curve.groupby(block)
    return groups.mean().round(5).assign(step=groups["step"].max()).reset_index(drop=True)


def evaluate_reference(
    out: Path, *, assets: Path | None = None, curves: Path | None = None, sampling: Sampling | None = None
) -> dict[str, Any]:
    """Every measured number of the reference model, after writing the report's pages and figures into `out`.

    `assets` is laid out as the package's own (the default); `curves` holds the CSV curves of the four trainings,
    copied into the report (default: the ones in `out` already).
    """
    assets = assets_folder() if assets is None else assets
    out.mkdir(parents=True, exist_ok=True)
    shipped = _Shipped.load(assets)
    quality = psnr(shipped.pipeline.vae, shipped.real)
    pictures, texts = embed_pairs(shipped.scorer, shipped.tokenizer, shipped.real, shipped.captions)
    losses = loss_by_timestep(shipped.pipeline.unet, shipped.probe(len(shipped.real), timesteps=100))
    probe = shipped.probe(IMPACT_PICTURES, timesteps=32)
    impacts = score_everything(shipped.pipeline.unet, probe).frame()
    training = {}
    for name in ("autoencoder", "clip", "text_encoder", "denoiser"):
        source = (out if curves is None else curves) / f"{name}.csv"
        if source.is_file():
            curve = thinned(pd.read_csv(source))
            write_frame(out / f"{name}.csv", curve)
            last = int(curve["step"].iloc[-1])
            training[name] = {
                "steps": last + 1,
                "loss": float(curve.loc[curve["step"] > last - 100, "loss"].mean()),
            }
    metrics: dict[str, Any] = {
        "pictures": {"train": len(read_split(assets / "pictures", "train")), "heldout": len(shipped.real)},
        "megabytes": {
            "pipeline": weights_megabytes(assets / "reference"),
            "scorer": weights_megabytes(assets / "scorer"),
        },
        "autoencoder": {"psnr_mean": float(quality.mean()), "psnr_p10": float(quality.quantile(0.1))},
        "scorer_heldout": retrieval(pictures, texts, shipped.captions),
        "denoiser": {
            "loss": float((losses["loss"] * losses["rows"]).sum() / losses["rows"].sum()),
            "rows": int(losses["rows"].sum()),
        },
        "scorer_generated": _drawn_figures(shipped, sampling or Sampling(), out / "grid.png"),
        "impacts": _impact_figures(impacts, probe),
        "training": training,
        "environment": Environment.capture("cpu", "float32").as_dict(),
    }
    write_frame(out / "impacts.csv", impacts)
    write_frame(out / "loss_by_timestep.csv", losses)
    write_json(out / "metrics.json", metrics)
    draw_impacts(out / "impacts.png", impacts[(impacts["kind"] == "block") & ~impacts["starred"]])
    draw_curves(out / "curves.png", {name: pd.read_csv(out / f"{name}.csv") for name in training})
    write_text(out / "README.md", report_page(metrics, losses, impacts))
    return metrics
