"""Looks up the pinned versions in the public lists of known vulnerabilities, with pip-audit.

    python .ci/audit.py constraints.txt

Ends with 1 when one of them is known to be vulnerable. What could not be looked up is called "not checked" and never
passes for sound: pip-audit itself says "no known vulnerabilities" of packages that it found nowhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

OPTIONS = ("--no-deps", "--disable-pip", "--format=json", "--progress-spinner=off", "--timeout=20")


def findings(answer: str) -> tuple[list[str], list[str], int]:
    """(vulnerable packages, packages that were not checked, how many were checked), of pip-audit's JSON."""
    vulnerable, unknown, checked = [], [], 0
    for one in json.loads(answer)["dependencies"]:
        if "skip_reason" in one:
            unknown.append(one["name"])
            continue
        checked += 1
        for hole in one["vulns"]:
            fixed = ", ".join(hole["fix_versions"]) or "no version yet"
            vulnerable.append(f"{one['name']} {one['version']}: {hole['id']}, mended in {fixed}")
    return vulnerable, unknown, checked


def audit(constraints: Path) -> int:
    """0, or 1 when a version in ``constraints`` is known to be vulnerable; prints what was and was not checked."""
    if not constraints.read_text(encoding="utf-8").strip():
        raise SystemExit(f"{constraints} is empty: nothing to look up")
    command = [sys.executable, "-m", "pip_audit", f"--requirement={constraints}", *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        vulnerable, unknown, checked = findings(done.stdout)
    except (ValueError, LookupError):
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        sys.stdout.write(f"not checked: the lists of vulnerabilities did not answer ({reason[:200]})\n")
        return 0
    for line in vulnerable:
        sys.stdout.write(f"vulnerable: {line}\n")
    if unknown:
        sys.stdout.write(f"not checked, not found in the lists: {', '.join(unknown)}\n")
    sys.stdout.write(f"{checked} checked, {len(vulnerable)} known holes, {len(unknown)} not checked\n")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(audit(Path(sys.argv[1])))
