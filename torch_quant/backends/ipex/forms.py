"""The forms of a quantized graph that IPEX fuses, and that it fuses right.

IPEX hands traced graphs to oneDNN Graph, which fuses ``dequantize -> product -> element-wise
functions -> quantize``. It finds a pair only where quantize and dequantize follow each other
directly, and some of what it does fuse comes out wrong or takes seconds. Each pass here makes one
form fit, or keeps it out of the fusion.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from torch_quant.backends.ipex.attention import plain_softmax
from torch_quant.graph.sites import fused_output, is_constant, operands
from torch_quant.ops.arguments import argument, arguments, positional, retarget, set_arguments
from torch_quant.ops.qdq import DEQUANTIZE_PER_CHANNEL, DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR
from torch_quant.ops.table import (
    ACTIVATIONS,
    DATA_MOVEMENT,
    RECTIFIERS,
    padding_sizes,
    pattern_of,
    size_hints,
    spread,
)
from torch_quant.passes.base import Pass, PassContext, call_again
from torch_quant.passes.constants import evaluate, new_constant

__all__ = ["ELEMENTWISE", "is_quantized_product", "graph_forms"]

aten = torch.ops.aten

_PAD = aten.constant_pad_nd.default
_MOVES = DATA_MOVEMENT | {_PAD}
_CONV_DIMS: dict[Any, int] = {
    aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3,
    aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}  # fmt: skip
_PADDED_CONVS: dict[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
_POOLS: dict[Any, int] = {
    aten.max_pool1d.default: 1, aten.max_pool2d.default: 2, aten.max_pool3d.default: 3,
    aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3,
}  # fmt: skip
_LAYOUT = {aten.contiguous.default, aten.clone.default}
_CONTIGUOUS = {aten.linear.default, aten.layer_norm.default}


def _call(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    with before.graph.inserting_before(before):
        return before.graph.call_function(target, args, kwargs)


def _replace(old: fx.Node, new: fx.Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def is_quantized_product(node: fx.Node) -> bool:
    """Whether ``node`` multiplies dequantized tensors."""
    pattern = pattern_of(node)
    if pattern is None or not pattern.activations:
        return False
    found = [argument(node, place) for place in pattern.activations]
    return any(isinstance(x, fx.Node) and _grid_behind(x) is not None for x in found)


def _products(graph: fx.Graph) -> Iterator[fx.Node]:
    yield from [node for node in graph.nodes if is_quantized_product(node)]


def _grid_behind(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The quantizer whose values ``node`` holds, and the data movement between, last first."""
    moves: list[fx.Node] = []
    dequantized = False
    while node.op == "call_function":
        if node.target is QUANTIZE_PER_TENSOR:
            return (node, moves) if dequantized else None
        if node.target is DEQUANTIZE_PER_TENSOR:
            dequantized = True
        elif node.target in _MOVES:
            moves.append(node)
        else:
            return None
        node = argument(node, 0)
    return None


def fold_constants(context: PassContext) -> int:
    """A product of constants only (projected position embeddings): IPEX crashes on it."""
    changed = 0
    for node in _products(context.graph):
        if is_constant(node):
            new = new_constant(context.gm, f"{node.name}_value", evaluate(context.gm, node), node)
            _replace(node, new)
            changed += 1
    return changed


def look_up_embeddings(context: PassContext) -> int:
    """Read int8 rows and their scales, instead of dequantizing the whole table."""
    changed = 0
    for node in list(context.graph.find_nodes(op="call_function", target=aten.embedding.default)):
        table, indices = argument(node, "weight"), argument(node, "indices")
        if table.target is not DEQUANTIZE_PER_CHANNEL:
            continue
        codes, scale = argument(table, "q"), argument(table, "scale")
        rows = _call(node, torch.embedding, codes, indices)
        real = _call(node, aten.to.dtype, rows, torch.float32)
        column = _call(node, aten.reshape.default, scale, [-1, 1])
        steps = _call(node, torch.embedding, column, indices)
        _replace(node, _call(node, aten.mul.Tensor, real, steps))
        changed += 1
    return changed


def explicit_padding(context: PassContext) -> int:
    """``padding="same"`` as numbers; a longer far side is padded before."""
    changed = 0
    for node in _products(context.graph):
        if node.target not in _PADDED_CONVS:
            continue
        target = _PADDED_CONVS[node.target]
        x, weight, bias, stride, padding, dilation, groups = arguments(node).values()
        sizes, far = padding_sizes(padding, _codes(weight).shape[2:], dilation)
        if far:
            x = _call(node, _PAD, x, far)
        stride, dilation = (spread(each, _CONV_DIMS[target]) for each in (stride, dilation))
        args = (x, weight, bias, stride, sizes, dilation, groups)
        _replace(node, _call(node, target, *args))
        changed += 1
    return changed


