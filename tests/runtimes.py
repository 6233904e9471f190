"""What the tests of runtimes in this process share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import normal
from thinning import rarely
from torch import Tensor, nn

from torch_quant.backends import OnnxRuntimeBackend, OpenVINOBackend
from torch_quant.backends.in_process import InProcess
from torch_quant.backends.onnx.in_process import InProcessBackend

__all__ = [
    "RUNTIMES",
    "Everything",
    "Pieces",
    "by_onnxruntime",
    "by_openvino",
    "check_calls_of_any_form",
    "compiled",
    "each_runtime",
    "everything",
]

RUNTIMES: dict[str, type[InProcessBackend]] = {
    "onnxruntime": OnnxRuntimeBackend, "openvino": OpenVINOBackend
}  # fmt: skip
each_runtime = pytest.mark.parametrize("name", RUNTIMES)
by_onnxruntime = pytest.mark.parametrize("name", ["onnxruntime", rarely("openvino")])
"""For what does not depend on the runtime; tests take them in turns, and the long run has both."""
by_openvino = pytest.mark.parametrize("name", ["openvino", rarely("onnxruntime")])


def compiled(model: nn.Module) -> InProcess:
    """What the first graph of a quantized model runs."""
    found = model.graphs[0].compiled
    assert isinstance(found, InProcess)
    return found


@dataclass
class Result:
    y: Tensor
    rows: int
    x: Tensor
    nothing: None = None


class Everything(nn.Module):
    """Keywords, numbers, a mask; among the outputs an input, a tensor twice, a size, an object."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor, mask: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        y = self.head(self.layer(x).relu()) * scale
        y = y.masked_fill(mask.unsqueeze(-1), 0.0)
        return {"result": Result(y, x.shape[0], x), "again": y, "ids": y.argmax(-1)}


def everything(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (normal(batch, 5, 16), torch.arange(batch * 5).reshape(batch, 5) % 3 == 0), {
        "scale": 2.5
    }


def check_calls_of_any_form(quant_model: Any, reference: Any) -> Any:
    """Inputs and outputs are those of ``Everything``, and outlive the next call.

    Returns:
        The last inputs, and what the scale 0.5 gives for them.
    """
    kept = []
    for batch in (5, 1, 0, 7):
        (x, mask), options = everything(batch)
        found, expected = quant_model(x, mask, **options), reference(x, mask, **options)
        result = found["result"]
        assert isinstance(result, Result)
        assert result.x is x
        assert result.rows == batch
        assert result.y is found["again"]
        torch.testing.assert_close(result.y, expected["again"], rtol=0.0, atol=1e-4)
        assert torch.equal(found["ids"], expected["ids"])
        kept.append((result.y, expected["again"]))
    other = quant_model(x, mask, scale=0.5)["again"]
    torch.testing.assert_close(other, found["again"] / 5)  # numbers are inputs of the session
    for found, expected in kept:
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4)
    return x, mask, other


class Pieces(nn.Module):
    """Reads a tensor's value between two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if float(x.abs().max()) > 1e6:
            raise ValueError("too large")
        return self.second(x.relu())
