"""Modules of a twin: their buffers, and what they compute with their weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["computes_linear", "own_buffers"]


def own_buffers(twin: nn.Module) -> None:
    """Copies of the model's buffers, which a forward may write to."""
    copies: dict[int, Tensor] = {}
    for module in twin.modules():
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = copies.setdefault(id(value), value.clone())


def computes_linear(module: nn.Module, weight: Tensor) -> bool:
    """Whether the module multiplies by ``weight`` of shape ``[out, in]``, not ``[in, out]``."""
    if isinstance(module, nn.Linear):
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], dtype=weight.dtype, generator=generator)
    bias = module._parameters.get("bias")
    try:
        return torch.allclose(module(x), F.linear(x, weight, bias), rtol=1e-3, atol=1e-3)
    except (RuntimeError, TypeError):  # it takes [in, out], or other inputs
        return False
