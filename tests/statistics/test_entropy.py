from __future__ import annotations

import pytest
import torch

from torch_quant.core.qparams import choose_qparams
from torch_quant.core.spec import QuantSpec
from torch_quant.statistics import EntropyObserver
from torch_quant.statistics._bins import Bins
from torch_quant.statistics.entropy import divergence

SPECS = {
    str(spec): spec
    for spec in (
        QuantSpec.of(bits=8),
        QuantSpec.of(bits=8, signed=True, symmetric=True),
        QuantSpec.of(bits=4),
        QuantSpec.of(bits=2, signed=True, symmetric=True),
    )
}


def gauss(count: int = 50000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def plain_divergence(bins: Bins, low: float, high: float, spec: QuantSpec) -> float:
    """The definition, one bin at a time."""
    counts = bins.counts[0].double().tolist()
    zero = -int(bins.first[0])
    if 0 <= zero < len(counts):
        around = [counts[i] for i in (zero - 1, zero + 1) if 0 <= i < len(counts)]
        counts[zero] = min(counts[zero], max(around))
    total = sum(counts)
    qparams = choose_qparams(torch.tensor(low), torch.tensor(high), spec)
    codes = [
        round(float(c) / float(qparams.scale) + int(qparams.zero_point)) for c in bins.centres[0]
    ]
    inside = [i for i, code in enumerate(codes) if spec.quant_min <= code <= spec.quant_max]
    p = {i: counts[i] / total for i in inside}
    p[inside[0]] += sum(counts[: inside[0]]) / total
    p[inside[-1]] += sum(counts[inside[-1] + 1 :]) / total
    result = 0.0
    for code in range(spec.quant_min, spec.quant_max + 1):
        members = [i for i in inside if codes[i] == code and p[i] > 0]
        if not members:
            continue
        mass = sum(counts[i] for i in members) / total
        q = max(mass, 1.0 / float(bins.counts.sum())) / len(members)
        result += sum(p[i] * float(torch.tensor(p[i] / q).double().log()) for i in members)
        result += mass - sum(p[i] for i in members)
    return result


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("low", "high"), [(-3.0, 3.5), (-1.0, 2.0), (-5.0, 5.0), (0.0, 1.7)])
@pytest.mark.parametrize("kind", ["gauss", "relu", "offset"])
def test_divergence_is_its_definition(kind: str, low: float, high: float, spec: QuantSpec) -> None:
    x = {"gauss": gauss(), "relu": gauss().relu(), "offset": gauss() * 0.3 + 1.5}[kind]
    observer = EntropyObserver()
    observer.observe(x)
    cost = divergence(observer.bins, spec)(torch.tensor([[low]]), torch.tensor([[high]]))
    if torch.isinf(cost):  # fewer bins than levels
        scale = choose_qparams(torch.tensor(low), torch.tensor(high), spec).scale
        assert float(scale) < float(observer.bins.width)
    else:
        expected = plain_divergence(observer.bins, low, high, spec)
        assert float(cost) == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("kind", ["two_sided", "positive", "negative", "relu", "gelu"])
def test_outliers_are_clipped_and_the_bulk_is_kept(kind: str, spec: QuantSpec) -> None:
    x = {
        "two_sided": gauss(),
        "positive": gauss().abs(),
        "negative": -gauss().abs(),
        "relu": gauss().relu(),
        "gelu": torch.nn.functional.gelu(2.0 * gauss()),
    }[kind]
    bulk = x.abs().max()
    x[0] = 5.0 * bulk * (-1.0 if kind == "negative" else 1.0)
    observer = EntropyObserver(bins=8192)
    observer.observe(x)
    low, high = observer.range(spec)
    reach = float(torch.maximum(-low, high))
    assert reach < 0.5 * float(x.abs().max())
    assert reach > float(x.std()) * 0.9


def test_uniform_data_are_not_clipped() -> None:
    observer = EntropyObserver()
    observer.observe(torch.linspace(0.0, 1.0, 60000))
    assert float(observer.range(QuantSpec.of())[1]) == 1.0


def test_zeros_of_a_relu_do_not_matter() -> None:
    """As many zeros as one likes: the range stays where the rest wants it."""
    positive = gauss().abs()
    ranges = []
    for zeros in (1000, 100000):
        observer = EntropyObserver()
        observer.observe(positive)
        for _ in range(zeros // 1000):
            observer.observe(torch.zeros(1000))
        ranges.append(float(observer.range(QuantSpec.of())[1]))
    assert ranges[0] == pytest.approx(ranges[1], rel=0.02)


def test_nearly_everything_is_never_clipped() -> None:
    """All data far from 0: the range must reach them."""
    observer = EntropyObserver()
    observer.observe(gauss() * 0.1 + 3.0)
    for spec in SPECS.values():
        assert float(observer.range(spec)[1]) > 2.8
