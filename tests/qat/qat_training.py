"""Calibrated models and steps of training, for the tests of QAT."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from models import MODELS, example
from torch import Tensor, nn

from torch_quant import Backend, QConfig, Quantizer, QuantSpec, recipes
from torch_quant.backends.reference import ReferenceBackend

__all__ = [
    "FOUR_BITS", "calibrated", "loss_of", "quiet", "simulation", "skip_beside_ipex", "steps",
    "train",
]  # fmt: skip

FOUR_BITS = QConfig(
    input=QuantSpec.of(bits=4),
    weight=QuantSpec.of(bits=4, signed=True, symmetric=True, per_channel=True),
)


def calibrated(
    model: nn.Module | str, *inputs: Any, backend: str = "reference", **options: Any
) -> tuple[Quantizer, nn.Module, tuple[Any, ...]]:
    """A quantizer that has seen a model, or one of ``MODELS`` by name, on one batch.

    Its QConfig has no optional transforms, which ``qat`` leaves out and ``quantize(model)`` not.
    """
    options.setdefault("qconfig", recipes.fast())
    if isinstance(model, str):
        model, inputs = MODELS[model](), example(model, 8)
    quantizer = Quantizer(backend, **options)
    quantizer.calib(model)(*inputs)
    return quantizer, model, inputs


def simulation(backend: str) -> Backend:
    """What computes the plan of a backend in float arithmetic."""
    return ReferenceBackend(None if backend == "reference" else Backend.get(backend))


def loss_of(outputs: Any) -> Tensor:
    """A number that depends on every element of every float output."""
    leaves = torch.utils._pytree.tree_leaves(outputs)
    if hasattr(outputs, "to_tuple"):
        leaves = torch.utils._pytree.tree_leaves(outputs.to_tuple())
    floats = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    loss: Tensor = sum((x.square() * 0.5 + x).mean() for x in floats)  # type: ignore[assignment]
    return loss


def train(
    model: nn.Module, inputs: tuple[Any, ...], optimizer: torch.optim.Optimizer, steps: int
) -> list[float]:
    """Losses of some steps on one batch."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(*inputs))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def steps(
    quantizer: Quantizer, qat_model: Any, inputs: tuple[Any, ...], count: int = 3
) -> list[float]:
    """Losses of some steps of Adam, with rates at which every parameter moves."""
    groups = quantizer.parameter_groups(qat_model, lr=1e-3, scale_lr=1e-3)
    return train(qat_model, inputs, torch.optim.Adam(groups), count)


@torch.no_grad()
def quiet(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The output without gradients."""
    return model(*inputs)


def skip_beside_ipex() -> None:
    """Skip a test that trains norms where another test of this process has imported IPEX."""
    if "intel_extension_for_pytorch" in sys.modules:
        pytest.skip("IPEX, once imported, takes the gradients of norms; run this file by itself")
