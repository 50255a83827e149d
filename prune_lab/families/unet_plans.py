"""Named plans of U-Nets: published students as the blocks and layers that they lack of Stable Diffusion's models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prune_lab.errors import PlanError
from prune_lab.families import unet_blocks
from prune_lab.families.family import Outline, Removed


def _all_of(outline: Outline, *stages: str) -> Removed:
    """The blocks of these stages."""
    return frozenset(unit.name for unit in outline.blocks if unit.stage in stages)


# BK-SDM's plans (arXiv:2305.15798, section 3) -----------------------------------------------------------------------


def _bk_base(outline: Outline) -> Removed:
    """``bk-base``: the second residual-attention pair of every stage but the mid stage."""
    stages = [stage for stage in outline.stages if stage.lane != "middle"]
    found = {stage.name: len(outline.units_in(stage.name, "resnet")) for stage in stages}
    expected = {stage.name: 2 if stage.lane == "left" else 3 for stage in stages}
    if found != expected or len(found) != 8:
        raise PlanError(
            "BK-SDM's plans are defined for four stages of two layers with a mid stage, as in Stable Diffusion 1 "
            f"and 2; this U-Net has residual blocks {found}; name the blocks instead, for example '-Dn1.R2 -Dn1.A2'"
        )
    names = {stage.name for stage in stages}
    return frozenset(
        unit.name for unit in outline.units if unit.stage in names and unit.local_name in ("R2", "A2")
    )


def _bk_small(outline: Outline) -> Removed:
    """``bk-small``: the mid stage as well."""
    return _bk_base(outline) | _all_of(outline, unet_blocks.MIDDLE)


def _bk_tiny(outline: Outline) -> Removed:
    """``bk-tiny``: the innermost stages as well."""
    return _bk_small(outline) | _all_of(outline, "Dn4", "Up1")


# Of Stable Diffusion XL ----------------------------------------------------------------------------------------------

# Residual blocks, and transformer layers of each attention block, of every stage of Stable Diffusion XL's base model.
_XL: Mapping[str, tuple[int, tuple[int, ...]]] = {
    "Dn1": (2, ()),
    "Dn2": (2, (2, 2)),
    "Dn3": (2, (10, 10)),
    "Md": (2, (10,)),
    "Up1": (3, (10, 10, 10)),
    "Up2": (3, (2, 2, 2)),
    "Up3": (3, ()),
}


def _check_xl(outline: Outline, plan: str) -> None:
    found = {
        stage.name: (
            len(outline.units_in(stage.name, "resnet")),
            tuple(unit.transformer_layers for unit in outline.units_in(stage.name, "attention")),
        )
        for stage in outline.stages
    }
    if found != _XL:
        shown = ", ".join(f"{name} {resnets} {list(layers)}" for name, (resnets, layers) in found.items())
        raise PlanError(
            f"the plan {plan} is defined for Stable Diffusion XL's base model; this U-Net has other residual blocks "
            f"and transformer layers ({shown[:300]}); name the blocks instead, for example '-{outline.blocks[-1].name}'"
        )


def _layers_after(outline: Outline, kept: Mapping[str, int]) -> Iterable[str]:
    """The layers of attention blocks behind the first ones that each keeps, by name of the block."""
    return (unit.name for name, count in kept.items() for unit in outline.inner(name)[count:])


def _koala(outline: Outline, plan: str, layers: int, attentions: Iterable[str]) -> Removed:
    """The second residual-attention pair of every stage but the mid stage, and all but the first ``layers`` layers of
    the innermost ``attentions``.
    """
    _check_xl(outline, plan)
    pairs = {unit.name for unit in outline.blocks if unit.local_name in ("R2", "A2")}
    pairs -= _all_of(outline, unet_blocks.MIDDLE)
    return frozenset(pairs) | frozenset(_layers_after(outline, dict.fromkeys(attentions, layers)))


def _koala_1b(outline: Outline) -> Removed:
    """``koala-1b`` (arXiv:2312.04005): one layer per stage, six transformer layers inside."""
    return _koala(outline, "koala-1b", 6, ("Dn3.A1", "Md.A1", "Up1.A1", "Up1.A3"))


def _koala_700m(outline: Outline) -> Removed:
    """``koala-700m``: five transformer layers inside, and no mid stage."""
    pairs = _koala(outline, "koala-700m", 5, ("Dn3.A1", "Up1.A1", "Up1.A3"))
    return pairs | _all_of(outline, unet_blocks.MIDDLE)


def _ssd_1b(outline: Outline) -> Removed:
    """``ssd-1b`` (arXiv:2401.02677): no attention in the mid stage, fewer transformer layers around it."""
    _check_xl(outline, "ssd-1b")
    kept = {"Dn3.A1": 4, "Dn3.A2": 4, "Up1.A1": 4, "Up1.A2": 4, "Up2.A2": 1, "Up2.A3": 1}
    return frozenset({"Md.A1", "Md.R2", *_layers_after(outline, kept)})


PLANS: Mapping[str, Callable[[Outline], Removed]] = {
    "bk-base": _bk_base,
    "bk-small": _bk_small,
    "bk-tiny": _bk_tiny,
    "koala-1b": _koala_1b,
    "koala-700m": _koala_700m,
    "ssd-1b": _ssd_1b,
}
