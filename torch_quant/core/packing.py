"""Codes of fewer than 8 bits, several in a byte: how weights are saved, and how kernels read them.

A row of a weight begins with a new byte. Its codes stand along the inputs, from the low bits of a
byte to the high ones, and are counted from 0: a signed code has half of the range added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig

__all__ = ["bits_of_storage", "pack", "pack_codes", "row_bytes", "unpack", "unpack_codes"]


_PART = 2**20
"""Codes that are looked at together, an even number: what is thrown away at once stays small."""


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


def pack(codes: Tensor, bits: int, above: int = 0) -> Tensor:
    """Codes as bytes.

    Args:
        codes: shape ``[rows, n]``.
        bits: 1 to 8. A code of 3, 5, 6 or 7 bits may begin in one byte and end in the next.
        above: what is added to the codes, so that they are 0 to ``2**bits - 1``.

    Returns:
        uint8, shape ``[rows, row_bytes(n, bits)]``; what is left of the last byte is 0.

    >>> pack(torch.tensor([[1, 2, 3]]), 4).tolist(), pack(torch.tensor([[1, 2, 7]]), 3).tolist()
    ([[33, 3]], [[209, 1]])
    """
    if codes.numel() > _PART and len(codes) > 1:
        parts = codes.split(max(1, _PART // codes.shape[1]))
        return torch.cat([pack(part, bits, above) for part in parts])
    codes = codes.to(torch.int16) + above if above else codes
    if 8 % bits:
        return _packed_across(codes, bits)
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % per_byte))
    split = padded.reshape(codes.shape[0], -1, per_byte)
    packed = split[..., 0].clone()
    for i in range(1, per_byte):
        packed |= split[..., i] << (bits * i)
    return packed


def _packed_across(codes: Tensor, bits: int) -> Tensor:
    """Eight codes are ``bits`` bytes."""
    rows, count = codes.shape
    split = torch.nn.functional.pad(codes.to(torch.uint8), (0, -count % 8)).reshape(rows, -1, 8)
    found = split.new_zeros(rows, split.shape[1], bits)
    for i, (byte, shift) in enumerate(_places(bits)):
        found[..., byte] |= split[..., i] << shift
        if shift + bits > 8:
            found[..., byte + 1] |= split[..., i] >> (8 - shift)
    return found.flatten(1)[:, : row_bytes(count, bits)].contiguous()


def _places(bits: int) -> list[tuple[int, int]]:
    """Of eight codes: the byte and the bit in which each begins."""
    return [divmod(i * bits, 8) for i in range(8)]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: uint8, shape ``[..., row_bytes(count, bits)]``.
        bits: 1 to 8.
        count: codes in a row.

    Returns:
        uint8, shape ``[..., count]``.

    >>> unpack(pack(torch.tensor([[1, 2, 3]]), 2), 2, 3).tolist()
    [[1, 2, 3]]
    """
    if 8 % bits:
        return _unpacked_across(packed, bits, count)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes: Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)[..., :count]


def _unpacked_across(packed: Tensor, bits: int, count: int) -> Tensor:
    words = -(-count // 8)
    padded = torch.nn.functional.pad(packed, (0, words * bits - packed.shape[-1]))
    split = padded.reshape(*packed.shape[:-1], words, bits)
    found = split.new_empty(*split.shape[:-1], 8)
    for i, (byte, shift) in enumerate(_places(bits)):
        code = split[..., byte] >> shift
        if shift + bits > 8:
            code |= split[..., byte + 1] << (8 - shift)
        found[..., i] = code & (2**bits - 1)
    return found.flatten(-2)[..., :count]


_NIBBLE = 4


def pack_codes(codes: Tensor, spec: QuantSpec) -> Tensor:
    """Integer codes of up to 4 bits in nibbles, the first in the lower one; others as they are.

    Args:
        codes: any shape, in ``spec.dtype``.
        spec: their format.

    Returns:
        uint8 of shape ``[ceil(elements / 2)]``, or ``codes``.

    >>> spec = QuantSpec.of(bits=4, signed=True, symmetric=True)
    >>> pack_codes(torch.tensor([-8, 7, 1], dtype=torch.int8), spec)
    tensor([240,   9], dtype=torch.uint8)
    """
    if not _packs(spec):
        return codes
    parts = codes.reshape(1, -1).split(_PART, dim=1)
    return torch.cat([pack(part, _NIBBLE, -int(spec.quant_min))[0] for part in parts])


def unpack_codes(packed: Tensor, shape: Sequence[int], spec: QuantSpec) -> Tensor:
    """Undo :func:`pack_codes`.

    Raises:
        InvalidConfig: ``packed`` holds another number of codes than ``shape`` has elements.

    >>> spec = QuantSpec.of(bits=4, signed=True, symmetric=True)
    >>> codes = torch.tensor([[-8, 7, 1]], dtype=torch.int8)
    >>> torch.equal(unpack_codes(pack_codes(codes, spec), (1, 3), spec), codes)
    True
    """
    count = math.prod(shape)
    held = row_bytes(count, _NIBBLE) if _packs(spec) else count
    if packed.numel() != held:
        raise InvalidConfig(f"{packed.numel()} values hold no {spec} codes of shape {list(shape)}")
    if not _packs(spec):
        return packed.reshape(tuple(shape))
    codes = torch.empty(count, dtype=spec.dtype, device=packed.device)
    for part, found in zip(packed.split(_PART // 2), codes.split(_PART), strict=True):
        found.copy_(unpack(part, _NIBBLE, len(found)).to(torch.int16) + int(spec.quant_min))
    return codes.reshape(tuple(shape))


def _packs(spec: QuantSpec) -> bool:
    return spec.integer and spec.bits <= _NIBBLE
