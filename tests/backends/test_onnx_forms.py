"""Each form computes what the graph before it did."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import normal, seeded, tokens
from rewriting import Compute, apply, canonical, grid_of, operators, plan_for
from torch import Tensor, fx, nn

from torch_quant.backends.onnx.forms.attention import attention_forms
from torch_quant.backends.onnx.forms.biases import integer_bias
from torch_quant.backends.onnx.forms.linears import linear_forms_2d
from torch_quant.backends.onnx.forms.move_codes import move_codes
from torch_quant.backends.onnx.forms.paddings import explicit_padding
from torch_quant.backends.onnx.forms.pools import padding_before_pools
from torch_quant.core.spec import QuantSpec
from torch_quant.ops.qdq import DEQUANTIZE_PER_CHANNEL, DEQUANTIZE_PER_TENSOR, QUANTIZE_PER_TENSOR
from torch_quant.passes.base import Pass
from torch_quant.passes.embeddings import embedding_forms
from torch_quant.passes.fold_scales import fold_scales
from torch_quant.passes.insert_qdq import insert_qdq


def both(model: nn.Module, x: Tensor, *passes: Pass) -> tuple[fx.GraphModule, fx.GraphModule, int]:
    """The graph with pairs, before and after the passes, and the number of changes of the last."""

    def insert() -> fx.GraphModule:
        gm = canonical(model, x)
        plan = plan_for(gm)
        apply(insert_qdq, gm, plan)
        apply(fold_scales, gm)
        return gm

    before, after = insert(), insert()
    return before, after, [apply(rewrite, after) for rewrite in passes][-1]


def convolution(gm: fx.GraphModule) -> fx.Node:
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    return next(node for node in calls if "conv2d" in str(node.target))


class Attention(nn.Module):
    """Attention over its input, causal or not."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        k = (q + 1.0).flip(-1)
        return F.scaled_dot_product_attention(q, k, q, is_causal=self.causal).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal: bool) -> None:
    x = normal(2, 5, 16)
    before, after, count = both(Attention(causal), x, attention_forms)
    assert count == 1
    found = operators(after)
    assert "masked_fill" not in found
    assert "_safe_softmax" not in found
    assert "mul" not in found  # the scale is that of a grid
    # A product is scaled before it is summed up, not after, which may turn a rounding.
    step = max(float(grid_of(key, QuantSpec()).scale) for key in "abcdefg")
    assert (before(x)[0] - after(x)[0]).abs().max() <= 2 * step


def test_data_moves_before_it_is_dequantized() -> None:
    x = normal(2, 5, 16)
    before, after, _ = both(Attention(causal=False), x, move_codes)
    for node in after.graph.nodes:
        if "transpose" in str(node.target) and node.args[0].target is DEQUANTIZE_PER_TENSOR:
            pytest.fail(f"{node} moves real numbers")
    assert torch.equal(before(x)[0], after(x)[0])


@pytest.mark.parametrize("shape", [(3, 16), (2, 3, 16), (2, 2, 3, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    model, x = seeded(lambda: nn.Sequential(nn.Linear(16, 8, bias=bias), nn.GELU())), normal(*shape)
    before, after, count = both(model, x, integer_bias, linear_forms_2d)
    assert count == 1
    (product,) = after.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    if bias:
        assert product.args[2].target is DEQUANTIZE_PER_CHANNEL
    torch.testing.assert_close(before(x)[0], after(x)[0], rtol=1e-4, atol=1e-4)
    moved = operators(after).count("reshape")
    assert moved == (0 if len(shape) == 2 else 2)


def test_a_linear_stays_2d_up_to_the_next_quantizer() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4)))
    _, after, _ = both(model, normal(2, 3, 16), linear_forms_2d)
    gelu = next(n for n in after.graph.nodes if "gelu" in str(n.target))
    assert gelu.args[0].target is torch.ops.aten.linear.default
    (quantizer,) = gelu.users
    assert quantizer.target is QUANTIZE_PER_TENSOR
    assert all("reshape" in str(user.target) for user in quantizer.users)


@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_bias_and_padding_of_convolutions(padding: str | int) -> None:
    model = seeded(lambda: nn.Conv2d(4, 6, 3, padding=padding, dilation=2))
    x = normal(2, 4, 9, 9)
    before, after, count = both(model, x, explicit_padding, integer_bias)
    assert count == 1
    conv = convolution(after)
    assert conv.target is torch.ops.aten.conv2d.default
    assert conv.args[2].target is DEQUANTIZE_PER_CHANNEL
    torch.testing.assert_close(before(x)[0], after(x)[0], rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_a_one_sided_padding_is_left_by_name() -> None:
    model = seeded(lambda: nn.Conv2d(4, 6, 2, padding="same"))
    _, after, count = both(model, normal(2, 4, 9, 9), explicit_padding)
    assert not count
    conv = convolution(after)
    assert conv.target is torch.ops.aten.conv2d.padding


def test_embedding() -> None:
    model, x = seeded(lambda: nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 4))), tokens(2, 5)
    before, after, count = both(model, x, embedding_forms)
    assert count == 1
    assert operators(after).count("embedding") == 2  # the codes, and their scales
    torch.testing.assert_close(before(x)[0], after(x)[0], rtol=1e-5, atol=1e-5)


PADDED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "pad": (lambda x: F.max_pool2d(F.pad(x, (1, 1)), 3), 1),
    "constant_pad_nd": (lambda x: F.max_pool2d(torch.constant_pad_nd(x, [1, 1], 0.0), 3), 1),
    "one_dimension": (lambda x: F.max_pool1d(F.pad(x[0], (1, 1), "constant", 0.0), 3), 1),
    "another_value": (lambda x: F.max_pool2d(F.pad(x, (1, 1), value=-2.0), 3), 0),
    "reflected": (lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), "reflect"), 3), 0),
    "averaged": (lambda x: F.avg_pool2d(F.pad(x, (1, 1)), 3), 0),
}


@pytest.mark.parametrize("name", PADDED)
def test_zeros_before_a_max_pool(name: str) -> None:
    """They are negative ones, which onnxruntime does not take for the pool's own padding."""
    compute, changes = PADDED[name]
    x = -normal(2, 3, 8, 8).abs()
    gm = canonical(Compute(compute), x)
    assert apply(padding_before_pools, gm) == changes
    found = [n.args[2] for n in gm.graph.nodes if "constant_pad_nd" in str(n.target)]
    assert [math.copysign(1.0, value) for value in found] == [-1.0] * changes
    assert torch.equal(gm(x)[0], compute(x))
