"""How many multiply-accumulates a model does, by PyTorch's own counter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["counted"]


def _grouped(x: Any, weight: Any, *rest: Any, out_shape: Any, **options: Any) -> int:
    """Each row of the result by one of the matrices; not known to PyTorch's counter."""
    return int(2 * math.prod(out_shape) * x[-1])


def counted(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Those of one call, of all that is no elementwise operator."""
    known = {torch.ops.aten._grouped_mm: _grouped}
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        known[torch.ops.transformers.grouped_mm_fallback] = _grouped
    model.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=known) as all_:
        model(**inputs)
    return int(all_.get_total_flops()) // 2
