"""Which weights are stored in one byte, what that changes, and the folder that ships."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel
from safetensors.torch import save_file
from torch import nn

from prune_lab.assets import reference_folder
from prune_lab.assets.assembling import PACKED
from prune_lab.assets.packing import packed, unpacked
from prune_lab.models.silence import quiet
from prune_lab.runtime import atomic_folder, read_json, write_json

CARD = Path(__file__).with_name("card.md")


def packed_names(transformer: PixArtTransformer2DModel) -> tuple[str, ...]:
    """Names of the weights that are stored in one byte a number: those of all linear layers."""
    modules = transformer.named_modules()
    return tuple(f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear))


def as_shipped(transformer: PixArtTransformer2DModel) -> PixArtTransformer2DModel:
    """A float32 copy with the weights as they are after storing and reading."""
    found = copy.deepcopy(transformer)
    found.load_state_dict(unpacked(packed(found.state_dict(), packed_names(found))))
    return found.eval()


def as_float8(transformer: PixArtTransformer2DModel) -> PixArtTransformer2DModel:
    """The same by the other way to store them in a byte, floats of 4 bits of exponent and 3 of mantissa, unscaled."""
    found, names = copy.deepcopy(transformer), set(packed_names(transformer))
    kinds = {name: torch.float8_e4m3fn if name in names else torch.float16 for name in found.state_dict()}
    found.load_state_dict({name: value.to(kinds[name]).float() for name, value in found.state_dict().items()})
    return found.eval()


def export_transformer(folder: Path, transformer: PixArtTransformer2DModel) -> None:
    """Write `folder`, replacing what is there: the pipeline without the parts that lie in the reference pipeline."""
    with quiet():  # it expects T5 and says so
        shared = PixArtAlphaPipeline.from_pretrained(
            reference_folder(), transformer=transformer, local_files_only=True
        )
    with atomic_folder(folder, force=True) as temporary:
        shared.save_config(temporary)
        transformer.save_config(temporary / "transformer")
        for path in (temporary / "model_index.json", temporary / "transformer" / "config.json"):
            config = read_json(path)
            assert isinstance(config, dict)
            # Where a part was loaded from is a folder of the machine that built it and means nothing elsewhere.
            config.pop("_name_or_path", None)
            write_json(path, config)
        tensors = packed(transformer.state_dict(), packed_names(transformer))
        save_file(tensors, temporary / "transformer" / PACKED)
        shutil.copyfile(CARD, temporary / "README.md")
