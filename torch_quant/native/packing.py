"""Codes of fewer than 8 bits, several in a byte: how weights are saved, and how kernels read them.

A row of a weight begins with a new byte. Its codes stand along the inputs, from the low bits of a
byte to the high ones, and are counted from 0: a signed code has half of the range added.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bits_of_storage", "pack", "row_bytes", "unpack"]


def bits_of_storage(bits: int) -> int:
    """How many bits a code of ``bits`` takes: 2, 4 or 8.

    >>> [bits_of_storage(bits) for bits in (2, 3, 4, 6)]
    [2, 4, 4, 8]
    """
    return next(size for size in (2, 4, 8) if bits <= size)


def row_bytes(codes: int, bits: int) -> int:
    """Bytes of a row of so many codes.

    >>> row_bytes(5, 4)
    3
    """
    return -(-codes * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes as bytes.

    Args:
        codes: 0 to ``2**bits - 1``, shape ``[rows, n]``.
        bits: 2 or 4.

    Returns:
        uint8, shape ``[rows, row_bytes(n, bits)]``; what is left of the last byte is 0.

    >>> pack(torch.tensor([[1, 2, 3]]), 4).tolist()
    [[33, 3]]
    """
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % per_byte))
    split = padded.reshape(codes.shape[0], -1, per_byte)
    packed = split[..., 0].clone()
    for i in range(1, per_byte):
        packed |= split[..., i] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: uint8, shape ``[..., row_bytes(count, bits)]``.
        bits: 2 or 4.
        count: codes in a row.

    Returns:
        uint8, shape ``[..., count]``.

    >>> unpack(pack(torch.tensor([[1, 2, 3]]), 2), 2, 3).tolist()
    [[1, 2, 3]]
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :count]
