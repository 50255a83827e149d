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
    encode_captions,
    note_cut,
)
from prune_lab.probes.latents import (
    channels_of,
    check_side,
    class_count,
    decode_latents,
    draw_at,
    encode_distributions,
    encode_pictures,
    encode_pixels,
    picture_side,
    pixels_per_latent,
    takes_frames,
    to_uint8,
    vae_of,
)
from prune_lab.probes.making import make_probe, probe_of_latents, random_probe
from prune_lab.probes.probe import Probe, evaluating, load_probe, predict
from prune_lab.probes.schedules import Schedule, schedule_of

__all__ = [
    "Probe",
    "Schedule",
    "channels_of",
    "check_side",
    "class_count",
    "cut_texts",
    "decode_latents",
    "draw_at",
    "drawn_rows",
    "encode_captions",
    "encode_distributions",
    "encode_pictures",
    "encode_pixels",
    "evaluating",
    "guidance_embedding",
    "load_probe",
    "make_probe",
    "note_cut",
    "picture_names",
    "picture_rows",
    "picture_side",
    "pipeline_conditions",
    "pixels_per_latent",
    "predict",
    "probe_of_latents",
    "random_probe",
    "rows_of_size",
    "schedule_of",
    "size_rows",
    "takes_frames",
    "to_uint8",
    "vae_of",
]
