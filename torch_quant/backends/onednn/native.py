"""Rows for language models: kernels of this package, where PyTorch has none that is fast.

They take weights of up to 8 bits and float activations, or such that are rounded per token at each
call. What they compute stands in ``csrc/kernels.h``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.backends.onednn.endings import function_behind, replace
from torch_quant.core.granularity import PerGroup, PerToken
from torch_quant.core.kernels import Accepts, Kernel
from torch_quant.core.packing import bits_of_storage, pack
from torch_quant.core.spec import QuantSpec, ScaleType
from torch_quant.graph.sites import key_of
from torch_quant.native import ops
from torch_quant.native.dynamic import DYNAMIC_LINEAR, MOST_INPUTS
from torch_quant.ops.arguments import argument, arguments, positional
from torch_quant.ops.qdq import DEQUANTIZE, DEQUANTIZE_PER_CHANNEL, QUANTIZE
from torch_quant.passes.base import PassContext, call_like
from torch_quant.passes.constants import name_of, new_constants

__all__ = ["TOKENS", "is_token", "native_kernels"]

_STEP = 32
"""A group of inputs with one scale is a multiple of this."""
_WEIGHT = QuantSpec.of(bits=4, signed=True, symmetric=True, granularity=PerGroup(128))
_INT8 = QuantSpec.of(bits=8, signed=True, symmetric=True, per_channel=True)
TOKENS = QuantSpec.of("uint8", granularity=PerToken(), dynamic=True)

_NOTE = (
    "activations are rounded inside, for each token and 32 inputs: to 8 bits with weights of up to "
    "4 bits, which leaves 38 dB and more, to 15 bits with others (32 or 128 inputs), which leaves "
    "74. What the rounding of the weights leaves lies 17 dB and more below that"
)
"""Measured with heavy-tailed activations of which every 97th channel is 1 to 3000 times as large:
int4 weights alone leave 9 to 21 dB, int8 weights 34 to 43."""


def native_kernels() -> tuple[Kernel, ...]:
    """What this package's kernels run."""
    weight = Accepts(
        _WEIGHT,
        _is_packed,
        f"weights are integers of up to 8 bits, with a scale per output channel or per group of "
        f"a multiple of {_STEP} inputs",
        any_format=True,
    )
    floats = Accepts(
        QuantSpec(),
        lambda spec: False,
        "weights of this format go with float activations, QConfig(FLOAT, weight)",
        any_format=True,
        floats=True,
        dynamic=True,
    )
    tokens = Accepts(
        TOKENS,
        is_token,
        "dynamic activations are uint8, or symmetric int8, with a scale per token",
        any_format=True,
        dynamic=True,
    )
    channels = Accepts(
        _INT8,
        lambda spec: spec.signed and spec.symmetric and spec.per_channel,
        "dynamic activations want a signed symmetric per-channel weight",
    )
    return (
        Kernel("linear", floats, weight, emit=_lower_weight_only, note=_NOTE),
        Kernel("grouped_linear", floats, weight, emit=_lower_experts, note=_NOTE),
        Kernel("linear", tokens, channels, emit=_lower_dynamic),
        Kernel("embedding", None, weight, emit=_lower_embedding),
    )


def _is_packed(spec: QuantSpec) -> bool:
    grouped = isinstance(spec.granularity, PerGroup) and spec.granularity.size % _STEP == 0
    return spec.integer and spec.bits <= 8 and not spec.dynamic and (spec.per_channel or grouped)


def is_token(spec: QuantSpec) -> bool:
    whole = spec.full_range and spec.bits == 8 and (spec.symmetric or not spec.signed)
    tokens = spec.dynamic and isinstance(spec.granularity, PerToken)
    return whole and tokens and spec.scale_type is ScaleType.FLOAT32


def _lower_weight_only(context: PassContext, node: fx.Node) -> None:
    x, weight, bias = arguments(node).values()
    packed = _packed(context, node, weight)
    if packed is not None:
        *tensors, bits, zero = packed
        _put(node, ops.WEIGHT_ONLY_LINEAR, (x, *tensors, bias, bits, zero))


