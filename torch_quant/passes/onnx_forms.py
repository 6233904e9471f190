"""Operators in the forms that ONNX runtimes match on, still computing the same in PyTorch.

Data moves as integers; attention's mask becomes one addition, its scale part of a dequantization;
a linear layer is a two-dimensional product with an int32 bias; an embedding gathers integers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.core.qparams import MIN_SCALE
from torch_quant.graph.sites import KEY, local_name
from torch_quant.ops.attention import decompose_attention
from torch_quant.ops.qdq import DEQUANTIZE_PER_CHANNEL, DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR
from torch_quant.ops.table import DATA_MOVEMENT, padding_sizes, size_hints, spread
from torch_quant.passes.base import PassContext, call_like
from torch_quant.passes.constants import constant_beside, evaluate, name_of, new_constants

__all__ = [
    "attention_forms",
    "embedding_forms",
    "integer_bias",
    "linear_forms_2d",
    "move_codes",
    "padding_before_pools",
]

aten = torch.ops.aten

_BIAS_LIMIT = 2**30
"""Codes of a bias stay below it, which leaves room for the products that are added to it."""
_CONVS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})
_PADDED_BY_NAME: dict[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


def move_codes(context: PassContext) -> int:
    """``dequantize -> move`` becomes ``move -> dequantize``, next to the product that reads it."""
    changed = 0
    for node in list(context.graph.nodes):
        real: Any = node.args[0] if node.args else None
        if node.target not in DATA_MOVEMENT or not _is_target(real, DEQUANTIZE_PER_TENSOR):
            continue
        moved = call_like(node, node.target, (real.args[0], *node.args[1:]), **node.kwargs)
        new = call_like(node, DEQUANTIZE_PER_TENSOR, (moved, *real.args[1:]))
        node.replace_all_uses_with(new)
        context.graph.erase_node(node)
        changed += 1
    return changed


_MAX_POOLS = frozenset({
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default,
})  # fmt: skip


def padding_before_pools(context: PassContext) -> int:
    """Zeros before a max pool are written as ``-0.0``, an equal number.

    onnxruntime makes a padding with 0 part of the pool behind it, which pads with minus infinity;
    where all values are negative, the results differ.
    """
    changed = 0
    for node in context.graph.nodes:
        if _pads_with_zeros(node) and any(user.target in _MAX_POOLS for user in node.users):
            node.target, node.args = aten.constant_pad_nd.default, (*node.args[:2], -0.0)
            changed += 1
    return changed


def _pads_with_zeros(node: fx.Node) -> bool:
    if node.target is aten.constant_pad_nd.default:
        return not any(node.args[2:])
    if node.target is not aten.pad.default:
        return False
    arguments: list[Any] = [*node.args[2:], *("constant", None)[len(node.args) - 2 :]]
    mode, value = arguments
    return mode == "constant" and not value


# Attention


def attention_forms(context: PassContext) -> int:
    """Masks as additions, scales inside dequantization; returns the number of attentions.

    A row whose mask leaves nothing must give zeros. Its mask is taken away, and the result, which
    is much smaller than the scores, multiplied by 0.
    """
    for node in context.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        decompose_attention(node)
    masks: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    changed = 0
    for node in context.graph.find_nodes(op="call_function", target=aten._safe_softmax.default):
        product = _product_behind(node)
        if product is not None:
            node.target = aten.softmax.int
            _add_mask(node, product, masks)
            changed += 1
    for node in context.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        _fold_scale(node)
    return changed


def _product_behind(softmax: fx.Node) -> fx.Node | None:
    """The product that alone reads the probabilities, quantized or not."""
    node = softmax
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target is aten.matmul.default:
            return node
        if node.target not in (QUANTIZE_PER_TENSOR, DEQUANTIZE_PER_TENSOR):
            return None
    return None


def _add_mask(
    softmax: fx.Node, product: fx.Node, masks: dict[fx.Node, tuple[fx.Node, fx.Node]]
) -> None:
    graph, scores = softmax.graph, softmax.args[0]
    assert isinstance(scores, fx.Node)
    if scores.target is aten.masked_fill.Scalar:
        hidden = scores.args[1]
        assert isinstance(hidden, fx.Node)
        mask = hidden.args[0]
        assert isinstance(mask, fx.Node)
        if mask.target is aten.tril.default:
            _add_causal_mask(scores)
            return
    elif scores.target is aten.add.Tensor:
        hidden, mask = None, scores.args[1]
        assert isinstance(mask, fx.Node)
    else:
        return
    if mask not in masks:
        masks[mask] = _additive(graph, mask, boolean=hidden is not None)
    added, alive = masks[mask]
    value = product.args[1]
    if _is_target(value, aten.to.dtype) and value.args[1] is torch.bfloat16:  # type: ignore[union-attr]
        with graph.inserting_before(scores):  # the attention fell back to it, the mask did not
            added = graph.call_function(aten.to.dtype, (added, torch.bfloat16))
    scores.target, scores.args = aten.add.Tensor, (scores.args[0], added)
    with graph.inserting_after(product):
        masked = graph.call_function(aten.mul.Tensor, (product, alive))
    masked.meta["val"] = product.meta["val"]
    product.replace_all_uses_with(masked, delete_user_cb=lambda user: user is not masked)


def _additive(graph: fx.Graph, mask: fx.Node, *, boolean: bool) -> tuple[fx.Node, fx.Node]:
    """What to add to the scores, and a factor for each row of the result, behind ``mask``."""
    anchor = mask.next
    while anchor.op == "placeholder":
        anchor = anchor.next
    with graph.inserting_before(anchor):

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return graph.call_function(target, args, kwargs)

        keep = mask if boolean else call(aten.ne.Scalar, mask, -math.inf)
        alive = call(aten.any.dim, keep, -1, True)
        wanted = call(aten.logical_or.default, keep, call(aten.logical_not.default, alive))
        if boolean:
            base = call(aten.zeros_like.default, mask, dtype=torch.float32)
        else:
            base = call(aten.masked_fill.Scalar, mask, call(aten.logical_not.default, keep), 0.0)
        hidden = call(aten.logical_not.default, wanted)
        added = call(aten.masked_fill.Scalar, base, hidden, -math.inf)
        return added, call(aten.to.dtype, alive, torch.float32)


def _add_causal_mask(scores: fx.Node) -> None:
    """Every row of a causal mask keeps the first key, so none is dead."""
    graph, x = scores.graph, scores.args[0]
    with graph.inserting_before(scores):
        sizes = [graph.call_function(aten.sym_size.int, (x, dim)) for dim in (-2, -1)]
        options: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
        full = graph.call_function(aten.full.default, (sizes, -math.inf), options)
        added = graph.call_function(aten.triu.default, (full, 1))
    scores.target, scores.args = aten.add.Tensor, (x, added)


def _fold_scale(node: fx.Node) -> None:
    """``product * number``: scale an operand's grid instead, where the product is quantized."""
    product, factor = node.args
    real: Any
    if not (_is_target(product, aten.matmul.default) and isinstance(factor, float)):
        return
    assert isinstance(product, fx.Node)
    real = product.args[0]
    if len(product.users) > 1 or not _is_target(real, DEQUANTIZE_PER_TENSOR) or factor <= 0:
        return
    grid = (real.args[1] * factor, real.args[2])
    scaled = call_like(product, DEQUANTIZE_PER_TENSOR, (real.args[0], *grid))
    scaled.meta = dict(real.meta)
    product.update_arg(0, scaled)
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)


