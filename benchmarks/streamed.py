"""Memory of scoring every block of a large model that is read from disk block by block: as stated, and as seen.

Writes a Flux-shaped model of random weights (about 4 GB in float32) to a folder, shard by shard (``--write``); then
answers a row without each of its blocks in one pass, and prints the peak that was stated before the start, and the one
that the system saw (VmHWM): of the process, and above what it had before (torch, what is always there).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from prune_lab.blocks import architecture_of
from prune_lab.families import CLASS_NAME, example_inputs, meta_model
from prune_lab.models.streamed import load_streamed, outer_units
from prune_lab.prefix_sharing import growth, replayed, stated_peak
from prune_lab.runtime import used_bytes

CONFIG = {
    CLASS_NAME: "FluxTransformer2DModel",
    "num_layers": 6,
    "num_single_layers": 14,
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}


def write_random(folder: Path) -> int:
    """Bytes of the weights of ``CONFIG``, written to ``folder``: no more than one block is ever in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    model = meta_model(CONFIG)
    paths = tuple(f"{unit.path}." for unit in outer_units(model))
    shards: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        shards.setdefault(next((path for path in paths if name.startswith(path)), "rest."), {})[name] = tensor
    total = 0
    generator = torch.Generator().manual_seed(0)
    homes: dict[str, str] = {}
    for number, tensors in enumerate(shards.values(), start=1):
        file = f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        homes |= dict.fromkeys(tensors, file)
        made = {name: torch.randn(one.shape, generator=generator).mul_(0.02) for name, one in tensors.items()}
        total += sum(4 * one.numel() for one in made.values())
        save_file(made, folder / file)
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return total


def peak_bytes() -> int:
    """The most memory that this process ever held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("no VmHWM in /proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the model is, or is to be written")
    parser.add_argument("--latent", type=int, default=32, help="side of the latent")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--at-once", type=int, default=4, help="sets in one call of a block")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--write", action="store_true", help="write the model and stop")
    arguments = parser.parse_args()
    if arguments.write:
        print(f"wrote {write_random(arguments.folder) / 1e9:.2f} GB to {arguments.folder}")
        return
    model: Any = load_streamed(arguments.folder, dtype=getattr(torch, arguments.dtype))
    architecture = architecture_of(model)
    sets = [frozenset[str](), *(frozenset({block.name}) for block in architecture.blocks)]

    def inputs(copies: int) -> dict[str, Any]:
        size: dict[str, Any] = {"latent": arguments.latent, "tokens": arguments.tokens}
        made = example_inputs(CONFIG, batch=copies, dtype=model.dtype, **size)
        return {name: one if name.endswith("ids") else torch.ones_like(one) for name, one in made.items()}

    options: dict[str, Any] = {"width": len(sets), "at_once": arguments.at_once}
    stated = stated_peak(model, inputs, sets, **options)
    before = used_bytes(model.device)
    print(
        f"{arguments.dtype}, {architecture.total_params:,} parameters, {len(sets)} sets, latent {arguments.latent}, "
        f"{arguments.tokens} tokens, {arguments.at_once} sets in a call, {torch.get_num_threads()} threads\n"
        f"stated peak {stated / 1e9:.3f} GB, {(stated - before) / 1e9:.3f} GB of it beside what is in use",
        flush=True,
    )
    start = time.perf_counter()
    with torch.no_grad():
        answers = replayed(
            model,
            architecture,
            lambda copies: model(**inputs(copies), return_dict=False)[0],
            sets,
            growth=lambda: growth(model, architecture, inputs),
            **options,
        )
        finite = all(bool(answer.isfinite().all()) for _, answer in answers)
    seen = peak_bytes()
    print(
        f"{time.perf_counter() - start:.0f} s, all finite: {finite}, peak of the process {seen / 1e9:.3f} GB, "
        f"{seen / stated:.3f} of what was stated; {(seen - before) / 1e9:.3f} GB of it beside what was in use"
    )


if __name__ == "__main__":
    main()
