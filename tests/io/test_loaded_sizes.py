"""A saved model is loaded into a model of the same sizes and no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flows import calibrated
from models import normal, seeded
from torch import Tensor, nn

import torch_quant
from torch_quant import InvalidConfig, recipes


class Sized(nn.Module):
    """Of a width, a depth and a number of classes."""

    def __init__(self, width: int = 16, depth: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"classes": 5}, r"head\.weight is \(5, 16\); expected \(3, 16\)"),
        ({"width": 32}, r"layers\.0\.weight is \(32, 32\); expected \(16, 16\)"),
        ({"depth": 3}, r"it has a module layers\.2, which that has not"),
        ({"depth": 1}, r"its module layers\.1 is a torch\.nn\.modules\.module\.Module"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_model_of_another_size_is_refused(
    other: dict[str, int], message: str, tmp_path: Path
) -> None:
    """Its attributes would speak of another model than its weights."""
    model = seeded(Sized)
    x = normal(8, 16)
    quantizer = calibrated(model, [((x,), {})], backend="reference", qconfig=recipes.fast())
    torch_quant.save(quantizer.quantize(model), tmp_path)
    with pytest.raises(InvalidConfig, match=message):
        torch_quant.load(tmp_path, model=Sized(**other))
    with torch.device("meta"):
        same = Sized()
    assert torch.equal(torch_quant.load(tmp_path, model=same)(x), quantizer.quantize(model)(x))
