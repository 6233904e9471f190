"""Inputs and outputs of a model while an AMP proxy looks at them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torch_quant.core.metrics import float_leaves
from torch_quant.graph.outputs import flatten_output, unflatten_output
from torch_quant.nn.probe import substitute

__all__ = ["batch_size", "copied", "describe", "detached", "plain", "projected", "same", "valued"]


def plain(x: Tensor) -> Tensor:
    """Without gradient history, and usable where gradients are taken."""
    return x.clone() if x.is_inference() else x.detach()


def batch_size(inputs: Any) -> int:
    leaves = pytree.tree_leaves(inputs)
    return next((len(x) for x in leaves if isinstance(x, Tensor) and x.dim()), 1)


def projected(outputs: Any) -> list[Tensor]:
    """The float tensors of the outputs; where they are not finite, which masks are, zero."""
    leaves = float_leaves(outputs)
    if not leaves:
        parts, _ = flatten_output(outputs)
        leaves = [x for x in parts if isinstance(x, Tensor) and x.is_floating_point()]
    return [x.masked_fill(~torch.isfinite(x), 0.0) for x in leaves]


def detached(outputs: Any) -> Any:
    leaves, spec = flatten_output(outputs)
    return unflatten_output((x.detach() if isinstance(x, Tensor) else x for x in leaves), spec)


def same(x: Any, value: Any) -> bool:
    if isinstance(x, Tensor):
        return torch.equal(x.detach().nan_to_num(), value.nan_to_num())
    return bool(x == value)


def valued(x: Any, value: Any) -> Any:
    """``value`` with the gradient of ``x``."""
    return substitute(x, value) if isinstance(x, Tensor) and x.requires_grad else value


def copied(value: Any) -> Any:
    """A deep copy, without the gradient history of its tensors."""
    leaves, _ = flatten_output(value)
    memo = {id(x): x.detach().clone() for x in leaves if isinstance(x, Tensor)}
    return copy.deepcopy(value, memo)


def describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
