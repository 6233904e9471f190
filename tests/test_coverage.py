"""What coverage counts, held against PyTorch's own counter over the zoo."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import ARCHITECTURES, ZooEntry

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


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("entry", ARCHITECTURES, ids=lambda entry: entry.name)
def test_all_multiply_accumulates_are_counted(entry: ZooEntry, batch: int) -> None:
    model = entry.build()
    report = Quantizer("reference").coverage(model, entry.inputs(batch))
    assert report.plan.macs == counted(model, entry.inputs(batch))
