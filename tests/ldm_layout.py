"""Names and shapes of the tensors of a U-Net in the CompVis/LDM layout, by the public constructor's rule.

A plain loop over ``channel_mult``, ``num_res_blocks`` and ``attention_resolutions``, as ``UNetModel`` counts.
It knows nothing of diffusers and nothing of ``prune_lab``; the golden lists are made by it:

    python tests/ldm_layout.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

Shapes = dict[str, tuple[int, ...]]
GOLDEN = Path(__file__).resolve().parent / "golden"


def _with_bias(shapes: Shapes, name: str, *weight: int) -> None:
    shapes[f"{name}.weight"] = weight
    shapes[f"{name}.bias"] = weight[:1]


def _resblock(shapes: Shapes, name: str, channels: int, out: int, embedding: int) -> None:
    _with_bias(shapes, f"{name}.in_layers.0", channels)
    _with_bias(shapes, f"{name}.in_layers.2", out, channels, 3, 3)
    _with_bias(shapes, f"{name}.emb_layers.1", out, embedding)
    _with_bias(shapes, f"{name}.out_layers.0", out)
    _with_bias(shapes, f"{name}.out_layers.3", out, out, 3, 3)
    if channels != out:
        _with_bias(shapes, f"{name}.skip_connection", out, channels, 1, 1)


def _spatial_transformer(
    shapes: Shapes, name: str, channels: int, context: int, depth: int, linear: bool
) -> None:
    projection = (channels, channels) if linear else (channels, channels, 1, 1)
    _with_bias(shapes, f"{name}.norm", channels)
    _with_bias(shapes, f"{name}.proj_in", *projection)
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        for attention, width in (("attn1", channels), ("attn2", context)):
            shapes[f"{block}.{attention}.to_q.weight"] = (channels, channels)
            shapes[f"{block}.{attention}.to_k.weight"] = (channels, width)
            shapes[f"{block}.{attention}.to_v.weight"] = (channels, width)
            _with_bias(shapes, f"{block}.{attention}.to_out.0", channels, channels)
        _with_bias(shapes, f"{block}.ff.net.0.proj", 8 * channels, channels)  # GEGLU: two halves of 4
        _with_bias(shapes, f"{block}.ff.net.2", channels, 4 * channels)
        for i_norm in (1, 2, 3):
            _with_bias(shapes, f"{block}.norm{i_norm}", channels)
    _with_bias(shapes, f"{name}.proj_out", *projection)


def ldm_unet_shapes(
    *,
    num_res_blocks: Sequence[int],
    channel_mult: Sequence[int],
    attention_resolutions: Sequence[int],
    context_dim: int,
    model_channels: int = 320,
    in_channels: int = 4,
    out_channels: int = 4,
    transformer_depth: int = 1,
    use_linear: bool = False,
) -> Shapes:
    """Shape of each tensor by its name, without the ``model.diffusion_model.`` that a whole model has before it."""
    shapes: Shapes = {}
    embedding = 4 * model_channels
    _with_bias(shapes, "time_embed.0", embedding, model_channels)
    _with_bias(shapes, "time_embed.2", embedding, embedding)
    _with_bias(shapes, "input_blocks.0.0", model_channels, in_channels, 3, 3)
    skips, channels, resolution, index = [model_channels], model_channels, 1, 1
    for level, mult in enumerate(channel_mult):
        for _ in range(num_res_blocks[level]):
            _resblock(shapes, f"input_blocks.{index}.0", channels, mult * model_channels, embedding)
            channels = mult * model_channels
            if resolution in attention_resolutions:
                _spatial_transformer(
                    shapes, f"input_blocks.{index}.1", channels, context_dim, transformer_depth, use_linear
                )
            skips.append(channels)
            index += 1
        if level != len(channel_mult) - 1:
            _with_bias(shapes, f"input_blocks.{index}.0.op", channels, channels, 3, 3)
            skips.append(channels)
            index += 1
            resolution *= 2
    _resblock(shapes, "middle_block.0", channels, channels, embedding)
    _spatial_transformer(shapes, "middle_block.1", channels, context_dim, transformer_depth, use_linear)
    _resblock(shapes, "middle_block.2", channels, channels, embedding)
    index = 0
    for level, mult in reversed(list(enumerate(channel_mult))):
        for i in range(num_res_blocks[level] + 1):
            out = mult * model_channels
            _resblock(shapes, f"output_blocks.{index}.0", channels + skips.pop(), out, embedding)
            channels, place = out, 1
            if resolution in attention_resolutions:
                _spatial_transformer(
                    shapes, f"output_blocks.{index}.1", channels, context_dim, transformer_depth, use_linear
                )
                place = 2
            if level and i == num_res_blocks[level]:
                _with_bias(shapes, f"output_blocks.{index}.{place}.conv", channels, channels, 3, 3)
                resolution //= 2
            index += 1
    _with_bias(shapes, "out.0", model_channels)
    _with_bias(shapes, "out.2", out_channels, model_channels, 3, 3)
    return shapes


def golden_shapes(num_res_blocks: int) -> Shapes:
    """The U-Net of Stable Diffusion 1 with that many residual blocks a level: 2 in the original, 1 in BK-SDM-Base."""
    return ldm_unet_shapes(
        num_res_blocks=[num_res_blocks] * 4,
        channel_mult=(1, 2, 4, 4),
        attention_resolutions=(4, 2, 1),
        context_dim=768,
    )


def golden_text(shapes: Shapes) -> str:
    """One line for each tensor: its name and its sizes."""
    return "".join(f"{name} {' '.join(map(str, shape))}\n" for name, shape in shapes.items())


def read_golden(path: Path) -> Shapes:
    """The shapes that ``golden_text`` wrote."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: tuple(map(int, sizes)) for name, *sizes in lines}


GOLDEN_LISTS = {"ldm_sd_v1.txt": 2, "ldm_bk_base.txt": 1}

if __name__ == "__main__":
    for file, num_res_blocks in GOLDEN_LISTS.items():
        (GOLDEN / file).write_text(golden_text(golden_shapes(num_res_blocks)), encoding="utf-8")
