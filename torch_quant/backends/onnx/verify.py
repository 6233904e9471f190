"""Does an exported file do what the plan says? Asked of the file itself and of onnxruntime.

The graph that onnxruntime has optimized shows which quantized operators became integer kernels. For
each that did not, its neighbours tell why.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch_quant.core.packages import missing_packages
from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.errors import BackendUnavailable, InvalidConfig

__all__ = ["OnnxReport", "OnnxSite", "verify"]

logger = logging.getLogger("torch_quant")

_FUSED = frozenset({
    "QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger",
    "ConvInteger", "DynamicQuantizeMatMul", "MatMulNBits",
})  # fmt: skip
_PRODUCTS = frozenset({
    "Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul",
    "TransposeMatMul", "NhwcFusedConv", "MatMulNBits",
})  # fmt: skip
_MOVES = frozenset({
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Flatten", "Identity",
})  # fmt: skip


@dataclass(frozen=True)
class OnnxSite:
    """One product of the plan in the file.

    Args:
        name: the node, called after its site.
        site: the entry of the plan.
        kernel: what onnxruntime runs.
        reason: why that is no integer kernel, empty if it is one.
    """

    name: str
    site: str
    kernel: str
    reason: str = ""


@dataclass(frozen=True)
class OnnxReport:
    """What :meth:`OnnxBackend.verify` found; ``print`` shows it.

    Args:
        path: the file.
        version: the torch_quant that wrote it, empty if another program did.
        calibration: how its ranges were found.
        opset: its ONNX operator set.
        runtime: the onnxruntime that loaded it.
        operators: how many of each operator onnxruntime runs.
        sites: every product that the file quantizes.
        missing: quantized sites of the plan that the file has no node for.
    """

    path: str
    version: str
    calibration: Mapping[str, Any]
    opset: int
    runtime: str
    operators: Mapping[str, int]
    sites: tuple[OnnxSite, ...]
    missing: tuple[str, ...] = ()

    @property
    def fused(self) -> tuple[OnnxSite, ...]:
        """Those that run on integer kernels."""
        return tuple(site for site in self.sites if not site.reason)

    @property
    def not_fused(self) -> tuple[OnnxSite, ...]:
        """Those that run in float, each with the reason."""
        return tuple(site for site in self.sites if site.reason)

    @property
    def left_out(self) -> dict[str, str]:
        """Node or site -> why it does not run on an integer kernel."""
        floats = {site.name: f"{site.kernel}: {site.reason}" for site in self.not_fused}
        return floats | dict.fromkeys(self.missing, "planned in int8, but not in the file")

    @property
    def complete(self) -> bool:
        """Whether all that is planned in int8 runs in int8."""
        return not self.left_out

    def __str__(self) -> str:
        kernels = Counter(site.kernel for site in self.fused)
        names = ", ".join(f"{count} {kernel}" for kernel, count in kernels.items())
        lines = [
            f"{self.path}: valid, opset {self.opset}, written by "
            f"{f'torch_quant {self.version}' if self.version else 'another program'}",
            f"onnxruntime {self.runtime}: {len(self.fused)} of {len(self.sites)} quantized "
            f"products on integer kernels{f' ({names})' if names else ''}",
        ]
        lines += [f"  {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)


def verify(path: str | os.PathLike[str]) -> OnnxReport:
    """Check the file, load it in onnxruntime, and compare what is fused with the plan.

    Raises:
        BackendUnavailable: onnx or onnxruntime is not installed.
        InvalidConfig: the file cannot be read, is no valid model, or does not load.
    """
    if missing := missing_packages("onnx", "onnxruntime"):
        raise BackendUnavailable(f"verify: {missing}")
    import onnx
    import onnxruntime

    file = os.fspath(path)
    try:
        onnx.checker.check_model(file, full_check=True)
        model = onnx.load(file)
    except Exception as error:  # of several unrelated classes
        raise InvalidConfig(f"{file} is no valid ONNX model: {_first_line(error)}") from error
    try:
        optimized = _optimized(file)
    except Exception as error:  # onnxruntime's own classes
        raise InvalidConfig(f"onnxruntime does not load {file}: {_first_line(error)}") from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    plan = QuantPlan.from_dict(json.loads(metadata.get("torch_quant.plan", '{"sites": []}')))
    sites = _sites(_View.of(model), _View.of(optimized), plan)
    found = {site.site for site in sites}
    return OnnxReport(
        path=file,
        version=metadata.get("torch_quant.version", ""),
        calibration=json.loads(metadata.get("torch_quant.calibration", "{}")),
        opset=next((each.version for each in model.opset_import if each.domain == ""), 0),
        runtime=onnxruntime.__version__,
        operators=dict(Counter(node.op_type for node in optimized.graph.node).most_common()),
        sites=tuple(sites),
        missing=tuple(
            name for name in plan.quantized if plan[name].op != "embedding" and name not in found
        )
        if metadata.get("torch_quant.piece") is None
        else (),
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def _optimized(file: str) -> Any:
    """The model as onnxruntime's CPU provider runs it."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.log_severity_level = 3
        # What comes after are changes of layout, which rename nodes.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath, load_external_data=False)


