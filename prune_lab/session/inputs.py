"""The inputs of a run: its probe, its training data and its scoring context.

Probe and data are read from the run folder when they are there, and made and written there otherwise.
"""

from __future__ import annotations

import dataclasses

import torch
from accelerate import PartialState

from prune_lab.distill import (
    LatentCache,
    LatentData,
    OtherCaptions,
    TrainingData,
    cached_data,
    check_draws_from_text,
    is_cache,
    other_captions,
)
from prune_lab.errors import ConfigError
from prune_lab.importance import (
    NEEDS_PIPELINE,
    GenerationSettings,
    ImportanceTable,
    ScoreCache,
    ScoringContext,
    importance_from_frame,
)
from prune_lab.models import model_digest
from prune_lab.probes import Probe, encode_captions, load_probe, random_probe
from prune_lab.profiling import latent_of_pixels
from prune_lab.prompts import read_prompts
from prune_lab.runs import Run, read_records
from prune_lab.schemas import IMPORTANCE
from prune_lab.session.drawing import drawn_probe
from prune_lab.session.own import probe_of_few
from prune_lab.session.parts import captions_part, data_part, lacking, probe_part, record
from prune_lab.session.session import Session

# The probe ---------------------------------------------------------------------------------------------------


def probe_of(session: Session, seed: int) -> Probe:
    """A probe of the run's pictures and captions, with noise and timesteps drawn with ``seed``."""
    settings, how = session.config.probe, session.config.evaluate
    if settings.prompts:
        own = dataclasses.replace(settings, samples=max(2, len(session.probe_prompts.texts)))
        return drawn_probe(session.pipeline, session.probe_prompts, own, how, steps=how.steps, seed=seed)
    match session.data_origin:
        case "shipped":
            return session.picture_probe(seed)
        case "own":
            return session.own.probe(session.pipeline, session.own.split.probe, settings, seed=seed)
        case "drawn":
            check_draws_from_text(type(session.pipeline))
            drawn = session.pipeline, session.prompt_parts.probe, settings, how
            return drawn_probe(*drawn, steps=settings.steps, seed=seed)
        case "none":
            config, samples, side = session.source.config, settings.samples, session.config.data.resolution
            latent = latent_of_pixels(side, session.source) if side else None
            how_many = {"samples": samples, "timesteps": settings.timesteps}
            return random_probe(config, **how_many, seed=seed, latent=latent)


def ensure_probe(session: Session) -> Probe:
    """The fixed inputs that scores are measured on; writes probe.safetensors.

    A pipeline gets held-out pictures with their captions, of the user's data or the shipped ones, or pictures that it
    draws itself; a bare model, which has nothing to encode them with, noise.
    """
    run, part = session.run, probe_part(session)
    if not lacking(session, part):
        return load_probe(run.probe)
    probe = probe_of(session, session.config.probe.seed)
    probe.save(run.probe)
    record(session, part)
    return probe


# Scores ------------------------------------------------------------------------------------------------------


def scoring_context_of(
    session: Session, probe: Probe, generation: GenerationSettings | None = None
) -> ScoringContext:
    """The run's model with ``probe``, the settings of the run and its cache of scores."""
    config = session.config
    guidance, unconditional, inputs = config.score.guidance, None, probe.digest
    if guidance != 1 and not session.reads_text:
        raise ConfigError(
            f"asked for score.guidance = {guidance:g}, found a model that reads no text, so there is none to leave "
            "out; set score.guidance = 1"
        )
    if guidance != 1 and session.source.is_pipeline:
        unconditional = probe.with_prompt(*encode_captions(session.pipeline, [""]))
        inputs = f"{inputs}-guided{guidance:g}"
    cache = ScoreCache.open(
        session.run.scores_dir, model=model_digest(session.source), inputs=inputs, precision=config.dtype
    )
    layout = torch.channels_last if config.score.channels_last else torch.contiguous_format
    return ScoringContext(
        session.model.to(memory_format=layout),
        probe,
        batch=config.score.batch or None,
        seed=config.seed,
        generation=generation,
        guidance=guidance,
        unconditional=unconditional,
        cache=cache,
        compiled=config.score.compile,
    )


def run_scoring_context(session: Session, *, pictures: bool = False) -> ScoringContext:
    """The run's model with its probe, and with prompts to draw where ``pictures`` or its criteria ask for them."""
    settings, generation = session.config.score, None
    if session.source.is_pipeline and (pictures or NEEDS_PIPELINE & {settings.criterion, *settings.also}):
        prompts, how = session.generation_prompts, session.config.evaluate
        generation = GenerationSettings(
            session.pipeline,
            prompts.texts,
            prompts.kinds,
            seeds=how.seeds,
            steps=how.steps,
            guidance=how.guidance,
            scorer=session.scorer,
            scorer_name=session.scorer_choice.text,
        )
    return scoring_context_of(session, ensure_probe(session), generation)


def read_scores(run: Run) -> ImportanceTable:
    """The scores of blocks, pairs and stages by the run's criterion; RunError before they are measured."""
    return importance_from_frame(read_records(run.needs(run.importance, "score"), IMPORTANCE))


# Training data -----------------------------------------------------------------------------------------------


def ensure_data(session: Session) -> TrainingData:
    """Training pictures as latents and text embeddings, the same for every candidate.

    Shipped ones are written to data.safetensors, those that ``data.source`` names to data/, unless it names a finished
    cache or ``data.cached`` is false; without either the model draws them.
    """
    run, part = session.run, data_part(session)
    if session.data_origin == "shipped":
        if not lacking(session, part):
            return LatentData.load(run.data)
        settings = session.config.distill
        pictures = session.pictures("train", settings.pictures, settings.seed)
        data = cached_data(run.data, session.pipeline, pictures.pixels, pictures.captions)
        record(session, part)
        return data
    _ = session.validation  # before the pictures may be gone
    if session.data_origin == "own" and not lacking(session, part) and is_cache(run.data_dir):
        return LatentCache.load(run.data_dir)
    found = session.own.training(session.pipeline, session.config.data, run.data_dir)
    record(session, part)
    return found


def training_and_validation(session: Session) -> tuple[TrainingData, Probe]:
    """(training data of the students, held-out rows for their validation loss), of different pictures."""
    return ensure_data(session), session.validation


def deciding_probe(session: Session) -> Probe:
    """Rows that decide whether a repair is kept: training pictures, with noise of their own.

    Neither the repair is fitted on them, nor are students judged by them at the end.
    """
    settings, data = session.config.probe, ensure_data(session)
    count = min(settings.samples, len(data))
    rows = torch.arange(count) * len(data) // count
    batch = data.rows(rows, torch.zeros(count, dtype=torch.int64))
    captions = tuple(data.captions[row] for row in rows.tolist())
    return probe_of_few(
        session.pipeline,
        batch.mean,
        captions,
        ("",) * count,
        settings,
        seed=settings.seed + 2,
        text=(batch.embeddings, batch.added),
    )


def ensure_captions(session: Session) -> OtherCaptions:
    """The captions of ``distill.captions`` encoded, without what is held out or drawn to compare students.

    Writes captions.safetensors. Of several processes the main one encodes them, and the others read its file.
    """
    part, held_out = captions_part(session), (*session.validation.captions, *session.shown_prompts.texts)
    held = {" ".join(caption.lower().split()) for caption in held_out}
    texts = read_prompts(session.config.distill.captions).texts
    captions = [text for text in texts if " ".join(text.lower().split()) not in held]
    with PartialState().main_process_first():
        made = lacking(session, part)
        found = other_captions(session.pipeline, captions, session.run.captions)
        if made:
            record(session, part)
        return found
