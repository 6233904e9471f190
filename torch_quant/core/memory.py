"""Memory that is free and that the C library keeps."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["give_back", "give_back_behind", "tensor_bytes"]

_LARGE = 2**20
"""Numbers of a weight behind which freed memory is given back: that takes milliseconds."""


def give_back() -> None:
    """Give freed memory back to the system, where the C library (glibc) can be told to.

    What tensors of up to 32 MB leave behind stays with the process otherwise: some hundred
    megabytes after the weights of a large layer were rounded. It takes milliseconds.

    >>> give_back()
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def give_back_behind(weight: Tensor) -> None:
    """:func:`give_back`, if the weight that was worked on is large enough for that to pay."""
    if weight.numel() >= _LARGE:
        give_back()


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return None
    return found


def tensor_bytes(model: nn.Module) -> int:
    """Of all tensors of its ``state_dict``, those that share memory once.

    >>> tensor_bytes(nn.Linear(2, 3))
    36
    """
    tensors = [x for x in model.state_dict().values() if isinstance(x, torch.Tensor)]
    places = {(x.data_ptr() or id(x), x.numel() * x.element_size()) for x in tensors}
    return sum(size for _, size in places)
