"""A new operator, and kernels for it: one row in the op table, one row for each backend."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import check_workflow
from flows import calibrated
from models import normal, seeded
from torch import Tensor, fx, nn

from torch_quant import InvalidConfig, QuantSpec
from torch_quant.backends import register_kernel
from torch_quant.backends.int8 import symmetric_weight
from torch_quant.core.kernels import Accepts, Kernel
from torch_quant.ops.table import OpPattern, call_sizes, register_operator
from torch_quant.passes.base import PassContext, call_like

RAN: list[torch.dtype] = []
"""Types of the weights that the toy kernel was given."""


@torch.library.custom_op("toy::mix", mutates_args=())
def mix(x: Tensor, weight: Tensor) -> Tensor:
    """Rows of ``x``, ``[..., in]``, times ``[out, in]``, rectified."""
    return (x @ weight.T).relu()


@mix.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight, output = ctx.saved_tensors
    grad = grad * (output > 0)
    return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


mix.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("toy::int8_mix", mutates_args=())
def int8_mix(x: Tensor, scale: float, zero_point: int, weight: Tensor, scales: Tensor) -> Tensor:
    """The kernel: integers times integers."""
    RAN.append(weight.dtype)
    product = (x.to(torch.int32) - zero_point) @ weight.to(torch.int32).T
    return (product * scales.flatten() * scale).relu()


@int8_mix.register_fake
def _(x: Tensor, scale: float, zero_point: int, weight: Tensor, scales: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32)


MIX = OpPattern(
    "mix",
    (torch.ops.toy.mix.default,),
    activations=(0,),
    weight=1,
    weight_axis=0,
    macs=lambda args, out: math.prod(call_sizes(out)) * 16,
)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return mix(x, self.weight)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixing, self.head = Mixing(), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixing(x))


def test_on_the_reference_a_row_of_the_op_table_is_enough(tmp_path: Path) -> None:
    register_operator(MIX)
    inputs = ((normal(32, 16),), {})
    check_workflow(seeded(Net), inputs, "mixing", tmp_path, backend="reference")


def emit(context: PassContext, node: fx.Node) -> None:
    x, weight = node.args
    new = call_like(node, int8_mix._opoverload, (*x.args, weight.args[0], weight.args[1]))
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def test_a_kernel_row_puts_it_on_a_backend(tmp_path: Path) -> None:
    register_operator(MIX)
    register_kernel(
        "onednn", Kernel("mix", Accepts(QuantSpec()), Accepts(symmetric_weight(7)), emit=emit)
    )
    RAN.clear()
    inputs = ((normal(32, 16),), {})
    quantizer, _ = check_workflow(seeded(Net), inputs, "mixing", tmp_path, backend="onednn")
    assert set(RAN) == {torch.int8}
    assert quantizer.coverage(seeded(Net), inputs[0]).plan["mixing"].quantized is False  # fell back


def test_without_a_kernel_row_it_stays_in_float_and_says_so() -> None:
    register_operator(MIX)
    quantizer = calibrated(model := seeded(Net), [((normal(32, 16),), {})], backend="onednn")
    quantizer.quantize(model)
    assert quantizer.plan["mixing"].reason == "onednn has no int8 kernel for mix"


def test_an_operator_of_the_table_is_not_registered_twice() -> None:
    register_operator(MIX)
    with pytest.raises(InvalidConfig, match="'mix' is in the op table already"):
        register_operator(MIX)
    other = OpPattern("blend", MIX.targets, (0,), 1, 0, MIX.macs)
    with pytest.raises(InvalidConfig, match=r"toy.mix.default is in the op table already, as mix"):
        register_operator(other)
