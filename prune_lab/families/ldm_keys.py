"""Where each tensor of a diffusers pipeline lies in the CompVis/LDM layout, and back.

The layout numbers the blocks of a U-Net in order of execution: ``input_blocks.0`` is the first convolution, then each
layer and each down-sampler takes one number; ``output_blocks`` likewise, with an up-sampler in the number of its last
layer. What follows a residual block in the same number moves up when attention is missing. The map is made from the
structure that a config describes, so any depth of stages, missing attention, mid or inner stages come out right.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import transformers
from diffusers import AutoencoderKL
from torch import Tensor

from prune_lab.errors import UnsupportedModelError
from prune_lab.families import meta_model, plain_config

# How the tensor in the file comes from those of diffusers: as it is or stacked along the first axis where there are
# several, a linear weight as a convolution of 1 x 1, or transposed.
Form = Literal["same", "convolution", "transposed"]


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """One tensor of the LDM layout: its key, the diffusers keys that it holds, and how."""

    key: str
    sources: tuple[str, ...]
    form: Form = "same"

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Its shape, from the shapes of its sources."""
        first = shapes[0]
        if self.form == "convolution":
            return (*first, 1, 1)
        if self.form == "transposed":
            return first[::-1]
        return (sum(shape[0] for shape in shapes), *first[1:]) if len(shapes) > 1 else first

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor of the file, from those of its sources."""
        if self.form == "convolution":
            return tensors[0][:, :, None, None]
        if self.form == "transposed":
            return tensors[0].T.contiguous()
        return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]

    def parted(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the sources, from the one of the file; equal parts where there are several."""
        if self.form == "convolution":
            return (tensor[:, :, 0, 0],)
        if self.form == "transposed":
            return (tensor.T.contiguous(),)
        return tensor.chunk(len(self.sources)) if len(self.sources) > 1 else (tensor,)


