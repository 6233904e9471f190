"""What IPEX really fused: read off the graph that ran, product by product."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.backends.ipex import ops
from torch_quant.backends.ipex.bags import BAG_KERNEL
from torch_quant.backends.ipex.lstm import LSTM_KERNEL
from torch_quant.backends.ipex.trace import WRITES, FusedGraph
from torch_quant.convert.quantized import quantized_graphs
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import InvalidConfig
from torch_quant.graph.examples import call_example, example_call
from torch_quant.graph.sites import KEY
from torch_quant.ops.arguments import argument, positional

__all__ = ["ALONE", "IPEXReport", "verify"]

aten = torch.ops.aten

_GROUP = "ipex::LlgaFusionGroup"
_KINDS: dict[str, str] = {
    "linear": "linear", "matmul": "matmul", "bmm": "matmul", "mm": "matmul",
    "_convolution": "conv", "conv1d": "conv", "conv2d": "conv", "conv3d": "conv",
    "conv_transpose1d": "conv", "conv_transpose2d": "conv", "conv_transpose3d": "conv",
}  # fmt: skip
"""Name of an operator -> the kind of product that it is."""
ALONE = (LSTM_KERNEL, BAG_KERNEL)
"""The operators that IPEX runs outside of its fused partitions, in the order they are lowered."""
_OPS = {alone.kernel: alone.op for alone in ALONE}
_FUNCTIONS = {function: alone.op for alone in ALONE for function in alone.functions}
_MISSING = {alone.op: alone.missing for alone in ALONE}
_WEIGHT = re.compile(r"(^|\.)weight(_ih_l0)?$")
"""The last part of what a weight is called."""
_PRODUCTS = {"scaled_dot_product_attention": ("matmul", "matmul")}


@dataclass(frozen=True)
class Product:
    """One product: its kind, the grids of its activations, a fingerprint of its weight."""

    kind: str
    grids: tuple[tuple[float, int], ...]
    weight: tuple[Any, ...] = ()


@dataclass(frozen=True)
class IPEXReport:
    """What :meth:`IPEXBackend.verify` found; ``print`` shows it.

    Args:
        partitions: fused groups in the graphs that ran.
        int8: kind of product -> how many run on int8 kernels.
        expected: kind of product -> how many should.
        left_out: product -> why it does not; named by site where that is known.
    """

    partitions: int
    int8: Mapping[str, int]
    expected: Mapping[str, int]
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every product that should runs on an int8 kernel."""
        return not self.left_out

    def __str__(self) -> str:
        counts = ", ".join(
            f"{self.int8.get(kind, 0)} of {count} {kind}" for kind, count in self.expected.items()
        )
        lines = [f"{self.partitions} fused partitions; on int8 kernels: {counts or 'nothing'}"]
        lines += [f"  {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)


def verify(model: nn.Module, example_inputs: Any, plan: QuantPlan | None = None) -> IPEXReport:
    """Run ``model`` and read its graphs; see :meth:`IPEXBackend.verify`."""
    with torch.no_grad():
        if isinstance(model, torch.jit.ScriptModule):
            tensors = _positional(model, example_inputs)
            for _ in range(2):
                model(*tensors)
            return _compare_counts(model.graph_for(*tensors), plan)
        ran: list[tuple[str, QuantizedGraph, tuple[Any, ...]]] = []

        def note(path: str, graph: Any, args: tuple[Any, ...]) -> None:
            ran.append((path, graph, args))

        hooks = [
            graph.register_forward_pre_hook(partial(note, module.quantization.path))
            for module, graph in quantized_graphs(model)
        ]
        try:
            call_example(model, example_inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return _compare(ran)


def _positional(model: torch.jit.ScriptModule, example: Any) -> tuple[Any, ...]:
    args, kwargs = example_call(example)
    return (*args, *kwargs.values())


# What was fused


@dataclass
class _Found:
    partitions: int = 0
    fused: list[Product] = field(default_factory=list)
    unfused: list[tuple[Product, str]] = field(default_factory=list)


def _read(graph: Any, found: _Found, *, inside: bool = False) -> None:
    for node in graph.nodes():
        kind = node.kind()
        if kind == _GROUP:
            found.partitions += 1
            _read(node.g("Subgraph"), found, inside=True)
        elif kind in _OPS:
            found.fused.append(Product(_OPS[kind], (), _first_weight(node)))
        elif kind.partition("::")[2].removeprefix("_") in _KINDS or _base(kind) in _KINDS:
            product = _product_of(node, _KINDS[_base(kind)])
            if product is None:
                continue
            if inside:
                found.fused.append(product)
            else:
                found.unfused.append((product, kind))
        for block in node.blocks():
            _read(block, found)


def _base(kind: str) -> str:
    """``ipex::matmul_mul`` -> ``matmul``; ``ipex_prepack::linear_run`` -> ``linear``."""
    name = kind.partition("::")[2]
    known = [base for base in _KINDS if name == base or name.startswith(f"{base}_")]
    known += ["_convolution"] if "convolution" in name else []
    return max(known, key=len, default=name)


def _product_of(node: Any, kind: str) -> Product | None:
    """The product that a node of the fused graph computes, None if its operands are not int8."""
    grids = []
    weight: tuple[Any, ...] = ()
    for value in list(node.inputs())[:2]:
        source = value.node()
        if source.kind() == "aten::to":  # in bfloat16
            source = next(iter(source.inputs())).node()
        if source.kind() != "aten::dequantize":
            continue
        names = source.attributeNames()
        if "axis" in names or "qtype" not in names:
            constant = next(iter(source.inputs())).node()
            if constant.kind() == "prim::Constant" and constant.hasAttribute("value"):
                weight = _fingerprint(constant.t("value").int_repr())
                continue
            grids.append(_grid_of(constant))
        else:
            grids.append((source.fs("scales")[0], getattr(source, "is")("zps")[0]))
    return Product(kind, tuple(grids), weight) if grids else None


def _first_weight(node: Any) -> tuple[Any, ...]:
    """Fingerprint of the first int8 constant that a kernel reads, alone or in a list."""
    for value in node.inputs():
        constant = value.toIValue() if value.node().kind() == "prim::Constant" else None
        first = constant[0] if isinstance(constant, list) and constant else constant
        if isinstance(first, Tensor) and first.is_quantized:
            return _fingerprint(first.int_repr())
    return ()


def _grid_of(quantize: Any) -> tuple[float, int]:
    """The grid of a quantize node that was not fused; its constants stand beside it."""
    while quantize.kind() not in ("aten::quantize_per_tensor", "prim::Param", _GROUP):
        inputs = list(quantize.inputs())
        if not inputs:
            return 0.0, 0
        quantize = inputs[0].node()
    if quantize.kind() == _GROUP:
        quantize = next(iter(quantize.g("Subgraph").outputs())).node()
    if quantize.kind() != "aten::quantize_per_tensor":
        return 0.0, 0
    _, scale, zero_point, _ = quantize.inputs()
    return scale.toIValue(), zero_point.toIValue()


def _fingerprint(codes: Tensor) -> tuple[Any, ...]:
    flat = codes.flatten().to(torch.int64)
    return (*codes.shape, int(flat.sum()), int((flat * flat).sum()), *flat[:8].tolist())


# What should be


def _site(node: fx.Node, path: str, codes: str, kind: str) -> str:
    """The site of a product; the graphs of a loaded model name its weight alone.

    Args:
        node: of the product.
        path: of the module whose graph it is in.
        codes: where the graph has the int8 weight.
        kind: of product, for a model that is one layer.
    """
    where = f"{path}.{codes}".strip(".")
    return str(node.meta.get(KEY, _WEIGHT.sub("", where) or kind))


def _expected(body: fx.GraphModule, path: str) -> Iterator[tuple[str, Product]]:
    """Products of dequantized tensors in the lowered graph of a module, each with a name."""
    for node in body.graph.nodes:
        if (op := _FUNCTIONS.get(node.target)) is not None:
            codes = argument(node, "codes")
            first = codes[0] if isinstance(codes, (list, tuple)) else codes
            found = Product(op, (), _fingerprint(body.get_buffer(first.target)))
            yield _site(node, path, first.target, op), found
        kind = _KINDS.get(str(getattr(node.target, "_opname", "")))
        if kind is None:
            continue
        grids = []
        weight: tuple[Any, ...] = ()
        name = str(node.meta.get(KEY, node.name))
        for arg in positional(node)[:2]:
            if arg.target is ops.dequantize:
                quantize = argument(arg, "x")
                grids.append((argument(quantize, "scale"), argument(quantize, "zero_point")))
            elif arg.target is ops.dequantize_weight:
                codes = argument(arg, "codes").target
                weight = _fingerprint(body.get_buffer(codes))
                name = _site(node, path, codes, kind)
        if grids:
            yield name, Product(kind, tuple(grids), weight)


def _same(product: Product) -> tuple[Any, ...]:
    """What two graphs agree on: scales as they are rounded to float32."""
    grids = sorted((f"{scale:.6g}", zero_point) for scale, zero_point in product.grids)
    return product.kind, tuple(grids), product.weight


def _compare(ran: list[tuple[str, QuantizedGraph, tuple[Any, ...]]]) -> IPEXReport:
    partitions = 0
    int8: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    left_out: dict[str, str] = {}
    for path, graph, tensors in ran:
        fused = graph.compiled
        if fused is graph.body:
            for name, product in _expected(graph.body, path):
                expected[product.kind] += 1
                left_out[name] = f"its graph is not compiled: {WRITES}"
            continue
        if not isinstance(fused, FusedGraph):
            raise InvalidConfig("the model was not quantized for Backend.IPEX")
        found = _Found()
        _read(fused.script.graph_for(*tensors), found)
        partitions += found.partitions
        matched = Counter(_same(product) for product in found.fused)
        outside = {_same(product): kind for product, kind in found.unfused}
        for name, product in _expected(graph.body, path):
            expected[product.kind] += 1
            if matched[_same(product)]:
                matched[_same(product)] -= 1
                int8[product.kind] += 1
            else:
                kind = outside.get(_same(product))
                left_out[name] = (
                    f"IPEX runs it as {kind} on dequantized tensors, in no fused partition"
                    if kind
                    else _MISSING.get(
                        product.kind, "it is in no fused partition of the graph that ran"
                    )
                )
    return IPEXReport(partitions, dict(int8), dict(expected), left_out)


def _compare_counts(graph: Any, plan: QuantPlan | None) -> IPEXReport:
    """For a traced module, whose products have no names: counts against the plan."""
    found = _Found()
    _read(graph, found)
    int8 = Counter(product.kind for product in found.fused)
    expected = int8 + Counter(product.kind for product, _ in found.unfused)
    left_out = {
        f"{product.kind} of {product.grids}": f"IPEX runs it as {kind}, in no fused partition"
        for product, kind in found.unfused
    }
    if plan is not None:
        wanted: Counter[str] = Counter()
        for name in plan.quantized:
            op = plan[name].op
            kinds = _PRODUCTS.get(op, ("conv" if op.startswith("conv") else op,))
            wanted.update(kind for kind in kinds if kind != "embedding")
        for kind, count in (wanted - int8).items():
            left_out.setdefault(kind, f"the plan has {count} more than the graph that ran")
        expected = wanted | expected
    return IPEXReport(found.partitions, dict(int8), dict(expected), left_out)
