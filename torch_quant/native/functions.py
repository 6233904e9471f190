"""Functions that kernels compute behind a product, by the names that oneDNN has for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["ends_of", "function_of"]

_functional = torch.nn.functional
_FUNCTIONS: dict[tuple[str, str], tuple[int, Callable[..., Tensor]]] = {
    ("none", ""): (0, lambda x: x),
    ("relu", ""): (1, torch.relu),
    ("hardtanh", ""): (1, _functional.hardtanh),
    ("leaky_relu", ""): (2, _functional.leaky_relu),
    ("gelu", "none"): (3, _functional.gelu),
    ("gelu", "tanh"): (4, lambda x: _functional.gelu(x, approximate="tanh")),
    ("swish", ""): (5, _functional.silu),
    ("tanh", ""): (6, torch.tanh),
    ("hardswish", ""): (7, _functional.hardswish),
}
"""Its name and algorithm -> ``Between`` of ``csrc/static.h``, and its operator."""


def function_of(post_op: str, algorithm: str) -> tuple[int, Callable[..., Tensor]] | None:
    """The kernels' number of a function, and its operator; None if they have not got it."""
    return _FUNCTIONS.get((post_op, algorithm if post_op == "gelu" else ""))


def ends_of(post_op: str, post_args: Sequence[float]) -> tuple[float, float]:
    """The arguments of a function as the kernels take them."""
    return (0.0, math.inf) if post_op == "relu" else (*post_args, 0.0, 0.0)[:2]  # type: ignore[return-value]
