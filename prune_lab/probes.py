"""A probe: the fixed noisy latents, timesteps and text that every model is compared on.

One row is one question to a U-Net: what noise is in this latent, at this timestep, given this caption? Rows
spread evenly over the noise schedule, because late and early steps fail differently, and each picture is used
equally often. The digest of the tensors names the probe wherever a number rests on it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from prune_lab.errors import DataError, UnsupportedModelError
from prune_lab.families import example_inputs
from prune_lab.runtime import atomic_write, seeded, tensors_digest

_FORMAT = "prune_lab probe 1"
_TENSORS = ("noisy", "noise", "timesteps", "embeddings", "target", "pictures")
# All of SD 1, 2, XL.
_SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_VAE_FACTOR = 8  # pixels per latent pixel in all of SD; only SDXL's size conditioning reads it


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """N rows of U-Net input with the answer each should give, float32 on the CPU."""

    noisy: Tensor  # (N, C, H, W) what the U-Net sees
    noise: Tensor  # (N, C, H, W)
    timesteps: Tensor  # (N,) int64
    embeddings: Tensor  # (N, L, D) of the captions
    captions: tuple[str, ...]
    groups: tuple[str, ...]  # the kind of prompt each row belongs to, for a look at damage per kind
    target: Tensor  # (N, C, H, W) what the U-Net was trained to predict: the noise, or the velocity
    added: Mapping[str, Tensor] = field(default_factory=dict)  # SDXL: text_embeds (N, P), time_ids (N, 6)
    # (N,) which picture a row is made from: rows of one picture are not independent. Default: one each.
    pictures: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        rows = len(self.noisy)
        if self.pictures.numel() == 0:
            object.__setattr__(self, "pictures", torch.arange(rows))
        lengths = {name: len(tensor) for name, tensor in self.tensors().items()}
        lengths |= {"captions": len(self.captions), "groups": len(self.groups)}
        wrong = {name: length for name, length in lengths.items() if length != rows}
        if wrong or not rows:
            raise DataError(
                f"a probe needs as many of everything, found noisy {rows} and {wrong or 'nothing else'}; "
                "give every row a latent, a timestep, a caption and a group"
            )

    def __len__(self) -> int:
        return len(self.noisy)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, the added conditioning as ``added.<name>``."""
        named: dict[str, Tensor] = {name: getattr(self, name) for name in _TENSORS}
        return named | {f"added.{name}": tensor for name, tensor in self.added.items()}

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with any bit of any tensor."""
        return tensors_digest(self.tensors())

    def rows(self, wanted: Sequence[int]) -> Probe:
        """The probe of these rows alone, in this order."""
        index = torch.as_tensor(wanted, dtype=torch.int64)
        return Probe(
            **{name: getattr(self, name)[index] for name in _TENSORS},
            captions=tuple(self.captions[row] for row in wanted),
            groups=tuple(self.groups[row] for row in wanted),
            added={name: tensor[index] for name, tensor in self.added.items()},
        )

    def with_prompt(self, embeddings: Tensor, added: Mapping[str, Tensor]) -> Probe:
        """The same rows with another text (1, L, D) for all of them, and its added conditioning (1, ...) where there is
        any; what ``encode_captions`` gives for one caption.
        """
        rows = len(self)
        return replace(
            self,
            embeddings=embeddings.expand(rows, -1, -1),
            captions=("",) * rows,
            added={**self.added, **{name: tensor.expand(rows, -1) for name, tensor in added.items()}},
        )

    def batches(
        self, size: int, device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Rows in order, at most ``size`` at a time: where they lie, and keyword arguments of ``unet``."""
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            inputs: dict[str, Any] = {
                "sample": self.noisy[rows].to(device, dtype),
                "timestep": self.timesteps[rows].to(device),
                "encoder_hidden_states": self.embeddings[rows].to(device, dtype),
            }
            if self.added:
                inputs["added_cond_kwargs"] = {
                    name: tensor[rows].to(device, dtype) for name, tensor in self.added.items()
                }
            yield rows, inputs

    def denoising_error(self, prediction: Tensor, rows: slice) -> Tensor:
        """(n,) mean squared error of ``prediction`` (n, C, H, W) for ``rows`` against their target, on its device."""
        return (prediction - self.target[rows].to(prediction.device)).square().mean((1, 2, 3))

    def save(self, path: Path) -> None:
        """Write the probe as one safetensors file, whole or not at all.

        Raises StorageError when it cannot be written.
        """
        metadata = {
            "format": _FORMAT,
            "digest": self.digest,
            "captions": json.dumps(self.captions, ensure_ascii=False),
            "groups": json.dumps(self.groups, ensure_ascii=False),
        }
        # safetensors refuses tensors that share memory, and the target of an epsilon model is its noise.
        tensors = {name: tensor.contiguous().clone() for name, tensor in self.tensors().items()}
        content = save(tensors, metadata=metadata)
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)


