"""Score, prune, profile, retrain and rank diffusion U-Nets, after BK-SDM (arXiv:2305.15798).

Importing the package does nothing; import the module that holds the noun you need, for example
``from prune_lab.plans import parse_plan``.
"""

__version__ = "0.1.0"
