"""Root mean square norms, however they are written, as one kernel call each.

    n = x * rsqrt(mean(x^2) + eps)          or x / sqrt(...), or aten.rms_norm
    y = n * weight, n * (weight + 1), or n

A sum of two tensors of one shape before it is computed in the same pass.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from torch_quant.native.rms_norm import ADD_RMS_NORM, RMS_NORM
from torch_quant.ops.arguments import argument, positional
from torch_quant.passes.base import PassContext, erase_call

__all__ = ["fuse_rms_norms"]

aten = torch.ops.aten

_ROOTS = (aten.rsqrt.default, aten.sqrt.default)
_SUMS = (aten.add.Tensor, aten.add.Scalar, aten.add_.Tensor, aten.add_.Scalar)
_COPIES = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default,
           aten.clone.default)  # fmt: skip


@dataclass
class _Norm:
    """A norm that was found: its last node, what it reads, and its numbers."""

    last: fx.Node
    x: fx.Node
    eps: float
    weight: fx.Node | None = None
    offset: float = 0.0


def fuse_rms_norms(context: PassContext) -> int:
    """Put one operator in the place of each norm of float32; returns how many there were."""
    count = 0
    for node in list(context.graph.nodes):  # one by one: a norm may read another, or its sum
        norm = None if node._erased else _norm_at(node)
        if norm is not None and _is_float(norm.last):
            _with_weight(norm)
            _replace(norm)
            count += 1
    return count


def _value(x: Any) -> Tensor | None:
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _is_float(x: Any) -> bool:
    value = _value(x)
    return value is not None and value.dtype is torch.float32 and value.dim() > 0


def _source(x: Any) -> Any:
    """``x``, behind casts from float32 to float32."""
    while isinstance(x, fx.Node) and x.target in _COPIES and _is_float(x):
        before = argument(x, 0)
        if not _is_float(before):
            break
        x = before
    return x


def _norm_at(node: fx.Node) -> _Norm | None:
    """The norm whose root, or whose operator, ``node`` is; without its weight."""
    if node.target is aten.rms_norm.default:
        x, shape, weight, eps = positional(node)
        if len(shape) != 1 or not _is_float(x) or not (weight is None or _is_vector(weight, x)):
            return None
        eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
        return _Norm(node, x, eps, weight)
    if node.target not in _ROOTS:
        return None
    total = argument(node, 0)
    if not isinstance(total, fx.Node) or total.target not in _SUMS:
        return None
    mean, eps = argument(total, 0), argument(total, 1)
    if not isinstance(eps, (int, float)) or argument(total, "alpha") != 1:
        return None
    x = _squared(mean)
    if x is None or not _is_float(x) or _used_by_others(mean, total, node):
        return None
    (last,) = node.users
    sides = [_source(side) for side in positional(last)[:2]]
    inverse = node.target is aten.rsqrt.default
    if inverse and last.target is aten.mul.Tensor and node in sides:
        sides.remove(node)
        return _Norm(last, x, float(eps)) if sides == [x] else None
    if not inverse and last.target is aten.div.Tensor and sides == [x, node]:
        return _Norm(last, x, float(eps))
    return None


def _used_by_others(*nodes: fx.Node) -> bool:
    return any(len(node.users) != 1 for node in nodes)


def _squared(mean: Any) -> fx.Node | None:
    """``x`` of ``mean(x^2, -1, keepdim=True)``."""
    if not isinstance(mean, fx.Node) or mean.target is not aten.mean.dim:
        return None
    square, axes = argument(mean, 0), argument(mean, 1)
    value = _value(square)
    if value is None or not argument(mean, "keepdim") or len(square.users) != 1:
        return None
    if axes is None or [axis % value.dim() for axis in axes] != [value.dim() - 1]:
        return None
    sides = positional(square)[:2]
    power = square.target is aten.pow.Tensor_Scalar and sides[1] == 2
    itself = square.target is aten.mul.Tensor and sides[0] is sides[1]
    if not (power or itself or square.target is aten.square.default):
        return None
    x = _source(sides[0])
    return x if isinstance(x, fx.Node) else None


def _is_vector(x: Any, of: fx.Node) -> bool:
    """Whether ``x`` is a tensor of the model, a number for each of the last dimension of ``of``."""
    value, whole = _value(x), _value(of)
    if value is None or whole is None or x.op != "get_attr" or value.dtype is not torch.float32:
        return False
    return value.dim() == 1 and _equal(value.shape[0], whole.shape[-1])


def _with_weight(norm: _Norm) -> None:
    """Take a weight in that multiplies the norm, and nothing else reads the norm."""
    if norm.weight is not None:
        return
    last = norm.last
    while len(last.users) == 1 and _source(user := next(iter(last.users))) is not user:
        last = user
    if len(last.users) != 1:
        return
    (user,) = last.users
    if user.target is not aten.mul.Tensor or not _is_float(user):
        return
    sides = list(positional(user)[:2])
    if sides.count(last) != 1:
        return
    sides.remove(last)
    weight, offset = _source(sides[0]), 0.0
    if isinstance(weight, fx.Node) and weight.target in _SUMS and len(weight.users) == 1:
        terms = list(positional(weight)[:2])
        numbers = [x for x in terms if isinstance(x, (int, float))]
        nodes = [_source(x) for x in terms if isinstance(x, fx.Node)]
        if len(numbers) == len(nodes) == 1 and argument(weight, "alpha") == 1:
            weight, offset = nodes[0], float(numbers[0])
    if _is_vector(weight, norm.x):
        norm.last, norm.weight, norm.offset = user, weight, offset


def _equal(a: int | SymInt, b: int | SymInt) -> bool:
    """Whether two sizes are one expression; to compare them would take those of the example."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node._expr == b.node._expr)


def _terms(x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Both of a sum of two floats of one shape."""
    if x.target is not aten.add.Tensor or argument(x, "alpha") != 1 or not _is_float(x):
        return None
    sides = positional(x)[:2]
    shape = x.meta["val"].shape
    for side in sides:
        if not _is_float(side) or len(side.meta["val"].shape) != len(shape):
            return None
        if not all(map(_equal, side.meta["val"].shape, shape)):
            return None
    return sides[0], sides[1]


def _replace(norm: _Norm) -> None:
    graph, last, numbers = norm.last.graph, norm.last, (norm.weight, norm.eps, norm.offset)
    terms = _terms(norm.x)
    with graph.inserting_after(norm.x if terms else last):
        if terms is None:
            new = graph.call_function(RMS_NORM, (norm.x, *numbers))
        else:
            both = graph.call_function(ADD_RMS_NORM, (*terms, *numbers))
    if terms is not None:
        if norm.weight is not None and both < norm.weight:
            both.prepend(norm.weight)
        with graph.inserting_after(both):
            new = graph.call_function(operator.getitem, (both, 1))
        with graph.inserting_after(both):
            total = graph.call_function(operator.getitem, (both, 0))
        total.meta = dict(norm.x.meta)
        norm.x.replace_all_uses_with(total)
    new.meta = dict(last.meta)
    last.replace_all_uses_with(new)
    erase_call(last)
    if terms is not None:
        erase_call(norm.x)
