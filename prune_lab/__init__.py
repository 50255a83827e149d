"""Score, prune, profile, retrain and rank diffusion U-Nets, after BK-SDM (arXiv:2305.15798).

``import prune_lab as pl`` does nothing but offer what matters; ``pl.load``, ``pl.run`` and the others import torch when
they are first used. The nouns behind them are in the modules, for example ``prune_lab.plans.parse_plan``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prune_lab.version import __version__

if TYPE_CHECKING:
    from prune_lab.api.applying import img2img
    from prune_lab.api.evaluating import Evaluation, evaluate
    from prune_lab.api.jobs import compare, load, load_student, run
    from prune_lab.api.model import Model
    from prune_lab.api.plans import Plan, Plans
    from prune_lab.api.results import RunResults, open_run
    from prune_lab.errors import PruneLabError
    from prune_lab.tables import Table

_HOMES = {
    "Evaluation": "api.evaluating",
    "Model": "api.model",
    "Plan": "api.plans",
    "Plans": "api.plans",
    "PruneLabError": "errors",
    "RunResults": "api.results",
    "Table": "tables",
    "compare": "api.jobs",
    "evaluate": "api.evaluating",
    "img2img": "api.applying",
    "load": "api.jobs",
    "load_student": "api.jobs",
    "open_run": "api.results",
    "run": "api.jobs",
}

__all__ = [
    "Evaluation",
    "Model",
    "Plan",
    "Plans",
    "PruneLabError",
    "RunResults",
    "Table",
    "__version__",
    "compare",
    "evaluate",
    "img2img",
    "load",
    "load_student",
    "open_run",
    "run",
]


def __getattr__(name: str) -> object:
    """What ``__all__`` offers, imported when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'prune_lab' has no attribute {name!r}; it offers {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(f"prune_lab.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