# Products with a weight


def integer_bias(context: PassContext) -> int:
    """Biases of quantized convolutions as int32 on the grid of the products they are added to."""
    changed = 0
    for node in list(context.graph.nodes):
        if node.target in _PADDED_BY_NAME and _is_quantized(node):
            _explicit_padding(context.gm, node)
        bias = node.args[2] if node.target in _CONVS and len(node.args) > 2 else None
        if bias is not None and _is_quantized(node):
            node.update_arg(2, _bias(context.gm, node, node.args[0], node.args[1], bias, 0))
            changed += 1
    return changed


def linear_forms_2d(context: PassContext) -> int:
    """Quantized ``linear`` of 2-D tensors, ONNX' Gemm; what follows is kept 2-D if it can be."""
    changed = 0
    for node in list(context.graph.find_nodes(op="call_function", target=aten.linear.default)):
        if _is_quantized(node):
            _linear(context.gm, node)
            changed += 1
    return changed


def _linear(gm: fx.GraphModule, node: fx.Node) -> None:
    graph, rank = node.graph, len(size_hints(node.args[0]))
    x, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else None
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    outputs, inputs = gm.get_buffer(str(weight.args[0].target)).shape  # type: ignore[union-attr]
    if bias is not None:
        bias = _bias(gm, node, x, weight, bias, 0)
    with graph.inserting_before(node):
        source = x.args[0]
        sizes = [graph.call_function(aten.sym_size.int, (source, i)) for i in range(rank - 1)]
        if rank != 2:
            source = graph.call_function(aten.reshape.default, (source, [-1, inputs]))
        rows = graph.call_function(DEQUANTIZE_PER_TENSOR, (source, *x.args[1:]))
        product = graph.call_function(aten.linear.default, (rows, weight, bias))
    product.meta = dict(node.meta)
    last = _chain_to_quantize(node) if rank != 2 else node
    node.replace_all_uses_with(product)
    if rank != 2:
        last = product if last is node else last
        with graph.inserting_after(last):
            shaped = graph.call_function(aten.reshape.default, (last, [*sizes, outputs]))
        shaped.meta = {"val": last.meta["val"]} if "val" in last.meta else {}
        last.replace_all_uses_with(shaped, delete_user_cb=lambda user: user is not shaped)
    graph.erase_node(node)


