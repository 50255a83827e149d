"""What Stable Diffusion's shapes say of their blocks before any training: the architecture prior at full size.

    python -m benchmarks.untrained_shapes --out reports/evidence --models sd-v1.4 sd-v2.1-base

Nothing is loaded: models of the presets' configs get the weights that training starts from, three seeds each, and
random inputs. Writes shapes.csv, a row per block of a model when its three seeds are done; the same command goes on
with the models that are missing. Each needs the memory of one model in float32 (3.4 GB).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd
import torch

from benchmarks.evidence_page import UNTRAINED, write_page
from benchmarks.width import append
from prune_lab.blocks import block_groups
from prune_lab.importance import ScoringContext, score, untrained
from prune_lab.models import resolve_model
from prune_lab.probes import random_probe


def prior_of(model: str, *, latent: int, rows: int) -> pd.DataFrame:
    """A row per block: ``output-mse`` without it in each untrained model, of ``rows`` inputs of ``latent`` squared."""
    source = resolve_model(model)
    probe = random_probe(source.config, samples=rows, seed=0, timesteps=rows, latent=latent)
    groups = block_groups(source.architecture, "block")
    found = pd.DataFrame({"model": model, "block": [group.name for group in groups]})
    started = time.perf_counter()
    for place, column in enumerate(UNTRAINED):
        context = ScoringContext(untrained(source.config, place), probe, batch=rows)
        impacts = score(context, groups, bootstrap=0).block_impacts()
        found[column] = [impacts[block] for block in found["block"]]
        print(f"{model}, seed {place}: {time.perf_counter() - started:.0f} s", flush=True)
    return found.assign(latent=latent, rows=rows, torch=torch.__version__)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["sd-v1.4", "sd-v2.1-base"])
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--rows", type=int, default=2)
    arguments = parser.parse_args()
    table = arguments.out / "shapes.csv"
    done = set(pd.read_csv(table)["model"]) if table.is_file() else set()
    for model in arguments.models:
        if model not in done:
            append(table, prior_of(model, latent=arguments.latent, rows=arguments.rows), {"model": model})
    write_page(arguments.out)


if __name__ == "__main__":
    main()
