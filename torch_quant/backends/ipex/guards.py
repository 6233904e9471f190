"""What IPEX must not fuse, or not in place: forms that it would compute wrong, or hang on.

Behind a product, IPEX fuses additions and multiplications. It adds into the other operand's memory,
without asking whether views of it are read later or whether it is the caller's tensor; and its
kernels know some broadcasts only: others are wrong, or a thousand times slower. A view of a result
onto itself costs nothing and keeps the operator behind it out of the fusion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.backends.convolutions import right_convolutions
from torch_quant.backends.ipex.attention import FUSED_MASK
from torch_quant.backends.ipex.forms import ELEMENTWISE, is_quantized_product
from torch_quant.graph.sites import behind
from torch_quant.ops.arguments import argument, arguments, positional, retarget, set_arguments
from torch_quant.ops.qdq import QUANTIZE_PER_TENSOR
from torch_quant.ops.table import ROW_MOVEMENT, contiguous_as_captured, pattern_of
from torch_quant.passes.base import Pass, PassContext
from torch_quant.passes.functionalize import may_alias_input

__all__ = ["GUARDS", "guard_convolutions"]

aten = torch.ops.aten

_BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor)
_COARSE = 1e-3
"""Of a grid with larger steps, no code changes by more than one if gelu is off by 2e-4."""


def _fused_product(node: Any, memo: dict[fx.Node, fx.Node | None]) -> fx.Node | None:
    """The quantized product that ``node`` may be fused into, if there is one."""
    if not isinstance(node, fx.Node):
        return None
    if node not in memo:
        memo[node] = None
        if is_quantized_product(node):
            memo[node] = node
        elif node.target in ELEMENTWISE:
            found = [_fused_product(arg, memo) for arg in positional(node)[:2]]
            memo[node] = next((product for product in found if product is not None), None)
    return memo[node]


def _barrier(user: fx.Node, arg: fx.Node) -> None:
    """Put ``arg``'s view onto itself before ``user``."""
    rank = arg.meta["val"].dim() if "val" in arg.meta else user.meta["val"].dim()
    with user.graph.inserting_before(user):
        view = user.graph.call_function(aten.expand.default, (arg, [-1] * rank))
    view.meta = dict(arg.meta)
    user.replace_input_with(arg, view)


def _single(x: Tensor, rank: int) -> list[bool]:
    """For each dimension of the result, whether ``x`` has size 1 there."""
    sizes = [isinstance(size, int) and size == 1 for size in x.shape]
    return [True] * (rank - len(sizes)) + sizes


def _broadcasts(product: fx.Node, result: Any, other: Any) -> bool:
    """Whether the fused kernel of ``product`` has this broadcast, right and fast."""
    if not isinstance(result, Tensor) or not isinstance(other, Tensor):
        return False
    rank = result.dim()
    if other.dim() == 0 or other.dim() > rank or rank < 2:
        return False
    single = _single(other, rank)
    ones = _single(result, rank)
    wide = [one and not own for one, own in zip(single, ones, strict=True)]
    if not any(wide) or all(single):
        return True
    pattern = pattern_of(product)
    assert pattern is not None
    if pattern.name == "linear":
        return not wide[-1]
    if pattern.name.startswith("conv"):
        return not single[1] if rank != 4 else not (wide[0] and not any(wide[1:]))
    return False


def _shared(node: fx.Node) -> bool:
    """Whether memory of ``node`` belongs to the caller or the model, or is seen through a view."""
    if node.op != "call_function" or may_alias_input(node):
        return True
    return any(may_alias_input(user) for user in node.users)


def _strided(node: fx.Node) -> bool:
    """Whether the elements may lie in another order than that of the dimensions.

    A sum takes over the layout of what it overwrites. IPEX compiles the products behind it for the
    layout of the first call, and is wrong once sizes change and come back.
    """
    moves = [each for each in behind(node)[:-1] if each.target not in ROW_MOVEMENT]
    return bool(moves) or not contiguous_as_captured(node)


def _is_conv(product: fx.Node) -> bool:
    pattern = pattern_of(product)
    return pattern is not None and pattern.name.startswith("conv")


def guard_sums(context: PassContext) -> int:
    """Keep broadcasts that the kernels do not have unfused, and copy what a sum may overwrite."""
    changed = 0
    memo: dict[fx.Node, fx.Node | None] = {}
    for node in list(context.graph.nodes):
        if node.target not in _BINARY or node.meta.get(FUSED_MASK):
            continue
        changed += _plain_scalar(node)
        for i in (0, 1):
            arg, other = argument(node, i), argument(node, 1 - i)
            product = _fused_product(arg, memo)
            if product is None or not isinstance(other, fx.Node):
                continue
            if other is arg or not _broadcasts(
                product, node.meta.get("val"), other.meta.get("val")
            ):
                _barrier(node, arg)
                changed += 1
                break
            strided = _strided(other) and not _is_conv(product)
            if node.target is aten.add.Tensor and (strided or _shared(other)):
                layout = {"memory_format": torch.contiguous_format} if strided else {}
                with node.graph.inserting_before(node):
                    copy = node.graph.call_function(aten.clone.default, (other,), layout)
                copy.meta = dict(other.meta)
                set_arguments(node, {1 - i: copy})
                changed += 1
    return changed


def _plain_scalar(node: fx.Node) -> bool:
    """``add(x, 2, alpha=3)`` as ``add(x, 6)``: IPEX fails on the first."""
    x, other, *rest = arguments(node).values()
    alpha = rest[0] if rest else 1
    if isinstance(other, fx.Node) or alpha == 1:
        return False
    retarget(node, node.target, (x, other * alpha))
    return True


def guard_convolutions(context: PassContext) -> int:
    """Put those right that oneDNN computes wrong; :func:`quantize_last` makes pairs of what comes.

    To be run before the other forms.
    """
    return right_convolutions(context, pad_codes=False)


def guard_gelu(context: PassContext) -> int:
    """Fused, the tanh form of gelu runs as the exact one; where that shows, keep it out."""
    changed = 0
    memo: dict[fx.Node, fx.Node | None] = {}
    for node in list(context.graph.find_nodes(op="call_function", target=aten.gelu.default)):
        arg, form = arguments(node).values()
        if form != "tanh" or _fused_product(arg, memo) is None:
            continue
        quantizers = [user for user in node.users if user.target is QUANTIZE_PER_TENSOR]
        coarse = all(argument(each, "scale") >= _COARSE for each in quantizers)
        if len(quantizers) == len(node.users) and coarse:
            continue
        _barrier(node, arg)
        changed += 1
    return changed


def guard_norms(context: PassContext) -> int:
    """IPEX fails on a layer norm without a weight whose result is quantized."""
    changed = 0
    for node in list(context.graph.find_nodes(op="call_function", target=aten.layer_norm.default)):
        weight = argument(node, "weight")
        quantizers = [user for user in node.users if user.target is QUANTIZE_PER_TENSOR]
        for user in quantizers if weight is None else []:
            _barrier(user, node)
            changed += 1
    return changed


GUARDS: tuple[Pass, ...] = (guard_sums, guard_gelu, guard_norms)
