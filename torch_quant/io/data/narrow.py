"""Integers of few values as tensors of few bits: what a folder holds of codes of 3 or 6 bits.

Kernels read codes of 2, 4 or 8 bits, a format may have any number. On a disk, a code takes the bits
that its values need, found by looking at them: nothing has to be known of a tensor but its numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_quant.core.packing import pack, row_bytes, unpack

__all__ = ["narrowed", "widened"]

_DTYPES = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32}
_NIBBLE, _LEAST = 4, 256
"""Bits of a code of which a byte may hold two; bytes of the smallest tensor that is looked at."""
_SLICE = 1 << 22
"""Codes that are looked at together; a multiple of 8, so that parts end with a byte."""


def narrowed(x: Tensor) -> tuple[Tensor, dict[str, Any]] | None:
    """The bits that the numbers of a tensor need, and how to read them; None if all are needed.

    Args:
        x: contiguous, of any dtype and shape.

    Returns:
        uint8, ``[bytes]``, and what :func:`widened` has to know.

    >>> codes = torch.arange(8, dtype=torch.int8).repeat(64) - 4
    >>> packed, how = narrowed(codes)
    >>> len(packed), how["bits"], torch.equal(widened(packed, how), codes)
    (192, 3, True)
    """
    kind = next((name for name, dtype in _DTYPES.items() if x.dtype is dtype), None)
    if kind is None or x.nbytes < _LEAST:
        return None
    best: dict[str, Any] | None = None
    for cell in _widths(kind):
        ends = [torch.aminmax(part) for part in _cells(x, cell)]
        low, high = min(int(a) for a, _ in ends), max(int(b) for _, b in ends)
        bits = max((high - low).bit_length(), 1)
        if bits <= 8 and bits / cell < (best["bits"] / best["cell"] if best else 1.0):
            most = _ends(kind, cell)[1] - (1 << bits) + 1  # so that all its codes are numbers
            best = {"bits": bits, "low": min(low, most), "cell": cell}
    if best is None:
        return None
    wide = torch.int32 if x.element_size() == 4 else torch.int16
    parts = [part.to(wide) - best["low"] for part in _cells(x, best["cell"])]
    packed = torch.cat([pack(part[None], best["bits"])[0] for part in parts])
    return packed, best | {"dtype": kind, "shape": list(x.shape)}


def _widths(kind: str) -> tuple[int, ...]:
    """The bits that a code of a tensor may have: those of its type; bytes may hold two."""
    whole = _DTYPES[kind].itemsize * 8
    return (whole, _NIBBLE) if kind == "uint8" else (whole,)


def _ends(kind: str, cell: int) -> tuple[int, int]:
    """The smallest and the largest number that such a code may be."""
    info = torch.iinfo(_DTYPES[kind])
    return (0, (1 << _NIBBLE) - 1) if cell == _NIBBLE else (info.min, info.max)


def _cells(x: Tensor, cell: int) -> list[Tensor]:
    """The codes of a tensor in order, in parts; a byte may hold two."""
    flat = x.reshape(-1)
    if cell != _NIBBLE:
        return list(flat.split(_SLICE))
    return [unpack(part, _NIBBLE, 2 * len(part)) for part in flat.split(_SLICE // 2)]


def widened(packed: Tensor, how: dict[str, Any]) -> Tensor:
    """Undo :func:`narrowed`.

    Raises:
        ValueError: ``how`` is not what that gave, or is of another tensor.
    """
    bits, low, cell, kind, shape = (how[key] for key in ("bits", "low", "cell", "dtype", "shape"))
    numbers = [bits, low, cell, *shape]
    plain = all(type(each) is int for each in numbers) and min(shape, default=1) > 0
    known = kind in _DTYPES and plain and cell in _widths(kind) and packed.dtype is torch.uint8
    if not known or not 1 <= bits <= 8:
        raise ValueError(f"no narrow integers: {how}")
    least, most = _ends(kind, cell)
    if not least <= low <= most - (1 << bits) + 1:
        raise ValueError(f"{bits} bits from {low} on go beyond {least} to {most} of {kind}: {how}")
    dtype, count = _DTYPES[kind], math.prod(shape)
    codes = count * dtype.itemsize * 8 // cell
    if packed.shape != (row_bytes(codes, bits),):
        raise ValueError(f"{list(packed.shape)} bytes are no {count} integers of {bits} bits")
    made, wide = (
        torch.empty(count, dtype=dtype),
        torch.int32 if dtype.itemsize == 4 else torch.int16,
    )
    step = _SLICE * bits // 8
    done = 0
    for i, part in enumerate(packed.split(step)):
        here = unpack(part, bits, min(_SLICE, codes - i * _SLICE)).to(wide) + low
        mine = pack(here[None], _NIBBLE)[0] if cell == _NIBBLE else here.to(dtype)
        made[done : done + len(mine)] = mine
        done += len(mine)
    return made.reshape(shape)