def diffusers_to_ldm(places: Iterable[Place], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file by their keys, from those of diffusers."""
    return {place.key: place.joined([tensors[source] for source in place.sources]) for place in places}


def ldm_to_diffusers(places: Iterable[Place], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of diffusers by their keys, from those of the file; what else is in the file is left out."""
    return {
        source: part
        for place in places
        for source, part in zip(place.sources, place.parted(tensors[place.key]), strict=True)
    }


# Counting what is there --------------------------------------------------------------------------------------------


def _paths(keys: Iterable[str]) -> set[str]:
    """Every module on the way to one of ``keys``."""
    return {key[: match.start()] for key in keys for match in re.finditer(r"\.", key)}


def _entries(paths: set[str], path: str) -> list[str]:
    """The modules ``path.0``, ``path.1``, ... as far as they are there."""
    named = (f"{path}.{index}" for index in itertools.count())
    return list(itertools.takewhile(paths.__contains__, named))


def _renamed(key: str, modules: Mapping[str, str], leaf_of: Callable[[str, str], str | None]) -> str:
    """``key`` with its module renamed by ``modules`` and the rest by ``leaf_of(module, rest)``."""
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module, rest = ".".join(parts[:length]), ".".join(parts[length:])
        if module in modules:
            leaf = leaf_of(module, rest)
            if leaf is not None:
                return f"{modules[module]}.{leaf}"
            break
    raise UnsupportedModelError(
        f"asked for the place of {key} in the LDM layout, which has none for it; models like Stable Diffusion 1, 2 and "
        "XL fit: keep this one as a diffusers folder"
    )


# U-Net -------------------------------------------------------------------------------------------------------------

_UNET_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",  # a table with a row for each class
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Inside a spatial transformer both layouts use the same names.
_UNET_ATTENTION = re.compile(
    r"(norm|proj_in|proj_out|transformer_blocks\.\d+\.(norm[123]|(attn[12]|ff)\..+))\.\w+"
)


def _unet_modules(paths: set[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The LDM module of each diffusers module, and the attention blocks of no layers, which have no place."""
    modules, empty = dict(_UNET_OUTSIDE), []

    def place_attention(attention: str, block: str) -> bool:
        if f"{attention}.proj_out" in paths and f"{attention}.transformer_blocks" not in paths:
            empty.append(attention)
        elif attention in paths:
            modules[attention] = f"{block}.1"
        return attention in modules

    number = 1
    for stage in _entries(paths, "down_blocks"):
        for layer, resnet in enumerate(_entries(paths, f"{stage}.resnets")):
            modules[resnet] = f"input_blocks.{number}.0"
            place_attention(f"{stage}.attentions.{layer}", f"input_blocks.{number}")
            number += 1
        if f"{stage}.downsamplers.0" in paths:
            modules[f"{stage}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    for layer, resnet in enumerate(_entries(paths, "mid_block.resnets")):
        modules[resnet] = f"middle_block.{2 * layer}"
    for layer, attention in enumerate(_entries(paths, "mid_block.attentions")):
        modules[attention] = f"middle_block.{2 * layer + 1}"
    number = 0
    for stage in _entries(paths, "up_blocks"):
        attends = False
        for layer, resnet in enumerate(_entries(paths, f"{stage}.resnets")):
            modules[resnet] = f"output_blocks.{number}.0"
            attends = place_attention(f"{stage}.attentions.{layer}", f"output_blocks.{number}")
            number += 1
        if f"{stage}.upsamplers.0" in paths:
            modules[f"{stage}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{1 + attends}.conv"
    return modules, tuple(empty)


def _unet_leaf(module: str, rest: str) -> str | None:
    if ".resnets." in module:
        layer, _, kind = rest.rpartition(".")
        return f"{_UNET_RESNET[layer]}.{kind}" if layer in _UNET_RESNET else None
    if ".attentions." in module:
        return rest if _UNET_ATTENTION.fullmatch(rest) else None
    return rest if rest in ("weight", "bias") else None


def empty_attentions(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Attention blocks of ``config`` with no transformer layer, outside of the mid stage; the layout leaves them out.

    That is right where they are the identity, which is for their weights to show: ``proj_out`` is zero.
    """
    return _unet_modules(_paths(meta_model(config).state_dict()))[1]


def with_middle(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config`` with a whole mid stage, which every reader of the layout knows; as it is where it has one.

    A mid stage of zeros is the identity: what each of its blocks adds to its input ends in a layer that gives zero.
    """
    return {**plain_config(config), "mid_block_type": "UNetMidBlock2DCrossAttn"}


def unet_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the U-Net of ``config`` by its key in diffusers."""
    return {key: tuple(tensor.shape) for key, tensor in meta_model(config).state_dict().items()}


def unet_places(config: Mapping[str, Any]) -> tuple[Place, ...]:
    """Where the tensors of the U-Net of ``config`` lie, without the prefix of a whole model.

    Raises UnsupportedModelError naming a tensor that has no place in the layout.
    """
    keys = list(meta_model(config).state_dict())
    modules, empty = _unet_modules(_paths(keys))
    left_out = tuple(f"{attention}." for attention in empty)
    return tuple(
        Place(_renamed(key, modules, _unet_leaf), (key,)) for key in keys if not key.startswith(left_out)
    )


# VAE ---------------------------------------------------------------------------------------------------------------

_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _vae_modules(paths: set[str]) -> dict[str, str]:
    modules = {name: name for name in ("quant_conv", "post_quant_conv")}
    for side in ("encoder", "decoder"):
        modules |= {f"{side}.{conv}": f"{side}.{conv}" for conv in ("conv_in", "conv_out")}
        modules[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for layer, resnet in enumerate(_entries(paths, f"{side}.mid_block.resnets")):
            modules[resnet] = f"{side}.mid.block_{layer + 1}"
        for layer, attention in enumerate(_entries(paths, f"{side}.mid_block.attentions")):
            modules[attention] = f"{side}.mid.attn_{layer + 1}"
    for level, stage in enumerate(_entries(paths, "encoder.down_blocks")):
        for layer, resnet in enumerate(_entries(paths, f"{stage}.resnets")):
            modules[resnet] = f"encoder.down.{level}.block.{layer}"
        modules[f"{stage}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
    # The layout counts the levels of the decoder by resolution: its first stage is the last level.
    for level, stage in enumerate(reversed(_entries(paths, "decoder.up_blocks"))):
        for layer, resnet in enumerate(_entries(paths, f"{stage}.resnets")):
            modules[resnet] = f"decoder.up.{level}.block.{layer}"
        modules[f"{stage}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
    return modules


def _vae_leaf(module: str, rest: str) -> str | None:
    layer, _, kind = rest.rpartition(".")
    if ".attentions." in module:
        return f"{_VAE_ATTENTION[layer]}.{kind}" if layer in _VAE_ATTENTION else None
    return rest.replace("conv_shortcut", "nin_shortcut")


def vae_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the ``AutoencoderKL`` of ``config`` by its key in diffusers."""
    with torch.device("meta"):
        model = AutoencoderKL.from_config(plain_config(config))
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def vae_places(config: Mapping[str, Any]) -> tuple[Place, ...]:
    """Where the tensors of the ``AutoencoderKL`` of ``config`` lie, without the prefix of a whole model."""
    tensors = vae_shapes(config)
    modules = _vae_modules(_paths(tensors))
    return tuple(
        Place(
            _renamed(key, modules, _vae_leaf),
            (key,),
            # attention over pixels is linear in diffusers, a convolution of 1 x 1 in the layout
            "convolution" if ".attentions." in key and len(shape) == 2 else "same",
        )
        for key, shape in tensors.items()
    )


# Text encoders -----------------------------------------------------------------------------------------------------

_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def clip_places(keys: Iterable[str]) -> tuple[Place, ...]:
    """Where the tensors ``keys`` of a text encoder lie as in OpenAI's CLIP, which Stable Diffusion 1 uses.

    ``keys`` are those of ``CLIPTextModel`` without ``text_model.`` before them.
    """
    return tuple(Place(f"transformer.text_model.{key}", (key,)) for key in keys)


def open_clip_places(keys: Iterable[str]) -> tuple[Place, ...]:
    """Where the tensors ``keys`` of a text encoder lie as in OpenCLIP, which Stable Diffusion 2 and XL use.

    Query, key and value of a layer are one tensor there. ``keys`` as for ``clip_places``.
    """
    places = []
    for key in keys:
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        if key in _OPEN_CLIP:
            places.append(Place(f"model.{_OPEN_CLIP[key]}", (key,)))
        elif key == "text_projection.weight":
            places.append(Place("model.text_projection", (key,), "transposed"))
        elif layer and layer[2] in _OPEN_CLIP_LAYER:
            name = f"model.transformer.resblocks.{layer[1]}.{_OPEN_CLIP_LAYER[layer[2]]}.{layer[3]}"
            places.append(Place(name, (key,)))
        elif layer and layer[2] == "self_attn.q_proj":
            fused = tuple(key.replace("q_proj", f"{part}_proj") for part in "qkv")
            places.append(Place(f"model.transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}", fused))
        elif not layer or layer[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            raise UnsupportedModelError(
                f"asked for the place of {key} in the LDM layout of a text encoder, which has none for it; "
                "CLIP text encoders fit: keep this model as a diffusers folder"
            )
    return tuple(places)


TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")


def text_shapes(config: Mapping[str, Any], class_name: str) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of the text encoder of that class and ``config``, without ``text_model.`` in its key."""
    with torch.device("meta"):
        model = getattr(transformers, class_name)(transformers.CLIPTextConfig(**plain_config(config)))
    return {
        key.removeprefix("text_model."): tuple(tensor.shape) for key, tensor in model.state_dict().items()
    }


def text_places(config: Mapping[str, Any], class_name: str) -> tuple[Place, ...]:
    """Where these tensors lie, without the prefix of the text encoder in a whole model."""
    # OpenAI's CLIP has the fast GELU, OpenCLIP the exact one: the readers build either by the layout of its names
    places = clip_places if config.get("hidden_act", "quick_gelu") == "quick_gelu" else open_clip_places
    return places(text_shapes(config, class_name))


def text_prefixes(index: Mapping[str, Any]) -> dict[str, str]:
    """The prefix of each text encoder that the pipeline with this ``index`` has."""
    present = [
        part for part in ("text_encoder", "text_encoder_2") if (index.get(part) or [None])[0] is not None
    ]
    if "text_encoder_2" not in present:
        return dict.fromkeys(present, "cond_stage_model.")
    return {part: f"conditioner.embedders.{place}." for place, part in enumerate(present)}