def _codes(weight: Any) -> Any:
    """The buffer behind a dequantized weight, as a tensor."""
    codes = argument(weight, "q")
    return codes.graph.owning_module.get_buffer(codes.target)


def batch_images(context: PassContext) -> int:
    """A convolution of one image without a batch dimension: give it one, and take it away."""
    changed = 0
    for node in _products(context.graph):
        dims = _CONV_DIMS.get(node.target)
        if dims is None or len(size_hints(node)) != dims + 1:
            continue
        image = _call(node, aten.unsqueeze.default, argument(node, "input"), 0)
        batched = call_again(node, {"input": image})
        batched.meta.pop("val", None)
        _replace(node, _call(node, aten.squeeze.dim, batched, 0))
        changed += 1
    return changed


def quantize_last(context: PassContext) -> int:
    """Move data in float, then quantize and dequantize right before the product.

    ``source -> quantize -> transpose -> dequantize`` is no pair to IPEX; ``source -> transpose ->
    quantize -> dequantize`` is one, and IPEX itself lifts the quantization back over views and
    transpositions into the product before them.
    """
    changed = 0
    for node in _products(context.graph):
        pattern = pattern_of(node)
        assert pattern is not None
        for arg in dict.fromkeys(operands(node, pattern)):
            found = _grid_behind(arg)
            if found is None or not found[1]:
                continue
            quantize, moves = found
            value, *grid = arguments(quantize).values()
            for move in reversed(moves):
                if move.target not in _LAYOUT:  # a reorder behind a product would be fused, badly
                    value = _moved(node, move, value)
            codes = _call(node, QUANTIZE_PER_TENSOR, value, *grid)
            real = _call(node, DEQUANTIZE_PER_TENSOR, codes, *grid[:2])
            real.meta = dict(arg.meta)
            node.replace_input_with(arg, real)
            changed += 1
    return changed


def _moved(before: fx.Node, move: fx.Node, value: fx.Node) -> fx.Node:
    new = call_again(move, {0: value}, before)
    if new.target is aten.reshape.default and value.target in _CONTIGUOUS:
        x, shape = arguments(new).values()
        retarget(new, aten.view.default, (x, shape))  # the one that IPEX looks through
    return new


def separate_twins(context: PassContext) -> int:
    """A product of a tensor with itself: IPEX never ends if both sides are one dequantization."""
    changed = 0
    for node in _products(context.graph):
        pattern = pattern_of(node)
        assert pattern is not None
        if len(pattern.activations) != 2 or argument(node, 0) is not argument(node, 1):
            continue
        _quantize_again(node, aten.clone.default)
        changed += 1
    return changed


def _quantize_again(product: fx.Node, copy: Any) -> fx.Node:
    """Give a product's right side a pair of its own, behind a copy of the float tensor."""
    codes, *grid = arguments(argument(product, 1)).values()
    value, *whole = arguments(codes).values()
    again = _call(product, QUANTIZE_PER_TENSOR, _call(product, copy, value), *whole)
    new = _call(product, DEQUANTIZE_PER_TENSOR, again, *grid)
    set_arguments(product, {1: new})
    return new


def batched_products(context: PassContext) -> int:
    """``matmul`` of two stacks of matrices as ``bmm``, the form that fuses.

    Its right side has to be contiguous: the kernel fails on a stack along another dimension.
    """
    changed = 0
    for node in _products(context.graph):
        if node.target not in (aten.matmul.default, aten.bmm.default):
            continue
        shapes: list[Any] = [getattr(x.meta.get("val"), "shape", ()) for x in node.all_input_nodes]
        if len(shapes) != 2 or not all(len(shape) == 3 for shape in shapes):
            continue
        if str(shapes[0][0]) == str(shapes[1][0]):
            retarget(node, aten.bmm.default, positional(node))
            right = argument(node, "mat2")
            _quantize_again(node, aten.contiguous.default).meta = dict(right.meta)
            changed += 1
    return changed


def relu6_as_hardtanh(context: PassContext) -> int:
    """``relu6`` is not fused, ``hardtanh(0, 6)`` is."""
    found = context.graph.find_nodes(op="call_function", target=aten.relu6.default)
    for node in found:
        retarget(node, aten.hardtanh.default, (argument(node, "self"), 0.0, 6.0))
    return len(found)


