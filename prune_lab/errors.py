"""The mistakes a user can make, one class per situation.

Every message is one line that says what was asked, what was found, and what would work. The command line prints it
and exits with ``exit_codes.MISTAKE``; any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class PruneLabError(ValueError):
    """A mistake in what was asked of the library; the message is meant for the user."""


class ConfigError(PruneLabError):
    """A setting is unknown, missing or out of range."""


class DeviceError(PruneLabError):
    """The device or number format asked for is not available here."""


class StorageError(PruneLabError):
    """A file or folder cannot be read or written as asked."""


class ClusterError(PruneLabError):
    """Ray is not installed, no cluster answers, or the machines of a cluster do not see what they need."""


class HubError(PruneLabError):
    """The model hub refuses, or cannot be reached."""


class RunError(PruneLabError):
    """A run folder lacks what a step needs, or was made with other settings."""


class ModelNotFoundError(PruneLabError):
    """Nothing of that name: no preset, no folder, no reachable hub repository."""


class ModelFormatError(PruneLabError):
    """The files of a model are damaged, incomplete or not in a format that is read here."""


class ProofError(PruneLabError):
    """What was written does not load as it should, or is not the model that it was made from."""


class UnsupportedModelError(PruneLabError):
    """The model is of a class or shape whose blocks are not known here."""


class ReplayError(UnsupportedModelError):
    """The model's forward pass does something that its blocks cannot be replayed with."""


class UnknownBlockError(PruneLabError):
    """The model has no block of that name."""


class UnremovableBlockError(PruneLabError):
    """The block changes the width of the main path, so the network does not close without it."""


class PlanError(PruneLabError):
    """A pruning plan cannot be read, or belongs to another architecture."""


class FormError(PlanError):
    """The smaller model that a plan leaves cannot be built in the form that was asked for."""


class NonNativePlanError(FormError):
    """No plain diffusers config describes the network that the plan leaves."""


class BudgetError(PruneLabError):
    """A budget cannot be read, or no plan meets it."""


class DataError(PruneLabError):
    """Pictures, captions, probes or cached tensors are damaged or do not fit the model."""


class UnknownCriterionError(PruneLabError):
    """There is no importance criterion of that name."""


class BackendError(PruneLabError):
    """A runtime is not installed, or cannot do what was asked of it."""
