"""Probes: the fixed inputs that every model is compared on, and how pictures and captions become inputs."""

from __future__ import annotations

from prune_lab.probes.conditions import (
    drawn_rows,
    guidance_embedding,
    picture_names,
    picture_rows,
    pipeline_conditions,
    rows_of_size,
    size_rows,
)
from prune_lab.probes.encoding import (
    cut_texts,
    decode_latents,
    encode_captions,
    encode_pictures,
    noise_schedule,
    note_cut,
    to_uint8,
    training_target,
)
from prune_lab.probes.making import make_probe, probe_of_latents, random_probe
from prune_lab.probes.probe import Probe, evaluating, load_probe, predict
from prune_lab.probes.schedules import Schedule, schedule_of

__all__ = [
    "Probe",
    "Schedule",
    "cut_texts",
    "decode_latents",
    "drawn_rows",
    "encode_captions",
    "encode_pictures",
    "evaluating",
    "guidance_embedding",
    "load_probe",
    "make_probe",
    "noise_schedule",
    "note_cut",
    "picture_names",
    "picture_rows",
    "pipeline_conditions",
    "predict",
    "probe_of_latents",
    "random_probe",
    "rows_of_size",
    "schedule_of",
    "size_rows",
    "to_uint8",
    "training_target",
]
