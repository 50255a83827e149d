"""ExecuTorch, which runs models on telephones and boards: a part lowered to XNNPACK, its kernels for processors."""

from __future__ import annotations

from pathlib import Path

import torch

from prune_lab.runtimes.backends import Runtime, Writing
from prune_lab.runtimes.engine_executorch import ENDING, INPUTS
from prune_lab.runtimes.engine_executorch import without_chatter as without_chatter_of_torchao
from prune_lab.runtimes.exported import exported, without_chatter
from prune_lab.runtimes.part import Part


def _write(part: Part, folder: Path, writing: Writing) -> Part:
    # A program reserves its memory when it is written: of one shape it is as small as that shape needs.
    program, written = exported(part.of_one_shape(writing.batch, writing.side))
    with torch.no_grad(), without_chatter(), without_chatter_of_torchao():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            constant_methods={INPUTS: " ".join(part.inputs)},
        )
        (folder / f"{part.name}{ENDING}").write_bytes(lowered.to_executorch().buffer)
    return written


EXECUTORCH = Runtime(
    name="executorch",
    called="ExecuTorch",
    extra="executorch",
    packages=("executorch",),
    runs_with="executorch",
    weights=("float32",),
    write=_write,
    ending=ENDING,
    engine="prune_lab.runtimes.engine_executorch",
    with_torch="its Python runtime needs torch; on a device the C++ runtime reads the same files without",
)
