"""Ranges of activations in a quantized ONNX file, brought back to the sites of the model.

Nodes are matched by what exporters leave of the modules: the weight's name (``layers.0.weight``),
the scopes in a node's metadata (``torch.onnx.export(dynamo=True)``), or the node's own name
(``/layers.0/MatMul``, of the older exporter). Signed and unsigned codes of one scale are the same
grid, so all become unsigned ones.
"""

from __future__ import annotations

import ast
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.migrate.ranges import migration_of, sites_of
from torch_quant.migrate.result import Migration, Rows

__all__ = ["from_onnx"]

_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast", "Expand")
_INTEGERS = {
    "QLinearConv": ((0, 1, 2),),
    "QLinearMatMul": ((0, 1, 2), (3, 4, 5)),
    "QGemm": ((0, 1, 2),),
    "MatMulIntegerToFloat": ((0, 2, 4), (1, 3, 5)),
}
"""Operators on integers -> where tensor, scale and zero point of each operand stand."""
_WEIGHT_ENDS = ("_quantized", "_DequantizeLinear_Output", "_QuantizeLinear_Output", "_transposed")
_SCOPES = "pkg.torch.onnx.name_scopes"
_SCALE = re.compile(r"\.input(_\d+)?_scale$")
_ABSENT = "not in the ONNX file"


def from_onnx(path: str | os.PathLike[str], model: nn.Module, example_inputs: Any) -> Migration:
    """The ranges of activations that a quantized ONNX file has, for the sites of a model.

    It reads QuantizeLinear and DequantizeLinear around products, and products on integers, as
    onnxruntime's ``quantize_static`` writes them. Weights have scales that follow from them.
    Products that the file has in float, or that cannot be told, stay in float.

    Args:
        path: the file; needs ``pip install onnx``.
        model: the float model that it was exported from.
        example_inputs: one call of the model, as for :meth:`Quantizer.calib`.

    Raises:
        InvalidConfig: it cannot be read, is no whole graph, has scales that are none, is not
            quantized, or is of another model.

    >>> from_onnx("missing.onnx", nn.Linear(4, 2), torch.ones(1, 4))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torch_quant.errors.InvalidConfig: cannot read the ONNX file missing.onnx: ...
    """
    graph = _Graph(_loaded(path), str(path))
    products = list(graph.products())
    origin = f"{path}, a quantized ONNX file"
    if not any(product.grids for product in products):
        raise InvalidConfig(
            f"{path} has no product with quantized inputs: expected QuantizeLinear before one, as "
            "onnxruntime.quantization.quantize_static writes it"
        )
    plan, rows = sites_of(model, example_inputs), Rows()
    found = _match(products, plan, rows)
    ranges: dict[str, list[float]] = {}
    sites = [_edited(site, found.get(name), ranges) for name, site in plan.items()]
    return migration_of(origin, QuantPlan(sites), ranges, rows)


def _loaded(path: str | os.PathLike[str]) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise InvalidConfig(f"{path}: reading ONNX files needs onnx: pip install onnx") from error
    try:
        return onnx.load(os.fspath(path))
    except Exception as error:  # the parser of protobuf raises classes of its own
        raise InvalidConfig(
            f"cannot read the ONNX file {path}: {type(error).__name__}: {error}"
        ) from error


@dataclass(frozen=True)
class _Grid:
    """Scale and zero point of one tensor.

    Args:
        low: the smallest value.
        high: the largest.
        bits: of a code.
    """

    low: float
    high: float
    bits: int


@dataclass(frozen=True)
class _Product:
    """A product of the file.

    Args:
        name: of the node, for the report.
        kind: its op type.
        modules: the modules that it may be of, the likeliest first.
        sites: what it may be itself, in a file that this package wrote.
        grids: of its inputs, without a constant weight; empty if one is in float.
        weighted: whether an operand is constant.
    """

    name: str
    kind: str
    modules: tuple[str, ...]
    sites: tuple[str, ...]
    grids: tuple[_Grid, ...]
    weighted: bool

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


