"""Layers that round their input at each call: functions behind them, and several in one call."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import normal
from torch import Tensor

from torch_quant import InvalidConfig, native
from torch_quant.native.dynamic import DYNAMIC_LINEAR, DYNAMIC_LINEARS

SETS = native.instruction_sets()
needs_kernels = pytest.mark.skipif(not SETS, reason=f"{native.unavailable()}")
FUNCTIONS: dict[str, tuple[tuple[Any, ...], Callable[[Tensor], Tensor]]] = {
    "relu": (("relu", [], "none"), torch.relu),
    "relu6": (("hardtanh", [0.0, 6.0], "none"), F.relu6),
    "leaky_relu": (("leaky_relu", [0.2], "none"), lambda x: F.leaky_relu(x, 0.2)),
    "gelu": (("gelu", [], "none"), F.gelu),
    "gelu, tanh": (("gelu", [], "tanh"), functools.partial(F.gelu, approximate="tanh")),
    "silu": (("swish", [], "none"), F.silu),
    "tanh": (("tanh", [], "none"), torch.tanh),
    "hardswish": (("hardswish", [], "none"), F.hardswish),
}  # fmt: skip


def layer(outputs: int, inputs: int, salt: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(outputs + inputs + salt)
    weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    scale = (torch.rand(outputs, generator=generator) + 0.1) / (80 * math.sqrt(inputs))
    return weight, scale, normal(outputs, salt=salt + 1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(instructions: str, name: str) -> None:
    """Few rows and many, odd sizes, and a row that is not finite."""
    ending, function = FUNCTIONS[name]
    for rows, inputs, outputs in ((3, 70, 21), (40, 64, 300)):
        x, tensors = normal(rows, inputs), layer(outputs, inputs)
        x[1, 2] = math.inf
        for signed in (False, True):
            real = DYNAMIC_LINEAR(x, *tensors, signed)
            found = DYNAMIC_LINEAR(x, *tensors, signed, *ending)
            assert found[1].isnan().all()
            others = torch.arange(rows) != 1
            expected = function(real[others])
            torch.testing.assert_close(found[others], expected, rtol=1e-5, atol=2e-6)


def test_function_names_that_are_not_known() -> None:
    x, tensors = normal(3, 8), layer(4, 8)
    for ending in (("mish", [], "none"), ("relu", [1.0], "none"), ("gelu", [], "sigmoid")):
        with pytest.raises(InvalidConfig, match="dynamic_linear: expected one of none, relu"):
            DYNAMIC_LINEAR(x, *tensors, False, *ending)


@pytest.mark.parametrize("rows", [1, 7, 33, 1500])
def test_layers_of_one_input(instructions: str, rows: int) -> None:
    """What each gives by itself, to the last bit; 1500 rows are not rounded at once."""
    x = normal(rows, 800)
    layers = [layer(outputs, 800, salt=outputs) for outputs in (5, 40, 16)]
    for signed, biased in ((False, True), (True, False)):
        weights, scales, biases = map(list, zip(*layers, strict=True))
        found = DYNAMIC_LINEARS(x, weights, scales, biases if biased else [], signed)
        for y, (weight, scale, bias) in zip(found, layers, strict=True):
            alone = DYNAMIC_LINEAR(x, weight, scale, bias if biased else None, signed)
            assert torch.equal(y, alone)


@needs_kernels
def test_threads_share_blocks_that_are_packed(instructions: str) -> None:
    x, tensors = normal(64, 512), layer(1000, 512)
    expected = DYNAMIC_LINEAR(x, *tensors, False, "gelu", [], "none")
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            found = DYNAMIC_LINEAR(x, *tensors, False, "gelu", [], "none")
            assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(1)


def test_other_types_and_nothing(instructions: str) -> None:
    tensors = layer(6, 40)
    x = normal(2, 9, 40)
    wide = DYNAMIC_LINEAR(x.double(), *tensors, False, "relu", [], "none")
    assert wide.dtype is torch.float64
    assert torch.equal(wide.float(), DYNAMIC_LINEAR(x, *tensors, False, "relu", [], "none"))
    turned = x.mT.contiguous().mT
    assert torch.equal(DYNAMIC_LINEAR(turned, *tensors, False), DYNAMIC_LINEAR(x, *tensors, False))
    weights, scales, biases = ([each] for each in tensors)
    assert DYNAMIC_LINEARS(x[:, :0], weights, scales, biases, False)[0].shape == (2, 0, 6)
    nothing = layer(6, 0)
    expected = F.gelu(nothing[2]).expand(2, 9, 6)
    found = DYNAMIC_LINEAR(x[..., :0], *nothing, False, "gelu", [], "none")
    torch.testing.assert_close(found, expected)


def test_layers_that_do_not_fit() -> None:
    x, (weight, scale, bias) = normal(3, 8), layer(4, 8)
    with pytest.raises(InvalidConfig, match=r"expected lists of one length.* got \[2, 1, 0\]"):
        DYNAMIC_LINEARS(x, [weight, weight], [scale], [], False)
    with pytest.raises(InvalidConfig, match="dynamic_linears: expected a weight of 8 inputs"):
        DYNAMIC_LINEARS(x, [weight, weight[:, :5]], [scale, scale], [], False)
    with pytest.raises(InvalidConfig, match="dynamic_linears: expected a bias of 4"):
        DYNAMIC_LINEARS(x, [weight], [scale], [bias[:3]], False)