@dataclass
class _View:
    """A graph by producer, reader and constant."""

    nodes: list[Any]
    made: dict[str, Any] = field(default_factory=dict)
    read: dict[str, list[Any]] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    outputs: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: Any) -> _View:
        view = cls(list(model.graph.node))
        view.outputs = frozenset(each.name for each in model.graph.output)
        view.types = {each.name: each.data_type for each in model.graph.initializer}
        for node in view.nodes:
            for name in node.output:
                view.made[name] = node
            for name in node.input:
                view.read.setdefault(name, []).append(node)
        return view

    def before(self, node: Any, index: int) -> Any:
        """What makes an input, behind nodes that only move data; None for a constant or input."""
        if index >= len(node.input):
            return None
        found = self.made.get(node.input[index])
        while found is not None and found.op_type in _MOVES:
            found = self.made.get(found.input[0])
        return found

    def is_quantized(self, node: Any, entry: SitePlan | None) -> bool:
        """Whether what is to be quantized is dequantized right before the product."""
        if node.op_type == "MatMulNBits":
            return True
        weight_alone = entry is not None and entry.quantized and entry.activation is None
        sides = [self.before(node, i) for i in ((1,) if weight_alone else (0, 1))]
        return all(side is not None and side.op_type == "DequantizeLinear" for side in sides)

    def block_size(self, node: Any) -> int:
        """Inputs that share a scale of its weight, 0 if that is not in blocks."""
        found = self.before(node, 1)
        attributes = () if found is None else found.attribute
        return next((each.i for each in attributes if each.name == "block_size"), 0)


def _sites(file: _View, optimized: _View, plan: QuantPlan) -> list[OnnxSite]:
    kernels = {node.name: node for node in optimized.nodes}
    found = []
    for node in file.nodes:
        entry = _entry(node.name, plan)
        if node.op_type not in _PRODUCTS or not file.is_quantized(node, entry):
            continue
        site = entry.name if entry else node.name
        kernel = kernels.get(node.name)
        if kernel is None:
            kernel = _by_result(node, optimized)
        if kernel is None:
            found.append(OnnxSite(node.name, site, "?", "onnxruntime has no node of this name"))
        elif kernel.op_type in _FUSED:
            found.append(OnnxSite(node.name, site, kernel.op_type))
        else:
            reason = _reason(node, file, optimized, kernel)
            found.append(OnnxSite(node.name, site, kernel.op_type, reason))
    return found


def _by_result(node: Any, optimized: _View) -> Any:
    """The node that makes what ``node`` made, where another name was given to it."""
    return optimized.made.get(node.output[0])


def _entry(name: str, plan: QuantPlan) -> SitePlan | None:
    """The plan's site of a node: attention's two products share one."""
    return plan.get(name) or plan.get(name.rpartition(".")[0])


def _reason(node: Any, file: _View, optimized: _View, kernel: Any) -> str:
    """Why a product with quantized operands stayed in float."""
    kind = node.op_type
    if kind == "ConvTranspose":
        return "onnxruntime has no int8 kernel for ConvTranspose"
    if kind == "Conv":
        readers = [each.op_type for each in file.read.get(node.output[0], [])]
        behind = _behind_rectifier(node, file)
        if node.output[0] in file.outputs or behind != ["QuantizeLinear"]:
            return (
                "QLinearConv gives integers only, but the result is read by "
                f"{' and '.join(sorted(set(behind or readers))) or 'nothing but the output'}"
            )
    if kind in ("Conv", "Gemm") and len(node.input) > 2 and node.input[2]:
        bias = file.made.get(node.input[2])
        if bias is None or bias.op_type != "DequantizeLinear":
            return "its bias is float; the kernel wants int32 through DequantizeLinear"
    if (size := file.block_size(node)) and (size < 16 or size & (size - 1)):
        return f"its weight has a scale for each {size} inputs; MatMulNBits wants 16, 32, 64 ..."
    if size and len(file.read[file.before(node, 1).input[0]]) + len(file.read[node.input[1]]) > 2:
        return "its weight serves several products; export_onnx(matmul_nbits=True) has a kernel"
    kinds = [file.types.get(each.input[2]) for each in _dequantizers(node, file)]
    return (
        f"onnxruntime left it as {kernel.op_type}, between "
        f"{_names(optimized.made.get(name) for name in kernel.input[:2])} and "
        f"{_names(optimized.read.get(kernel.output[0], []))} (zero point types {kinds})"
    )


def _behind_rectifier(node: Any, file: _View) -> list[str]:
    """The readers' operators; those of a rectifier's result where that alone reads the product."""
    readers = file.read.get(node.output[0], [])
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        readers = file.read.get(readers[0].output[0], [])
    return [each.op_type for each in readers]


def _dequantizers(node: Any, file: _View) -> list[Any]:
    found = [file.before(node, i) for i in (0, 1)]
    return [each for each in found if each is not None and len(each.input) > 2]


def _names(nodes: Any) -> str:
    return ", ".join(sorted({node.op_type for node in nodes if node is not None})) or "nothing"
