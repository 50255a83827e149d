"""Classes of models that diffusers has and no family here describes, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping

_VIDEO = "mixes the frames of a film between its blocks"
_BRANCH = (
    "is a branch beside a U-Net and predicts nothing by itself (`prune-lab convert` fits it to a pruned one)"
)
_SOUND = "makes sound and no pictures"
_PIECES = "draws a film piece by piece, each from those before it"
_PLACED = "puts other blocks between its blocks by their numbers"
_ALL_IN_ONE = "reads words and pictures in one sequence that its pipeline makes"
_EXPERTS = "chooses experts while it runs, so that its shapes do not tell its multiply-adds"

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
    "AceStepTransformer1DModel": _SOUND,
    "LongCatAudioDiTTransformer": _SOUND,
    "StableAudioDiTModel": _SOUND,
    "StableAudio3DiTModel": _SOUND,
    "MiniMaxMusic3Transformer1DModel": _SOUND,
    "MiniMaxMusic3RVQDepthDecoder": _SOUND,
    "T5FilmDecoder": _SOUND,
    "AnyFlowFARTransformer3DModel": _PIECES,
    "HeliosTransformer3DModel": _PIECES,
    "HunyuanVideoFramepackTransformer3DModel": _PIECES,
    "BriaFibo2Transformer2DModel": _PLACED,
    "WanAnimateTransformer3DModel": _PLACED,
    "WanVACETransformer3DModel": _PLACED,
    "ConsisIDTransformer3DModel": _PLACED,
    "SanaWMTransformer3DModel": _PLACED,
    "Cosmos3OmniTransformer": _ALL_IN_ONE,
    "OmniGenTransformer2DModel": _ALL_IN_ONE,
    "HiDreamImageTransformer2DModel": f"gives every block a layer of its text encoder by its number, and {_EXPERTS}",
    "NucleusMoEImageTransformer2DModel": _EXPERTS,
    "EasyAnimateTransformer3DModel": "rounds its sizes while it runs, so that its multiply-adds cannot be traced",
    "RFD4ProteinaTransformer": "makes molecules and no pictures",
    "Transformer2DModel": "is one block of attention of a U-Net",
    "TransformerTemporalModel": "is one block of attention of a U-Net for films",
    "PriorTransformer": "makes the embedding of a picture and no picture",
}
"""By name of the diffusers class; the reason follows the word *which*."""