def _lower_experts(context: PassContext, node: fx.Node) -> None:
    x, weight, ends = arguments(node).values()
    packed = _packed(context, node, weight)
    if packed is not None:
        *tensors, bits, zero = packed
        _put(node, ops.WEIGHT_ONLY_EXPERTS, (x, *tensors, ends, bits, zero))


def _lower_embedding(context: PassContext, node: fx.Node) -> None:
    table, indices = argument(node, "weight"), argument(node, "indices")
    packed = _packed(context, node, table)
    if packed is not None:
        *tensors, bits, zero = packed
        args = (*tensors, indices, bits, zero, _codes(table).shape[1])
        _put(node, ops.PACKED_EMBEDDING, args)


def _lower_dynamic(context: PassContext, node: fx.Node) -> None:
    real, weight, bias = arguments(node).values()
    if weight.target is not DEQUANTIZE_PER_CHANNEL or real.target is not DEQUANTIZE:
        return
    quantize = argument(real, "q")
    assert quantize.target is QUANTIZE
    if _codes(weight).shape[1] > MOST_INPUTS:
        inputs = f"{MOST_INPUTS} inputs"
        context.decline(key_of(node), f"sums of more than {inputs} do not fit in 32 bits")
        return
    spec = context.plan[key_of(node)].activation
    assert spec is not None
    codes, scale = argument(weight, "q"), argument(weight, "scale")
    out = function_behind(node)
    ending = (out.post_op, list(out.post_args), out.algorithm)
    args = (argument(quantize, "x"), codes, scale, bias, spec.symmetric, *ending)
    replace(node, out, DYNAMIC_LINEAR, args)


def _codes(weight: fx.Node) -> Tensor:
    """Codes of a weight that is dequantized."""
    return _buffer(argument(weight, "q"))


def _buffer(node: Any) -> Tensor:
    return node.graph.owning_module.get_buffer(str(node.target))  # type: ignore[no-any-return]


def _put(node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    node.replace_all_uses_with(call_like(node, target, args))
    node.graph.erase_node(node)


def _packed(context: PassContext, node: fx.Node, weight: fx.Node) -> tuple[Any, ...] | None:
    """Nodes of a weight as kernels read it: codes, scale, zero point; its bits, and its zero."""
    if weight.target not in (DEQUANTIZE, DEQUANTIZE_PER_CHANNEL):
        return None
    spec = context.plan[key_of(node)].weight
    assert spec is not None
    codes, scale, zero_point = map(_buffer, positional(weight)[:3])
    made = context.gm.meta.setdefault("torch_quant_packed", {})
    if id(codes) not in made:
        made[id(codes)] = codes, _values(codes, scale, zero_point, spec)
    values = made[id(codes)][1]
    nodes = new_constants(context.gm, name_of(argument(weight, "q"), "weight"), values, node)
    middle = 0 if spec.signed else int(spec.quant_min + spec.quant_max + 1) // 2
    bits = bits_of_storage(spec.bits)
    if len(nodes) < 3:
        nodes.append(None)  # type: ignore[arg-type]
    return (*nodes, bits, middle + _above(spec))


def _above(spec: QuantSpec) -> int:
    """What is added to a code so that none is negative."""
    return int(2 ** (bits_of_storage(spec.bits) - 1)) if spec.signed else 0


def _values(codes: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> dict[str, Tensor]:
    bits, above = bits_of_storage(spec.bits), _above(spec)
    packed = codes.contiguous() if bits == 8 else pack(codes, bits, above)
    values = {"": packed, "_scale": scale.contiguous()}
    if not spec.symmetric:
        floats = zero_point.is_floating_point()
        moved = zero_point + above if floats else zero_point.to(torch.int16) + above
        values["_zero_point"] = moved if floats else moved.to(torch.uint8)
    return values
