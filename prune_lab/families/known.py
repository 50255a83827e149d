"""The families, by the class of model that each knows."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from prune_lab.errors import UnsupportedModelError
from prune_lab.families.family import CLASS_NAME, Family
from prune_lab.families.image_transformers import IMAGE_TRANSFORMERS
from prune_lab.families.joint_transformers import JOINT_TRANSFORMERS
from prune_lab.families.own_code import base_name, file_of, is_own, own_family
from prune_lab.families.refused import REFUSED
from prune_lab.families.skipping_transformers import SKIPPING_TRANSFORMERS
from prune_lab.families.unet2d import UNET2D
from prune_lab.families.unet2d_condition import UNET2D_CONDITION
from prune_lab.families.video_transformers import VIDEO_TRANSFORMERS

FAMILIES: Mapping[str, Family] = {
    "UNet2DConditionModel": UNET2D_CONDITION,
    "UNet2DModel": UNET2D,
    **IMAGE_TRANSFORMERS,
    **JOINT_TRANSFORMERS,
    **VIDEO_TRANSFORMERS,
    **SKIPPING_TRANSFORMERS,
}
"""By name of the diffusers class."""


def supported_classes() -> str:
    """The names of the classes that have a family, in one short text."""
    nets = [name for name in FAMILIES if name.startswith("UNet")]
    rest = [re.sub("(Transformer)?[23]DModel$", "", name) for name in FAMILIES if name not in nets]
    return f"{', '.join(nets)} and the transformers {', '.join(rest)}"


@functools.cache
def _own_family(class_name: str, file: str) -> Family:
    return own_family(FAMILIES[base_name(class_name)], file)


def family_of(source: nn.Module | Mapping[str, Any]) -> Family:
    """The family of a model, or of the model that a diffusers config describes.

    Raises UnsupportedModelError when its class has none, or a config does not name its class.
    """
    name = source.get(CLASS_NAME) if isinstance(source, Mapping) else type(source).__name__
    if is_own(name) and base_name(str(name)) in FAMILIES:
        file = file_of(source) if isinstance(source, Mapping) else type(source).__module__
        return _own_family(str(name), file.rpartition(".")[2])
    if not isinstance(name, str) or name not in FAMILIES:
        found = f"a model of class {name}" if name else f"a config without {CLASS_NAME}"
        why = f", which {REFUSED[name]}" if isinstance(name, str) and name in REFUSED else ""
        raise UnsupportedModelError(
            f"asked for the blocks of a model, found {found}{why}; supported is {supported_classes()}"
        )
    return FAMILIES[name]
