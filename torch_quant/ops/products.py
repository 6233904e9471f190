"""Linear layers, convolutions and products of activations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from torch_quant.core.window import Window
from torch_quant.ops.arguments import argument
from torch_quant.ops.table import (
    RECTIFIERS,
    OpPattern,
    call_sizes,
    numel,
    padding_sizes,
    register_operator,
    spread,
)

aten = torch.ops.aten


def _gemm_macs(args: Any, out: Any) -> int:
    return numel(out) * call_sizes(args[0])[-1]


def _conv_macs(args: Any, out: Any) -> int:
    return numel(out) * math.prod(call_sizes(args[1])[1:])


def _transposed_macs(args: Any, out: Any) -> int:
    return numel(args[0]) * math.prod(call_sizes(args[1])[1:])


def _window(node: fx.Node) -> Window:
    kernel = call_sizes(argument(node, "weight"))[2:]
    dims, dilation = len(kernel), argument(node, "dilation")
    sides, far = padding_sizes(argument(node, "padding"), kernel, dilation)
    added = list(reversed(far[1::2])) or [0] * dims
    return Window(
        kernel,
        tuple(spread(argument(node, "stride"), dims)),
        tuple(sides),
        tuple(side + more for side, more in zip(sides, added, strict=True)),
        tuple(spread(dilation, dims)),
        argument(node, "groups"),
    )


_CONVS: dict[str, tuple[Any, ...]] = {
    "conv1d": (aten.conv1d.default, aten.conv1d.padding),
    "conv2d": (aten.conv2d.default, aten.conv2d.padding),
    "conv3d": (aten.conv3d.default, aten.conv3d.padding),
}
_TRANSPOSED: dict[str, Any] = {
    "conv_transpose1d": aten.conv_transpose1d.default,
    "conv_transpose2d": aten.conv_transpose2d.input,
    "conv_transpose3d": aten.conv_transpose3d.input,
}

register_operator(
    OpPattern(
        "linear",
        (aten.linear.default,),
        (0,),
        1,
        0,
        _gemm_macs,
        bias=2,
        smoothable=True,
        channels=-1,
    )
)
for _dims, (_name, _targets) in enumerate(_CONVS.items(), 1):
    register_operator(
        OpPattern(
            _name,
            _targets,
            (0,),
            1,
            0,
            _conv_macs,
            bias=2,
            channels=-1 - _dims,
            output=RECTIFIERS,
            window=_window,
        )
    )
for _name, _target in _TRANSPOSED.items():
    register_operator(OpPattern(_name, (_target,), (0,), 1, 1, _transposed_macs, bias=2))
register_operator(
    OpPattern(
        "matmul",
        (aten.matmul.default, aten.bmm.default, aten.mm.default),
        (0, 1),
        None,
        0,
        _gemm_macs,
        columns=(1,),
    )
)
