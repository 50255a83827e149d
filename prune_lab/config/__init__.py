"""The settings of a run: frozen, checked dataclasses, and the TOML they are read from and written to.

Each table of the TOML is one dataclass, each key one field of the same name. A field says its default, what it means
and which step reads it; ``SETTINGS`` has all of that as data. The settings that stand before the first table are those
of ``RunConfig`` itself.
"""

from __future__ import annotations

from prune_lab.config.numbers import NUMBERS, check_numbers
from prune_lab.config.recipes import recipe_about, recipe_names, recipe_path
from prune_lab.config.settings import (
    AUTO,
    BUDGET_CONTROLS,
    NO_SCORER,
    PLAN_FILES,
    SETTINGS,
    SHIPPED,
    DataConfig,
    DistillConfig,
    EngineConfig,
    EvaluateConfig,
    ProbeConfig,
    ProfileConfig,
    RankConfig,
    RepairConfig,
    ReportConfig,
    RunConfig,
    ScoreConfig,
    SearchConfig,
)
from prune_lab.config.toml import (
    changed_settings,
    load_config,
    parse_assignment,
    setting_named,
    setting_values,
    to_toml,
    toml_literal,
    with_settings,
)

__all__ = [
    "AUTO",
    "BUDGET_CONTROLS",
    "NO_SCORER",
    "NUMBERS",
    "PLAN_FILES",
    "SETTINGS",
    "SHIPPED",
    "DataConfig",
    "DistillConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ProbeConfig",
    "ProfileConfig",
    "RankConfig",
    "RepairConfig",
    "ReportConfig",
    "RunConfig",
    "ScoreConfig",
    "SearchConfig",
    "changed_settings",
    "check_numbers",
    "load_config",
    "parse_assignment",
    "recipe_about",
    "recipe_names",
    "recipe_path",
    "setting_named",
    "setting_values",
    "to_toml",
    "toml_literal",
    "with_settings",
]
