"""What a single file must hold by the configs of its parts, tensor by tensor, and what else it may.

The loader of diffusers takes what it knows and says nothing of the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prune_lab.errors import UnsupportedModelError
from prune_lab.families.ldm_keys import (
    TEXT_CLASSES,
    Place,
    text_places,
    text_prefixes,
    text_shapes,
    unet_places,
    unet_shapes,
    vae_places,
    vae_shapes,
)
from prune_lab.families.ldm_structure import UNET, VAE
from prune_lab.models.components import misfit
from prune_lab.runtime import path_text

Shapes = Mapping[str, tuple[int, ...]]

# What is no part of the model: averages and losses of its training, the schedule, counters, marks, what CLIP has for
# pictures, and the last layer of OpenCLIP, which Stable Diffusion 2 does not read.
_HARMLESS = re.compile(
    r"model_ema\..+|first_stage_model\.(?:loss|model_ema)\..+|.+\.position_ids|.+\.logit_scale|.+\.attn_mask"
    r"|betas|logvar|scale_factor|(?:sqrt_|log_)?(?:one_minus_)?(?:recip_|recipm1_)?alphas_cumprod(?:_prev)?"
    r"|posterior_\w+|denoiser\.sigmas|edm_vpred\.sigma_\w+|v_pred|ztsnr"
    r"|(?:cond_stage_model|conditioner\.embedders\.\d)\.(?:model|transformer)\.text_projection(?:\.weight)?"
    r"|cond_stage_model\.model\.transformer\.resblocks\.23\..+"
)


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` without its last sides of 1: a linear layer may be there as a convolution."""
    return shape if not shape or shape[-1] != 1 else _plain(shape[:-1])


def _placed(prefix: str, places: Sequence[Place], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}{place.key}": _plain(place.shape([shapes[key] for key in place.sources]))
        for place in places
    }


def _wanted(configs: Mapping[str, Mapping[str, Any]]) -> Shapes:
    """Shape, as ``_plain``, of each tensor of the parts of these ``configs`` by its key in the file."""
    unet, vae, index = configs["unet"], configs["vae"], configs["model_index"]
    wanted = _placed(UNET, unet_places(unet), unet_shapes(unet))
    wanted |= _placed(VAE, vae_places(vae), vae_shapes(vae))
    for part, prefix in text_prefixes(index).items():
        config, name = configs.get(part, {}), index[part][-1]
        if not config or name not in TEXT_CLASSES:
            raise UnsupportedModelError(f"its {part} is none of {' and '.join(TEXT_CLASSES)} with a config")
        wanted |= _placed(prefix, text_places(config, name), text_shapes(config, name))
    return wanted


def left_out(configs: Mapping[str, Mapping[str, Any]], found: Shapes) -> tuple[str, ...]:
    """The keys in a file of the shapes ``found`` that are known to be no part of the model.

    Raises UnsupportedModelError where a tensor that the parts of ``configs`` have is not there or has another shape, or
    another one is there that nothing is known of.
    """
    wanted = _wanted(configs)
    harmless = tuple(key for key in found if key not in wanted and _HARMLESS.fullmatch(key))
    own = {key: _plain(shape) for key, shape in found.items() if key not in harmless}
    if complaint := misfit(own, wanted, "the parts that it says it has"):
        raise UnsupportedModelError(
            f"its tensors are not those of its parts: {path_text(complaint)}; give the diffusers folder of the model"
        )
    return harmless
