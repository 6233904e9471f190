"""Codes of up to 4 bits, two a byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_quant.core.spec import QuantSpec
from torch_quant.errors import InvalidConfig

__all__ = ["pack_codes", "unpack_codes"]


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
    low = int(spec.quant_min)
    flat = (codes.reshape(-1).to(torch.int16) - low).to(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | (flat[1::2] << 4)


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
    held = count if not _packs(spec) else (count + 1) // 2
    if packed.numel() != held:
        raise InvalidConfig(f"{packed.numel()} values hold no {spec} codes of shape {list(shape)}")
    if not _packs(spec):
        return packed.reshape(tuple(shape))
    low = int(spec.quant_min)
    pairs = torch.stack([packed & 15, packed >> 4], -1).reshape(-1)[:count]
    return (pairs.to(torch.int16) + low).to(spec.dtype).reshape(tuple(shape))


def _packs(spec: QuantSpec) -> bool:
    return spec.integer and spec.bits <= 4
