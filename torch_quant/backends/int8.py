"""What int8 kernels ask for on every runtime: a weight's format, and instructions of the CPU."""

from __future__ import annotations

import torch

from torch_quant.core.spec import QuantSpec

__all__ = ["has_vnni", "symmetric_weight"]


def has_vnni() -> bool:
    """Whether u8 x s8 products accumulate in 32 bits; else pairs saturate at 16."""
    return bool(torch.cpu._is_vnni_supported())


def symmetric_weight(bits: int = 8) -> QuantSpec:
    """Signed, per-channel, zero point 0: the weight format of every int8 kernel."""
    return QuantSpec.of(bits=bits, signed=True, symmetric=True, per_channel=True)
