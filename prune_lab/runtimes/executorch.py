"""ExecuTorch, which runs models on telephones and boards: a part lowered to XNNPACK, its kernels for processors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.export import ExportedProgram

from prune_lab.errors import BackendError
from prune_lab.models.components import reason_of
from prune_lab.runtimes.backends import Runtime, Writing
from prune_lab.runtimes.engine_executorch import ENDING, INPUTS
from prune_lab.runtimes.engine_executorch import without_chatter as without_chatter_of_torchao
from prune_lab.runtimes.exported import exported, without_chatter
from prune_lab.runtimes.part import Part


def _with_plain_gelu(program: ExportedProgram) -> None:
    """Write out every GELU by tanh: XNNPACK's kernel computes the one by erf, whatever was asked for."""
    aten, graph = torch.ops.aten, program.graph_module.graph
    for node in list(graph.find_nodes(op="call_function", target=aten.gelu.default)):
        if node.kwargs.get("approximate") != "tanh":
            continue
        given = node.args[0]
        with graph.inserting_before(node):
            # x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))
            square = graph.call_function(aten.mul.Tensor, (given, given))
            factor = graph.call_function(aten.mul.Tensor, (square, 0.044715 * (2 / torch.pi) ** 0.5))
            shifted = graph.call_function(aten.add.Tensor, (factor, (2 / torch.pi) ** 0.5))
            inner = graph.call_function(aten.mul.Tensor, (given, shifted))
            bent = graph.call_function(aten.tanh.default, (inner,))
            above = graph.call_function(aten.add.Tensor, (bent, 1.0))
            half = graph.call_function(aten.mul.Tensor, (given, 0.5))
            whole = graph.call_function(aten.mul.Tensor, (half, above))
        for made in (square, factor, shifted, inner, bent, above, half, whole):
            made.meta = dict(node.meta)
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
    program.graph_module.recompile()


def _write(part: Part, folder: Path, writing: Writing) -> Part:
    # A program reserves its memory when it is written: of one shape it is as small as that shape needs.
    program, written = exported(part.of_one_shape(writing.batch, writing.side))
    _with_plain_gelu(program)
    with torch.no_grad(), without_chatter(), without_chatter_of_torchao():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            lowered = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                constant_methods={INPUTS: " ".join(part.inputs)},
            )
        except Exception as error:  # whatever the partitioner raises
            raise BackendError(
                f"asked for the {part.name} in ExecuTorch, it cannot be lowered ({reason_of(error)}); export it --to "
                "onnx or openvino"
            ) from None
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