def load_probe(path: Path) -> Probe:
    """The probe saved at ``path``; DataError when it is missing, damaged or not a probe."""
    path = Path(path)
    remedy = "make it again with `prune-lab score`, or give the path of a probe.safetensors"
    if not path.is_file():
        raise DataError(f"asked to read the probe {path}, found no such file; {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(f"asked to read the probe {path}, found a damaged file ({error}); {remedy}") from None
    if metadata.get("format") != _FORMAT or not set(_TENSORS) <= set(tensors):
        raise DataError(f"asked to read the probe {path}, found another kind of safetensors file; {remedy}")
    probe = Probe(
        **{name: tensors[name] for name in _TENSORS},
        captions=tuple(json.loads(metadata["captions"])),
        groups=tuple(json.loads(metadata["groups"])),
        added={
            name.removeprefix("added."): value for name, value in tensors.items() if name.startswith("added.")
        },
    )
    if probe.digest != metadata["digest"]:
        raise DataError(f"asked to read the probe {path}, found tensors that were changed; {remedy}")
    return probe


# From pictures to rows ------------------------------------------------------------------------------------


def _finite(tensor: Tensor, what: str) -> Tensor:
    if not tensor.isfinite().all():
        raise DataError(f"asked for {what}, found values that are not finite; load the pipeline in float32")
    return tensor


def encode_pictures(pipeline: Any, pictures: Tensor, *, batch: int = 16) -> Tensor:
    """Scaled latents (N, C, h, w), float32 on the CPU, of ``pictures`` (N, 3, H, W) in uint8.

    The mode of the VAE's distribution, not a draw from it, so the same picture always gives the same latent.
    Raises DataError for pictures of another form, or latents that are not finite (an SDXL VAE in float16).
    """
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise DataError(
            f"asked to encode pictures, found {pictures.dtype} of shape {tuple(pictures.shape)}; "
            "give uint8 of shape (N, 3, height, width)"
        )
    vae = pipeline.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    latents = []
    with torch.no_grad():  # not inference_mode: a training loop may take gradients through these later
        for chunk in torch.split(pictures, batch):
            pixels = chunk.to(vae.device).to(vae.dtype) / 127.5 - 1
            mode = vae.encode(pixels).latent_dist.mode().float().cpu()
            latents.append((mode - shift) * vae.config.scaling_factor)
    return _finite(torch.cat(latents), "latents of pictures")


def encode_captions(
    pipeline: Any, captions: Sequence[str], *, batch: int = 32
) -> tuple[Tensor, dict[str, Tensor]]:
    """Text embeddings (N, L, D) and, for SDXL, ``{"text_embeds": (N, P)}``, float32 on the CPU."""
    pooled: list[Tensor] = []
    embeddings: list[Tensor] = []
    device = pipeline.text_encoder.device
    with torch.no_grad():
        for start in range(0, len(captions), batch):
            few = list(captions[start : start + batch])
            answer = pipeline.encode_prompt(
                few, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            embeddings.append(answer[0].float().cpu())
            if len(answer) == 4:  # SDXL: prompt, negative, pooled prompt, pooled negative
                pooled.append(answer[2].float().cpu())
    added = {"text_embeds": _finite(torch.cat(pooled), "pooled text embeddings")} if pooled else {}
    return _finite(torch.cat(embeddings), "text embeddings"), added


def noise_schedule(scheduler_config: Mapping[str, Any]) -> DDPMScheduler:
    """The training-time noise schedule (DDPM) behind any scheduler's config."""
    return DDPMScheduler.from_config(dict(scheduler_config))


def training_target(schedule: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the U-Net was trained to predict, (N, C, H, W): the noise, or the velocity of arXiv:2202.00512.

    Raises UnsupportedModelError for any other prediction type.
    """
    kind = schedule.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        velocity: Tensor = schedule.get_velocity(latents, noise, timesteps)
        return velocity
    raise UnsupportedModelError(
        f"the scheduler says the U-Net predicts {kind!r}; known are 'epsilon' and 'v_prediction'"
    )


def _spread_order(count: int) -> list[int]:
    """0..count-1 in an order whose every prefix is spread over the range (golden-ratio stride)."""
    golden = (math.sqrt(5) - 1) / 2
    strides = (stride for stride in range(1, count + 1) if math.gcd(stride, count) == 1)
    stride = min(strides, key=lambda stride: abs(stride - golden * count))
    return [index * stride % count for index in range(count)]


def _assign_timesteps(
    groups: Sequence[str], *, strata: int, per_picture: int, length: int, generator: torch.Generator
) -> Tensor:
    """(pictures, per_picture) timesteps: middles of equal strata of the schedule, used equally often (+-1).

    Pictures are taken group by group, so every group meets every part of the schedule as evenly as it can.
    """
    shuffled = torch.randperm(len(groups), generator=generator).tolist()
    order = sorted(shuffled, key=lambda picture: groups[picture])
    middles = [int((stratum + 0.5) * length / strata) for stratum in _spread_order(strata)]
    timesteps = torch.empty(len(groups), per_picture, dtype=torch.int64)
    for place, picture in enumerate(order):
        for repeat in range(per_picture):
            timesteps[picture, repeat] = middles[(place * per_picture + repeat) % strata]
    return timesteps


def _time_ids(height: int, width: int, rows: int) -> Tensor:
    """(rows, 6) SDXL's size conditioning, in pixels: original size, corner of the crop, target size."""
    return torch.tensor([[height, width, 0, 0, height, width]] * rows, dtype=torch.float32)


def make_probe(
    pipeline: Any,
    pictures: Tensor,
    captions: Sequence[str],
    groups: Sequence[str],
    *,
    timesteps: int,
    seed: int,
    per_picture: int = 1,
) -> Probe:
    """A probe of ``len(pictures) * per_picture`` rows on the schedule of ``pipeline``'s scheduler.

    ``pictures`` (N, 3, H, W) uint8 with a caption and a group each. The schedule is cut into ``timesteps``
    equal strata and every row sits in the middle of one. By default a picture is used at one timestep, which
    makes all rows independent; ``per_picture`` uses it at that many different ones. Raises DataError for
    lengths that do not agree, UnsupportedModelError for a U-Net that is fed more than latents.
    """
    latents = encode_pictures(pipeline, pictures) if len(pictures) else torch.empty(0)
    return probe_of_latents(
        pipeline,
        latents,
        captions,
        groups,
        timesteps=timesteps,
        seed=seed,
        per_picture=per_picture,
        size=(int(pictures.shape[-2]), int(pictures.shape[-1])),
    )


def probe_of_latents(
    pipeline: Any,
    latents: Tensor,
    captions: Sequence[str],
    groups: Sequence[str],
    *,
    timesteps: int,
    seed: int,
    per_picture: int = 1,
    size: tuple[int, int] | None = None,
    text: tuple[Tensor, Mapping[str, Tensor]] | None = None,
) -> Probe:
    """``make_probe`` of scaled latents (N, C, h, w), such as the model's own; ``size`` in pixels is told to SDXL.

    ``text`` holds embeddings (N, L, D) and added conditioning where they are known, and are not made of the captions.
    """
    if not len(latents) == len(captions) == len(groups) or not len(latents):
        raise DataError(
            f"asked for a probe of {len(latents)} pictures, found {len(captions)} captions and {len(groups)} groups; "
            "give every picture one of each"
        )
    schedule = noise_schedule(pipeline.scheduler.config)
    length = schedule.config.num_train_timesteps
    if not 1 <= per_picture <= timesteps <= length:
        raise DataError(
            f"asked for {timesteps} timesteps and {per_picture} of them per picture; the schedule has {length} steps; "
            "give 1 <= per_picture <= timesteps <= that"
        )
    if latents.shape[1] != pipeline.unet.config.in_channels:
        raise UnsupportedModelError(
            f"the U-Net takes {pipeline.unet.config.in_channels} channels, the VAE gives {latents.shape[1]}; "
            "text-to-image models take the latents alone"
        )
    embeddings, added = encode_captions(pipeline, captions) if text is None else (text[0], dict(text[1]))
    if added and text is None:
        height, width = size or tuple(_VAE_FACTOR * side for side in latents.shape[-2:])
        added["time_ids"] = _time_ids(height, width, len(latents))
    generator = seeded(seed)
    steps = _assign_timesteps(
        groups, strata=timesteps, per_picture=per_picture, length=length, generator=generator
    ).flatten()
    index = torch.arange(len(latents)).repeat_interleave(per_picture)
    latents = latents[index]
    noise = torch.randn(latents.shape, generator=generator)
    return Probe(
        noisy=schedule.add_noise(latents, noise, steps),
        noise=noise,
        timesteps=steps,
        embeddings=embeddings[index],
        captions=tuple(captions[picture] for picture in index.tolist()),
        groups=tuple(groups[picture] for picture in index.tolist()),
        target=training_target(schedule, latents, noise, steps),
        added={name: tensor[index] for name, tensor in added.items()},
        pictures=index,
    )


def random_probe(config: Mapping[str, Any], *, samples: int, seed: int, timesteps: int = 10) -> Probe:
    """A probe of normal noise for the U-Net of ``config``, where there is no VAE, text encoder or picture.

    Good for checks of machinery and speed; impacts measured on it say nothing about pictures.
    """
    shapes = example_inputs(config, batch=samples)
    generator = seeded(seed)
    latents = torch.randn(shapes["sample"].shape, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    schedule = noise_schedule(_SD_SCHEDULE)
    steps = _assign_timesteps(
        [""] * samples,
        strata=timesteps,
        per_picture=1,
        length=schedule.config.num_train_timesteps,
        generator=generator,
    ).flatten()
    added: dict[str, Tensor] = {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in shapes.get("added_cond_kwargs", {}).items()
    }
    if "time_ids" in added:
        height, width = (_VAE_FACTOR * side for side in latents.shape[-2:])
        added["time_ids"] = _time_ids(height, width, samples)
    return Probe(
        noisy=schedule.add_noise(latents, noise, steps),
        noise=noise,
        timesteps=steps,
        embeddings=torch.randn(shapes["encoder_hidden_states"].shape, generator=generator),
        captions=("",) * samples,
        groups=("random",) * samples,
        target=noise,
        added=added,
    )


# Asking a U-Net -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode; every submodule's own flag returns on exit."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def predict(unet: Any, probe: Probe, *, batch: int = 32) -> Tensor:
    """What ``unet`` predicts for every row, (N, C, H, W) float32 on the CPU, ``batch`` rows at a time."""
    predictions = torch.empty_like(probe.target)
    with evaluating(unet), torch.inference_mode():
        for rows, inputs in probe.batches(batch, unet.device, unet.dtype):
            predictions[rows] = unet(**inputs, return_dict=False)[0].float().cpu()
    return predictions