def _chain_to_quantize(node: fx.Node) -> fx.Node:
    """The quantizer behind ``node`` and at most one element-wise function, or ``node``."""
    last = node
    for _ in range(2):
        if len(last.users) != 1:
            return node
        last = next(iter(last.users))
        if last.target is QUANTIZE_PER_TENSOR:
            return last
        if last.target not in _ELEMENTWISE:
            return node
    return node


_ELEMENTWISE = frozenset({
    aten.relu.default, aten.relu6.default, aten.gelu.default, aten.silu.default, aten.tanh.default,
    aten.sigmoid.default, aten.hardswish.default, aten.hardsigmoid.default, aten.hardtanh.default,
    aten.leaky_relu.default, aten.clamp.default, aten.elu.default, aten.mish.default,
})  # fmt: skip


def _bias(gm: fx.GraphModule, node: fx.Node, x: Any, weight: Any, bias: Any, axis: int) -> fx.Node:
    """The bias as dequantized int32 codes, scale = that of the input times that of the weight."""
    value = evaluate(gm, bias).detach().to(torch.float32)
    step = float(x.args[1])
    scale: Any = weight.args[1]
    if weight.target is DEQUANTIZE_PER_CHANNEL:
        scale = gm.get_buffer(str(scale.target))
        needed = (value.abs() / (step * _BIAS_LIMIT)).clamp(min=MIN_SCALE)
        codes = gm.get_buffer(str(weight.args[0].target))
        empty = (codes == 0).flatten(1).all(1) if axis == 0 else torch.zeros_like(value).bool()
        if bool(((needed > scale.abs()) | empty).any()):  # a full-range scale may be negative
            size = torch.where(empty, needed, torch.maximum(scale.abs(), needed))
            wanted = size.copysign(scale)
            scale = _widen(gm, node, weight, wanted, axis)
    grid = (torch.as_tensor(scale, dtype=torch.float32) * step).expand(value.shape).contiguous()
    codes = (value / grid).round().clamp(-_BIAS_LIMIT, _BIAS_LIMIT).to(torch.int32)
    values = {"": codes, "_scale": grid, "_zero_point": torch.zeros_like(codes)}
    consts = new_constants(gm, name_of(bias, f"{local_name(node)}.bias"), values, node)
    return call_like(node, DEQUANTIZE_PER_CHANNEL, (*consts, 0))


