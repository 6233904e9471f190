from __future__ import annotations

import torch

from torch_quant.core.granularity import PerChannel
from torch_quant.core.spec import QuantSpec
from torch_quant.statistics import MinMaxObserver


def test_extremes_over_all_batches() -> None:
    observer = MinMaxObserver()
    for batch in ([1.0, 2.0], [-3.0, 0.0], [0.5, 7.0]):
        observer.observe(torch.tensor(batch))
    low, high = observer.range(QuantSpec.of())
    assert (float(low), float(high)) == (-3.0, 7.0)


def test_extremes_of_each_channel() -> None:
    observer = MinMaxObserver(PerChannel(1))
    observer.observe(torch.tensor([[1.0, -5.0], [2.0, 4.0]]))
    observer.observe(torch.tensor([[0.0, 0.0]]))
    low, high = observer.range(QuantSpec.of(per_channel=True))
    assert low.tolist() == [[0.0, -5.0]]
    assert high.tolist() == [[2.0, 4.0]]
