"""The histogram observer's range against brute force on the data itself."""

from __future__ import annotations

import pytest
import torch

from torch_quant.core.functional import fake_quantize
from torch_quant.core.granularity import PerChannel
from torch_quant.core.qparams import choose_qparams
from torch_quant.core.spec import QuantSpec
from torch_quant.statistics import HistogramObserver
from torch_quant.statistics._bins import SAMPLES
from torch_quant.statistics.histogram import Density, squared_error

COUNT = 20000


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gauss = torch.randn(COUNT, generator=generator)
    # Student's t with 3 degrees of freedom: a heavy tail with a variance
    tail = gauss / torch.randn(3, COUNT, generator=generator).square().mean(0).sqrt()
    outliers = gauss.clone()
    outliers[:3] = torch.tensor([100.0, -40.0, 60.0])
    return {
        "gauss": gauss,
        "heavy_tail": tail,
        "relu": gauss.relu(),
        "relu6": (4.0 * gauss).clamp(0.0, 6.0),
        "gelu": torch.nn.functional.gelu(2.0 * gauss),
        "offset": gauss + 5.0,
        "uniform": torch.rand(COUNT, generator=generator),
        "outliers": outliers,
    }


SPECS = {
    str(spec): spec
    for spec in (
        QuantSpec.of(bits=8),
        QuantSpec.of(bits=8, signed=True, symmetric=True),
        QuantSpec.of(bits=6),
        QuantSpec.of(bits=4),
        QuantSpec.of(bits=3, signed=True, symmetric=True),
        QuantSpec.of(bits=2, signed=True),
    )
}


def error(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, spec: QuantSpec) -> float:
    return float((fake_quantize(x, choose_qparams(low, high, spec)) - x).square().mean())


def brute_force(x: torch.Tensor, spec: QuantSpec) -> float:
    """The least error over a dense grid of ranges, measured on the data."""
    low, high = x.min().clamp(max=0.0), x.max().clamp(min=0.0)
    if spec.symmetric:
        high = torch.maximum(-low, high)
        return min(error(x, -high * r, high * r, spec) for r in torch.linspace(0.01, 1.0, 200))
    ratios = torch.linspace(0.04, 1.0, 25)
    if low == 0:
        return min(error(x, low, high * r, spec) for r in torch.linspace(0.01, 1.0, 200))
    return min(error(x, low * a, high * b, spec) for a in ratios for b in ratios)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", tensors())
def test_as_good_as_brute_force(name: str, spec: QuantSpec) -> None:
    x = tensors()[name]
    observer = HistogramObserver()
    observer.observe(x)
    found = error(x, *observer.range(spec), spec)
    # 2 percent (0.1 dB): candidates are 2 percent apart, and data moves inside its bin.
    assert found <= 1.02 * brute_force(x, spec)
    assert found <= 1.02 * error(x, x.min(), x.max(), spec)


def tokens(outliers: int, sigmas: float) -> torch.Tensor:
    """A million Gaussian values, ``[tokens, channels]``; outliers in one channel of a few tokens.

    Too few for an even sample to meet: it has one element in thirty.
    """
    x = torch.randn(2500, 400, generator=torch.Generator().manual_seed(0))
    x[77 : 77 + outliers, 13] = torch.linspace(0.9, 1.1, outliers) * sigmas
    return x


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(
    ("outliers", "sigmas"), [(0, 0.0), (1, 100.0), (10, 60.0), (10, -60.0), (200, 20.0)]
)
def test_rare_massive_outliers_weigh_what_they_weigh(
    outliers: int, sigmas: float, spec: QuantSpec
) -> None:
    x = tokens(outliers, sigmas)
    observer, exact = HistogramObserver(), HistogramObserver()
    for batch in x.view(2, 1250, 400):
        observer.observe(batch)
    for batch in x.flatten().split(SAMPLES):
        exact.observe(batch)
    found = error(x, *observer.range(spec), spec)
    assert found <= 1.02 * error(x, x.min(), x.max(), spec)
    # The tails are exact; the sampled body moves the range a little about the least error.
    assert found <= 1.03 * error(x, *exact.range(spec), spec)


def test_large_gaussian_batches_are_still_clipped() -> None:
    x = tokens(0, 0.0)
    observer = HistogramObserver()
    observer.observe(x)
    low, high = observer.range(QuantSpec.of(bits=8))
    assert x.min() < low < -3.5
    assert 3.5 < high < x.max()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", tensors())
def test_never_worse_than_minmax_on_the_histogram(name: str, spec: QuantSpec) -> None:
    observer = HistogramObserver()
    observer.observe(tensors()[name])
    cost = squared_error(Density(observer.bins), spec, exact=True)
    found, whole = (
        cost(low.view(1, 1), high.view(1, 1))
        for low, high in (observer.range(spec), (observer.min_val, observer.max_val))
    )
    assert found <= whole


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "model"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_squared_error_is_that_of_the_quantizer(spec: QuantSpec, exact: bool) -> None:
    """Against the quantizer, applied to many points spread evenly over each bin."""
    observer = HistogramObserver(bins=256)
    observer.observe(tensors()["gauss"])
    bins = observer.bins
    inside = (torch.arange(64) + 0.5) / 64 - 0.5
    points = bins.centres[0][:, None] + inside * bins.width
    weights = bins.counts[0].double()[:, None] / (bins.counts.sum() * len(inside))
    low, high = torch.tensor(-2.0), torch.tensor(2.5)
    qparams = choose_qparams(low, high, spec)
    expected = ((fake_quantize(points, qparams) - points).square() * weights).sum()
    cost = squared_error(Density(bins), spec, exact=exact)(low.view(1, 1), high.view(1, 1))
    # The uniform-noise model is meant for more than 4 bits; below, it is a coarse guess.
    tolerance = 1e-3 if exact else (0.02 if spec.bits > 4 else 0.5)
    assert float(cost * bins.width**2) == pytest.approx(float(expected), rel=tolerance)


def test_channels_are_searched_one_by_one() -> None:
    """The chunks in which channels are searched together leave no trace."""
    x = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)) ** 3
    together = HistogramObserver(PerChannel(0))
    together.observe(x)
    spec = QuantSpec.of(bits=4, per_channel=True)
    low, high = together.range(spec)
    for channel in (0, 15, 16, 150, 299):
        alone = HistogramObserver(bins=512)
        alone.observe(x[channel])
        expected = alone.range(QuantSpec.of(bits=4))
        assert torch.equal(low[channel, 0], expected[0])
        assert torch.equal(high[channel, 0], expected[1])


def test_wide_formats_are_not_clipped() -> None:
    x = tensors()["heavy_tail"]
    observer = HistogramObserver()
    observer.observe(x)
    spec = QuantSpec.of("int16")
    assert torch.equal(torch.stack(observer.range(spec)), torch.stack([x.min(), x.max()]))