def _widen(gm: fx.GraphModule, node: fx.Node, weight: Any, scale: Tensor, axis: int) -> Tensor:
    """Channels whose weights vanish beside their bias, on grids that serve the bias.

    On a finer one the bias would not fit int32; without any weight, a coarse one would round it.
    """
    codes, old, zero_point = (gm.get_buffer(str(each.target)) for each in weight.args[:3])
    shape = [1] * codes.dim()
    shape[axis] = -1
    centred = (codes.to(torch.int32) - zero_point.reshape(shape)) * old.reshape(shape)
    info = torch.iinfo(codes.dtype)
    new = (centred / scale.reshape(shape)).round() + zero_point.reshape(shape)
    values = {
        "": new.clamp(info.min, info.max).to(codes.dtype),
        "_scale": scale,
        "_zero_point": zero_point,
    }
    name = name_of(weight.args[0], "")
    weight.args = (*new_constants(gm, name, values, weight), *weight.args[3:])
    return scale


def _explicit_padding(gm: fx.GraphModule, node: fx.Node) -> None:
    """``"valid"``, and ``"same"`` where both sides get as much, as numbers."""
    defaults = (None, None, None, [1], "valid", [1], 1)
    arguments: list[Any] = [*node.args, *defaults[len(node.args) :]]
    x, weight, bias, stride, padding, dilation, groups = arguments
    kernel = gm.get_buffer(str(weight.args[0].target)).shape[2:]
    sides, far = padding_sizes(padding, kernel, dilation)
    if far:
        return
    node.target = _PADDED_BY_NAME[node.target]
    dims = len(kernel)
    node.args = (x, weight, bias, spread(stride, dims), sides, spread(dilation, dims), groups)


def embedding_forms(context: PassContext) -> int:
    """Gather integers and their scales; dequantizing the whole table would cost more than all."""
    changed, gm = 0, context.gm
    for node in context.graph.find_nodes(op="call_function", target=aten.embedding.default):
        weight, indices = node.args[:2]
        if not isinstance(weight, fx.Node):
            continue
        if weight.target is DEQUANTIZE_PER_TENSOR:
            rows = call_like(node, aten.embedding.default, (weight.args[0], indices))
            real = call_like(node, DEQUANTIZE_PER_TENSOR, (rows, *weight.args[1:]))
        elif weight.target is DEQUANTIZE_PER_CHANNEL:
            rows = call_like(node, aten.embedding.default, (weight.args[0], indices))
            real = call_like(node, aten.to.dtype, (rows, torch.float32))
            scale, zero_point = (gm.get_buffer(str(each.target)) for each in weight.args[1:3])  # type: ignore[union-attr]
            if bool(zero_point.any()):
                centre = zero_point.to(torch.float32).unsqueeze(-1)
                real = _with_rows(gm, node, aten.sub.Tensor, real, "_zero_point_rows", centre)
            real = _with_rows(gm, node, aten.mul.Tensor, real, "_scale_rows", scale.unsqueeze(-1))
        else:
            continue
        node.replace_all_uses_with(real)
        context.graph.erase_node(node)
        changed += 1
    return changed


def _with_rows(
    gm: fx.GraphModule, node: fx.Node, target: Any, x: fx.Node, ending: str, column: Tensor
) -> fx.Node:
    weight: Any = node.args[0]
    table = constant_beside(gm, weight.args[0], ending, column, node)
    rows = call_like(node, aten.embedding.default, (table, node.args[1]))
    rows.meta.pop(KEY, None)
    return call_like(node, target, (x, rows))


# Questions


def _is_target(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _is_quantized(node: fx.Node) -> bool:
    weight = node.args[1]
    return _is_target(node.args[0], DEQUANTIZE_PER_TENSOR) and (
        _is_target(weight, DEQUANTIZE_PER_CHANNEL) or _is_target(weight, DEQUANTIZE_PER_TENSOR)
    )
