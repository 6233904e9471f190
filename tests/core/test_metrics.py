from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch

from torch_quant.core.metrics import cosine, float_leaves, sqnr
from torch_quant.errors import InvalidConfig


def test_sqnr_of_known_noise() -> None:
    x = torch.ones(100)
    assert sqnr(x, x + 0.1) == pytest.approx(20.0, abs=1e-4)
    assert sqnr(x, x * 0.9) == pytest.approx(20.0, abs=1e-4)


def test_sqnr_at_its_ends() -> None:
    x = torch.randn(10, generator=torch.Generator().manual_seed(0))
    assert sqnr(x, x.clone()) == math.inf
    assert sqnr(torch.zeros(3), torch.ones(3)) == -math.inf
    assert sqnr(torch.zeros(3), torch.zeros(3)) == math.inf


def test_sqnr_counts_all_float_leaves_together() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, generator=generator), torch.randn(30, generator=generator)
    noise = 0.01 * torch.randn(50, generator=generator)
    nested = OrderedDict(a=x, b=[y, None, torch.tensor([1, 2])], c="text")
    noisy = OrderedDict(a=x + noise[:20], b=[y + noise[20:], None, torch.tensor([3, 4])], c="text")
    flat = torch.cat([x, y])
    assert sqnr(nested, noisy) == pytest.approx(sqnr(flat, flat + noise), abs=1e-4)
    assert len(float_leaves(nested)) == 2


def test_sqnr_ignores_masked_positions() -> None:
    x = torch.tensor([1.0, -math.inf, 2.0])
    y = torch.tensor([1.1, -math.inf, 2.2])
    assert sqnr(x, y) == pytest.approx(20.0, abs=1e-4)


def test_sqnr_of_what_is_no_number() -> None:
    x, nothing = torch.ones(3), torch.full((3,), math.nan)
    masked = torch.full((3,), -math.inf)
    assert math.isnan(sqnr(x, nothing))
    assert math.isnan(sqnr(0.0 * x, nothing))
    assert math.isnan(sqnr(nothing, x))
    assert math.isnan(sqnr(nothing, nothing))
    assert sqnr(masked, masked) == math.inf
    assert sqnr([nothing, x], [x, x]) == math.inf
    assert sqnr([], []) == math.inf


def test_sqnr_needs_one_structure() -> None:
    for other in ([torch.ones(2)], [torch.ones(2), torch.ones(3)]):
        with pytest.raises(InvalidConfig, match=r"of the same sizes, got \[\(2,\), \(2,\)\] and"):
            sqnr([torch.ones(2), torch.ones(2)], other)


def test_cosine() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    y = torch.tensor([[0.0, 3.0], [2.0, 2.0], [-1.0, 0.0]])
    assert cosine(x, y).tolist() == pytest.approx([0.0, 1.0, -1.0])


def test_tensors_of_any_size_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 5, 9, generator=torch.Generator().manual_seed(0))
    y = (x + 0.1).transpose(0, 2).contiguous().transpose(0, 2)
    whole = sqnr(x, y)
    monkeypatch.setattr("torch_quant.core.metrics._SLICE", 10)
    assert sqnr(x, y) == pytest.approx(whole, abs=1e-9)
    x[0, 0, 0] = y[0, 0, 0] = float("-inf")
    assert math.isfinite(sqnr(x, y))
