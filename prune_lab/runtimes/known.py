"""All runtimes, by the name that ``--to`` and ``--backend`` take."""

from __future__ import annotations

from prune_lab.runtimes.backends import GRAPH_RUNTIMES, Runtime
from prune_lab.runtimes.coreml import COREML
from prune_lab.runtimes.executorch import EXECUTORCH

RUNTIMES: dict[str, Runtime] = {
    **GRAPH_RUNTIMES,
    EXECUTORCH.name: EXECUTORCH,
    COREML.name: COREML,
}
