"""A weight that is folded with a norm, rounded and unfolded again, as one function of autograd.

    y = round(w f) / f,    dw = mask(dy / f) f,    f = gain / sqrt(var + eps), a constant

``batch_norm.py`` writes this as a dozen operators while the statistics of a norm move. In a small
network their number is what a step takes its time for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.core.elements import element_type
from torch_quant.core.qparams import MIN_SCALE
from torch_quant.core.spec import ScaleType
from torch_quant.native.refolding import refold, refold_gradient
from torch_quant.native.rounding import serves
from torch_quant.qat.batch_norm import TINY, unfolded
from torch_quant.qat.fake_quantize import TRAINED_FAKE_QUANTIZE
from torch_quant.qat.methods import QAT_METHODS, WEIGHT, Rounding

__all__ = ["refolded", "unite_folds"]

aten = torch.ops.aten

_LARGEST = 2**18
"""Elements of a weight. Of a larger one the operators take long enough, and have more threads."""


def refolded(
    weight: Tensor,
    gain: Tensor | None,
    var: Tensor,
    eps: float,
    shape: Sequence[int],
    scale: Tensor,
    zero: Tensor,
    *how: Any,
) -> Tensor:
    """``round(w f) / f``; the weight itself where the norm multiplies by nothing.

    Args:
        weight: of a product.
        gain: of its norm; None for ones.
        var: the running variance.
        eps: added to it.
        shape: in which ``f`` broadcasts against the weight.
        scale: of ``w f``.
        zero: its zero point.
        how: the other arguments of ``TRAINED_FAKE_QUANTIZE``.
    """
    given = weight, gain, var, eps, shape, scale, zero, *how
    if torch.compiler.is_compiling() or not _serves(weight, gain, var, shape, scale, zero, how):
        return _in_steps(*given)
    found: Tensor = _Refold.apply(*given)
    return found


def _in_steps(
    weight: Tensor,
    gain: Tensor | None,
    var: Tensor,
    eps: float,
    shape: Sequence[int],
    scale: Tensor,
    zero: Tensor,
    *how: Any,
) -> Tensor:
    factor = torch.rsqrt(var + eps)
    if gain is not None:
        factor = gain.detach() * factor
    factor = factor.reshape(shape)
    rounded = TRAINED_FAKE_QUANTIZE(weight * factor, scale, zero, *how)
    return unfolded(rounded, weight, factor)


def _serves(
    weight: Tensor,
    gain: Tensor | None,
    var: Tensor,
    shape: Sequence[int],
    scale: Tensor,
    zero: Tensor,
    how: tuple[Any, ...],
) -> bool:
    """Whether the kernels compute it, forward and backward, if no factor is tiny."""
    element, scale_type, role, method = how[:4]
    return (
        role == WEIGHT
        and scale_type == ScaleType.FLOAT32.value
        and shape[0] != 1  # of the first dimension
        and weight.numel() <= _LARGEST
        and weight.is_contiguous()
        and all(_plain(x) for x in (var, gain) if x is not None)
        and QAT_METHODS[method].is_straight
        and serves(weight, scale, zero, element_type(element))
    )


def _plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.dtype is torch.float32 and x.is_contiguous()


class _Refold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        weight, gain, var, eps, _, scale, zero, *how = given
        found = refold(
            weight, gain, var, scale, zero, element_type(how[0]),
            eps=eps, tiny=TINY, smallest=MIN_SCALE,
        )  # fmt: skip
        ctx.given = eps, *given[4:5], *how
        if found is None:
            ctx.save_for_backward(weight, gain, var, scale, zero)
            return _in_steps(*given)
        made = found.factor, found.folded, found.rounded, found.scale
        ctx.save_for_backward(weight, gain, var, scale, zero, *made)
        return found.weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gain, var, scale, zero, *made = ctx.saved_tensors
        eps, shape, *how = ctx.given
        wants_weight, wants_scale = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        further = torch.is_grad_enabled()  # gradients of gradients are wanted
        of_weight = of_scale = None
        if further or not made:
            with torch.enable_grad():
                inputs = (x if further else x.detach().requires_grad_() for x in (weight, scale))
                w, s = inputs
                result = _in_steps(w, gain, var, eps, shape, s, zero, *how)
            wanted = [x for x, yes in ((w, wants_weight), (s, wants_scale)) if yes]
            found = list(torch.autograd.grad(result, wanted, grad, create_graph=further))
            of_weight = found.pop(0) if wants_weight else None
            of_scale = found.pop(0) if wants_scale else None
        else:
            factor, folded, rounded, used = made
            element, share = element_type(how[0]), None
            if wants_scale:
                rounding = Rounding(grad, folded, rounded, used, zero, element, WEIGHT, 1, True)
                share = QAT_METHODS[how[3]].gradient_scale(rounding)
            of_weight, of_scale = refold_gradient(
                grad, factor, folded, rounded, used, zero, element, share
            )
        return of_weight, None, None, None, None, of_scale, None, *((None,) * len(how))


def unite_folds(body: fx.GraphModule) -> int:
    """Have one function compute each weight that is folded, rounded and unfolded; how many.

    Args:
        body: a graph whose norms move.
    """
    return sum(map(_unite, body.graph.find_nodes(op="call_function", target=unfolded)))


def _unite(node: fx.Node) -> bool:
    rounded, weight, factor = node.args
    assert isinstance(rounded, fx.Node)
    assert isinstance(factor, fx.Node)
    folded = rounded.args[0]
    if (
        rounded.target is not TRAINED_FAKE_QUANTIZE
        or len(rounded.users) != 1
        or rounded.kwargs
        or not isinstance(folded, fx.Node)
        or folded.target is not aten.mul.Tensor
        or folded.args != (weight, factor)
        or factor.target is not aten.reshape.default
    ):
        return False
    constant: Any = factor.args[0]
    if constant.target is not aten.detach.default:
        return False
    product, gain = constant.args[0], None
    if product.target is aten.mul.Tensor:
        gain, product = product.args
    if product.target is not aten.rsqrt.default or product.args[0].target is not aten.add.Tensor:
        return False
    var, eps = product.args[0].args
    graph = node.graph
    with graph.inserting_before(node):
        norm = gain, var, eps, factor.args[1]
        new = graph.call_function(refolded, (weight, *norm, *rounded.args[1:]))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    graph.erase_node(rounded)
    return True
