"""What coverage counts of models that were not captured before, held against PyTorch's counter.

``test_zoo`` does so for what it has captured, that is for every architecture.
"""

from __future__ import annotations

import pytest
from multiplications import counted
from thinning import LONG
from zoo import ZOO

from torch_quant import Quantizer

SOME = [*ZOO] if LONG else ["mixtral", "resnet"]
"""Experts and attention, convolutions."""


@pytest.mark.parametrize("name", SOME)
def test_all_multiply_accumulates_are_counted(name: str) -> None:
    model, inputs = ZOO[name].build(), ZOO[name].inputs(3)
    report = Quantizer("reference").coverage(model, inputs)
    assert report.plan.macs == counted(model, inputs)
