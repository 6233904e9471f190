"""Modules of a twin: their buffers, and what they compute with their weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_quant.algorithms import DEFAULT_METHOD
from torch_quant.core.functional import dequantize
from torch_quant.core.methods import WeightMethod
from torch_quant.core.plan import QuantPlan
from torch_quant.core.qparams import QParams
from torch_quant.core.spec import QuantSpec
from torch_quant.graph.sites import Site

__all__ = ["RoundedTable", "computes_linear", "own_buffers", "rounded_embeddings"]


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


@dataclass
class RoundedTable:
    """The weight of an embedding, of which rounded rows are made when they are looked up.

    Args:
        weight: the float weight.
        spec: its format, bound to the rows.
        method: what rounds it.
        known: codes, ``[rows, columns]``, and what they stand for, while rows are looked up.
    """

    weight: nn.Parameter
    spec: QuantSpec
    method: WeightMethod
    known: tuple[Tensor, QParams] | None = None

    def rounded(self) -> tuple[Tensor, QParams]:
        """Codes and what they stand for."""
        if self.known is None:
            self.known = self.method.quantize(self.weight.detach(), self.spec, {})
        return self.known

    def look_up(self, input: Tensor) -> Tensor:
        """What the embedding gives, with the error of the format; its argument has its name."""
        codes, qparams = self.rounded()
        rows = input.reshape(-1)
        count = len(qparams.scale) if qparams.scale.dim() else 1
        if count not in (1, len(codes)):  # some rows share scales
            found = dequantize(codes, qparams)[rows]
        else:
            if count > 1:
                scale, zero_point = qparams.scale[rows], qparams.zero_point[rows]
                qparams = replace(qparams, scale=scale, zero_point=zero_point)
            found = dequantize(codes[rows], qparams)
        return found.reshape(*input.shape, -1).to(self.weight.dtype)

    def put(self, module: nn.Module, rounded: bool) -> None:
        """Have an embedding of a twin give rounded rows, or its own.

        One whose forward does more than to look up computes with a whole rounded weight.
        """
        self.known = None
        if type(module) is nn.Embedding and module.max_norm is None:
            module.__dict__.pop("forward", None)
            if rounded:
                module.__dict__["forward"] = self.look_up
            return
        module._parameters["weight"] = self.weight
        if rounded:
            made = dequantize(*self.method.quantize(self.weight.detach(), self.spec, {}))
            made = made.to(self.weight.dtype)
            module._parameters["weight"] = nn.Parameter(made, requires_grad=False)


def rounded_embeddings(
    twin: nn.Module, sites: Iterable[Site], plan: QuantPlan
) -> dict[nn.Module, RoundedTable]:
    """Modules that look tokens up, and their rounded weights."""
    found = {}
    modules = dict(twin.named_modules())
    for site in sites:
        module, entry = modules.get(site.module), plan[site.name]
        weight = None if module is None else module._parameters.get("weight")
        if module is None or weight is None or weight.shape != site.weight_shape:
            continue
        assert entry.weight is not None
        found[module] = RoundedTable(weight, entry.weight.on(0), entry.method or DEFAULT_METHOD)
    return found
