#!/usr/bin/env bash
# over.sh PYTHON OTHER: what is installed for PYTHON can be imported by OTHER too, whose own packages come first.
set -euo pipefail
where='import sysconfig; print(sysconfig.get_path("purelib"))'
"$1" -c "$where" > "$("$2" -c "$where")/over.pth"
