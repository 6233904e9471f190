from __future__ import annotations

import math

import pytest
import torch

from torch_quant.core.granularity import PerChannel
from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.statistics import PercentileObserver

SPEC = QuantSpec.of()


def quantile(x: torch.Tensor, share: float) -> float:
    """The smallest value with at least ``share`` of the data at or below it."""
    return float(x.sort().values[math.ceil(share * len(x)) - 1])


@pytest.mark.parametrize("percentile", [60.0, 90.0, 99.0, 99.9])
@pytest.mark.parametrize("kind", ["gauss", "exponential", "offset"])
def test_within_one_bin_of_the_quantile(kind: str, percentile: float) -> None:
    gauss = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    x = {"gauss": gauss, "exponential": gauss.exp(), "offset": gauss - 7.0}[kind]
    observer = PercentileObserver(percentile=percentile)
    for batch in x.split(999):
        observer.observe(batch)
    low, high = observer.range(SPEC)
    tail = (1.0 - percentile / 100.0) / 2.0
    width = float(observer.bins.width)
    for end, share in ((low, tail), (high, 1.0 - tail)):
        assert abs(float(end) - quantile(x, share)) <= width


@pytest.mark.parametrize("kind", ["gauss", "exponential", "outliers"])
def test_the_default_is_exact_for_sampled_batches_too(kind: str) -> None:
    gauss = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    outliers = gauss.clone()
    outliers[5000:5040] = 30.0
    x = {"gauss": gauss, "exponential": gauss.exp(), "outliers": outliers}[kind]
    observer = PercentileObserver()
    observer.observe(x)
    low, high = observer.range(SPEC)
    for end, share in ((low, 0.00005), (high, 0.99995)):
        assert abs(float(end) - quantile(x, share)) <= float(observer.bins.width)


def test_each_channel_has_its_own() -> None:
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1.0, 10.0, 100.0])[:, None]
    observer = PercentileObserver(PerChannel(0), percentile=98.0)
    observer.observe(x)
    low, high = observer.range(QuantSpec.of(per_channel=True))
    width = observer.bins.width
    for channel in range(3):
        for end, share in ((low, 0.01), (high, 0.99)):
            assert abs(float(end[channel]) - quantile(x[channel], share)) <= width[channel]


def test_hundred_percent_is_minmax() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    observer = PercentileObserver(percentile=100.0)
    observer.observe(x)
    assert torch.equal(torch.stack(observer.range(SPEC)), torch.stack([x.min(), x.max()]))


def test_an_outlier_is_dropped() -> None:
    x = torch.linspace(-1.0, 1.0, 50000)
    x[0] = 1e4
    observer = PercentileObserver(percentile=99.9, bins=65536)
    observer.observe(x)
    assert float(observer.range(SPEC)[1]) < 1.2


@pytest.mark.parametrize("percentile", [0.0, 50.0, 100.1, float("nan")])
def test_percentile_is_validated(percentile: float) -> None:
    with pytest.raises(InvalidConfig, match="percentile"):
        PercentileObserver(percentile=percentile)


def test_state_brings_the_options_along() -> None:
    original, restored = PercentileObserver(percentile=90.0, bins=4096), PercentileObserver()
    original.observe(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    restored.load_state_dict(original.state_dict())
    assert torch.equal(torch.stack(original.range(SPEC)), torch.stack(restored.range(SPEC)))
