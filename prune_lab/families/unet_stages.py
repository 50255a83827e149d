"""The stages that diffusers builds a U-Net of: what each is without attention, and which skips it gives and takes.

What diffusers calls a block is a stage here. A stage without its attention blocks is a stage of another class, and not
every class has one that computes the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from prune_lab.errors import UnsupportedModelError
from prune_lab.families.family import Stage

# By class, what the same stage is called without attention blocks. Samplers are convolutions where the name is plain
# and residual blocks where it says ``Resnet``; those of an ``Attn`` stage are as the config says.
DOWN: Mapping[str, str] = {
    "DownBlock2D": "DownBlock2D",
    "CrossAttnDownBlock2D": "DownBlock2D",
    "AttnDownBlock2D": "DownBlock2D",
    "ResnetDownsampleBlock2D": "ResnetDownsampleBlock2D",
    "SimpleCrossAttnDownBlock2D": "ResnetDownsampleBlock2D",
    "KDownBlock2D": "KDownBlock2D",
    "KCrossAttnDownBlock2D": "KDownBlock2D",
}
UP: Mapping[str, str] = {
    "UpBlock2D": "UpBlock2D",
    "CrossAttnUpBlock2D": "UpBlock2D",
    "AttnUpBlock2D": "UpBlock2D",
    "ResnetUpsampleBlock2D": "ResnetUpsampleBlock2D",
    "SimpleCrossAttnUpBlock2D": "ResnetUpsampleBlock2D",
    "KUpBlock2D": "KUpBlock2D",
    "KCrossAttnUpBlock2D": "KUpBlock2D",
}
MIDDLES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn")
SUPPORTED_STAGES = (*DOWN, *MIDDLES, *UP)
K_STAGES = tuple(name for name in SUPPORTED_STAGES if name.startswith("K"))
"""K-diffusion's stages, as in the latent upscaler: one skip from each to its opposite."""
TRANSFORMERS = ("CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D")
"""Stages whose attention blocks are transformers of one or more layers."""
_PREFIX = "UNetRes"  # of old configs; diffusers leaves it out

# Why a stage that diffusers builds is not read here.
_REFUSED = {
    "Skip": "hands the picture itself from stage to stage beside the hidden state",
    "EncoderBlock2D": "belongs to an autoencoder and hands on no skip connections",
    "DecoderBlock2D": "belongs to an autoencoder and takes no skip connections",
}


def stage_class(kind: str) -> str:
    """The class that diffusers builds for the stage type ``kind`` of a config."""
    return kind.removeprefix(_PREFIX)


def check_stage(stage: Stage, module: Any) -> None:
    """Raise UnsupportedModelError for a stage of a class that is not known here."""
    name = type(module).__name__
    if name in SUPPORTED_STAGES:
        return
    why = next((f", which {reason}" for part, reason in _REFUSED.items() if part in name), "")
    raise UnsupportedModelError(
        f"stage {stage.name} is a {name}{why}; stages known here: {', '.join(SUPPORTED_STAGES)}"
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Skips:
    """Which layers of a stage put their state on the stack of skips, and which read one, by their place."""

    given: bool = False  # after each layer
    taken: bool = False  # ahead of each layer
    once: bool = False  # of a K stage: given after the last layer, taken ahead of the first

    def gives(self, layer: int, layers: int) -> bool:
        """Whether the state behind ``layer`` of ``layers`` goes onto the stack."""
        return self.given and (not self.once or layer == layers - 1)

    def reads(self, layer: int) -> bool:
        """Whether ``layer`` reads the top of the stack."""
        return self.taken and (not self.once or layer == 0)


def skips_of(stage: Stage, module: Any, width: int) -> Skips:
    """The skips of a stage that gets ``width`` channels on the main path.

    The innermost K stage gives none, and the stage opposite takes none; no other K stage is without.
    """
    once = type(module).__name__ in K_STAGES
    given = stage.lane == "left" and (
        not once or module.downsamplers is not None or not getattr(module, "has_cross_attention", False)
    )
    taken = stage.lane == "right" and (not once or module.resnets[0].in_channels > width)
    return Skips(given, taken, once)
