"""What has no gradient is ranked by local noise; sites without gradient or data are named."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from amp_proxies import assert_same, fresh, ready
from flows import assert_unchanged, calibrated, run, snapshot
from models import normal, seeded
from torch import Tensor, nn

from torch_quant import Quantizer


class Heads(nn.Module):
    def __init__(self, finish: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.l0, self.l1, self.finish = nn.Linear(16, 16), nn.Linear(16, 8), finish

    def forward(self, x: Tensor) -> Any:
        return self.finish(self.l1(self.l0(x).relu()))


def spoiled(y: Tensor) -> Tensor:
    z = y.exp()  # whose gradient needs its result
    z.add_(1.0)
    return z


def through_numpy(y: Tensor) -> Tensor:
    return torch.from_numpy(y.numpy().clip(-1.0, 1.0))


CUT: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda y: y.argmax(1),
    "integers": lambda y: (10.0 * y).round().int(),
    "detach": lambda y: y.detach(),
    "in place": spoiled,
    "numpy": through_numpy,
}


@pytest.mark.parametrize("cut", CUT)
def test_a_model_without_gradient_is_ranked_by_local_noise(
    cut: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = seeded(lambda: Heads(CUT[cut]))
    quantizer = ready(model, normal(16, 16))
    before = snapshot(model)
    amp_model = quantizer.amp(model)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        for batch in (8, 3):
            for mode in (torch.no_grad, torch.enable_grad):
                with mode():
                    expected = run(model.requires_grad_(False), ((normal(batch, 16),), {}))
                    model.requires_grad_(True)
                    assert_same(amp_model(normal(batch, 16)), expected)
    assert_unchanged(model, before)
    ranking = quantizer.sensitivity(amp_model)
    assert ranking.metric == amp_model.metric == "sqnr"
    assert 'ranked by "sqnr": the model cannot be differentiated' in ranking.note
    assert 'ranked by "sqnr"' in str(ranking)
    assert caplog.text.count('ranked by "sqnr"') == 1
    assert ranking.batches == 4
    plain = quantizer.amp(model, metric="sqnr")
    for batch in (8, 8, 3, 3):
        plain(normal(batch, 16))
    expected_ranking = quantizer.sensitivity(plain)
    assert ranking.names == expected_ranking.names
    for site in expected_ranking:
        assert ranking.of(site.name).score == pytest.approx(site.score)
        assert 0.0 < site.weight_share < 1.0
    assert quantizer.fallback(amp_model, 1) == ranking.names[:1]


def test_after_one_batch_the_shares_are_those_of_local_noise_too() -> None:
    model = seeded(lambda: Heads(CUT["argmax"]))
    quantizer = ready(model, normal(16, 16))
    found = quantizer.sensitivity(fresh(quantizer, model, normal(8, 16)))
    expected = quantizer.sensitivity(fresh(quantizer, model, normal(8, 16), metric="sqnr"))
    for site in expected:
        assert found.of(site.name).weight_share == pytest.approx(site.weight_share)


class Aside(nn.Module):
    """``aside`` decides which values are kept, and no gradient comes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.aside = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) * (self.aside(x) > 0)


def test_sites_that_no_gradient_reaches_are_named() -> None:
    model = seeded(Aside)
    quantizer = ready(model, normal(16, 16))
    ranking = quantizer.sensitivity(fresh(quantizer, model, normal(8, 16)))
    assert ranking.metric == "output"
    assert ranking.note == "no gradient reaches them, so their score is 0: aside"
    assert ranking.names == ["main", "aside"]
    assert ranking.of("aside").score == 0.0
    assert math.isfinite(ranking.of("aside").local_sqnr)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) if float(x.detach().sum()) > 0 else self.down(x)


def test_sites_that_saw_no_data_are_named() -> None:
    model, x = seeded(Branches), normal(8, 16).abs()
    quantizer = calibrated(model, [((x,), {}), ((-x,), {})], backend="reference")
    ranking = quantizer.sensitivity(fresh(quantizer, model, x))
    assert ranking.note == "saw no data: down"
    assert ranking.of("down").score == 0.0
    assert ranking.of("up").score > 0.0


def test_a_model_without_sites() -> None:
    model = nn.Sequential(nn.ReLU())
    quantizer = Quantizer("reference")
    quantizer.calib(model)(normal(4, 16))
    amp_model = quantizer.amp(model)
    assert_same(amp_model(normal(4, 16)), model(normal(4, 16)))
    ranking = quantizer.sensitivity(amp_model)
    assert len(ranking) == 0
    assert "no site ran" in str(ranking)
    assert quantizer.fallback(amp_model, 0) == []
