from __future__ import annotations

import pytest
import torch

from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig
from torch_quant.statistics import MovingAverageObserver


def test_average_of_the_extremes() -> None:
    observer = MovingAverageObserver(momentum=0.25)
    for batch in ([-1.0, 1.0], [-5.0, 3.0], [0.0, 0.0]):
        observer.observe(torch.tensor(batch))
    low, high = observer.range(QuantSpec.of())
    # -1, -1 + (-5 + 1) / 4 = -2, -2 + 2 / 4; and 1, 1.5, 1.5 * 3 / 4
    assert (float(low), float(high)) == (-1.5, 1.125)


def test_momentum_one_keeps_the_last_batch() -> None:
    observer = MovingAverageObserver(momentum=1.0)
    observer.observe(torch.tensor([-100.0, 100.0]))
    observer.observe(torch.tensor([-1.0, 2.0]))
    low, high = observer.range(QuantSpec.of())
    assert (float(low), float(high)) == (-1.0, 2.0)


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.1, float("nan")])
def test_momentum_is_validated(momentum: float) -> None:
    with pytest.raises(InvalidConfig, match="momentum"):
        MovingAverageObserver(momentum=momentum)


def test_state_brings_the_momentum_along() -> None:
    original, restored = MovingAverageObserver(momentum=0.5), MovingAverageObserver()
    original.observe(torch.tensor([-1.0, 1.0]))
    restored.load_state_dict(original.state_dict())
    restored.observe(torch.tensor([-3.0, 1.0]))
    assert float(restored.range(QuantSpec.of())[0]) == -2.0
