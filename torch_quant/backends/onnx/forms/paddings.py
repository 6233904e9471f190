"""A convolution's padding by name, as numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from torch_quant.backends.int8 import is_quantized_product
from torch_quant.ops.arguments import argument, arguments, retarget
from torch_quant.ops.table import padding_sizes, spread
from torch_quant.passes.base import PassContext

__all__ = ["explicit_padding"]

aten = torch.ops.aten

_NUMBERED: dict[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


def explicit_padding(context: PassContext) -> int:
    """``"valid"``, and ``"same"`` where both sides get as much, of quantized convolutions."""
    changed = 0
    for node in context.graph.nodes:
        if node.target in _NUMBERED and is_quantized_product(node):
            changed += _spell_out(context.gm, node)
    return changed


def _spell_out(gm: fx.GraphModule, node: fx.Node) -> bool:
    x, weight, bias, stride, padding, dilation, groups = arguments(node).values()
    kernel = gm.get_buffer(str(argument(weight, "q").target)).shape[2:]
    sides, far = padding_sizes(padding, kernel, dilation)
    if far:
        return False
    dims = len(kernel)
    args = (x, weight, bias, spread(stride, dims), sides, spread(dilation, dims), groups)
    retarget(node, _NUMBERED[node.target], args)
    return True
