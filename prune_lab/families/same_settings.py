"""Settings that are written in several ways and mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of this class a number stands for as many equal ones, one for each stage.
_WITH_STAGES = "UNet2DConditionModel"
_FOR_EACH_STAGE = (
    *("attention_head_dim", "num_attention_heads", "cross_attention_dim", "layers_per_block"),
    "transformer_layers_per_block",
)


def shortened(class_name: str, everything: Mapping[str, Any]) -> dict[str, Any]:
    """``everything`` that a config of the class says, as JSON holds it, with one value where a list repeats it for each
    stage, which means the same to the class.
    """
    found = dict(everything)
    if class_name != _WITH_STAGES:
        return found
    stages = everything.get("down_block_types")
    count = len(stages) if isinstance(stages, list) else 0
    for name in _FOR_EACH_STAGE:
        value = everything.get(name)
        if isinstance(value, list) and len(value) == count > 0 and all(one == value[0] for one in value):
            found[name] = value[0]
    # of true the middle would hear, of a list it does not
    if everything.get("only_cross_attention") == [False] * count:
        found["only_cross_attention"] = False
    return found
