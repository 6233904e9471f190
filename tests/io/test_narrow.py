"""Integers of few values take few bits in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_quant
from torch_quant import Backend, InvalidConfig, Quantizer, recipes
from torch_quant.core.packing import pack
from torch_quant.io.data import narrow
from torch_quant.io.data.narrow import narrowed, widened
from torch_quant.io.folder import read_folder, write_folder


def integers(low: int, high: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape).to(dtype)


CASES = {
    "int8 of 3 bits": (integers(-4, 3, torch.int8, 20, 33), 3),
    "int8 of 6 bits": (integers(-32, 31, torch.int8, 7, 5, 11), 6),
    "one value": (torch.full((64, 8), -7, dtype=torch.int32), 1),
    "zero points": (integers(0, 15, torch.int32, 64, 2), 4),
    "the largest of int8": (integers(100, 127, torch.int8, 400), 5),
    "the largest of int32": (integers(2**31 - 5, 2**31 - 1, torch.int64, 400).int(), 3),
    "int16 far from zero": (integers(30000, 30100, torch.int16, 300), 7),
    "two codes of 3 bits in a byte": (pack(integers(4, 11, torch.uint8, 30, 64), 4), 3),
    "two codes of 2 bits in a byte": (pack(integers(6, 9, torch.uint8, 30, 64), 4), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_they_come_back(case: str, monkeypatch: Any) -> None:
    x, bits = CASES[case]
    for size in (narrow._SLICE, 16):  # at once, and in parts
        monkeypatch.setattr(narrow, "_SLICE", size)
        found = narrowed(x)
        assert found is not None
        packed, how = found
        assert how["bits"] == bits
        again = widened(packed, how)
        assert again.dtype is x.dtype
        assert torch.equal(again, x)


@pytest.mark.parametrize(
    "x",
    [
        integers(-128, 127, torch.int8, 4000),
        integers(0, 255, torch.uint8, 4000),
        integers(0, 1, torch.int8, 10),  # too small to be looked at
        torch.rand(4000),
        torch.arange(4000),
        torch.rand(4000) > 0.5,
    ],
    ids=["int8", "uint8", "small", "float", "int64", "bool"],
)
def test_what_needs_its_bits_is_left_alone(x: Tensor) -> None:
    assert narrowed(x) is None


@pytest.mark.parametrize("backend", ["reference", "onednn"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_a_saved_weight_takes_the_bits_of_its_format(
    bits: int, backend: str, tmp_path: Path
) -> None:
    if reason := Backend.get(backend).unavailable():
        pytest.skip(reason)
    model, x = nn.Sequential(nn.Linear(512, 256, bias=False)).eval(), torch.randn(3, 512)
    recipe = recipes.weight_only(bits=bits, group_size=64)
    quant_model = Quantizer(recipe, backend=backend).quantize(model, example_inputs=x)
    torch_quant.save(quant_model, tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    codes, scales = 512 * 256 * bits // 8, 256 * 8 * 4
    zeros = 256 * 8 // 8 if backend == "reference" else 0  # of one value: a bit each
    assert 0 <= file.stat().st_size - (codes + scales + zeros) < 500  # names and shapes
    again = torch_quant.load(tmp_path / "model", model)
    assert torch.equal(again(x), quant_model(x))
    state, expected = again.state_dict(), quant_model.state_dict()
    assert {name: (y.dtype, y.shape) for name, y in state.items()} == {
        name: (y.dtype, y.shape) for name, y in expected.items()
    }


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 0},
        {"bits": 5},
        {"cell": 3},
        {"dtype": "int64"},
        {"shape": [-1]},
        {"low": "x"},
        {"low": 10**12},
        {"low": 121},
        {"low": -129},
        {"low": True},
        {"shape": [0, 10**30]},
        {"cell": 4, "dtype": "int32", "shape": [248], "bits": 1, "low": 0},
        {"cell": 4, "dtype": "uint8", "shape": [330], "low": 9},
    ],
    ids=str,
)
def test_forged_notes_are_refused(change: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    write_folder(tmp_path / "x", "model", {}, {"weight": integers(-4, 3, torch.int8, 20, 33)})
    monkeypatch.setattr(
        "torch_quant.io.folder.widened", lambda packed, how: widened(packed, how | change)
    )
    with pytest.raises(InvalidConfig, match="the tensor weight: "):
        read_folder(tmp_path / "x", "model")
