"""The forms in which the smaller model of a plan can be built, and what it is in each.

``native``: a plain config of the plain class. ``neutral``: the plain class, whose removed blocks are there and do
nothing. ``own``: with one small model file in the folder, any plan at full savings. ``padded``: a plain config at full
width, zeros where a plan makes it narrower. All compute the same, narrower ones up to rounding; so does the neutral
form where a block that does nothing hands on its state in another order in memory (plain attention).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import get_args

from prune_lab.blocks import Architecture
from prune_lab.errors import ConfigError, FormError, NonNativePlanError
from prune_lab.families import (
    CLASS_NAME,
    FAMILIES,
    Conversion,
    Form,
    Layout,
    base_name,
    emptied,
    meta_model,
    own_layout,
)
from prune_lab.plans import PruningPlan, chosen_units, is_native, native_layout, units_gone

FORM_NAMES: tuple[Form, ...] = get_args(Form)


def _neutral(architecture: Architecture, plan: PruningPlan) -> Layout:
    neutral = architecture.family.neutral
    if plan.widths:
        raise FormError(
            f"asked for the neutral form of {plan.widths[0].short}: widths have the forms own and padded; ask for one"
        )
    if neutral is None:
        name = architecture.config[CLASS_NAME]
        raise FormError(
            f"asked for the neutral form of a {name}, whose blocks cannot stay and do nothing; ask for --form native "
            "or own"
        )
    return neutral(architecture.outline, units_gone(architecture, plan))


def _own(architecture: Architecture, plan: PruningPlan) -> Layout:
    gone = units_gone(architecture, plan)
    kept = chosen_units(architecture, plan)
    return own_layout(FAMILIES[base_name(architecture.config[CLASS_NAME])], architecture.outline, gone, kept)


def _in_turn(first: Conversion, second: Conversion) -> Conversion:
    return lambda tensor: second(first(tensor))


def _padded(architecture: Architecture, plan: PruningPlan) -> Layout:
    if not plan.widths:
        raise FormError(
            "asked for the padded form of a plan that leaves all widths as they are; ask for --form native or own"
        )
    kept = chosen_units(architecture, plan)
    try:
        layout = native_layout(architecture, plan.without_widths())
    except NonNativePlanError as error:
        raise FormError(
            f"asked for the padded form, a plain model at full width, of a plan whose removed blocks leave none "
            f"({error}); ask for --form own, or remove other blocks"
        ) from None
    zeros = emptied(meta_model(architecture.config), kept)
    convert = dict(layout.convert)
    for name, empty in zeros.items():
        new = layout.renamed(name)
        assert new is not None, f"{name} is of a block that leaves, and of a width"
        convert[new] = _in_turn(convert[new], empty) if new in convert else empty
    return dataclasses.replace(layout, convert=convert)


FORMS: Mapping[Form, Callable[[Architecture, PruningPlan], Layout]] = {
    "native": native_layout,
    "neutral": _neutral,
    "own": _own,
    "padded": _padded,
}
"""By name: the config of the smaller model, where the original's modules are in it, and which of their numbers are
others. Each raises FormError, which says why, where it has none for a plan, and PlanError for another model's plan."""


def form_named(name: str) -> Form:
    """The form called ``name``. Raises ConfigError where there is none."""
    for form in FORM_NAMES:
        if form == name:
            return form
    raise ConfigError(f"asked for the form {name!r}; there are {', '.join(FORM_NAMES)}")


def layout_of(architecture: Architecture, plan: PruningPlan) -> Layout:
    """The smaller model of ``plan`` in the plan's own form. Raises FormError where it cannot be built in that."""
    return FORMS[plan.form](architecture, plan)


def why_not(architecture: Architecture, plan: PruningPlan) -> str:
    """Why ``plan`` cannot be built in its form; empty when it can."""
    try:
        layout_of(architecture, plan)
    except FormError as error:
        return str(error)
    return ""


def exists_in(architecture: Architecture, plan: PruningPlan, form: Form) -> bool:
    """Whether ``plan`` can be built in ``form``; the plan that removes nothing exists in all."""
    return not plan.changes or not why_not(architecture, plan.built(form))


def in_form(architecture: Architecture, plan: PruningPlan, form: Form | None = None) -> PruningPlan:
    """``plan`` in the form that is asked for; None: the one it has, or where it has none yet native, else own.

    Raises FormError where it cannot be built in that.
    """
    undecided: Form = "native" if is_native(architecture, plan) else "own"
    made = plan.built(form or (undecided if plan.form == "native" else plan.form))
    layout_of(architecture, made)
    return made


def within_form(architecture: Architecture, plan: PruningPlan, form: Form) -> PruningPlan:
    """``plan`` as a run builds it that asks for ``form``: natively where that exists, which costs least, and with code
    of its own where it makes blocks narrower.
    """
    if plan.widths:  # no native plan has any
        return plan.built("padded" if form == "padded" else "own")
    return plan.built("native" if form == "native" or is_native(architecture, plan) else form)
