"""Memory that is free and that the C library keeps."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

__all__ = ["give_back"]


def give_back() -> None:
    """Give freed memory back to the system, where the C library (glibc) can be told to.

    What tensors of up to 32 MB leave behind stays with the process otherwise: some hundred
    megabytes after the weights of a large layer were rounded. It takes milliseconds.

    >>> give_back()
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return None
    return found
