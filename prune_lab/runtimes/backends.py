"""The runtimes that a part can be written for: how it is written, and what runs it here."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from prune_lab.errors import BackendError
from prune_lab.runtimes.exported import exported, without_chatter
from prune_lab.runtimes.part import Part

Runner = Callable[[Mapping[str, Any]], list[Any]]  # named arrays in, arrays out
Weights = Literal["float32", "float16", "int8"]  # how the numbers of the weights lie in the file
MOST_INSIDE = (
    2_000_000_000  # bytes of weights that lie in the file of an ONNX graph itself: protobuf ends at 2 GiB
)
_OPSET = 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How a part is written: the format of its weights, its shape, and what lies inside one file."""

    weights: Weights = "float32"
    side: int | None = None  # of the latent in the example; None: the model's own
    batch: int = 2  # rows, for a runtime that takes one number of them alone; with guidance a picture has two
    most_inside: int = MOST_INSIDE


class Write(Protocol):
    """Writes ``part`` into ``folder`` -> the part as it was written, of one size where its code computes with that."""

    def __call__(self, part: Part, folder: Path, writing: Writing) -> Part: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A program that runs a part."""

    name: str
    called: str  # in messages
    extra: str  # of prune-lab, that installs it
    packages: tuple[str, ...]  # as they are imported, to write and to run a part
    runs_with: str  # the package that runs a part, where it was written
    weights: tuple[Weights, ...]  # formats that can be written
    write: Write
    ending: str
    engine: str  # the module whose ``load`` runs it
    with_torch: str = ""  # why torch is in the process that runs it; empty: it is not
    platform: str = ""  # the one of ``sys.platform`` where it runs; empty: any

    @property
    def runs_here(self) -> bool:
        """Whether what is written can be run on this machine."""
        return self.platform in ("", sys.platform)

    def check_installed(self) -> None:
        """Raise BackendError unless all of it is installed."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise BackendError(
                f"asked for {self.called}, found that {', '.join(missing)} is not installed; "
                f"install it with: pip install 'prune-lab[{self.extra}]'"
            )

    @property
    def version(self) -> str:
        """Of the package that runs a part; empty where it is not installed."""
        try:
            return importlib.metadata.version(self.runs_with)
        except importlib.metadata.PackageNotFoundError:
            return ""

    def file(self, folder: Path, part: Part) -> Path:
        """Where ``part`` lies in ``folder``."""
        return folder / f"{part.name}{self.ending}"

    @property
    def engine_file(self) -> Path:
        """The source of the module that runs it, which travels with what was written."""
        found = importlib.util.find_spec(self.engine)
        assert found is not None
        assert found.origin is not None
        return Path(found.origin)

    def load(self, path: Path, *, threads: int = 0, precision: str = "f32") -> Runner:
        """What runs the part in ``path``. Raises BackendError where that fails."""
        self.check_installed()
        engine: Any = importlib.import_module(self.engine)
        try:
            runner: Runner = engine.load(path, threads, precision)
        except Exception as error:  # whatever the runtime raises
            raise BackendError(
                f"asked {self.called} for {path.name}, it refuses: {str(error).strip().splitlines()[0]:.160}; "
                "write it again with the versions that are installed"
            ) from None
        return runner


# ONNX --------------------------------------------------------------------------------------------------------------


def _without_places(model: Any) -> None:
    """Take out of an ONNX graph where in a source each node comes from: paths of this machine, megabytes of them."""
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in graphs:
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.metadata_props.clear()
        graph.metadata_props.clear()
    model.metadata_props.clear()


def _write_graph(part: Part, path: Path, writing: Writing, *, optimised: bool = True) -> Part:
    """``part`` as a graph in ``path``; ``optimised`` for onnxruntime, whose own optimiser does not do all of it."""
    program, written = exported(part, writing.side)
    with torch.no_grad(), without_chatter():
        graph = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=_OPSET,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            verbose=False,
            optimize=optimised,
        )
        assert graph is not None
        _without_places(graph.model)
        graph.save(path, external_data=part.num_bytes > writing.most_inside)
    return written


def _write_onnx(part: Part, folder: Path, writing: Writing) -> Part:
    path = folder / f"{part.name}.onnx"
    if writing.weights == "float32":
        return _write_graph(part, path, writing)
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(dir=folder) as inner:
        whole = Path(inner) / path.name
        written = _write_graph(part, whole, writing)
        with without_chatter():
            quantize_dynamic(
                whole,
                path,
                op_types_to_quantize=["MatMul"],
                weight_type=QuantType.QInt8,
                use_external_data_format=part.num_bytes > writing.most_inside,
                extra_options={"MatMulConstBOnly": True},
            )
    return written


# OpenVINO ----------------------------------------------------------------------------------------------------------


def _write_openvino(part: Part, folder: Path, writing: Writing) -> Part:
    import openvino

    with tempfile.TemporaryDirectory(dir=folder) as inner, without_chatter():
        graph = Path(inner) / f"{part.name}.onnx"
        # OpenVINO simplifies a graph when it loads it: as fast as an optimised one, which takes twice as long
        written = _write_graph(part, graph, writing, optimised=False)
        model = openvino.convert_model(graph)
        ports = (*model.inputs, *model.outputs)
        for port, name in zip(ports, (*part.inputs, *part.outputs), strict=True):
            assert name in port.get_names(), f"{name} is called {port.get_names()}"
            port.get_tensor().set_names(
                {name}
            )  # alone: what an idle step behind an input was called stays with it
        if writing.weights == "int8":
            import nncf

            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        path = folder / f"{part.name}.xml"
        openvino.save_model(model, path, compress_to_fp16=writing.weights == "float16")
        del model  # it reads the graph's file
    return written


GRAPH_RUNTIMES: dict[str, Runtime] = {  # that need no torch
    "onnx": Runtime(
        name="onnx",
        called="onnxruntime",
        extra="edge",
        packages=("onnx", "onnxscript", "onnxruntime"),
        runs_with="onnxruntime",
        weights=("float32", "int8"),
        write=_write_onnx,
        ending=".onnx",
        engine="prune_lab.runtimes.engine_onnx",
    ),
    "openvino": Runtime(
        name="openvino",
        called="OpenVINO",
        extra="edge",
        packages=("onnx", "onnxscript", "openvino", "nncf"),
        runs_with="openvino",
        weights=("float32", "float16", "int8"),
        write=_write_openvino,
        ending=".xml",
        engine="prune_lab.runtimes.engine_openvino",
    ),
}
