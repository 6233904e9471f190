"""Rows for recurrent layers: a kernel of this package runs a whole sequence, rounding each step.

PyTorch's own takes one step a call, and rounds all sequences of a batch alike.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from torch_quant import native
from torch_quant.backends.onednn.native import TOKENS, is_token
from torch_quant.core.kernels import Accepts, Kernel
from torch_quant.core.plan import SitePlan
from torch_quant.graph.sites import key_of
from torch_quant.native.dynamic import MOST_INPUTS
from torch_quant.native.recurrent import DYNAMIC_CELL, DYNAMIC_RECURRENT
from torch_quant.ops.arguments import argument, arguments, retarget
from torch_quant.ops.qdq import DEQUANTIZE, DEQUANTIZE_PER_CHANNEL, QUANTIZE
from torch_quant.ops.stepping import RECURRENT, RECURRENT_CELL
from torch_quant.ops.table import OPERATORS
from torch_quant.passes.base import PassContext

__all__ = ["recurrent_kernels"]


def recurrent_kernels(weight: Accepts) -> tuple[Kernel, ...]:
    """The rows; where the library of kernels is missing they refuse every format and say so.

    Args:
        weight: what a matrix of int8 rows may be.
    """
    missing = native.unavailable()
    tokens = Accepts(
        TOKENS,
        is_token if missing is None else lambda spec: False,
        "recurrent layers run on this package's kernels, with uint8 or symmetric int8 activations "
        "that have a scale per token, chosen at each call"
        + ("" if missing is None else f" ({missing})"),
        any_format=True,
        dynamic=True,
    )
    names = [name for name, pattern in OPERATORS.items() if pattern.steps]
    return tuple(Kernel(name, tokens, weight, emit=_lower) for name in names)


def _lower(context: PassContext, node: fx.Node) -> None:
    if node.target not in (RECURRENT, RECURRENT_CELL):
        return
    given = arguments(node)
    count = 4 if given["has_biases"] else 2
    params = given["params"]
    weights = [each for i, each in enumerate(params) if i % count < 2]
    biases = [each for i, each in enumerate(params) if i % count >= 2]
    real = given["x"]
    known = all(each.target is DEQUANTIZE_PER_CHANNEL for each in weights)
    if not known or real.target is not DEQUANTIZE or argument(real, "q").target is not QUANTIZE:
        return
    codes, scales = ([argument(each, which) for each in weights] for which in ("q", "scale"))
    shapes = [_shape(each) for each in codes]
    if max(shape[1] for shape in shapes) > MOST_INPUTS:
        inputs = f"{MOST_INPUTS} inputs"
        context.decline(key_of(node), f"sums of more than {inputs} do not fit in 32 bits")
        return
    entry: SitePlan = context.plan[key_of(node)]
    assert entry.activation is not None
    x, last = argument(argument(real, "q"), "x"), (scales, biases, entry.activation.symmetric)
    if node.target is RECURRENT_CELL:
        middle = [given[name] for name in ("kind", "has_biases")]
        retarget(node, DYNAMIC_CELL, (x, given["hx"], codes, *middle, *last))
        return
    names = ("batch_sizes", "kind", "has_biases", "bidirectional", "batch_first")
    middle = [given[name] for name in names]
    retarget(node, DYNAMIC_RECURRENT, (x, given["hx"], codes, *middle, *last))


def _shape(codes: Any) -> tuple[int, ...]:
    return tuple(codes.graph.owning_module.get_buffer(str(codes.target)).shape)
