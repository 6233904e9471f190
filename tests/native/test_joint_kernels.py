"""Several linear layers in one call, against one call for each."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from processor import without_kernels
from torch import Tensor

from torch_quant import InvalidConfig
from torch_quant.native import joint
from torch_quant.native.joint import FUNCTIONS, GATED_LINEAR, WEIGHT_ONLY_LINEARS
from torch_quant.native.ops import WEIGHT_ONLY_LINEAR

Layer = tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int]
"""Weight, scale, zero point, bias, bits, zero."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed + sum(shape)))


def layer(
    out: int, inputs: int, bits: int = 4, group: int = 32, zeros: str = "", bias: bool = False
) -> Layer:
    def codes(*shape: int, most: int = 256) -> Tensor:
        return torch.randint(most, shape, generator=seeded(out + inputs)).to(torch.uint8)

    groups = inputs // group
    scale = normal(out, groups).abs() / 2**bits / inputs**0.5
    points = codes(out, groups, most=2**bits) if zeros == "bytes" else None
    if zeros == "floats":
        points = 2 ** (bits - 1) + normal(out, groups)
    weight = codes(out, (inputs * bits + 7) // 8)
    return weight, scale, points, normal(out) if bias else None, bits, 2 ** (bits - 1)


def one(x: Tensor, each: Layer) -> Tensor:
    result: Tensor = WEIGHT_ONLY_LINEAR(x, *each)
    return result


def lists(layers: list[Layer]) -> list[list[Any]]:
    return [[x for x in part if x is not None] for part in zip(*layers, strict=True)]


GROUPS = {
    "query, key and value": [layer(48, 96), layer(16, 96), layer(16, 96)],
    "biases": [layer(5, 64, bias=True), layer(3, 64, bias=True), layer(7, 64, bias=True)],
    "formats": [layer(6, 64), layer(6, 64, 8), layer(6, 64, 2), layer(6, 64, 4, 64)],
    "zero points": [layer(6, 64, zeros="bytes"), layer(7, 64, zeros="floats")],
    "zero points, formats": [layer(6, 64, zeros="bytes"), layer(6, 64, 8, zeros="bytes")],
    "wide": [layer(300, 256, 8, 128), layer(200, 256, 8, 128)],
    "one": [layer(9, 32)],
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("rows", [(), (1,), (2, 5), (700,), (0,)], ids=str)
def test_each_result_is_that_of_its_own_call(
    name: str, rows: tuple[int, ...], instructions: str
) -> None:
    layers = GROUPS[name]
    x = normal(*rows, 256 if name == "wide" else layers[0][1].shape[1] * 32)
    for _ in range(2):  # what is known of the weights is used again
        found = WEIGHT_ONLY_LINEARS(x, *lists(layers))
        assert len(found) == len(layers)
        for y, each in zip(found, layers, strict=True):
            assert torch.equal(y, one(x, each))


def test_more_rows_than_a_slab_has() -> None:
    layers = [layer(6, 2048), layer(6, 2048)]
    x = normal(900, 2048)
    for y, each in zip(WEIGHT_ONLY_LINEARS(x, *lists(layers)), layers, strict=True):
        assert torch.equal(y, one(x, each))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("rows", [(1,), (2, 5), (300,)], ids=str)
@pytest.mark.parametrize("count", [2, 3])
def test_gated(function: str, rows: tuple[int, ...], count: int, instructions: str) -> None:
    """Codes between the products move a step where a function differs in its last bits."""
    layers = [layer(96, 64, bias=True), layer(96, 64, bias=True), layer(40, 96, bias=True)]
    layers = layers if count == 3 else layers[::2]
    x = 3 * normal(*rows, 64)
    between = FUNCTIONS[function][1](one(x, layers[0]))
    wanted = one(between * one(x, layers[1]) if count == 3 else between, layers[-1])
    y = GATED_LINEAR(x, *lists(layers), function)
    assert y.shape == wanted.shape
    assert (y - wanted).norm() <= 1e-3 * wanted.norm()
    assert rows != (1,) or (y - wanted).norm() <= 1e-4 * wanted.norm()


def test_rows_that_are_not_finite_stay_with_themselves(instructions: str) -> None:
    layers = [layer(96, 64), layer(96, 64), layer(40, 96)]
    x = normal(3, 64)
    x[1, 5] = float("nan")
    y = GATED_LINEAR(x, *lists(layers), "silu")
    assert y[1].isnan().all()
    assert torch.equal(y[::2], GATED_LINEAR(x[::2], *lists(layers), "silu"))


def test_types_and_strides() -> None:
    layers = [layer(96, 64), layer(96, 64), layer(40, 96)]
    x = normal(64, 3).t()
    assert torch.equal(
        GATED_LINEAR(x, *lists(layers), "silu"),
        GATED_LINEAR(x.contiguous(), *lists(layers), "silu"),
    )
    half = x.bfloat16()
    assert GATED_LINEAR(half, *lists(layers), "silu").dtype is torch.bfloat16
    assert [y.dtype for y in WEIGHT_ONLY_LINEARS(half, *lists(layers[:2]))] == [torch.bfloat16] * 2


WITHOUT = """
from test_joint_kernels import *
layers = [layer(96, 64), layer(96, 64), layer(40, 96)]
x = normal(3, 64)
gate, up = WEIGHT_ONLY_LINEARS(x, *lists(layers[:2]))
assert torch.equal(gate, one(x, layers[0]))
assert torch.equal(up, one(x, layers[1]))
wanted = one(torch.nn.functional.silu(gate) * up, layers[2])
assert torch.equal(GATED_LINEAR(x, *lists(layers), "silu"), wanted)
"""


@pytest.mark.long("tests/native/test_library.py does the same with others")
def test_without_the_library_they_give_the_same() -> None:
    without_kernels(WITHOUT, __file__)


def test_what_is_written_to_weights_later_is_read() -> None:
    layers = [layer(8, 64), layer(8, 64)]
    x = normal(2, 64)
    WEIGHT_ONLY_LINEARS(x, *lists(layers))
    layers[1][0].add_(17)
    layers[0][1].mul_(2)
    for y, each in zip(WEIGHT_ONLY_LINEARS(x, *lists(layers)), layers, strict=True):
        assert torch.equal(y, one(x, each))
    layers[1][1].data = layers[1][1] * 3
    for y, each in zip(WEIGHT_ONLY_LINEARS(x, *lists(layers)), layers, strict=True):
        assert torch.equal(y, one(x, each))


def test_nothing_is_kept_of_weights_that_are_gone() -> None:
    gc.collect()
    before = len(joint._TABLES)
    layers = [layer(8, 64), layer(8, 64)]
    WEIGHT_ONLY_LINEARS(normal(2, 64), *lists(layers))
    assert len(joint._TABLES) == before + 1
    del layers
    gc.collect()
    assert len(joint._TABLES) == before


def test_what_does_not_fit_is_said() -> None:
    x, layers = normal(2, 64), [layer(96, 64), layer(96, 64), layer(40, 96)]
    with pytest.raises(InvalidConfig, match="lists of one length, those of zero points"):
        WEIGHT_ONLY_LINEARS(x, *lists(layers)[:-1], [8])
    with pytest.raises(InvalidConfig, match="weight_only_linear: expected rows of 64 codes"):
        WEIGHT_ONLY_LINEARS(x, *lists(layers))
    with pytest.raises(InvalidConfig, match="2 or 3 weights and one of none, relu"):
        GATED_LINEAR(x, *lists(layers), "tanh")
    with pytest.raises(InvalidConfig, match="2 or 3 weights"):
        GATED_LINEAR(x, *lists(layers[:1]), "silu")
    uneven = [layers[0], layer(64, 64), layers[2]]
    with pytest.raises(InvalidConfig, match="two weights of one height, got"):
        GATED_LINEAR(x, *lists(uneven), "silu")
    wrong = [(*each[:3], normal(5), *each[4:]) for each in layers]
    with pytest.raises(InvalidConfig, match="gated_linear: expected a bias of 96"):
        GATED_LINEAR(x, *lists(wrong), "silu")
