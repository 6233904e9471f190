"""Between two products: sums, layer norms, factors and rounding in one pass over the floats.

A product that reads codes has a quantizer before it. Where that rounds a layer norm, or a tensor
times a factor for each channel (SmoothQuant's), each operator would read and write all of it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from torch_quant import native
from torch_quant.backends.onednn.ops import LINEAR, QUANTIZE_FAST
from torch_quant.native.rows import NORM_ROWS, ROUND_ROWS
from torch_quant.ops.arguments import argument, positional, set_arguments
from torch_quant.passes.base import PassContext, erase_call

__all__ = ["round_in_one_pass"]

aten = torch.ops.aten


def round_in_one_pass(context: PassContext) -> None:
    """Replace quantizers, and what stands before them; where the kernels are missing, nothing."""
    if native.unavailable() is not None:
        return
    for node in context.graph.find_nodes(op="call_function", target=QUANTIZE_FAST):
        x, *grid = positional(node)
        if not _floats(x):
            continue
        x, factor = _without_factor(x, node)
        if _is_norm(x):
            _lower_norm(node, x, factor, grid)
        elif factor is not None:
            _lower_round(node, x, factor, grid)


def _floats(x: Any) -> bool:
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype is torch.float32 and value.dim() > 0


def _like(x: Any, y: Any) -> bool:
    """Whether both are floats of one shape, whatever sizes the inputs have."""
    if not (_floats(x) and _floats(y)):
        return False
    sizes, others = x.meta["val"].shape, y.meta["val"].shape
    if len(sizes) != len(others):
        return False
    return all(_equal(a, b) for a, b in zip(sizes, others, strict=True))


def _equal(a: int | SymInt, b: int | SymInt) -> bool:
    """Whether two sizes are one expression; to compare them would take those of the example."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node._expr == b.node._expr)


def _is_vector(x: Any, of: fx.Node) -> bool:
    """Whether ``x`` is a constant number for each element of the last dimension of ``of``."""
    if not isinstance(x, fx.Node) or x.op != "get_attr":
        return False
    value: Any = operator.attrgetter(str(x.target))(x.graph.owning_module)
    size = of.meta["val"].shape[-1]
    vector = value.dtype is torch.float32 and value.dim() == 1
    return vector and isinstance(size, int) and value.shape[0] == size


def _without_factor(x: fx.Node, reader: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """``x`` without a factor of each channel that ``reader`` alone reads, and the factor."""
    if x.target is not aten.mul.Tensor or set(x.users) != {reader}:
        return x, None
    real, factor = positional(x)
    known = _like(real, x) and _is_vector(factor, real)
    return (real, factor) if known else (x, None)


def _is_norm(x: fx.Node) -> bool:
    if x.target is not aten.layer_norm.default or len(argument(x, "normalized_shape")) != 1:
        return False
    vectors = (argument(x, "weight"), argument(x, "bias"))
    return _floats(argument(x, 0)) and all(v is None or _is_vector(v, x) for v in vectors)


def _lower_norm(node: fx.Node, norm: fx.Node, factor: fx.Node | None, grid: list[Any]) -> None:
    """A quantizer, the layer norm before it, and the sum before that."""
    graph, before, more = node.graph, argument(norm, 0), None
    x = before
    if before.target is aten.add.Tensor and argument(before, "alpha") == 1:
        sides = argument(before, 0), argument(before, 1)
        if all(_like(side, before) for side in sides):
            x, more = sides
    keep = more is not None and set(before.users) != {norm}
    rounded = node if factor is None else argument(node, 0)
    read = set(norm.users) != {rounded}
    vectors = argument(norm, "weight"), argument(norm, "bias")
    args = (x, more, *vectors, argument(norm, "eps"), factor, *grid, keep, read)
    with graph.inserting_after(before if keep else norm):
        made = graph.call_function(NORM_ROWS, args)
    for constant in (*vectors, factor):
        if constant is not None and made < constant:
            made.prepend(constant)
    replaced = {2: node} | ({1: norm} if read else {}) | ({0: before} if keep else {})
    with graph.inserting_after(made):
        for place, old in replaced.items():
            new = graph.call_function(operator.getitem, (made, place))
            new.meta = dict(old.meta)
            old.replace_all_uses_with(new)
    for old in (node, norm):
        erase_call(old)


def _lower_round(node: fx.Node, x: fx.Node, factor: fx.Node, grid: list[Any]) -> None:
    """A quantizer and the factor before it, by the linear layer before where there is one."""
    if x.target is LINEAR and len(x.users) == 1 and grid[-1] is torch.uint8:
        args = {"out_scale": grid[0], "out_zero_point": grid[1], "out_dtype": grid[2]}
        set_arguments(x, args | {"factor": factor})
        if x < factor:
            x.prepend(factor)
        new = x
    else:
        with node.graph.inserting_before(node):
            new = node.graph.call_function(ROUND_ROWS, (x, factor, "none", *grid))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    erase_call(node)
