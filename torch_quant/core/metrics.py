"""How far a quantized output is from the float one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torch_quant.errors import InvalidConfig

__all__ = ["cosine", "difference", "float_leaves", "sqnr"]

_LEAST = 20.0
"""dB that deployed code gives at least of what the model gives. Kernels that are fused otherwise
round a few codes otherwise; a wrong branch has nothing in common."""

_SLICE = 1 << 20
"""Numbers that are compared together: logits of a language model, in float64, take a gigabyte."""


def float_leaves(outputs: Any) -> list[Tensor]:
    """The floating-point tensors of a model's (nested) outputs, in order."""
    leaves = pytree.tree_leaves(outputs)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def sqnr(reference: Any, actual: Any) -> float:
    """Signal to quantization-noise ratio, ``10 log10(|reference|^2 / |reference - actual|^2)``, dB.

    Args:
        reference: a tensor or any nesting of them; all float leaves count together.
        actual: the same nesting.

    Returns:
        Decibels; ``inf`` where both are equal, ``-inf`` where the reference is 0 and the other is
        not, NaN where that is NaN, or where no number of the reference can be compared. Positions
        where the reference is not finite do not count.

    Raises:
        InvalidConfig: there are other tensors, or of other sizes.

    >>> round(sqnr(torch.ones(4), 0.9 * torch.ones(4)), 3)
    20.0
    """
    signal = noise = 0.0
    known, total = False, 0
    leaves, others = float_leaves(reference), float_leaves(actual)
    sizes = [[tuple(x.shape) for x in each] for each in (leaves, others)]
    if sizes[0] != sizes[1]:
        raise InvalidConfig(
            f"sqnr compares tensors of the same sizes, got {sizes[0]} and {sizes[1]}: give outputs "
            "of the same inputs, and of sizes that do not depend on values"
        )
    for pair in zip(leaves, others, strict=True):
        x, y = (each.detach().reshape(-1).split(_SLICE) for each in pair)
        for part, other in zip(x, y, strict=True):
            exact, total = part.double(), total + part.numel()
            finite = torch.isfinite(exact)  # masked positions, -inf in both, carry no noise
            known = known or bool((finite | (exact == other.double())).any())
            exact = exact[finite]
            signal += float(exact.square().sum())
            noise += float((exact - other.double()[finite]).square().sum())
    if noise != noise or (total and not known):
        return float("nan")
    if noise == 0.0:
        return float("inf")
    return float("-inf") if signal == 0.0 else 10.0 * float(torch.tensor(signal / noise).log10())


def cosine(reference: Tensor, actual: Tensor) -> Tensor:
    """Cosine of the angle between rows.

    Args:
        reference: shape ``[rows, features]``.
        actual: the same shape.

    Returns:
        Shape ``[rows]``, in ``[-1, 1]``.

    >>> cosine(torch.eye(2), torch.ones(2, 2))
    tensor([0.7071, 0.7071], dtype=torch.float64)
    """
    return torch.nn.functional.cosine_similarity(reference.double(), actual.double(), dim=-1)


def difference(expected: Tensor, found: Tensor) -> str:
    """How a tensor of deployed code is not the model's, up to codes that are rounded otherwise.

    Args:
        expected: the model's, of any shape.
        found: what the code gives.

    Returns:
        Words to put behind its name; empty if it is.

    >>> difference(torch.ones(2), torch.ones(3))
    'is (3,) torch.float32; expected (2,) torch.float32'
    >>> difference(torch.ones(2), torch.tensor([1.0, 2.0]))
    'agrees to 3.0 dB; expected 20 at least'
    """
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return (
            f"is {tuple(found.shape)} {found.dtype}; "
            f"expected {tuple(expected.shape)} {expected.dtype}"
        )
    x, y = expected.nan_to_num(), found.nan_to_num()
    if not x.is_floating_point() or torch.equal(x, y):
        return ""  # ranks and classes go over with the values they are taken from
    agreement = sqnr(x, y)
    if agreement >= _LEAST:
        return ""
    return f"agrees to {agreement:.1f} dB; expected {_LEAST:.0f} at least"
