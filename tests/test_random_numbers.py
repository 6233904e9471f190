"""Models that draw random numbers in the Python code between their pieces."""

from __future__ import annotations

import random

import pytest
import torch
from models import seeded
from torch import Tensor, nn

from torch_quant import Quantizer, sqnr


class Noisy(nn.Module):
    """Adds noise between two layers, as samplers do, in code that is no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def noise(self, x: Tensor) -> Tensor:
        return torch.randn_like(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if float(y.detach().sum()) > 1e9:
            return y
        return self.last(y + self.noise(y))


class Picking(Noisy):
    """Draws indices, and so the order of what it gives."""

    def noise(self, x: Tensor) -> Tensor:
        return x[torch.multinomial(torch.ones(len(x)), len(x))]


class Unsteady(Noisy):
    """Draws from Python's own generator, whose state nobody keeps."""

    def noise(self, x: Tensor) -> Tensor:
        return x * random.random()


class Around(nn.Module):
    """One of these as a part, and Python code that reads a value around it."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.head = part, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return self.head(y) if float(y.detach().sum()) < 1e9 else y


@pytest.mark.parametrize("kind", [Noisy, Picking])
@pytest.mark.parametrize("inside", [False, True])
def test_the_same_numbers_are_drawn(kind: type[Noisy], inside: bool) -> None:
    model = seeded(lambda: Around(kind()) if inside else kind())
    quantizer = Quantizer("reference")
    proxy = quantizer.calib(model)
    for seed, rows in enumerate((4, 4, 7)):
        x = torch.randn(rows, 8)
        torch.manual_seed(seed)
        expected, after = model(x), torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(proxy(x), expected)
        assert torch.equal(torch.rand(1), after)  # as many as the model draws
    quantized = quantizer.quantize(model)
    assert len(quantizer.plan.quantized) == 2 + inside
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    assert sqnr(expected, quantized(x)) > 25  # other noise is 3 dB


def test_numbers_of_another_generator_end_the_comparison(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing can be compared with a module that gives another result at each call."""
    model = seeded(lambda: Around(Unsteady()))
    quantizer = Quantizer("reference")
    proxy = quantizer.calib(model)
    for rows in (4, 4, 7):
        assert proxy(torch.randn(rows, 8)).shape == (rows, 8)
    assert "part: it gives another result each time" in caplog.text
    quantized = quantizer.quantize(model)
    assert quantizer.plan.quantized == ("head",)
    assert quantized(torch.randn(3, 8)).shape == (3, 8)
