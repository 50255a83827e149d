"""What a run searches for: its budgets, its controls and its rules, as they are set or as the model gives them."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from prune_lab.blocks import Architecture
from prune_lab.config import AUTO, BUDGET_CONTROLS, RunConfig, SearchConfig
from prune_lab.config.axes import searches_widths
from prune_lab.errors import BudgetError
from prune_lab.evaluation import check_step_count
from prune_lab.families import CLASS_NAME, knows_its_size, latent_shape
from prune_lab.families.drawing import has_own_size, latents_per_patch
from prune_lab.models import ModelSource, configured_model
from prune_lab.models.files import json_object
from prune_lab.models.parts import pipeline_class
from prune_lab.plans import PruningPlan, chosen_units, read_plans
from prune_lab.probes.latents import check_side_of
from prune_lab.profiling import CostTable, Service, cost_table, drawn_latent, read_service
from prune_lab.profiling.runtime_process import check_runtime
from prune_lab.profiling.service import pixels_per_latent
from prune_lab.runtime import note, pick_device, pick_dtype
from prune_lab.runtimes import RUNTIMES
from prune_lab.search import (
    Budget,
    Constraints,
    check_budget_text,
    check_reachable,
    check_reachable_narrower,
    check_single,
    named_plans,
    parse_budget,
    parse_quota,
    service_named,
    split_budgets,
)
from prune_lab.workflow.widths import check_axes, form_of

# Of the parameters of a model without named plans; the second row where no plan that can be built reaches the first.
_SHARES = (("80%", "65%", "50%"), ("95%", "90%"))


def constraints_of(config: RunConfig) -> Constraints:
    """The rules for plans in ``[search]``. Raises ConfigError."""
    settings = config.search
    for name in ("keep", "remove", "quotas"):
        values = getattr(settings, name)
        check_single(f"search.{name}", [re.sub(r"\s*([<=]+)\s*", r"\1", text) for text in values])
    return Constraints(
        keep=settings.keep,
        remove=settings.remove,
        least_resnets=settings.least_resnets,
        quotas=tuple(parse_quota(text) for text in settings.quotas),
        longest_run=settings.longest_run or None,
        form=form_of(settings),
    )


# Controls --------------------------------------------------------------------------------------------------------


def controls_among(settings: SearchConfig, architecture: Architecture) -> tuple[PruningPlan, ...]:
    """The plans in ``search.controls`` for ``architecture``; one without a name is called by its text.

    ``auto`` stands for the family's named plans that are defined for it. Those that are found for a budget
    (``BUDGET_CONTROLS``) are not among them. Raises PlanError or UnknownBlockError for a plan that is named and does
    not exist.
    """
    found: list[PruningPlan] = []
    for text in settings.controls:
        if text == AUTO:
            found += named_plans(architecture)[0]
        elif text not in BUDGET_CONTROLS:
            found += read_plans(text, architecture)
            for plan in found:
                chosen_units(architecture, plan)  # says where it is open which units stay
    unique = {(plan.id, plan.name): plan for plan in found}
    return tuple(plan if plan.name else plan.named(plan.text) for plan in unique.values())


def check_controls(config: RunConfig) -> None:
    """Raise the errors of ``search.controls`` that are named and do not exist; note it where ``auto`` has none.

    Needs no weights.
    """
    architecture = configured_model(config).architecture
    controls_among(config.search, architecture)
    found, missing = named_plans(architecture)
    if AUTO in config.search.controls and missing and not found:  # each is defined for one published model
        note(f"controls left out: {', '.join(missing)} ({next(iter(missing.values())).split(';')[0]})")


# Budgets ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _reachable(
    architecture: Architecture, shares: Sequence[str], constraints: Constraints
) -> tuple[str, ...]:
    costs, found = cost_table(architecture), []
    for share in shares:
        text = f"params<={share}"
        try:
            check_reachable(
                architecture, costs, [parse_budget(text, architecture, costs)], constraints=constraints
            )
        except BudgetError:
            continue
        found.append(text)
    return tuple(found)


def _auto_budgets(architecture: Architecture, constraints: Constraints) -> tuple[str, ...]:
    """The parameters of the family's named plans; of a model without, the shares that a plan reaches under the rules.

    Raises BudgetError when none does.
    """
    named, _ = named_plans(architecture)
    if named:
        return tuple(f"params<={plan.name}" for plan in named)
    for shares in _SHARES:
        if found := _reachable(architecture, shares, constraints):
            return found
    raise BudgetError(
        f"asked for plans that leave {', '.join(share for row in _SHARES for share in row)} of the parameters, found "
        "none that can be built; give a budget of your own, such as --macs 97%, or drop rules of [search]"
    )


def budgets_of(config: RunConfig, architecture: Architecture) -> tuple[str, ...]:
    """The texts in ``search.budgets``, ``auto`` replaced by what the model gives. Raises BudgetError."""
    found: list[str] = []
    for text in config.search.budgets:
        found += _auto_budgets(architecture, constraints_of(config)) if text == AUTO else (text,)
    return tuple(dict.fromkeys(found))


def service_asked(config: RunConfig, source: ModelSource) -> Service:
    """Where and how the models of a run of ``source`` are to work: as its budgets on latency say, else as the run does.

    Raises BudgetError, ConfigError or DeviceError when it cannot be read, or is not to be had here.
    """
    own = Service(
        device=str(pick_device(config.device)),
        dtype=str(pick_dtype(config.dtype)).removeprefix("torch."),
        batch=config.profile.batch,
        latent=drawn_latent(source, config.data.resolution),
        tokens=source.architecture.tokens,
    )
    asked = service_named(config.search.budgets)
    return read_service(asked, own, source) if asked else own


def check_narrower(
    settings: SearchConfig, costs: CostTable, budgets: Sequence[Budget], constraints: Constraints
) -> None:
    """Raise BudgetError where no plan of blocks and widths meets ``budgets``. Needs no scores."""
    deep = "depth" in settings.axes
    blocks = [block.name for block in costs.architecture.blocks if block.removable and deep]
    check_reachable_narrower(costs, blocks, budgets, constraints, channels=settings.round_to or 1)


def check_budgets(config: RunConfig) -> None:
    """Raise BudgetError when one of ``search.budgets`` cannot be read, or no native plan meets it; needs no weights.

    Raises DeviceError, ConfigError or BackendError for a service that is not to be had here.
    """
    if not config.search.budgets:
        return
    check_axes(config)
    source = configured_model(config)
    if service_named(config.search.budgets):
        service = service_asked(config, source)
        if service.backend in RUNTIMES:
            check_runtime(service, source.config)
    architecture = source.architecture
    latent = drawn_latent(source, config.data.resolution)
    costs, constraints = cost_table(architecture, latent=latent), constraints_of(config)
    for text in budgets_of(config, architecture):
        for one in split_budgets(text):
            check_budget_text(one, architecture)
        # latency and memory have to be measured first: whether a plan meets them is seen then
        counted = [one for one in split_budgets(text) if not re.match(r"\s*(latency|memory)", one)]
        budgets = [parse_budget(one, architecture, costs) for one in counted]
        constraints.limits(architecture)  # raises for a rule about what the model does not have
        if searches_widths(config.search):  # by whole blocks alone much is out of reach
            if len(counted) == len(split_budgets(text)):
                check_narrower(config.search, costs, budgets, constraints)
            continue
        check_reachable(architecture, costs, budgets, constraints=constraints)


def _check_side(source: ModelSource, side: int) -> None:
    assert source.folder is not None
    drawing = pipeline_class(json_object(source.folder / "model_index.json").get(CLASS_NAME))
    pixels = pixels_per_latent(source)
    if drawing is None or pixels is None:
        return
    own = min(latent_shape(source.config)) * pixels if knows_its_size(source.config) else 0
    step = pixels * latents_per_patch(drawing, source.config)
    check_side_of(side, own, step, alone=has_own_size(drawing))


def check_drawing(config: RunConfig, source: ModelSource, origin: str) -> None:
    """Raise ConfigError for more denoising steps than the scheduler of ``source`` has, DataError for pictures of a size
    that it cannot draw; ``origin`` is that of the data.

    Loads nothing, so that a plan of a run can be checked.
    """
    if not source.is_pipeline:
        return
    drawing = {"evaluate.steps": config.evaluate.steps}
    if origin == "drawn":
        drawing |= {"data.steps": config.data.steps, "probe.steps": config.probe.steps}
    for name, steps in drawing.items():
        check_step_count(source.timesteps, steps, name)
    drawn = (
        origin == "drawn" or "sample_size" not in source.config
    )  # then the size is that of all that is drawn
    if config.data.resolution and drawn:
        _check_side(source, config.data.resolution)
