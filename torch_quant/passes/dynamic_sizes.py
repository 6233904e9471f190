"""Keep sizes dynamic under ``torch.jit.trace``.

Traced, ``aten.sym_size.int`` yields a plain int, and an ATen overload refuses a traced one. So
sizes are read by ``Tensor.size`` and every operator that takes one is called by its Python name,
whose argument parser records the size as a value.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.ops.arguments import argument, arguments, in_order, retarget
from torch_quant.ops.functions import graph_function
from torch_quant.passes.base import PassContext

__all__ = ["dynamic_sizes"]

aten = torch.ops.aten


def _slice_to_index(node: fx.Node) -> None:
    """``slice(x, dim, start, end, step)`` as ``x[..., start:end:step]``."""
    x, dim, start, end, step = arguments(node).values()
    axis = dim if dim >= 0 else x.meta["val"].dim() + dim
    index = (*[slice(None)] * axis, slice(start, end, step))
    retarget(node, operator.getitem, (x, index))


def _upsamplings() -> dict[Any, tuple[str, bool]]:
    """ATen's upsampling overloads -> (mode of ``interpolate``, antialiased)."""
    modes = {"upsample_linear1d": "linear", "upsample_trilinear3d": "trilinear"}
    for kind in ("bilinear", "bicubic"):
        modes[f"upsample_{kind}2d"] = modes[f"_upsample_{kind}2d_aa"] = kind
    for dims in (1, 2, 3):
        modes[f"upsample_nearest{dims}d"] = "nearest"
        modes[f"_upsample_nearest_exact{dims}d"] = "nearest-exact"
    return {getattr(aten, name).vec: (mode, name.endswith("_aa")) for name, mode in modes.items()}


_UPSAMPLE = _upsamplings()


def _upsample_to_interpolate(node: fx.Node) -> None:
    target: Any = node.target
    mode, antialias = _UPSAMPLE[target]
    given = arguments(node)
    kwargs = {"size": given["output_size"], "mode": mode, "scale_factor": given["scale_factors"]}
    if not mode.startswith("nearest"):
        kwargs |= {"align_corners": given["align_corners"], "antialias": antialias}
    node.target = torch.nn.functional.interpolate
    node.args, node.kwargs = (given["input"],), kwargs


def _real(n: Any) -> Any:
    """A size as a real number: Python's floats are float64, and so is a traced one."""
    return n.to(torch.float64) if isinstance(n, Tensor) else n


@graph_function
def size_float(n: Any) -> Any:
    """A size as a real number, which ``float`` would take for a constant while exporting."""
    return _real(n) if isinstance(n, Tensor) else torch.sym_float(n)


@graph_function
def size_sqrt(n: Any) -> Any:
    """The square root of a size, which is a tensor while tracing."""
    return _real(n) ** 0.5


@graph_function
def size_power(a: Any, b: Any) -> Any:
    """A power of a size."""
    return _real(a) ** b


@graph_function
def size_ratio(a: Any, b: Any) -> Any:
    """The quotient of sizes, as a real number."""
    return _real(a) / _real(b)


@graph_function
def size_max(a: Any, b: Any) -> Any:
    """The larger of two sizes."""
    traced = isinstance(a, Tensor) or isinstance(b, Tensor)
    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b)) if traced else max(a, b)


@graph_function
def size_min(a: Any, b: Any) -> Any:
    """The smaller of two sizes."""
    traced = isinstance(a, Tensor) or isinstance(b, Tensor)
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b)) if traced else min(a, b)


_ARITHMETIC: dict[Any, Any] = {
    torch.sym_max: size_max,
    torch.sym_min: size_min,
    torch.sym_float: size_float,
    torch._sym_sqrt: size_sqrt,  # type: ignore[attr-defined]
    operator.pow: size_power,
    operator.truediv: size_ratio,
}


_READS: dict[Any, str] = {aten.sym_size.int: "size", aten.sym_numel.default: "numel"}


def _takes_size(node: fx.Node, sizes: set[fx.Node]) -> bool:
    return any(argument in sizes for argument in node.all_input_nodes)


def _is_aten(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "aten"


def dynamic_sizes(context: PassContext) -> int:
    """Rewrite size reads and their users; returns how many nodes changed."""
    sizes: set[fx.Node] = set()
    changed = 0
    for node in context.graph.nodes:
        if node.target in _READS:
            in_order(node)
            node.op, node.target = "call_method", _READS[node.target]
            sizes.add(node)
            changed += 1
        elif node.op == "call_function" and _takes_size(node, sizes):
            if not _is_aten(node):
                sizes.add(node)  # arithmetic of sizes
                node.target = _ARITHMETIC.get(node.target, node.target)
                continue
            if node.target is aten.slice.Tensor:
                _slice_to_index(node)
            elif node.target in _UPSAMPLE:
                _upsample_to_interpolate(node)
            else:
                _call_by_name(node)
            changed += 1
    return changed


def _call_by_name(node: fx.Node) -> None:
    name = node.target._opname  # type: ignore[union-attr]
    in_order(node)  # Python has other names for some
    takes_tensor = isinstance(argument(node, 0), fx.Node)
    if takes_tensor and hasattr(Tensor, name):
        node.op, node.target = "call_method", name
    elif hasattr(torch, name):
        node.target = getattr(torch, name)
    elif hasattr(torch.nn.functional, name):
        node.target = getattr(torch.nn.functional, name)
    elif hasattr(torch._C._nn, name):  # im2col and col2im
        node.target = getattr(torch._C._nn, name)
