"""PyTorch's own oneDNN int8 kernels, and ours: nothing to install, fast on every x86 CPU with VNNI.

A product becomes one kernel call with the activation function behind it fused in; if all that reads
the result wants it quantized alike, the kernel gives integers right away.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import fx

from torch_quant import native
from torch_quant.backends.base import Backend, register_backend
from torch_quant.backends.convolutions import CONV_DIMS, float_multipliers
from torch_quant.backends.int8 import has_vnni, int8_weight, symmetric_weight
from torch_quant.backends.onednn import ops
from torch_quant.backends.onednn.endings import ending_of, replace
from torch_quant.backends.onednn.native import native_kernels
from torch_quant.backends.onednn.products import product_kernels
from torch_quant.backends.onednn.recurrent import recurrent_kernels
from torch_quant.backends.onednn.rows import round_in_one_pass
from torch_quant.backends.onednn.tables import table_kernels
from torch_quant.core.kernels import Accepts, Kernel, KernelTable
from torch_quant.core.spec import QuantSpec
from torch_quant.graph.sites import key_of
from torch_quant.ops.arguments import argument, positional, retarget, set_arguments
from torch_quant.ops.qdq import DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR
from torch_quant.ops.table import padding_sizes, size_hints, spread
from torch_quant.passes.attention_masks import share_masks
from torch_quant.passes.base import PassContext
from torch_quant.passes.fold_pads import zeros_around
from torch_quant.passes.fold_scales import fold_scales
from torch_quant.passes.joint_products import join_gated, join_products
from torch_quant.passes.rms_norms import fuse_rms_norms
from torch_quant.passes.unsigned import unsigned_activations

__all__ = ["OneDNNBackend", "accepted_weight", "missing_kernels", "pad_codes"]

aten = torch.ops.aten

_CONV_POST_OPS: dict[int, set[str]] = {
    1: {"relu"},
    2: {"relu", "hardtanh", "swish", "hardswish"},
    3: set(),
}
"""What the kernels fuse, by the number of spatial dimensions."""


def missing_kernels() -> str | None:
    """Why this machine cannot run PyTorch's oneDNN kernels, or None."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"its kernels are for x86 CPUs, this is {platform.machine()}"
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
    ):
        return "this build of torch has no oneDNN; pip install torch>=2.8 has"
    return None


def accepted_weight() -> Accepts:
    """What they take: 7 bits where sums of two products of 8 bits would saturate."""
    return Accepts(
        symmetric_weight(bits=8 if has_vnni() else 7),
        lambda spec: spec.signed and spec.symmetric and spec.per_channel,
        "oneDNN wants a signed symmetric per-channel weight",
    )


@register_backend
class OneDNNBackend(Backend):
    """Kernels of ``torch.ops.onednn``.

    Without VNNI, two u8 x s8 products are added in 16 bits and saturate: weights are then kept to 7
    bits, with which they cannot.
    """

    name = "onednn"
    priority = 10

    def unavailable(self) -> str | None:
        return missing_kernels()

    def _kernels(self) -> KernelTable:
        activation, weight = Accepts(QuantSpec()), accepted_weight()
        return KernelTable(
            self.name,
            (
                Kernel("linear", activation, weight, emit=_lower_linear),
                Kernel("conv1d", activation, weight, emit=_lower_conv),
                Kernel("conv2d", activation, weight, emit=_lower_conv),
                Kernel("conv3d", activation, weight, emit=_lower_conv),
                *table_kernels(weight),
                *product_kernels(activation),
                *native_kernels(),
                *recurrent_kernels(weight),
            ),
        )

    def lower(self, context: PassContext) -> fx.GraphModule:
        fold_scales(context)
        unsigned_activations(context)
        pad_codes(context)
        float_multipliers(context)
        self.emit(context)
        for node in context.graph.find_nodes(op="call_function", target=QUANTIZE_PER_TENSOR):
            _lower_quantize(node)
        round_in_one_pass(context)
        share_masks(context)
        if native.unavailable() is None:
            fuse_rms_norms(context)
            join_gated(context)
            join_products(context)
        return context.gm


def pad_codes(context: PassContext) -> int:
    """Round first, then pad with the code of 0: the kernel before may round, and bytes are few."""
    changed = 0
    for node in context.graph.find_nodes(op="call_function", target=QUANTIZE_PER_TENSOR):
        pad = argument(node, "x")
        dims = len(size_hints(pad))
        sides = zeros_around(pad, dims) if pad.op == "call_function" and dims else None
        if sides is None or len(pad.users) > 1:
            continue
        flat = [each for side in reversed(sides) for each in side]
        set_arguments(node, {"x": argument(pad, 0)})
        with node.graph.inserting_after(node):
            args: Any = (node, flat, argument(node, "zero_point"))
            padded = node.graph.call_function(aten.constant_pad_nd.default, args)
        padded.meta = dict(node.meta)
        node.replace_all_uses_with(padded)
        set_arguments(padded, {0: node})
        node.graph.erase_node(pad)
        changed += 1
    return changed


def _is_quantized(node: fx.Node) -> bool:
    x = argument(node, "input")
    quantized = isinstance(x, fx.Node) and x.target is DEQUANTIZE_PER_TENSOR
    return quantized and int8_weight(node) is not None


def _operands(node: fx.Node) -> tuple[Any, ...]:
    """x, its scale and zero point, the weight's codes and scale, the bias."""
    weight = int8_weight(node)
    assert weight is not None
    return (*positional(argument(node, "input")), *weight, argument(node, "bias"))


def _lower_linear(context: PassContext, node: fx.Node) -> None:
    if not _is_quantized(node):
        return
    out = ending_of(node)
    ending = (out.scale, out.zero_point, out.dtype, out.post_op, list(out.post_args), out.algorithm)
    replace(node, out, ops.LINEAR, (*_operands(node), *ending))


def _lower_conv(context: PassContext, node: fx.Node) -> None:
    if not _is_quantized(node):
        return
    dims = CONV_DIMS[node.target]
    if len(size_hints(node)) != dims + 2:
        context.decline(key_of(node), "oneDNN's convolutions want inputs with a batch dimension")
        return
    x, x_scale, x_zero_point, weight, *rest = _operands(node)
    names = ("stride", "padding", "dilation", "groups")
    stride, padding, dilation, groups = (argument(node, name) for name in names)
    kernel = node.graph.owning_module.get_buffer(weight.target).shape[2:]  # type: ignore[union-attr]
    sides, far = padding_sizes(padding, kernel, dilation)
    if far:  # the code of a real 0
        with node.graph.inserting_before(node):
            pad = (x, far, x_zero_point)
            x = node.graph.call_function(aten.constant_pad_nd.default, pad)
    geometry = (spread(stride, dims), sides, spread(dilation, dims), groups)
    out = ending_of(node, _CONV_POST_OPS[dims])
    ending = (out.scale, out.zero_point, out.dtype, out.post_op, list(out.post_args))
    args = (x, x_scale, x_zero_point, weight, *rest, *geometry, *ending)
    replace(node, out, ops.CONV, args)


def _lower_quantize(node: fx.Node) -> None:
    x, scale, zero_point, low, high, dtype = positional(node)
    info = torch.iinfo(dtype)
    if (low, high) != (info.min, info.max):
        return  # fewer bits than the type: the plain operator clamps to them
    retarget(node, ops.QUANTIZE_FAST, (x, scale, zero_point, dtype))