class _Graph:
    """A graph of ONNX, read from its outputs back.

    Args:
        model: the file.
        path: what messages call it.
    """

    def __init__(self, model: Any, path: str) -> None:
        from onnx import numpy_helper

        self._path, graph = path, model.graph
        self.nodes = list(graph.node)
        self._made = {out: node for node in self.nodes for out in node.output}
        self._constants = {each.name: each for each in graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self._counted(node, 0)
                self._constants[node.output[0]] = node.attribute[0].t
        self._array = numpy_helper.to_array

    def products(self) -> Iterator[_Product]:
        """Every product, in the order of the file."""
        for node in self.nodes:
            if node.op_type in _PRODUCTS:
                self._counted(node, 2)
                operands = [self._source(name) for name in node.input[:2]]
            elif node.op_type in _INTEGERS:
                places = _INTEGERS[node.op_type]
                if len(places) == 1:  # the weight stands behind
                    places = (*places, (3, 4, 5))
                self._counted(node, 4 if node.op_type == "MatMulIntegerToFloat" else 6)
                given = [*node.input, "", ""]  # zero points may be left out at the end
                operands = [(given[a], given[b], given[c]) for a, b, c in places]
            else:
                continue
            weights = [x for x in (self._weight(each[0]) for each in operands) if x]
            moving = [each for each in operands if not self._weight(each[0])]
            grids = [self._grid(scale, zero) for _, scale, zero in moving]
            whole = tuple(grid for grid in grids if grid is not None)
            yield _Product(
                node.name or node.output[0],
                node.op_type,
                tuple(self._modules(node, weights)),
                (node.name, *(_SCALE.sub("", scale) for _, scale, _ in moving if scale)),
                whole if len(whole) == len(grids) else (),
                bool(weights),
            )

    def _source(self, name: str) -> tuple[str, str, str]:
        """The tensor behind what only moves data, with its scale and zero point, empty if none."""
        for node in self._makers(name):
            if node.op_type == "DequantizeLinear":
                self._counted(node, 2)
                zero = node.input[2] if len(node.input) > 2 else ""
                return node.input[0], node.input[1], zero
            if node.op_type not in _MOVES:
                break
            self._counted(node, 1)
            name = node.input[0]
        return name, "", ""

    def _weight(self, name: str) -> str:
        """The initializer that a tensor is, behind what moves or rounds it; empty if it is none."""
        steps = (*_MOVES, "QuantizeLinear", "DequantizeLinear")
        for node in self._makers(name):
            if name in self._constants or node.op_type not in steps:
                break
            self._counted(node, 1)
            name = node.input[0]
        return name if name in self._constants else ""

    def _makers(self, name: str) -> Iterator[Any]:
        """The node that makes a tensor, that which makes its first input, and so on."""
        passed = set()
        while (node := self._made.get(name)) is not None:
            if name in passed:
                raise self._wrong(node, "a graph without cycles", f"{name!r} made of itself")
            passed.add(name)
            yield node
            if not node.input:
                return
            name = node.input[0]

    def _counted(self, node: Any, inputs: int) -> None:
        """Refuse a node with too few inputs, or without a result."""
        if len(node.input) < inputs:
            raise self._wrong(node, f"{inputs} inputs or more", f"{len(node.input)}")
        if not node.output:
            raise self._wrong(node, "a result", "none")

    def _wrong(self, node: Any, expected: str, got: str) -> InvalidConfig:
        name = node.name or next(iter(node.output), "(without a name)")
        return InvalidConfig(
            f"{self._path}: {node.op_type} {name}: expected {expected}; got {got}: "
            "onnx.checker.check_model(path) says whether a file is whole"
        )

    def _values(self, name: str) -> Any:
        """An initializer as an array of one dimension."""
        try:
            return self._array(self._constants[name]).reshape(-1)
        except Exception as error:  # whatever is wrong with its bytes and sizes
            raise InvalidConfig(
                f"{self._path}: the initializer {name!r} cannot be read: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _grid(self, scale: str, zero: str) -> _Grid | None:
        if scale not in self._constants or (zero and zero not in self._constants):
            return None
        steps, offset = self._values(scale), self._values(zero) if zero else None
        kind = "uint8" if offset is None else str(offset.dtype)
        if steps.size != 1 or kind not in ("uint8", "int8", "uint16", "int16"):
            return None
        if offset is not None and offset.size != 1:
            raise InvalidConfig(
                f"{self._path}: the zero point {zero!r}: expected one, as the scale {scale!r} has; "
                f"got {offset.size}: quantize the model again"
            )
        bits = 8 if kind.endswith("8") else 16
        size, most = float(steps[0]), torch.finfo(torch.float32).max / 2**bits
        if not 0 < size <= most:
            raise InvalidConfig(
                f"{self._path}: the scale {scale!r}: expected a number above 0 and up to "
                f"{most:.4g}; got {size}: quantize the model again"
            )
        first = 0 if kind.startswith("u") else -(2 ** (bits - 1))
        point = int(offset[0]) if offset is not None else 0
        return _Grid((first - point) * size, (first + 2**bits - 1 - point) * size, bits)

    def _modules(self, node: Any, weights: list[str]) -> Iterator[str]:
        for name in weights:
            for end in _WEIGHT_ENDS:
                name = name.removesuffix(end)
            if name.endswith(".weight"):
                yield name.removesuffix(".weight")
        scopes = next((each.value for each in node.metadata_props if each.key == _SCOPES), None)
        if scopes is not None:
            try:
                listed = ast.literal_eval(scopes)
            except (ValueError, SyntaxError):  # another exporter's
                listed = []
            if isinstance(listed, list) and len(listed) > 1:
                yield str(listed[-2])
        if node.name.startswith("/"):
            yield _scope(node.name)


def _scope(name: str) -> str:
    """The module of ``/layers.0/layers.0.1/MatMul``, whose sequences repeat where they stand.

    >>> _scope("/layers.0/layers.0.1/MatMul"), _scope("/MatMul"), _scope("/encoder/q/MatMul")
    ('layers.0.1', '', 'encoder.q')
    """
    parts: list[str] = []
    for part in name.strip("/").split("/")[:-1]:
        if parts and part.startswith(f"{parts[-1]}."):
            parts[-1] = part
        else:
            parts.append(part)
    return ".".join(parts)


def _match(products: list[_Product], plan: QuantPlan, rows: Rows) -> dict[str, _Product]:
    """Site -> its product; the others are noted."""
    anonymous = defaultdict(list)
    for name, site in plan.items():
        if site.weight is None and site.op == "matmul":
            anonymous[name.rpartition(".")[0]].append(name)
    found: dict[str, _Product] = {}
    for product in products:
        name = _site(product, plan, anonymous, found)
        if name:
            found[name] = product
        elif product.grids:
            rows.left_out(
                str(product),
                "no site stands for it: calibrate, if it is a product of attention",
            )
    return found


def _site(
    product: _Product,
    plan: QuantPlan,
    anonymous: dict[str, list[str]],
    found: dict[str, _Product],
) -> str:
    for module in product.modules:
        calls = [n for n in plan if n.partition("@")[0] == module and n not in found]
        if product.weighted and calls:
            return calls[0]
        if not product.weighted and anonymous[module]:
            return anonymous[module].pop(0)
    own = (name for name in product.sites if name in plan and name not in found)
    name = next((name for name in own if product.weighted == (plan[name].weight is not None)), "")
    waiting = anonymous[name.rpartition(".")[0]]
    if name in waiting:
        waiting.remove(name)
    return name


def _edited(site: SitePlan, product: _Product | None, ranges: dict[str, list[float]]) -> SitePlan:
    if product is None:
        return replace(site, quantized=False, reason=_ABSENT)
    widths = {grid.bits for grid in product.grids}
    if len(product.grids) != len(site.inputs) or len(widths) != 1:
        return replace(site, quantized=False, reason="left in float by the ONNX file")
    for key, grid in zip(site.inputs, product.grids, strict=True):
        ranges[key] = [grid.low, grid.high]
    return replace(site, quantized=True, reason="", activation=QuantSpec.of(bits=widths.pop()))
