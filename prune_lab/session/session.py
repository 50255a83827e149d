"""The session of a run: its settings, model, scorer and held-out rows, each loaded when first asked for."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from prune_lab.assets import decode_pictures
from prune_lab.blocks import Architecture
from prune_lab.config import SHIPPED, RunConfig
from prune_lab.distill import LatentCache, draw_cache
from prune_lab.errors import ConfigError, DataError, RunError
from prune_lab.families import conditions_of, embedding_width, known_conditions, model_of
from prune_lab.models import (
    ModelSource,
    ScorerChoice,
    choose_scorer,
    load_model,
    load_pipeline,
    load_scorer,
    of_shipped_family,
    recorded_model,
)
from prune_lab.models.streamed import bytes_beside, load_streamed
from prune_lab.probes import Probe, draw_at, load_probe, make_probe, picture_side
from prune_lab.prompts import Prompts, read_prompts
from prune_lab.runs import Manifests, Run, load_run_config
from prune_lab.runtime import bytes_text, free_bytes, note, pick_device, pick_dtype
from prune_lab.session.drawing import PromptParts, prompt_parts, untexted_parts
from prune_lab.session.origins import check_teacher
from prune_lab.session.own import OwnData
from prune_lab.session.parts import binding_settings, data_part, lacking, record, validation_part
from prune_lab.session.prompts import Pictures, shipped_rows

_MEMORY_SHARE = 0.9  # of what is free: a model that takes more is read from disk while it is scored
SHOWN_PROMPTS = 8  # prompts to draw when evaluate.prompts names none
Origin = Literal["shipped", "own", "drawn", "none"]
"""Pictures of the package, of the user, drawn by the model itself; none for a model alone, which gets noise."""


def origin_of(config: RunConfig, source: ModelSource) -> Origin:
    """Whose pictures a run of ``source`` uses; the shipped ones serve the shipped models, others must ask for them."""
    if not source.is_pipeline:
        return "none"
    named = config.data.source
    if named == SHIPPED or (not named and of_shipped_family(source)):
        return "shipped"
    return "own" if named else "drawn"


class Session:
    """A run with its settings and models: each part is loaded when first asked for, and then kept.

    ``config`` and ``validation`` replace those of the run folder; a worker on another machine needs that.
    """

    def __init__(
        self,
        run: Run,
        *,
        config: RunConfig | None = None,
        validation: Probe | None = None,
        trusting: bool = False,
    ) -> None:
        self.run = run
        self.trusting = trusting  # a worker takes what is in the folder as it is: the driver has looked
        self._streaming = False  # whether the model that is loaded next is read from disk block by block
        self.told = False  # whether its sources of data were shown
        given = {"config": config, "validation": validation}
        # a cached property that is in the instance already is not computed
        vars(self).update({name: value for name, value in given.items() if value is not None})

    @cached_property
    def config(self) -> RunConfig:
        """The settings that the run was started with.

        Raises RunError where finished steps were made with others: somebody edited config.toml.
        """
        config = load_run_config(self.run)
        changed = () if self.trusting else self.manifests.other_settings(binding_settings(config))
        if changed:
            raise RunError(
                f"{self.run.config} was changed: finished steps were made with other values of {', '.join(changed)}; "
                f"set them back, or redo these steps: prune-lab run --run {self.run.folder} --force"
            )
        return config

    @cached_property
    def source(self) -> ModelSource:
        """The source of the model: shipped, preset, folder or hub.

        Raises RunError where the run was started with other weights of it.
        """
        source = recorded_model(self.config, self.run.folder)
        for line in source.notes:
            note(line)
        if not self.trusting:
            self.teacher = check_teacher(self.run, self.manifests, source)
        return source

    @cached_property
    def teacher(self) -> str:
        """The digest of the model. Raises RunError where the run was started with other weights of it."""
        return check_teacher(self.run, self.manifests, self.source)

    @cached_property
    def manifests(self) -> Manifests:
        """What the steps of the run were made from."""
        return Manifests(self.run.folder)

    @cached_property
    def architecture(self) -> Architecture:
        """The inventory of the model; needs no weights."""
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
        """The whole pipeline on the device. Raises RunError when the model is alone.

        Raises UnsupportedModelError, before anything is read, for a model that takes what no rows are made of here.
        """
        known_conditions(self.source.config)
        if not self.source.is_pipeline:
            raise RunError(
                f"this step encodes captions and pictures, but {self.source.text!r} is a {self.source.kind} "
                "without text encoder and VAE; give 'reference', a pipeline folder or a hub id"
            )
        model = None
        if self._streaming:
            model = self._from_disk()
            if beside := bytes_beside(self.source, self.dtype):
                note(
                    f"what {self.source.text} holds beside its {self.source.called} takes {bytes_text(beside)} until "
                    "texts and pictures are encoded"
                )
        found = load_pipeline(self.source, device=self.device, dtype=self.dtype, model=model)
        draw_at(found, self.config.data.resolution)
        return found

    @cached_property
    def model(self) -> Any:
        """The model with its weights, on the device and in eval mode."""
        known_conditions(self.source.config)
        if self.source.is_pipeline:
            return model_of(self.pipeline)
        if self._streaming:
            return self._from_disk()
        return load_model(self.source, device=self.device, dtype=self.dtype)

    def _from_disk(self) -> Any:
        folder, variant = self.source.model_folder, self.source.variant
        if folder is None or self.source.random_seed is not None:
            raise ConfigError(
                f"asked to read the blocks of {self.source.text} from disk (score.stream), found no weights there; "
                "score.stream = false"
            )
        return load_streamed(folder, device=self.device, dtype=self.dtype, variant=variant)

    @cached_property
    def streams(self) -> bool:
        """Whether scores are measured on a model that is read from disk block by block.

        So says the configuration, or the model does not fit into memory by far.
        """
        if self.config.score.stream:
            return True
        if self.source.model_folder is None or self.source.random_seed is not None:
            return False
        needed, free = self.architecture.total_params * self.dtype.itemsize, free_bytes(self.device)
        if needed <= _MEMORY_SHARE * free:
            return False
        note(
            f"{self.source.text} holds {bytes_text(needed)} of weights, free are {bytes_text(free)}: its blocks are "
            "read from disk when they run"
        )
        return True

    @contextlib.contextmanager
    def streaming(self) -> Iterator[None]:
        """Inside, the model is read from disk where it ``streams``; what is loaded inside is let go at the end."""
        if self._streaming or not self.streams or not {"model", "pipeline"}.isdisjoint(vars(self)):
            yield
            return
        self._streaming = True
        try:
            yield
        finally:
            self._streaming = False
            for name in ("model", "pipeline"):
                vars(self).pop(name, None)

    def let_go_of_encoders(self) -> None:
        """Keep the model alone, if it is read from disk: what is scored has its texts and pictures encoded already."""
        if self._streaming and "pipeline" in vars(self):
            _ = self.model  # stays
            del self.pipeline
            gc.collect()

    @cached_property
    def scorer_choice(self) -> ScorerChoice:
        """The scorer of the run and why it is this one, or why there is none."""
        return choose_scorer(self.config.evaluate.scorer, self.source)

    @cached_property
    def scorer(self) -> Any:
        """The CLIP model that judges pictures against prompts, with its input settings; None where there is none."""
        choice = self.scorer_choice
        return load_scorer(choice.text, device=self.device) if choice.text else None

    # Where pictures and prompts come from ------------------------------------------------------------------------

    @cached_property
    def data_origin(self) -> Origin:
        """Whose pictures the run uses (see ``origin_of``)."""
        return origin_of(self.config, self.source)

    @property
    def reads_text(self) -> bool:
        """Whether the model draws what a text says; others are asked for classes, or for nothing."""
        return embedding_width(self.source.config) > 0

    @cached_property
    def classes(self) -> int:
        """Classes that the model is told by number; 0 where it takes none."""
        return next((one.classes for one in conditions_of(self.source.config) if one.classes), 0)

    @cached_property
    def prompt_parts(self) -> PromptParts:
        """The prompts of ``data.prompts`` in parts, for a model that has no other pictures than those it draws.

        Of a model that reads no text its classes, or names of pictures.
        """
        probe, settings = self.config.probe, self.config.data
        count = min(probe.drawn, probe.samples)
        if not self.reads_text:
            return untexted_parts(self.classes, probe=count, shown=SHOWN_PROMPTS)
        return prompt_parts(
            read_prompts(settings.prompts), probe=count, shown=SHOWN_PROMPTS, seed=settings.seed
        )

    @cached_property
    def own(self) -> OwnData:
        """The user's data in parts, or what the model draws, which it does now where that is not there in data/."""
        settings, samples = self.config.data, self.config.probe.samples
        if self.data_origin == "own":
            return OwnData.open(settings, samples, reads_text=self.reads_text, classes=self.classes)
        folder, part = self.run.data_dir, data_part(self)
        if not lacking(self, part):
            rows = LatentCache.load(folder)
        else:
            rows = draw_cache(self.pipeline, self.prompt_parts.data, settings, folder).cache
            record(self, part)
        told = self.reads_text
        return OwnData.of(rows, probe=0, validate=samples, seed=settings.seed, by_caption=told)

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that teacher and candidates draw: ``evaluate.prompts``, or else captions of held-out pictures."""
        return self.shown_prompts.texts

    @cached_property
    def shown_prompts(self) -> Prompts:
        """``prompts`` with their kinds."""
        if named := self.config.evaluate.prompts:
            return Prompts(named, ())
        if not self.reads_text and not self.classes:
            return self.prompt_parts.shown
        if self.data_origin == "shipped":
            rows = shipped_rows("heldout", SHOWN_PROMPTS, self.config.seed)
            return Prompts(tuple(rows["caption"]), tuple(rows["group"]))
        if self.data_origin == "own":
            captions = (
                self.validation.captions if self._validated else self.own.captions(self.own.split.validate)
            )
            found = tuple(dict.fromkeys(caption for caption in captions if caption))[:SHOWN_PROMPTS]
            if found:
                return Prompts(found, ())
        return self.prompt_parts.shown

    @cached_property
    def probe_prompts(self) -> Prompts:
        """The prompts in the file ``probe.prompts``, the first ``probe.samples`` of them."""
        found, most = read_prompts(Path(self.config.probe.prompts)), self.config.probe.samples
        return Prompts(found.texts[:most], found.kinds[:most])

    @cached_property
    def generation_prompts(self) -> Prompts:
        """The prompts for criteria that compare pictures: those of the probe, or else those of the evaluation."""
        return self.probe_prompts if self.config.probe.prompts else self.shown_prompts

    # Held-out pictures -------------------------------------------------------------------------------------------

    @property
    def _validated(self) -> bool:
        return "validation" in vars(self) or self.run.done(self.run.validation)

    @cached_property
    def validation(self) -> Probe:
        """Held-out rows for the loss that ranks candidates, of other pictures than those of the probe.

        On the pictures that a plan was searched with, it would look better than it is. Of the user's data, or of what
        the model drew, it is written to validation.safetensors.
        """
        settings, path = self.config.probe, self.run.validation
        if self.data_origin in ("shipped", "none"):
            return self.picture_probe(settings.seed + 1, skip=settings.samples)
        if self.data_origin == "drawn":
            _ = self.own  # what it is part of
        part = validation_part(self)
        if not lacking(self, part):
            return load_probe(path)
        probe = self.own.probe(self.pipeline, self.own.split.validate, settings, seed=settings.seed + 1)
        probe.save(path)
        record(self, part)
        return probe

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
        if self.classes:
            raise DataError(
                f"asked to show the pictures of the package to {self.source.text}, a model of {self.classes:,} "
                "classes, which they do not have; name pictures with classes as captions in data.source, or let it draw"
            )
        rows = shipped_rows(split, skip + count, seed).iloc[skip:]
        pixels = decode_pictures(rows)
        side = picture_side(self.pipeline)
        if pixels.shape[-1] != side:
            resized = F.interpolate(pixels.float(), (side, side), mode="bicubic", antialias=True)
            pixels = resized.round().clamp(0, 255).to(torch.uint8)
        return Pictures(pixels, tuple(rows["caption"]), tuple(rows["group"]))
