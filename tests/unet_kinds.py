"""Small U-Nets of every kind that is read, drawn at random, and what they answer without some of their blocks.

Nothing of the package computes here: names are turned into module paths, and blocks are taken out by patching their
``forward``, so that what is tested is compared with something else.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

PARTS = {"Dn": "down_blocks", "Up": "up_blocks", "R": "resnets", "A": "attentions", "T": "transformer_blocks"}

Config = dict[str, Any]


def _base(chance: random.Random, stages: int) -> Config:
    widths = sorted(chance.choice((8, 8, 16, 32)) for _ in range(stages))
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 2 ** (stages - 1) * 2,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": widths,
        "layers_per_block": chance.choice((1, 2, 2, 3)),
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "attention_head_dim": chance.choice((2, 4)),
    }


def _types(chance: random.Random, stages: int, pairs: Collection[tuple[str, str]]) -> Config:
    """A pair of types for each level of resolution, mostly the same on both sides."""
    downs, ups = [], []
    for _ in range(stages):
        down, up = chance.choice(list(pairs))
        downs.append(down)
        ups.append(up if chance.random() < 0.7 else chance.choice(list(pairs))[1])
    return {"down_block_types": downs, "up_block_types": ups[::-1]}


_PLAIN = ("DownBlock2D", "UpBlock2D")
_CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
_ATTN = ("AttnDownBlock2D", "AttnUpBlock2D")
_RESNET = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
_SIMPLE = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")


def sd1(chance: random.Random) -> Config:
    """As Stable Diffusion 1: four stages, three with one transformer layer for each residual block."""
    return _base(chance, 4) | {
        "layers_per_block": 2,
        "down_block_types": [*[_CROSS[0]] * 3, _PLAIN[0]],
        "up_block_types": [_PLAIN[1], *[_CROSS[1]] * 3],
        "block_out_channels": [8, 16, 32, 32],
    }


def sd2(chance: random.Random) -> Config:
    """As Stable Diffusion 2: linear projections, heads of one width."""
    return sd1(chance) | {"use_linear_projection": True, "attention_head_dim": [1, 2, 4, 4]}


def xl(chance: random.Random) -> Config:
    """As Stable Diffusion XL: three stages, several transformer layers in a block, sizes of pictures as a condition."""
    return _base(chance, 3) | {
        "layers_per_block": 2,
        "block_out_channels": [8, 16, 32],
        "down_block_types": [_PLAIN[0], *[_CROSS[0]] * 2],
        "up_block_types": [*[_CROSS[1]] * 2, _PLAIN[1]],
        "transformer_layers_per_block": [1, 2, chance.choice((3, 4))],
        "attention_head_dim": [1, 2, 4],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 40,
    }


def nested(chance: random.Random) -> Config:
    """Three to six stages of their own depths, each attention block with layers of its own."""
    stages = chance.randint(3, 6)
    config = _base(chance, stages) | _types(chance, stages, [_PLAIN, _CROSS, _CROSS])
    layers = [chance.randint(1, 2) for _ in range(stages)]
    depths = [[[chance.randint(0, 3) for _ in range(n + more)] for n in layers] for more in (0, 1)]
    return config | {
        "layers_per_block": layers,
        "mid_block_type": chance.choice(("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)),
        "transformer_layers_per_block": depths[0],
        "reverse_transformer_layers_per_block": depths[1][::-1],
    }


def simple(chance: random.Random) -> Config:
    """As DeepFloyd and Kandinsky: samplers of residual blocks, attention to picture and text in one."""
    stages = chance.randint(3, 4)
    heads = chance.choice((4, chance.sample((1, 2, 4, 8), stages)))
    config = (
        _base(chance, stages)
        | _types(chance, stages, [_RESNET, _SIMPLE, _SIMPLE])
        | {
            "mid_block_type": chance.choice(("UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D", None)),
            "attention_head_dim": heads,
            "resnet_time_scale_shift": chance.choice(("default", "scale_shift")),
            "resnet_skip_time_act": chance.choice((True, False)),
            "resnet_out_scale_factor": chance.choice((1.0, 1.5)),
            "only_cross_attention": chance.choice((True, False)),
        }
    )
    conditions: list[Config] = [
        {},
        {"encoder_hid_dim": 6, "addition_embed_type": "text", "addition_embed_type_num_heads": 2},
        {"encoder_hid_dim": 6, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"},
        {"class_embed_type": "timestep"},
        {"class_embed_type": "identity"},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 5},
    ]
    return config | chance.choice(conditions)


def attention_only(chance: random.Random) -> Config:
    """Stages that attend to themselves alone, among others that read the text; a text width for each stage."""
    stages = chance.randint(3, 4)
    config = _base(chance, stages) | _types(chance, stages, [_PLAIN, _ATTN, _CROSS])
    heads: Any = chance.choice((4, chance.sample((1, 2, 4, 8), stages)))
    return config | {
        "attention_head_dim": heads,
        "cross_attention_dim": [12] * stages,
        "num_class_embeds": chance.choice((None, 7)),
    }


def without_text(chance: random.Random) -> Config:
    """As AudioLDM: the text is a class, and every stage attends to itself with its own width."""
    config = _base(chance, 3) | _types(chance, 3, [_CROSS])
    return config | {
        "block_out_channels": [8, 16, 32],
        "cross_attention_dim": [8, 16, 32],
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 6,
        "class_embeddings_concat": True,
    }


def upscaler(chance: random.Random) -> Config:
    """As the latent upscaler: K-diffusion's stages, one skip from each to its opposite."""
    return _base(chance, 4) | {
        "block_out_channels": [32, 32, 64, 64],
        "layers_per_block": chance.choice((2, 3)),
        "down_block_types": ["KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3],
        "up_block_types": [*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"],
        "mid_block_type": None,
        "norm_num_groups": None,
        "attention_head_dim": 16,
        "time_embedding_type": "fourier",
        "time_embedding_dim": 64,
        "act_fn": "gelu",
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
        "timestep_post_act": "gelu",
    }


def unet2d(chance: random.Random) -> Config:
    """A U-Net without a text, of pixels, of one class of 5 or of none."""
    stages = chance.randint(2, 4)
    widths = sorted(chance.choice((8, 16)) for _ in range(stages))
    return _types(chance, stages, [_PLAIN, _ATTN, _RESNET]) | {
        "_class_name": "UNet2DModel",
        "sample_size": 2 ** (stages - 1) * 2,
        "block_out_channels": widths,
        "layers_per_block": chance.choice((1, 2, 2, 3)),
        "norm_num_groups": 4,
        "attention_head_dim": chance.choice((4, None)),
        "mid_block_type": chance.choice(("UNetMidBlock2D", "UNetMidBlock2D", None)),
        "add_attention": chance.choice((True, False)),
        "downsample_type": chance.choice(("conv", "resnet")),
        "upsample_type": chance.choice(("conv", "resnet")),
        "num_class_embeds": chance.choice((None, 5)),
        "resnet_time_scale_shift": chance.choice(("default", "scale_shift")),
    }


KINDS: Mapping[str, Callable[[random.Random], Config]] = {
    one.__name__: one
    for one in (sd1, sd2, xl, nested, simple, attention_only, without_text, upscaler, unet2d)
}


def built(config: Config, seed: int = 0) -> Any:
    """The model of ``config`` as diffusers builds it, with random weights, also where they start as zeros."""
    torch.manual_seed(seed)
    model = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


# Without some blocks, by hand ----------------------------------------------------------------------------------------


def path_of(name: str) -> str:
    """Module path of the block or layer called ``name``: ``up_blocks.0.attentions.1`` of ``Up1.A2``."""
    stage, *inner = name.split(".")
    parts = ["mid_block"] if stage == "Md" else [PARTS[stage[:2]], str(int(stage[2:]) - 1)]
    for part in inner:
        parts += [PARTS[part[0]], str(int(part[1:]) - 1)]
    return ".".join(parts)


def _empty_levels(model: nn.Module, removed: Collection[str]) -> list[str]:
    """Paths of the samplers between which no block is left."""
    depth = len(model.down_blocks)
    gone = {path_of(name) for name in removed}
    found = []
    for level in range(1, depth):
        inside = [f"down_blocks.{i}" for i in range(level, depth)]
        inside += [f"up_blocks.{i}" for i in range(depth - level)]
        inside += ["mid_block"] if model.mid_block is not None else []
        left = [
            f"{stage}.{part}.{i}"
            for stage in inside
            for part in ("resnets", "attentions")
            for i, block in enumerate(getattr(model.get_submodule(stage), part, None) or [])
            if block is not None and f"{stage}.{part}.{i}" not in gone
        ]
        if not left:
            found += [
                f"down_blocks.{level - 1}.downsamplers.0",
                f"up_blocks.{depth - level - 1}.upsamplers.0",
            ]
    return found


def _layout(state: Tensor) -> torch.memory_format:
    """In which order the numbers of a state lie in memory; kernels round differently for each."""
    last = state.is_contiguous(memory_format=torch.channels_last) and not state.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@contextlib.contextmanager
def without(model: Any, removed: Collection[str]) -> Iterator[Any]:
    """The model while the blocks ``removed`` hand on what they get, of a concatenation the main path alone.

    It lies in memory as before it was concatenated: in a model that has never had the block nothing is.
    """
    paths = [*(path_of(name) for name in removed), *_empty_levels(model, removed)]
    found = [torch.contiguous_format]

    def seen(_module: nn.Module, _args: Any, output: Any) -> None:
        found[0] = _layout(output if isinstance(output, Tensor) else output[0])

    with contextlib.ExitStack() as stack:
        parts = [model.conv_in]
        for stage in (*model.down_blocks, model.mid_block, *model.up_blocks):
            for name in ("resnets", "attentions", "downsamplers", "upsamplers"):
                parts += [part for part in getattr(stage, name, None) or [] if part is not None]
        for part in parts:
            stack.callback(part.register_forward_hook(seen).remove)
        for path in paths:
            module = model.get_submodule(path)
            tuples = type(module).__name__ == "Transformer2DModel"
            out = module.conv2.out_channels if hasattr(module, "conv2") else None

            def handed(
                hidden: Tensor, *_: Any, _out: int | None = out, _tuples: bool = tuples, **__: Any
            ) -> Any:
                whole = _out is None or hidden.shape[1] == _out
                main = hidden if whole else hidden[:, :_out].contiguous(memory_format=found[0])
                return (main,) if _tuples else main

            module.forward = handed
            stack.callback(module.__dict__.pop, "forward")
        yield model
