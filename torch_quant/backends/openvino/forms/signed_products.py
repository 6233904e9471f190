"""Products of two activations are of signed integers around 0.

quantize to 0..255, zero point 117      quantize to -128..127, zero point 0, at most twice as coarse
"""

from __future__ import annotations

import torch
from torch import fx

from torch_quant.backends.onnx.forms.matching import readers_behind
from torch_quant.backends.openvino.forms.readers import in_products
from torch_quant.core.elements import IntegerType, element_type
from torch_quant.ops.arguments import arguments, set_arguments
from torch_quant.ops.qdq import DEQUANTIZE, QUANTIZE
from torch_quant.passes.base import PassContext
from torch_quant.passes.constants import new_constants

__all__ = ["signed_products"]

_SIGNED, _LARGEST = "int8", 127


def signed_products(context: PassContext) -> int:
    """Operands that such products alone read get a grid whose zero point is 0.

    OpenVINO multiplies in float where one of them has another zero point. Grids that are trained
    stay as they are until training ends.
    """
    if context.live:
        return 0
    changed = 0
    for node in list(context.graph.find_nodes(op="call_function", target=QUANTIZE)):
        readers = _readers(node)
        if readers and all(map(in_products, readers)):
            changed += _sign(context.gm, node, readers)
    return changed


def _sign(gm: fx.GraphModule, node: fx.Node, readers: list[fx.Node]) -> bool:
    _, scale, zero_point, name = arguments(node).values()
    element = element_type(name)
    if scale.op != "get_attr" or not isinstance(element, IntegerType) or element.bits != 8:
        return False
    step, zero = (gm.get_buffer(str(each.target)) for each in (scale, zero_point))
    if step.dim() or zero.is_floating_point() or not int(zero):
        return False
    span = max(int(zero) - element.quant_min, element.quant_max - int(zero))
    values = {"_scale": step * (span / _LARGEST), "_zero_point": torch.zeros_like(zero)}
    path = str(scale.target).removesuffix("_scale")
    grid = [*new_constants(gm, path, values, node), _SIGNED]
    for each in (node, *readers):
        set_arguments(each, dict(enumerate(grid, 1)))
    return True


def _readers(quantizer: fx.Node) -> list[fx.Node]:
    """Every ``dequantize`` of the codes, moved or not; none if anything else reads them."""
    found = list(readers_behind(quantizer))
    return found if all(each.target is DEQUANTIZE for each in found) else []
