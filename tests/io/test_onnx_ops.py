"""Operators that PyTorch's exporter has no form for, in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flows import Inputs, calibrated
from models import normal, seeded
from onnx_files import feeds, needs, run_onnxruntime, written
from torch import Tensor, nn

from torch_quant import sqnr

pytestmark = needs("onnx", "onnxscript", "onnxruntime", "transformers")


def check(file: Path, quant_model: nn.Module, inputs: Inputs) -> None:
    (found,) = run_onnxruntime(file, feeds(quant_model, inputs))
    assert sqnr(quant_model(*inputs[0]), found) > 30.0


class Experts(nn.Module):
    """Rows sorted by expert, each multiplied with the weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)
        self.weights = nn.Parameter(normal(4, 8, 6))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0, dtype=torch.int32)
        return torch.ops.transformers.grouped_mm_fallback(self.linear(x), self.weights, ends)


def test_products_of_experts(tmp_path: Path) -> None:
    """Some have no row, and the number of rows is free."""
    pytest.importorskip("transformers.integrations.moe")  # registers the operator
    model, file = seeded(Experts), tmp_path / "model.onnx"
    inputs = ((normal(12, 16), torch.tensor([3, 0, 4, 5])), {})
    quantizer = calibrated(model, [((normal(64, 16), torch.tensor([16] * 4)), {}), inputs])
    quant_model = written(quantizer, model, inputs, file, least=None)  # counts add up to the rows
    for counts in ([3, 0, 4, 5], [0, 0, 7, 0], [9, 1, 0, 0]):
        some = ((normal(sum(counts), 16), torch.tensor(counts)), {})
        (found,) = run_onnxruntime(file, feeds(quant_model, some))
        torch.testing.assert_close(found, quant_model(*some[0]), rtol=1e-4, atol=1e-4)


class Squeezes(nn.Module):
    """Asks to squeeze a size that is not 1, which PyTorch takes for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu().squeeze(1)).squeeze(-1)


def test_a_squeeze_of_another_size_than_1(tmp_path: Path) -> None:
    model, file = seeded(Squeezes), tmp_path / "model.onnx"
    inputs = ((normal(12, 16),), {})
    quant_model = written(calibrated(model, [inputs]), model, inputs, file)
    for rows in (12, 3, 1):
        some = ((normal(rows, 16),), {})
        check(file, quant_model, some)


class Rotated(nn.Module):
    """Queries turned by complex numbers, which are moved in all ways that the exporter has not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("angles", torch.linspace(0.1, 1.0, 4))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], dtype=torch.float32)
        angles = torch.outer(places, self.angles)
        turns = torch.polar(torch.ones_like(angles), angles)
        turns = turns[None, :, None].expand(x.shape[0], -1, -1, -1).repeat(1, 1, 2, 1)
        heads = torch.view_as_complex(self.first(x).unflatten(-1, (2, 4, 2)))
        both = (heads * turns).unsqueeze(-3).select(2, 0).index_select(-2, torch.tensor([1, 0]))
        return self.second(torch.view_as_real(both).flatten(2))


def test_complex_numbers_that_are_moved(tmp_path: Path) -> None:
    model, file = seeded(Rotated), tmp_path / "model.onnx"
    inputs = ((normal(3, 7, 16),), {})
    quant_model = written(calibrated(model, [inputs]), model, inputs, file)
    for sizes in ((3, 7), (1, 9), (2, 2)):
        some = ((normal(*sizes, 16),), {})
        check(file, quant_model, some)


class Sorted(nn.Module):
    """Where values belong among sorted ones, equal ones before and behind, and a look-up of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(9, 16), nn.Linear(16, 4)
        self.register_buffer("bounds", torch.tensor([-1.0, -0.5, 0.0, 0.5, 0.5, 1.0]))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        place = torch.bucketize(x, self.bounds) + torch.searchsorted(self.bounds, x, side="right")
        own = torch.searchsorted(x.sort().values, x, out_int32=True)
        known = torch.isin(ids, torch.tensor([1, 5, 7])).long()
        return self.second(self.first(place.clamp(max=8)) + self.first(own + known))


def test_places_among_sorted_values(tmp_path: Path) -> None:
    model, file = seeded(Sorted), tmp_path / "model.onnx"
    x = torch.tensor([[0.5, -1.0, 0.2, 3.0], [0.0, 0.0, -7.0, 0.7], [1.0, 0.5, -0.5, 0.1]])
    inputs = ((x, torch.tensor([[0, 1, 2, 5], [7, 7, 6, 5], [3, 1, 0, 8]])), {})
    quant_model = written(calibrated(model, [inputs]), model, inputs, file)
    for few in (slice(3), slice(1), slice(1, 3)):
        some: Inputs = (tuple(each[few] for each in inputs[0]), {})
        check(file, quant_model, some)
