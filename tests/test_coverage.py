"""What coverage counts, held against PyTorch's own counter over the zoo."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import ARCHITECTURES, EVERYTHING, ZOO

from torch_quant import Quantizer


def grouped(x: Any, weight: Any, *rest: Any, out_shape: Any, **options: Any) -> int:
    """Each row of the result by one of the matrices; not known to PyTorch's counter."""
    return int(2 * math.prod(out_shape) * x[-1])


def counted(model: nn.Module, inputs: dict[str, Any]) -> int:
    known = {torch.ops.aten._grouped_mm: grouped}
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        known[torch.ops.transformers.grouped_mm_fallback] = grouped
    model.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=known) as all_:
        model(**inputs)
    return int(all_.get_total_flops()) // 2


ONE = {"bert", "mixtral", "resnet", "whisper"}
"""Attention, experts, convolutions, an encoder-decoder: from an example of batch 1 too."""


@pytest.mark.parametrize(
    ("name", "batch"),
    [(e.name, b) for e in ARCHITECTURES for b in (1, 3) if b == 3 or e.name in ONE or EVERYTHING],
)
def test_all_multiply_accumulates_are_counted(name: str, batch: int) -> None:
    model, inputs = ZOO[name].build(), ZOO[name].inputs(batch)
    report = Quantizer("reference").coverage(model, inputs)
    assert report.plan.macs == counted(model, inputs)
