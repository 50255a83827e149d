"""The settings of a run: frozen, checked dataclasses, and the TOML they are read from and written to.

Each table of the TOML is one dataclass, each key one field of the same name, so there is one list of settings and one
place for their defaults. The settings that stand before the first table are those of ``RunConfig`` itself.
"""

from __future__ import annotations

from prune_lab.config.settings import (
    BUDGET_CONTROLS,
    CACHE_FORMATS,
    CROPS,
    DTYPES,
    GROUP_KINDS,
    PLAN_FILES,
    RANK_ENGINES,
    REPAIRS,
    SOLVERS,
    DataConfig,
    DistillConfig,
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
from prune_lab.config.toml import changed_settings, config_from_toml, load_config, setting_names, to_toml

__all__ = [
    "BUDGET_CONTROLS",
    "CACHE_FORMATS",
    "CROPS",
    "DTYPES",
    "GROUP_KINDS",
    "PLAN_FILES",
    "RANK_ENGINES",
    "REPAIRS",
    "SOLVERS",
    "DataConfig",
    "DistillConfig",
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
    "config_from_toml",
    "load_config",
    "setting_names",
    "to_toml",
]
