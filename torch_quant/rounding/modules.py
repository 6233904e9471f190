"""Modules of a twin: their buffers, and what they compute with their weight."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_quant.algorithms import DEFAULT_METHOD
from torch_quant.core.functional import dequantize
from torch_quant.core.plan import QuantPlan
from torch_quant.graph.sites import Site

__all__ = ["computes_linear", "own_buffers", "rounded_embeddings"]


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


def rounded_embeddings(
    twin: nn.Module, sites: Iterable[Site], plan: QuantPlan
) -> dict[nn.Module, tuple[nn.Parameter, nn.Parameter]]:
    """Module -> its weight, and that with the error of its format."""
    found = {}
    modules = dict(twin.named_modules())
    for site in sites:
        module, entry = modules.get(site.module), plan[site.name]
        weight = None if module is None else module._parameters.get("weight")
        if module is None or weight is None or weight.shape != site.weight_shape:
            continue
        assert entry.weight is not None
        method = entry.method or DEFAULT_METHOD
        rounded = dequantize(*method.quantize(weight.detach(), entry.weight.on(0), {}))
        found[module] = weight, nn.Parameter(rounded, requires_grad=False)
    return found
