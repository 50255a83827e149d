"""``python -m prune_lab`` is ``prune-lab``, for where the folder of scripts is not on the path."""

from __future__ import annotations

from prune_lab.cli import main

if __name__ == "__main__":
    main()
