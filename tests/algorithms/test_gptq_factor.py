"""The factor of a Hessian that takes the Hessian's place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torch_quant import FLOAT, GPTQ, PerGroup, QConfig, Quantizer, QuantSpec
from torch_quant.algorithms import gptq_factor
from torch_quant.algorithms.gptq_factor import unit_factor
from torch_quant.core.methods import WeightMethod
from torch_quant.statistics import HESSIAN, Hessian


def moments(size: int = 20, count: int = 100) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(size, size, generator=generator)
    x = torch.randn(count, size, generator=generator) @ mixed
    return x.T @ x


def order_of(size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("panel", [1, 6, 20, 512])
def test_it_is_the_factor_whatever_the_panels(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_factor, "_PANEL", panel)
    sums, order = moments(), order_of(20)
    backwards = order.flip(0)
    hessian = (sums / 100)[backwards[:, None], backwards]
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(20)
    place = sums.data_ptr()
    factor = unit_factor(sums, order, 100, damping=0.01, turns=0)
    assert factor is not None
    assert factor.data_ptr() == place
    assert torch.equal(factor, factor.tril())
    assert torch.equal(factor.diagonal(), torch.ones(20))
    lower = torch.linalg.cholesky(hessian)
    torch.testing.assert_close(factor, lower / lower.diagonal(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("panel", [6, 512])
def test_more_damping_begins_from_the_hessian(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempts fail in the last panel, when the others are overwritten."""
    monkeypatch.setattr(gptq_factor, "_PANEL", panel)
    values, vectors = torch.linalg.eigh(moments())
    values[0] = -0.05 * values.mean()
    sums, order = vectors @ values.diag() @ vectors.T, torch.arange(20)
    sums = (sums + sums.T) / 2
    assert unit_factor(sums.clone(), order, 100, damping=0.01, turns=0) is None
    found = unit_factor(sums.clone(), order, 100, damping=0.01, turns=1)
    expected = unit_factor(sums.clone(), order, 100, damping=0.1, turns=0)
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, expected)


def test_what_has_no_factor() -> None:
    sums = moments()
    sums[3, 4] = sums[4, 3] = torch.nan
    assert unit_factor(sums, order_of(20), 100, damping=0.01, turns=4) is None


class Readers(nn.Module):
    """Two layers that read one tensor, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.c(self.a(x).relu() * self.b(x))
        return made


@pytest.mark.parametrize("sequential", [False, True])
def test_the_last_reader_uses_up_a_hessian(
    sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Hessian, bool, int]] = []
    real = GPTQ.quantize

    def quantize(self: GPTQ, weight: Tensor, spec: QuantSpec, statistics: dict[str, Hessian]):  # type: ignore[no-untyped-def]
        hessian = statistics[HESSIAN]
        before = hessian.disposable
        made = real(self, weight, spec, statistics)
        seen.append((hessian, before, hessian.rows))
        return made

    monkeypatch.setattr(GPTQ, "quantize", quantize)
    method: WeightMethod = GPTQ(sequential=sequential)
    spec = QuantSpec.of("int4", granularity=PerGroup(16))
    quantizer = Quantizer("reference", qconfig=QConfig(FLOAT, spec, method=method))
    quantizer.round_weights(Readers().eval(), [torch.randn(64, 32)], progress=False)
    assert [(disposable, rows) for _, disposable, rows in seen] == [
        (False, 64), (True, 0), (True, 0),
    ]  # fmt: skip
    assert seen[0][0] is seen[1][0]
