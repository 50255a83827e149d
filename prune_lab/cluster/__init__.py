"""Work on many machines by Ray: a connection, shared storage, tasks, and trials that ASHA stops.

The work is given as functions; nothing here knows of models. Ray is an extra (``prune-lab[ray]``) and is imported when
it is first needed.
"""

from __future__ import annotations

from prune_lab.cluster.asha import Report, compete, tournament_from_asha
from prune_lab.cluster.connection import Cluster, connected, everywhere, in_tasks, slots
from prune_lab.cluster.storage import ArtifactStore, publish

__all__ = [
    "ArtifactStore",
    "Cluster",
    "Report",
    "compete",
    "connected",
    "everywhere",
    "in_tasks",
    "publish",
    "slots",
    "tournament_from_asha",
]
