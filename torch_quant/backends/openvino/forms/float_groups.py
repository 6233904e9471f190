"""Convolutions of sequences whose channels have several results each, in float.

Of two such channels OpenVINO 2026 computes other numbers in int8.
"""

from __future__ import annotations

from torch_quant.backends.convolutions import float_multipliers
from torch_quant.passes.base import PassContext

__all__ = ["float_groups"]


def float_groups(context: PassContext) -> int:
    """Give them float weights; returns how many there were."""
    return float_multipliers(context, dims=(1,), most=1)
