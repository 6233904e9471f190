"""Codes of 1 to 8 bits in bytes."""

from __future__ import annotations

import pytest
import torch

from torch_quant import QuantSpec
from torch_quant.core import packing
from torch_quant.core.packing import pack, pack_codes, row_bytes, unpack, unpack_codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_of_any_length_come_back(bits: int) -> None:
    for count in (0, 1, 7, 8, 9, 64, 129):
        codes = torch.randint(0, 2**bits, (3, count))
        packed = pack(codes, bits)
        assert packed.shape == (3, row_bytes(count, bits))
        assert torch.equal(unpack(packed, bits, count).long(), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_stand_from_the_low_bits_on(bits: int) -> None:
    """As one long number of which the first code is the least significant digit."""
    codes = torch.randint(0, 2**bits, (1, 16))
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes[0]))
    expected = list(number.to_bytes(2 * bits, "little"))
    assert pack(codes, bits)[0].tolist() == expected


@pytest.mark.parametrize("element", ["int2", "uint3", "int4", "int6"])
def test_codes_of_a_format_come_back(element: str) -> None:
    spec = QuantSpec.of(element)
    low, high = int(spec.quant_min), int(spec.quant_max)
    codes = torch.randint(low, high + 1, (3, 5)).to(spec.dtype)
    assert torch.equal(unpack_codes(pack_codes(codes, spec), (3, 5), spec), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_large_tensors_are_packed_in_parts(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same bytes; the last part is smaller, and its last byte half full."""
    spec = QuantSpec.of(bits=bits, signed=True, symmetric=True)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (13, 17), generator=generator)
    codes = codes.to(torch.int8)
    rows, flat = pack(codes, bits, 2 ** (bits - 1)), pack_codes(codes, spec)
    monkeypatch.setattr(packing, "_PART", 50)
    assert torch.equal(pack(codes, bits, 2 ** (bits - 1)), rows)
    assert torch.equal(pack_codes(codes, spec), flat)
    assert torch.equal(unpack_codes(flat, codes.shape, spec), codes)
    assert torch.equal(unpack(rows, bits, 17), codes.to(torch.int16) + 2 ** (bits - 1))
