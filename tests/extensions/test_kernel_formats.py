"""Kernels for weights alone and for dynamic activations, given to a backend that has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contract import check_workflow
from models import normal, seeded
from torch import Tensor, fx, nn

from torch_quant import FLOAT, Backend, PerGroup, PerToken, QConfig, Quantizer, QuantSpec
from torch_quant.backends import register_kernel
from torch_quant.backends.int8 import symmetric_weight
from torch_quant.core.elements import element_type
from torch_quant.core.functional import dequantize_blocks
from torch_quant.core.kernels import Accepts, Kernel
from torch_quant.ops.qdq import CHOOSE_QPARAMS
from torch_quant.passes.base import PassContext, call_like

INT4 = QuantSpec.of("int4", granularity=PerGroup(8))
TOKENS = QuantSpec.of("int8", granularity=PerToken(), scale_type="bfloat16", dynamic=True)

needs_onednn = pytest.mark.skipif(
    Backend.ONEDNN.unavailable() is not None, reason="run on an x86 CPU"
)


def int4_product(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None
) -> Tensor:
    """A linear layer of int4 weights; a real kernel would unpack them on the way."""
    weight = dequantize_blocks(codes, scale, zero_point, element_type("int4"))
    return nn.functional.linear(x, weight, bias)


def token_product(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of int8 weights that rounds its input itself, a token at a time."""
    scale, zero_point = CHOOSE_QPARAMS(x, "int8", True, "per_token", "bfloat16")
    codes = (x / scale).round().clamp(-128, 127).long() + zero_point
    real = (codes @ weight.long().T).double() * scales.double() * scale
    return (real if bias is None else real + bias).float()


def emit_int4(context: PassContext, node: fx.Node) -> None:
    x, weight, *rest = node.args
    args = (x, *weight.args[:3], *(rest or [None]))
    node.replace_all_uses_with(call_like(node, int4_product, args))
    node.graph.erase_node(node)


def emit_tokens(context: PassContext, node: fx.Node) -> None:
    x, weight, *rest = node.args
    source = x.args[0].args[0]  # what is quantized: the kernel does that too
    args = (source, *weight.args[:2], *(rest or [None]))
    node.replace_all_uses_with(call_like(node, token_product, args))
    node.graph.erase_node(node)


def net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))).eval()


KERNELS = {
    "int4 weights": (
        Kernel("linear", None, Accepts(INT4, any_format=True), emit=emit_int4),
        QConfig(FLOAT, INT4),
        int4_product,
    ),
    "dynamic tokens": (
        Kernel(
            "linear",
            Accepts(TOKENS, lambda spec: spec == TOKENS, "tokens", any_format=True, dynamic=True),
            Accepts(symmetric_weight()),
            emit=emit_tokens,
        ),
        QConfig(TOKENS),
        token_product,
    ),
}


@needs_onednn
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_of_another_format(name: str, tmp_path: Path) -> None:
    kernel, config, called = KERNELS[name]
    x, model = normal(32, 16), net()
    without = Quantizer("onednn", qconfig=config).coverage(model, x)
    assert without.share == 0.0
    register_kernel("onednn", kernel)
    _, quantized = check_workflow(
        model, ((x,), {}), "0", tmp_path, least=15.0, backend="onednn", qconfig=config,
        capture="whole",
    )  # fmt: skip
    targets = [node.target for node in graph_of(quantized)]
    assert targets.count(called) == 2
    assert CHOOSE_QPARAMS not in targets
    simulated = Quantizer("reference", qconfig=config).quantize(model, example_inputs=x)
    torch.testing.assert_close(quantized(x), simulated(x), rtol=1e-4, atol=1e-4)


@needs_onednn
def test_static_int8_stays_on_the_backends_own_kernel() -> None:
    """The rows of an extension come first and take their own formats alone."""
    x, model = normal(32, 16), net()
    register_kernel("onednn", KERNELS["int4 weights"][0])
    config = QConfig(QuantSpec(), symmetric_weight())
    quantizer = Quantizer("onednn", qconfig=config)
    quantizer.calib(model)(x)
    quantized = quantizer.quantize(model)
    assert int4_product not in [node.target for node in graph_of(quantized)]
    assert "onednn_linear" in {getattr(n.target, "_opname", "") for n in graph_of(quantized)}


def graph_of(quantized: Any) -> list[fx.Node]:
    return list(quantized.graphs[0].body.graph.nodes)
