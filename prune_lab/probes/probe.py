"""A probe: the fixed noisy latents, timesteps and text that every model is compared on.

One row is one question to a model: what noise is in this latent, at this timestep, given this caption? Rows
spread evenly over the noise schedule, because late and early steps fail differently, and each picture is used
equally often. The digest of the tensors names the probe wherever a number rests on it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from prune_lab.errors import DataError
from prune_lab.families import forward_inputs, prediction_of
from prune_lab.runs.tensor_files import read_entry, read_tensors
from prune_lab.runtime import atomic_write, device_of, full_float32, tensors_digest

_FORMAT = "prune_lab probe 1"
_TENSORS = ("noisy", "noise", "timesteps", "embeddings", "target", "pictures")


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """N rows of the input of a model with the answer each should give, float32 on the CPU."""

    noisy: Tensor  # (N, C, H, W) what the model sees
    noise: Tensor  # (N, C, H, W)
    timesteps: Tensor  # (N,) int64
    embeddings: Tensor  # (N, L, D) of the captions
    captions: tuple[str, ...]
    groups: tuple[str, ...]  # the kind of prompt each row belongs to, for a look at damage per kind
    target: Tensor  # (N, C, H, W) what the model was trained to predict: the noise, or the velocity
    # By name, what the model takes beside (`families.conditions_of`); of SDXL: text_embeds (N, P), time_ids (N, 6).
    added: Mapping[str, Tensor] = field(default_factory=dict)
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
            added={
                **self.added,
                **{name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in added.items()},
            },
        )

    def batches(self, size: int, model: Any) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Rows in order, at most ``size`` at a time: where they lie, and keyword arguments of ``model`` on its device.

        Raises DataError for a probe that was made for a model that takes other inputs.
        """
        device, dtype = device_of(model), model.dtype

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)

        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            yield (
                rows,
                forward_inputs(
                    model,
                    moved(self.noisy[rows]),
                    self.timesteps[rows].to(device),
                    moved(self.embeddings[rows]),
                    {name: moved(tensor[rows]) for name, tensor in self.added.items()},
                ),
            )

    def predicted(self, rows: slice, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """What ``model`` predicts for ``rows``, (n, C, H, W) in its number format, given ``inputs`` of ``batches``."""
        return prediction_of(model, model(**inputs, return_dict=False)[0], self.noisy[rows])

    def denoising_error(self, prediction: Tensor, rows: slice) -> Tensor:
        """(n,) mean squared error of ``prediction`` (n, C, H, W) for ``rows`` against their target, on its device."""
        return (prediction - self.target[rows].to(prediction.device)).square().flatten(1).mean(1)

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
    metadata, tensors = read_tensors(path, _FORMAT, "read the probe", remedy)
    if not set(_TENSORS) <= set(tensors):
        raise DataError(f"asked to read the probe {path}, found another kind of file; {remedy}")
    captions, groups = (
        read_entry(path, metadata, name, tuple[str, ...], "read the probe", remedy)
        for name in ("captions", "groups")
    )
    probe = Probe(
        **{name: tensors[name] for name in _TENSORS},
        captions=captions,
        groups=groups,
        added={
            name.removeprefix("added."): value for name, value in tensors.items() if name.startswith("added.")
        },
    )
    if probe.digest != metadata.get("digest"):
        raise DataError(f"asked to read the probe {path}, found tensors that were changed; {remedy}")
    return probe


# Asking a model --------------------------------------------------------------------------------------------


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


def predict(model: Any, probe: Probe, *, batch: int = 32) -> Tensor:
    """What ``model`` predicts for every row, (N, C, H, W) float32 on the CPU, ``batch`` rows at a time."""
    predictions = torch.empty_like(probe.target)
    with evaluating(model), torch.inference_mode(), full_float32():
        for rows, inputs in probe.batches(batch, model):
            predictions[rows] = probe.predicted(rows, model, inputs).float().cpu()
    return predictions
