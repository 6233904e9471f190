"""Convolutions in the form that Inductor fuses, and whether their weights are packed for one size.

Inductor reads strides and paddings by dimension. It packs the weight of a convolution over several
pixels for the sizes of its image; where these are free, the kernel packs it again at each call:
ResNet-50 takes five times as long.
"""

from __future__ import annotations

import torch
from torch import fx

from torch_quant.backends.convolutions import padded
from torch_quant.backends.inductor.products import TARGETS, codes_of
from torch_quant.backends.int8 import int8_weight
from torch_quant.ops.arguments import argument, arguments, retarget
from torch_quant.ops.qdq import DEQUANTIZE_PER_TENSOR
from torch_quant.ops.table import padding_sizes, spread
from torch_quant.passes.base import PassContext

__all__ = ["plain_convolutions", "wants_one_size"]

aten = torch.ops.aten


def plain_convolutions(context: PassContext) -> int:
    """Strides, dilations and paddings by dimension; ``"same"`` pads codes on the far side."""
    changed = 0
    for node in list(context.graph.nodes):
        known = int8_weight(node) if node.target in TARGETS["conv2d"] else None
        if known is None:
            continue
        x, weight, bias, stride, padding, dilation, groups = arguments(node).values()
        if x.target is not DEQUANTIZE_PER_TENSOR:
            continue
        kernel = context.gm.get_buffer(str(known[0].target)).shape[2:]
        dims = len(kernel)
        sides, far = padding_sizes(padding, kernel, dilation)
        if far:
            x = padded(x, far, node)
        args = (x, weight, bias, spread(stride, dims), sides, spread(dilation, dims), groups)
        retarget(node, aten.conv2d.default, args)
        changed += 1
    return changed


def wants_one_size(body: fx.GraphModule) -> bool:
    """Whether a graph has a convolution whose weight is packed for the sizes of its image."""
    return any(
        (codes := codes_of(node, "conv2d")) is not None
        and argument(node, "groups") == 1
        and any(size > 1 for size in body.get_buffer(str(codes.target)).shape[2:])
        for node in body.graph.nodes
    )
