"""A new backend: a class with a table of kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contract import check_workflow
from flows import calibrated
from models import normal, seeded
from torch import Tensor, fx, nn

from torch_quant import InvalidConfig, QuantSpec, available_backends
from torch_quant.backends import Backend, register_backend, register_kernel
from torch_quant.backends.int8 import symmetric_weight
from torch_quant.backends.reference import ReferenceBackend
from torch_quant.core.kernels import Accepts, Kernel, KernelTable
from torch_quant.passes.base import PassContext, call_like


def wide_product(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """A linear layer of integers, in 64 bits."""
    product = (x.long() - zero_point) @ weight.long().T
    real = product.double() * scales.double().flatten() * scale
    return (real if bias is None else real + bias).float()


def emit_linear(context: PassContext, node: fx.Node) -> None:
    x, weight, *rest = node.args
    args = (*x.args[:3], weight.args[0], weight.args[1], *(rest or [None]))
    node.replace_all_uses_with(call_like(node, wide_product, args))
    node.graph.erase_node(node)


class Toy(Backend):
    """Has one kernel."""

    name = "toy"
    priority = -100

    def unavailable(self) -> str | None:
        return None

    def _kernels(self) -> KernelTable:
        weight = Accepts(symmetric_weight(), lambda spec: spec.per_channel, "toys want channels")
        return KernelTable(
            self.name, (Kernel("linear", Accepts(QuantSpec()), weight, emit=emit_linear),)
        )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean(-1))


def test_a_backend_is_a_table_of_kernels(tmp_path: Path) -> None:
    register_backend(Toy)
    inputs = ((normal(16, 3, 9),), {})
    quantizer, quant_model = check_workflow(seeded(Net), inputs, "head", tmp_path, backend="toy")
    assert quantizer.plan["conv"].reason == "toy has no int8 kernel for conv1d"
    assert Backend.get("toy") in available_backends()
    called = {node.target for node in quant_model.graphs[0].body.graph.nodes}
    assert wide_product in called


def test_its_simulation_computes_the_same() -> None:
    register_backend(Toy)
    x = normal(16, 3, 9)
    quantizer = calibrated(model := seeded(Net), [((x,), {})], backend="toy")
    simulated = quantizer.quantize(model, backend=ReferenceBackend(Backend.get("toy")))
    torch.testing.assert_close(quantizer.quantize(model)(x), simulated(x))


def test_formats_that_it_does_not_take_are_reported() -> None:
    register_backend(Toy)
    from torch_quant import QConfig

    whole = QConfig(weight=QuantSpec.of(signed=True, symmetric=True))
    quantizer = calibrated(model := seeded(Net), [((normal(4, 3, 9),), {})], backend="toy")
    quantizer.overrides["head"] = whole
    assert "toys want channels, not s8" in str(quantizer.coverage(model))


def test_a_kernel_for_an_unknown_backend() -> None:
    with pytest.raises(InvalidConfig, match="unknown backend 'nowhere'"):
        register_kernel("nowhere", Kernel("linear"))
