"""The histogram behind histogram, percentile and entropy: exact however it grows."""

from __future__ import annotations

import math

import pytest
import torch

from torch_quant.core.granularity import PerChannel
from torch_quant.errors import InvalidConfig
from torch_quant.statistics import HistogramObserver
from torch_quant.statistics._bins import SAMPLES, TAIL, Bins


def observed(*batches: torch.Tensor, axis: int | None = None, bins: int = 64) -> Bins:
    observer = HistogramObserver(None if axis is None else PerChannel(axis), bins=bins)
    for batch in batches:
        observer.observe(batch)
    return observer.bins


def reference_counts(x: torch.Tensor, bins: Bins) -> torch.Tensor:
    """Counts by integer arithmetic on exact fractions, one element at a time."""
    counts = torch.zeros_like(bins.counts[0])
    level, first = int(bins.level[0]), int(bins.first[0])
    for value in x.flatten().tolist():
        counts[math.floor(math.ldexp(value, -level)) - first] += 1
    return counts


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e20])
@pytest.mark.parametrize("offset", [0.0, 3.0, -1000.0])
def test_counts_are_exact_after_any_growth(scale: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [
        (torch.randn(100, generator=generator) * 4.0**i + offset) * scale for i in range(-6, 6)
    ]
    bins = observed(*parts)
    assert torch.equal(bins.counts[0], reference_counts(torch.cat(parts), bins))


@pytest.mark.parametrize("count", [16, 17, 100, 2048])
def test_at_least_half_of_the_bins_are_used(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        ends = torch.randn(2, generator=generator) * 10 ** float(
            torch.randn((), generator=generator)
        )
        low, high = ends.sort().values[:, None]
        bins = Bins.empty(count).covering(low, high)
        first, last = bins.index(torch.stack([low, high], dim=1))[0].tolist()
        assert first == 0
        assert count // 2 - 1 <= last < count


def test_narrow_data_far_from_zero_keep_float_precision() -> None:
    bins = observed(torch.tensor([1000.0, 1000.0 + 2**-10]), bins=64)
    assert float(bins.width) <= 2**-10
    assert bins.counts.sum() == 2
    assert bins.counts.max() == 1


def test_channels_have_bins_of_their_own() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1e-3, 1, 1e3]
    )
    together = observed(*x.split(9), axis=1)
    for channel in range(3):
        alone = observed(x[:, channel])
        for name in ("counts", "level", "first"):
            assert torch.equal(getattr(together, name)[channel], getattr(alone, name)[0])


def test_large_batches_are_sampled_evenly() -> None:
    """Each position of the last axis is met equally often: the stride aliases with no axis."""
    width = 96
    x = torch.arange(width, dtype=torch.float32).expand(4 * SAMPLES // width, width).contiguous()
    counts = observed(x, bins=128).counts[0, :width]
    assert counts.sum() == pytest.approx(x.numel(), rel=1e-3)  # each counts for all it stands for
    assert counts.min() >= 0.99 * counts.max()


def test_sampled_split_stays_within_the_stated_bound() -> None:
    """Cumulative shares differ like those of two samples of SAMPLES elements.

    By the Dvoretzky-Kiefer-Wolfowitz inequality, with probability 0.999 each is within
    sqrt(log(2 / 0.001) / (2 SAMPLES)) of the true share.
    """
    x = torch.randn(10 * SAMPLES + 13, generator=torch.Generator().manual_seed(0)).exp()
    whole, split = observed(x, bins=2048), observed(*x.split(SAMPLES // 3), bins=2048)
    assert torch.equal(whole.level, split.level)
    assert torch.equal(whole.first, split.first)
    shares = [b.counts[0].cumsum(0).double() / b.counts.sum() for b in (whole, split)]
    assert (shares[0] - shares[1]).abs().max() <= math.sqrt(math.log(2000.0) / (2 * SAMPLES))


def assert_tails_are_whole(observer: HistogramObserver, rows: torch.Tensor) -> None:
    """The tails of one batch, ``[channels, n]``: each at least TAIL in SAMPLES, by and large."""
    bins = observer.bins
    index = bins.index(rows)
    few = rows.shape[1] * TAIL // SAMPLES // 4
    for channel, counts in enumerate(bins.counts):
        exact = torch.bincount(index[channel], minlength=len(counts))
        below, above = exact.cumsum(0), exact.flip(0).cumsum(0).flip(0)
        tails = (below <= few) | (above <= few)
        assert 0 < int(exact[tails].sum()) <= 2 * few
        assert torch.equal(counts[tails], exact[tails])
        assert int(counts.sum()) == pytest.approx(rows.shape[1], rel=2e-3)


@pytest.mark.parametrize("count", [SAMPLES + 1, 3 * SAMPLES, 10 * SAMPLES + 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tails_of_a_sampled_batch_are_counted_whole(count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, generator=generator).mul(0.5).exp().to(dtype)
    observer = HistogramObserver()
    observer.observe(x)
    assert_tails_are_whole(observer, x.float()[None])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_tails_of_each_channel_are_counted_whole(axis: int) -> None:
    shape = [3, 200, 301]
    shape[0], shape[axis] = shape[axis], 3
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = x.transpose(0, axis).reshape(3, -1)
    rows = rows * torch.tensor([1.0, 1e-3, 50.0])[:, None] + torch.tensor([[0.0], [1.0], [-3.0]])
    other = [size for other, size in enumerate(shape) if other != axis]
    observer = HistogramObserver(PerChannel(axis), bins=2048)
    observer.observe(rows.reshape(3, *other).movedim(0, axis))
    assert_tails_are_whole(observer, rows)


def test_a_few_massive_outliers_are_counted_once_each() -> None:
    """Wherever they are: in the last, incomplete block, too."""
    x = torch.randn(10 * SAMPLES + 77, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([0, 1, 127, 128, 5000, 5001, len(x) - 3, len(x) - 1])
    x[at] = torch.tensor([100.0, -60.0]).repeat(4)
    observer = HistogramObserver()
    observer.observe(x)
    bins = observer.bins
    for value in (100.0, -60.0):
        assert bins.counts[0, int(bins.index(torch.tensor([[value]])))] == 4


def test_the_extremes_of_a_sampled_batch_are_counted() -> None:
    x = torch.zeros(4 * SAMPLES)
    x[1], x[2] = 100.0, -30.0
    bins = observed(x)
    assert bins.counts[0, 0] == 1
    assert bins.counts[0, int(bins.index(torch.tensor([[100.0]])))] == 1


@pytest.mark.parametrize("value", [0.0, -3.4e38, 1e-40, 7.0])
def test_a_large_constant_batch(value: float) -> None:
    bins = observed(torch.full((3 * SAMPLES,), value))
    assert int(bins.counts.sum()) == pytest.approx(3 * SAMPLES, rel=1e-3)
    assert bins.counts.max() == bins.counts.sum()


@pytest.mark.parametrize("bins", [0, 15, 65537])
def test_bins_are_validated(bins: int) -> None:
    with pytest.raises(InvalidConfig, match=f"bins={bins}"):
        HistogramObserver(bins=bins)


def test_default_bins() -> None:
    assert HistogramObserver().bins.counts.shape == (1, 2048)
    weight = HistogramObserver(PerChannel(0))
    weight.observe(torch.randn(7, 5))
    assert weight.bins.counts.shape == (7, 512)
