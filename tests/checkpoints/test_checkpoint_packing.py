"""Codes in words, against the definition: code ``i`` begins at bit ``i * bits``."""

from __future__ import annotations

import pytest
import torch

from torch_quant.checkpoints.packing import packed, unpacked


def by_definition(codes: list[int], bits: int) -> list[int]:
    whole = sum(code << (i * bits) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    words = [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("columns", [1, 7, 32, 45, 64])
@pytest.mark.parametrize("bits", range(1, 9))
def test_words_hold_what_the_definition_says(bits: int, columns: int) -> None:
    torch.manual_seed(bits)
    codes = torch.randint(0, 2**bits, (3, columns))
    words = packed(codes, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [by_definition(row, bits) for row in codes.tolist()]
    assert torch.equal(unpacked(words, bits, columns), codes.to(torch.uint8))
