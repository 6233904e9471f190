"""Convolutions that oneDNN computes wrong in int8, put so that it computes them right.

PyTorch's kernels, IPEX and OpenVINO all call oneDNN. With AVX512-VNNI its int8 convolutions read
what is not theirs, or crash, in three cases that no check of its own sees:

* a row of results has one element, and the stride along it is larger than 1;
* a window lies in the padding alone, or an image of depth 1 is padded in depth;
* each of several groups has one input channel and more than 32 results.

Where a row has one result, the stride says nothing; zeros around an image can be given as codes;
and the last is rare, so it stays in float.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.backends.int8 import is_quantized_product
from torch_quant.graph.sites import key_of
from torch_quant.ops.arguments import argument, arguments, positional, retarget, set_arguments
from torch_quant.ops.qdq import DEQUANTIZE_PER_TENSOR
from torch_quant.ops.table import padding_sizes, spread
from torch_quant.passes.base import PassContext
from torch_quant.passes.constants import evaluate, name_of, new_constant

__all__ = [
    "CONV_DIMS",
    "Windows",
    "float_multipliers",
    "padded",
    "right_convolutions",
    "right_windows",
]

aten = torch.ops.aten

CONV_DIMS: dict[Any, int] = {
    aten.conv1d.default: 1, aten.conv1d.padding: 1,
    aten.conv2d.default: 2, aten.conv2d.padding: 2,
    aten.conv3d.default: 3, aten.conv3d.padding: 3,
}  # fmt: skip
"""The overloads, and how many spatial dimensions they have."""
_PLAIN = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_MOST_RESULTS = 32
"""Of a group of one channel."""
_BLOCK = 64
"""Bytes of a row of a window that the kernel reads at once."""


@dataclass(frozen=True)
class Windows:
    """Arguments of a convolution in place of others, by spatial dimension.

    Args:
        pads: what ``constant_pad_nd`` adds before, empty for nothing.
        stride: of the windows.
        padding: of both sides.
        end: where a row of results ends, as the end of a slice; None if all of it counts.
    """

    pads: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    end: int | None


@functools.lru_cache(maxsize=4096)
def right_windows(
    sizes: tuple[int | None, ...],
    weight: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Windows | None:
    """What to ask oneDNN for in place of a convolution that it would compute wrong.

    Args:
        sizes: of the image, without batch and channels; None is any.
        weight: sizes, ``[out, in / groups, ...]``.
        stride, padding, dilation: numbers for each spatial dimension.
        groups: of channels.

    Returns:
        None where it computes the convolution as it is.

    >>> right_windows((8, 8), (16, 16, 8, 8), (8, 8), (0, 0), (1, 1), 1)
    Windows(pads=(), stride=(8, 1), padding=(0, 0), end=None)
    """
    kernel = weight[2:]
    whole = tuple(zip(sizes, kernel, stride, padding, dilation, strict=True))
    depthwise = weight[1] == 1 and weight[0] == groups > 1  # these have a kernel of their own
    alone = weight[1] == 1 and not depthwise
    outside = [_may_see_padding_alone(*each) for each in whole]
    if alone and len(whole) == 3 and sizes[0] in (1, None) and padding[0]:
        outside[0] = True
    pads = [[side, side] if odd else [0, 0] for side, odd in zip(padding, outside, strict=True)]
    n, k, step, side, hole = whole[-1]
    last, end = step, None
    if step == 1 or depthwise:
        pass
    elif n is not None:
        spare = n + 2 * side - hole * (k - 1) - 1
        if spare < step:
            last, end = 1, None if spare == 0 else 1
    elif alone or _row_of_blocks(weight, step, side, hole):
        pads[-1][1] += step  # one result more
        end = -1
    if not any(outside) and last == step and end is None:
        return None
    flat = [each for sides in reversed(pads) for each in sides]
    kept = tuple(0 if odd else side for side, odd in zip(padding, outside, strict=True))
    return Windows(tuple(flat) if any(flat) else (), (*stride[:-1], last), kept, end)


def _may_see_padding_alone(n: int | None, k: int, step: int, side: int, hole: int) -> bool:
    """Whether a window may lie in the padding of one dimension, as far as its size is known."""
    if not side or (hole == 1 and side < k):
        return False
    centred = step == 1 and k % 2 and 2 * side == hole * (k - 1)
    if n is None or centred:
        return not centred
    starts = range(-side, n + side - hole * (k - 1), step)
    return any(all(not 0 <= start + hole * i < n for i in range(k)) for start in starts)


def _row_of_blocks(weight: tuple[int, ...], step: int, side: int, hole: int) -> bool:
    """Whether windows lie side by side, and a row of one is a whole number of blocks."""
    return weight[-1] == step and not side and hole == 1 and weight[1] * step % _BLOCK == 0


def right_convolutions(context: PassContext, *, pad_codes: bool = True) -> int:
    """Quantized convolutions as oneDNN computes them right, for all sizes that the graph takes.

    Args:
        context: of the graph.
        pad_codes: put zeros around an image as codes; False: behind the dequantizer.
    """
    changed = float_multipliers(context)
    for node in list(context.graph.nodes):
        if node.target in CONV_DIMS and is_quantized_product(node):
            changed += _with_right_windows(node, _codes(node).shape, pad_codes)
    return changed


def float_multipliers(
    context: PassContext, dims: Collection[int] = (1, 2, 3), most: int = _MOST_RESULTS
) -> int:
    """Groups of one channel with many results each: their weight becomes a float tensor.

    Args:
        context: of the graph.
        dims: spatial dimensions of the convolutions that are looked at.
        most: results of a group that may stay in int8.
    """
    changed = 0
    for node in list(context.graph.nodes):
        if CONV_DIMS.get(node.target) not in dims or not is_quantized_product(node):
            continue
        weight, groups = argument(node, "weight"), argument(node, "groups")
        results, channels = _codes(node).shape[:2]
        if channels > 1 or groups == 1 or results <= groups * most:
            continue
        value = evaluate(context.gm, weight)
        name = name_of(argument(weight, "q"), f"{node.name}_weight")
        set_arguments(node, {"weight": new_constant(context.gm, name, value, node)})
        context.decline(
            key_of(node),
            f"its int8 kernel is wrong where groups of one channel have results beyond {most}",
        )
        changed += 1
    return changed


def _codes(node: fx.Node) -> Tensor:
    """Of a quantized weight."""
    codes = argument(argument(node, "weight"), "q")
    return node.graph.owning_module.get_buffer(str(codes.target))  # type: ignore[union-attr]


def _with_right_windows(node: fx.Node, weight: torch.Size, pad_codes: bool) -> bool:
    x, w, bias, stride, padding, dilation, groups = arguments(node).values()
    dims = CONV_DIMS[node.target]
    sides, far = padding_sizes(padding, weight[2:], dilation)
    stride, dilation = spread(stride, dims), spread(dilation, dims)
    geometry = (tuple(stride), tuple(sides), tuple(dilation))
    found = right_windows(_sizes(x, dims, far), weight, *geometry, groups)
    if found is None:
        return False
    none = [0] * 2 * dims
    pads = [a + b for a, b in zip(found.pads or none, far or none, strict=True)]
    if any(pads):
        x = padded(x, pads, node, of_codes=pad_codes)
    args = (x, w, bias, list(found.stride), list(found.padding), dilation, groups)
    retarget(node, _PLAIN[dims], args)
    if found.end is not None:
        with node.graph.inserting_after(node):
            kept = node.graph.call_function(aten.slice.Tensor, (node, -1, 0, found.end))
        kept.meta = dict(node.meta)
        node.meta.pop("val", None)
        node.replace_all_uses_with(kept, lambda user: user is not kept)
    return True


def _sizes(x: fx.Node, dims: int, far: Sequence[int]) -> tuple[int | None, ...]:
    """Of the image, with what ``"same"`` adds on the far side."""
    value = x.meta.get("val")
    if not isinstance(value, Tensor):
        return (None,) * dims
    more = list(reversed(far[1::2])) or [0] * dims
    sizes = zip(value.shape[-dims:], more, strict=True)
    return tuple(n + extra if isinstance(n, int) else None for n, extra in sizes)


def padded(x: fx.Node, pads: list[int], before: fx.Node, *, of_codes: bool = True) -> fx.Node:
    """``x``, which dequantizes codes, with zeros around.

    Args:
        x: of codes with a scale for the whole tensor.
        pads: as ``constant_pad_nd`` takes them.
        before: where the new nodes stand.
        of_codes: whether the codes get them, or else what is dequantized.
    """
    with before.graph.inserting_before(before):
        call = before.graph.call_function
        if not of_codes:
            return call(aten.constant_pad_nd.default, (x, pads, 0.0))
        codes, scale, zero_point = positional(x)
        codes = call(aten.constant_pad_nd.default, (codes, pads, zero_point))
        return call(DEQUANTIZE_PER_TENSOR, (codes, scale, zero_point))
