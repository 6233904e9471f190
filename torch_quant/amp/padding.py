"""Which positions of a padded batch are real, so that no others count in scores.

Where the outputs at padding are left out of what is differentiated, and attention excludes padding,
gradients there are 0: noise at padding then adds nothing to a score.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_quant.errors import InvalidConfig
from torch_quant.proxies.values import describe

__all__ = ["Mask", "Real", "batch_of", "real_positions"]

Mask = str | Callable[[Any], Tensor]
"""The name of the input that tells real positions from padding, or what gives that of a batch."""


@dataclass(frozen=True)
class Real:
    """The real positions of a batch.

    Args:
        positions: bool of shape ``[rows, length]``; None where all are real.
    """

    positions: Tensor | None = None

    def kept(self, x: Tensor) -> Tensor:
        """``x`` with zeros at padding.

        Args:
            x: of shape ``[rows, length, ...]``, ``[rows, heads, length, ...]`` or
                ``[rows * length, ...]``; others are given back as they are. The rows may be the
                first ones only.

        >>> real = Real(torch.tensor([[True, False]]))
        >>> real.kept(torch.ones(1, 2, 3)).sum(), real.kept(torch.ones(1, 5)).sum()
        (tensor(3.), tensor(5.))
        """
        if self.positions is None or x.dim() == 0:
            return x
        real = self.positions.to(x.device)
        rows, length = real.shape
        count = len(x)
        if x.dim() > 1 and count <= rows and x.shape[1] == length:
            shape = [count, length, *[1] * (x.dim() - 2)]
        elif x.dim() > 3 and count <= rows and x.shape[2] == length:
            shape = [count, 1, length, *[1] * (x.dim() - 3)]
        elif count == rows * length:
            count, shape = rows, [count, *[1] * (x.dim() - 1)]
        else:
            return x
        return torch.where(real[:count].reshape(shape), x, torch.zeros((), dtype=x.dtype))


def batch_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What functions of the user's are given as the batch.

    >>> batch_of((1,), {}), batch_of((1, 2), {}), batch_of((), {"x": 1})
    (1, (1, 2), {'x': 1})
    """
    return kwargs if not args else args[0] if len(args) == 1 and not kwargs else args


def real_positions(
    mask: Mask | None,
    signature: inspect.Signature,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    rows: int,
) -> Real:
    """The real positions of one batch; all where nobody tells, or this batch has no mask.

    Args:
        mask: as in :meth:`Quantizer.amp`.
        signature: of the model's forward.
        args: of the batch.
        kwargs: of the batch.
        rows: how many samples it has.

    Raises:
        InvalidConfig: the model has no such input; the mask is none.
    """
    if mask is None:
        return Real()
    if isinstance(mask, str):
        what = f"the input {mask!r}"
        found = signature.bind_partial(*args, **kwargs).arguments
        given = {**kwargs, **found}
        if mask not in given:
            names = [name for name in signature.parameters if name != "self"]
            if mask not in names:
                raise InvalidConfig(
                    f"mask={mask!r}: the model has no input of that name; expected one of "
                    f"{', '.join(names)}, or a function of the batch"
                )
            return Real()
        value = given[mask]
        if value is None:
            return Real()
    else:
        what, value = "mask(batch)", mask(batch_of(args, kwargs))
    if not isinstance(value, Tensor) or value.dim() != 2 or len(value) != rows:
        raise InvalidConfig(
            f"{what} is {describe(value)}; expected a tensor [{rows}, length], 1 at real positions "
            "and 0 at padding: mask=lambda batch: ... makes one"
        )
    return Real(value != 0)
