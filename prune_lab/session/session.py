"""The session of a run: its settings, model, scorer and held-out rows, each loaded when first asked for."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from prune_lab.assets import decode_pictures
from prune_lab.blocks import Architecture
from prune_lab.config import RunConfig
from prune_lab.errors import RunError
from prune_lab.models import ModelSource, load_pipeline, load_scorer, load_unet, resolve_model
from prune_lab.probes import Probe, make_probe
from prune_lab.prompts import Prompts, read_prompts
from prune_lab.runs import Run, load_run_config
from prune_lab.runtime import pick_device, pick_dtype
from prune_lab.session.prompts import Pictures, shipped_rows

HELDOUT_PROMPTS = 8  # captions to draw when evaluate.prompts names none


class Session:
    """A run with its settings and models: each part is loaded when first asked for, and then kept.

    ``config`` and ``validation`` replace those of the run folder; a worker on another machine needs that.
    """

    def __init__(self, run: Run, *, config: RunConfig | None = None, validation: Probe | None = None) -> None:
        self.run = run
        given = {"config": config, "validation": validation}
        # a cached property that is in the instance already is not computed
        vars(self).update({name: value for name, value in given.items() if value is not None})

    @cached_property
    def config(self) -> RunConfig:
        """The settings that the run was started with."""
        return load_run_config(self.run)

    @cached_property
    def source(self) -> ModelSource:
        """The source of the model: shipped, preset, folder or hub."""
        return resolve_model(self.config.model)

    @cached_property
    def architecture(self) -> Architecture:
        """The inventory of the U-Net; needs no weights."""
        return self.source.architecture

    @cached_property
    def device(self) -> torch.device:
        """The device on which the run computes."""
        return pick_device(self.config.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The number format in which the run computes."""
        return pick_dtype(self.config.dtype)

    @cached_property
    def pipeline(self) -> Any:
        """The whole pipeline on the device. Raises RunError when the model is a U-Net alone."""
        if not self.source.is_pipeline:
            raise RunError(
                f"this step encodes captions and pictures, but {self.source.text!r} is a {self.source.kind} "
                "without text encoder and VAE; give 'reference', a pipeline folder or a hub id"
            )
        return load_pipeline(self.source, device=self.device, dtype=self.dtype)

    @cached_property
    def unet(self) -> Any:
        """The U-Net with its weights, on the device and in eval mode."""
        if self.source.is_pipeline:
            return self.pipeline.unet
        return load_unet(self.source, device=self.device, dtype=self.dtype)

    @cached_property
    def scorer(self) -> Any:
        """The CLIP model that judges pictures against prompts, with its input settings."""
        return load_scorer(self.config.evaluate.scorer, device=self.device)

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that teacher and candidates draw: ``evaluate.prompts``, or else captions of held-out pictures."""
        named = self.config.evaluate.prompts
        return named or tuple(shipped_rows("heldout", HELDOUT_PROMPTS, self.config.seed)["caption"])

    @cached_property
    def probe_prompts(self) -> Prompts:
        """The prompts in the file ``probe.prompts``, the first ``probe.samples`` of them."""
        found, most = read_prompts(Path(self.config.probe.prompts)), self.config.probe.samples
        return Prompts(found.texts[:most], found.kinds[:most])

    @cached_property
    def generation_prompts(self) -> Prompts:
        """The prompts for criteria that compare pictures: those of the probe, or else those of the evaluation."""
        if self.config.probe.prompts:
            return self.probe_prompts
        if self.config.evaluate.prompts:
            return Prompts(self.config.evaluate.prompts, ())
        rows = shipped_rows("heldout", HELDOUT_PROMPTS, self.config.seed)
        return Prompts(tuple(rows["caption"]), tuple(rows["group"]))

    @cached_property
    def validation(self) -> Probe:
        """Held-out rows for the loss that ranks candidates, of other pictures than those of the probe.

        On the pictures that a plan was searched with, it would look better than it is.
        """
        settings = self.config.probe
        return self.picture_probe(settings.seed + 1, skip=settings.samples)

    def picture_probe(self, seed: int, *, skip: int = 0) -> Probe:
        """``probe.samples`` held-out pictures after the first ``skip``; ``seed`` draws their noise and timesteps."""
        settings = self.config.probe
        chosen = self.pictures("heldout", settings.samples, settings.seed, skip=skip)
        shown = chosen.pixels, chosen.captions, chosen.groups
        return make_probe(self.pipeline, *shown, timesteps=settings.timesteps, seed=seed)

    def pictures(self, split: str, count: int, seed: int, *, skip: int = 0) -> Pictures:
        """``count`` shipped pictures of ``split`` in an order drawn with ``seed``, after the first ``skip`` of them.

        They are resized to the size at which the pipeline works. Raises DataError when there are not that many.
        """
        rows = shipped_rows(split, skip + count, seed).iloc[skip:]
        pixels = decode_pictures(rows)
        side = int(self.pipeline.unet.config.sample_size) * int(self.pipeline.vae_scale_factor)
        if pixels.shape[-1] != side:
            resized = F.interpolate(pixels.float(), (side, side), mode="bicubic", antialias=True)
            pixels = resized.round().clamp(0, 255).to(torch.uint8)
        return Pictures(pixels, tuple(rows["caption"]), tuple(rows["group"]))
