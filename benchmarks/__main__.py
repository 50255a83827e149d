"""Every benchmark in turn, each with its defaults: ``python -m benchmarks``."""

from __future__ import annotations

import sys

from benchmarks import counting, distillation, latency, pricing, racing, scoring, search, solvers


def main() -> None:
    del sys.argv[1:]  # the defaults of each
    for benchmark in (counting, pricing, latency, scoring, racing, search, solvers, distillation):
        print(f"== {benchmark.__name__.removeprefix('benchmarks.')}")
        benchmark.main()


if __name__ == "__main__":
    main()
