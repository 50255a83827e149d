"""Core ML, which runs models on Apple's devices: a part is converted anywhere, read back, and runs on macOS alone."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._decomp import get_decompositions
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from prune_lab.errors import BackendError
from prune_lab.models.components import reason_of
from prune_lab.runtimes.backends import Runtime, Weights, Writing
from prune_lab.runtimes.engine_coreml import ENDING
from prune_lab.runtimes.exported import exported, without_chatter
from prune_lab.runtimes.part import Part

_FOLDED = "common::fuse_conv_scale"  # makes other weights of a convolution before a factor: they could not be compared
_ATEN = torch.ops.aten
_UNKNOWN = [  # to coremltools: made of others that it knows
    *(_ATEN.new_ones, _ATEN.new_zeros, _ATEN.new_full),
]
_NUMBERS: dict[Weights, Any] = {"float32": np.float32, "float16": np.float16}


def _as_tensor(graph: Graph, user: Node, value: Any) -> Any:
    """``value`` of ``user`` itself, or where it is a number a node that makes a tensor of it."""
    if isinstance(value, Node):
        return value
    kind = user.meta["val"].dtype
    with graph.inserting_before(user):
        made = graph.call_function(_ATEN.full.default, ([1], value), {"dtype": kind})
    made.meta["val"] = torch.full((1,), value, dtype=kind)
    return made


def _in_known_words(program: ExportedProgram) -> None:
    """Take out nodes that give another name to what is there, and say others in words that coremltools knows."""
    graph = program.graph_module.graph
    for other, usual in (
        (_ATEN.__and__.Tensor, _ATEN.bitwise_and.Tensor),
        (_ATEN.__or__.Tensor, _ATEN.bitwise_or.Tensor),
    ):
        for node in graph.find_nodes(op="call_function", target=other):
            node.target = usual
    for other in (_ATEN.where.Scalar, _ATEN.where.ScalarOther, _ATEN.where.ScalarSelf):
        for node in graph.find_nodes(op="call_function", target=other):
            node.args = (node.args[0], *(_as_tensor(graph, node, value) for value in node.args[1:]))
            node.target = _ATEN.where.self
    for node in list(graph.find_nodes(op="call_function", target=_ATEN.alias.default)):
        if not any(user.op == "output" for user in node.users):  # whose name is in the signature
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    program.graph_module.recompile()


def _of_weights_alone(program: ExportedProgram) -> set[Node]:
    """The nodes that follow from no input of ``program``: a converter computes them once."""
    inputs, found = set(program.graph_signature.user_inputs), set[Node]()
    for node in program.graph.nodes:
        if node.op != "output" and node.name not in inputs and set(node.all_input_nodes) <= found:
            found.add(node)
    return found


def _matrices(program: ExportedProgram) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of the weights of two dimensions and more that meet an input in the graph of ``program``."""
    named, alone = program.graph_signature.inputs_to_parameters, _of_weights_alone(program)
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in named and set(node.users) - alone:
            tensor = program.state_dict[named[node.name]]
            if tensor.ndim > 1:
                yield named[node.name], tensor


def _stored(path: Path) -> set[bytes]:
    """Every constant of the package in ``path``, as the bytes of its numbers in single precision."""
    import coremltools
    from coremltools.converters.mil.frontend.milproto import load

    model = coremltools.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    program = load.load(
        spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir
    )
    return {
        _as_bytes(operation.val.val)
        for function in program.functions.values()
        for operation in function.operations
        if operation.op_type == "const" and isinstance(operation.val.val, np.ndarray)
    }


def _as_bytes(numbers: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(numbers, np.float32).tobytes()


def _check_stored(part: Part, program: ExportedProgram, path: Path, weights: Weights) -> None:
    """Raise BackendError unless the matrices in ``path`` are those of ``program``; vectors may be folded into them."""
    stored = _stored(path)
    for name, tensor in _matrices(program):
        wanted = tensor.detach().numpy().astype(_NUMBERS[weights])
        if _as_bytes(wanted) not in stored and _as_bytes(wanted.T) not in stored:
            raise BackendError(
                f"asked for the {part.name} in Core ML, found that {name} in the package is not what it is in torch; "
                "install the version of coremltools that prune-lab was tested with"
            )


def _write(part: Part, folder: Path, writing: Writing) -> Part:
    program, written = exported(part.of_one_shape(writing.batch, writing.side))
    path = folder / f"{part.name}{ENDING}"
    # coremltools draws a bar for each of its passes
    with torch.no_grad(), without_chatter(), contextlib.redirect_stderr(io.StringIO()):
        import coremltools

        program = program.run_decompositions(get_decompositions(_UNKNOWN))
        _in_known_words(program)
        precision, passes = coremltools.precision, coremltools.PassPipeline()
        passes.remove_passes({_FOLDED})
        try:
            model = coremltools.convert(
                program,
                outputs=[coremltools.TensorType(name=name, dtype=np.float32) for name in part.outputs],
                minimum_deployment_target=coremltools.target.iOS17,
                compute_precision=precision.FLOAT16 if writing.weights == "float16" else precision.FLOAT32,
                pass_pipeline=passes,
                skip_model_load=True,
            )
        except Exception as error:  # whatever the converter raises
            raise BackendError(
                f"asked for the {part.name} in Core ML, coremltools does not convert it ({reason_of(error)}); "
                "export it --to onnx or openvino"
            ) from None
        spec = model.get_spec()
        for given, name in zip(program.graph_signature.user_inputs, part.inputs, strict=True):
            coremltools.utils.rename_feature(spec, given, name)
        named = coremltools.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True)
        named.save(str(path))
        _check_stored(part, program, path, writing.weights)
    return written


COREML = Runtime(
    name="coreml",
    called="Core ML",
    extra="coreml",
    packages=("coremltools",),
    runs_with="coremltools",
    weights=("float32", "float16"),
    write=_write,
    ending=ENDING,
    engine="prune_lab.runtimes.engine_coreml",
    with_torch="coremltools imports torch where it is installed; an app reads the same files without",
    platform="darwin",
)