def explicit_pools(context: PassContext) -> int:
    """Pools with a stride; a maximum whose result is quantized is taken of the integers.

    Rounding to a grid keeps order: ``quantize(max_pool(x)) = max_pool(quantize(x))``, exactly.
    """
    changed = 0
    for node in list(context.graph.nodes):
        dims = _POOLS.get(node.target)
        if dims is None:
            continue
        if not argument(node, "stride"):
            set_arguments(node, {"stride": argument(node, "kernel_size")})
            changed += 1
        users = list(node.users)
        alike = {positional(user)[1:] for user in users if user.target is QUANTIZE_PER_TENSOR}
        if node.target is not aten.max_pool2d.default or len(size_hints(node)) != 4:
            continue
        if len(alike) == 1 and all(user.target is QUANTIZE_PER_TENSOR for user in users):
            (grid,) = alike
            codes = _call(node, QUANTIZE_PER_TENSOR, argument(node, "self"), *grid)
            set_arguments(node, {"self": _call(node, DEQUANTIZE_PER_TENSOR, codes, *grid[:2])})
            changed += 1
    return changed


def rectified_shortcuts(context: PassContext) -> int:
    """:func:`integer_shortcuts` where a rectifier alone reads the sum, as in ResNet.

    Convolution, sum and rectifier are one kernel there, which then neither reads nor writes floats.
    """
    return integer_shortcuts(context, rectified=True)


def integer_shortcuts(context: PassContext, *, rectified: bool = False) -> int:
    """Behind a convolution, add the codes of a shortcut that is quantized anyway.

    Then nothing between two blocks is in float, and IPEX fuses whole stages of a residual network.
    A sum is left alone where IPEX would be wrong: if the convolution itself reads those codes,
    which the sum overwrites, and if something else than convolutions reads the quantized result.
    """
    changed = 0
    for node in list(context.graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        if argument(node, "alpha") != 1 or not _all_read_by_convs(node):
            continue
        if rectified and fused_output(node, RECTIFIERS) is node:
            continue
        for i in (0, 1):
            other, conv = argument(node, 1 - i), _conv_behind(argument(node, i))
            if conv is None or not isinstance(other, fx.Node):
                continue
            quantizers = [user for user in other.users if user.target is QUANTIZE_PER_TENSOR]
            grids = [user for user in quantizers if user < node]
            shapes = [str(getattr(x.meta.get("val"), "shape", x)) for x in (node, other)]
            own = argument(argument(conv, "input"), "q")
            if not grids or grids[0] is own or shapes[0] != shapes[1]:
                continue
            _, *grid = positional(grids[0])
            real = _call(node, DEQUANTIZE_PER_TENSOR, grids[0], *grid[:2])
            real.meta = dict(other.meta)
            set_arguments(node, {1 - i: real})
            changed += 1
            break
    return changed


def _conv_behind(node: Any) -> fx.Node | None:
    """The quantized convolution that ``node`` is the result of, up to an activation function."""
    while isinstance(node, fx.Node) and node.target in ACTIVATIONS:
        node = argument(node, 0)
    found = isinstance(node, fx.Node) and node.target in _CONV_DIMS and is_quantized_product(node)
    return node if found else None


def _all_read_by_convs(node: fx.Node) -> bool:
    """Whether the sum, or its rectified form, is read quantized by convolutions, and added on."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in ACTIVATIONS:
        users = list(users[0].users)
    quantized = [user for user in users if user.target is QUANTIZE_PER_TENSOR]
    rest = [user for user in users if user.target not in (QUANTIZE_PER_TENSOR, aten.add.Tensor)]
    readers = [reader for q in quantized for real in q.users for reader in real.users]
    known = _CONV_DIMS.keys() | {aten.add.Tensor}
    return bool(quantized) and not rest and all(reader.target in known for reader in readers)


def graph_forms(*, int8_shortcuts: bool | None) -> tuple[Pass, ...]:
    """The passes of this module, in order."""
    shortcuts: dict[bool | None, tuple[Pass, ...]] = {
        None: (rectified_shortcuts,), True: (integer_shortcuts,), False: (),
    }  # fmt: skip
    return (
        fold_constants,
        look_up_embeddings,
        explicit_padding,
        batch_images,
        quantize_last,
        plain_softmax,
        separate_twins,
        batched_products,
        relu6_as_hardtanh,
        *shortcuts[int8_shortcuts],
        explicit_pools,
    )


ELEMENTWISE = frozenset(ACTIVATIONS) | {
    aten.exp.default, aten.abs.default, aten.sqrt.default, aten.square.default, aten.log.default,
    aten.reciprocal.default, aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor,
}  # fmt: skip
"""What may be fused behind a product."""
