"""Classes of models that diffusers has and no family here describes, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping

_VIDEO = "mixes the frames of a film between its blocks"
_BRANCH = (
    "is a branch beside a U-Net and predicts nothing by itself (`prune-lab convert` fits it to a pruned one)"
)

REFUSED: Mapping[str, str] = {
    "UNet3DConditionModel": _VIDEO,
    "UNetMotionModel": _VIDEO,
    "UNetSpatioTemporalConditionModel": _VIDEO,
    "I2VGenXLUNet": _VIDEO,
    "MotionAdapter": "is a part of a U-Net for films",
    "ControlNetModel": _BRANCH,
    "ControlNetUnionModel": _BRANCH,
    "ControlNetXSAdapter": _BRANCH,
    "MultiControlNetModel": _BRANCH,
    "UNetControlNetXSModel": "is a U-Net grown together with a ControlNet",
    "T2IAdapter": _BRANCH,
    "AudioLDM2UNet2DConditionModel": "reads two texts at a time",
    "Kandinsky3UNet": "pools its text inside its stages",
    "StableCascadeUNet": "has stages of blocks of its own",
    "UNet1DModel": "works on signals of one dimension",
    "UVit2DModel": "predicts tokens of pictures and no noise",
}
"""By name of the diffusers class; the reason follows the word *which*."""
