"""Codes of a few bits, side by side in 32-bit words: the first in the lowest bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["packed", "unpacked"]

WORD = 32


def packed(codes: Tensor, bits: int) -> Tensor:
    """Rows of codes as rows of words, without a gap: code ``i`` begins at bit ``i * bits``.

    Args:
        codes: integers from 0 to ``2 ** bits - 1``, shape ``[rows, columns]``.
        bits: of a code, 1 to 8. Where it does not divide 32, codes lie across the borders of words.

    Returns:
        int32, ``[rows, ceil(columns * bits / 32)]``; what is left of the last word is 0.

    >>> [hex(word) for word in packed(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]]), 4)[0].tolist()]
    ['0x7654321']
    """
    rows, columns = codes.shape
    words = -(-columns * bits // WORD)
    if 8 % bits:
        planes = np.unpackbits(
            _bytes(codes)[..., None], axis=-1, count=bits, bitorder="little"
        ).reshape(rows, columns * bits)
        filled = np.zeros((rows, words * WORD), np.uint8)
        filled[:, : columns * bits] = planes
        found = np.packbits(filled, axis=-1, bitorder="little")
    else:
        each = 8 // bits
        wide = np.zeros((rows, words * 4 * each), np.uint8)
        wide[:, :columns] = _bytes(codes)
        found = np.zeros((rows, words * 4), np.uint8)
        for i in range(each):
            found |= wide[:, i::each] << (i * bits)
    return torch.from_numpy(found.view("<i4").astype(np.int32, copy=False))


def unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """Undo :func:`packed`.

    Args:
        words: int32, ``[rows, words]``.
        bits: of a code.
        columns: codes in a row.

    Returns:
        uint8, ``[rows, columns]``.

    >>> unpacked(torch.tensor([[0x7654321]], dtype=torch.int32), 4, 3)
    tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    rows = words.shape[0]
    octets = words.contiguous().numpy().astype("<i4", copy=False).view(np.uint8)
    if 8 % bits:
        planes = np.unpackbits(octets, axis=-1, count=columns * bits, bitorder="little")
        found = np.packbits(planes.reshape(rows, columns, bits), axis=-1, bitorder="little")
        return torch.from_numpy(found.reshape(rows, columns))
    each, mask = 8 // bits, 2**bits - 1
    wide = np.empty((rows, octets.shape[1] * each), np.uint8)
    for i in range(each):
        wide[:, i::each] = (octets >> (i * bits)) & mask
    return torch.from_numpy(np.ascontiguousarray(wide[:, :columns]))


def _bytes(codes: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return codes.to(torch.uint8).contiguous().numpy()
