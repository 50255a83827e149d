"""Writes the versions that are installed as plain lines, name==version, in alphabetical order: constraints.txt.

    python .ci/constraints.py > constraints.txt

Without hashes and addresses, so that the file says the same wherever it is used, and with any build of torch.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions

OURS = {"prune-lab", "pip", "setuptools", "wheel"}  # what installs is not what is installed


def lines() -> list[str]:
    """``name==version`` of every distribution that is installed here, but for ours."""
    found = {
        re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower(): one.version.partition("+")[0]
        for one in distributions()
    }
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name not in OURS]


if __name__ == "__main__":
    sys.stdout.write("\n".join(lines()) + "\n")
