"""Rounding and its gradients by the kernels, against operators of PyTorch, by instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_quant import native
from torch_quant.core import functional
from torch_quant.core.elements import element_type
from torch_quant.core.granularity import split_blocks
from torch_quant.native.rounding import round_gradient, round_to_grid, serves
from torch_quant.ops.qdq import FAKE_QUANTIZE
from torch_quant.qat.fake_quantize import TRAINED_FAKE_QUANTIZE
from torch_quant.qat.methods import Rounding

pytestmark = pytest.mark.skipif(not native.instruction_sets(), reason=f"{native.unavailable()}")

GRIDS = {
    "one": ((1,), ()),
    "whole": ((3, 5, 7), ()),
    "whole, several pieces": ((5, 7001), ()),
    "channels": ((6, 3, 3, 3), (6, 1, 1, 1)),
    "channels of two pieces": ((2, 20001), (2, 1)),
    "groups": ((5, 64), (5, 4)),
    "tokens": ((2, 9, 33), (2, 9, 1)),
}
ELEMENTS = ("uint8", "int2", "int8[-127, 127]", "uint16")


def case(name: str, element: str) -> tuple[Tensor, Tensor, Tensor]:
    """Values of which some are clipped, scales, zero points of formats that have them."""
    generator = torch.Generator().manual_seed(len(name))
    shape, grid = GRIDS[name]
    kind = element_type(element)
    x = torch.randn(shape, generator=generator)
    scale = (torch.rand(grid, generator=generator) + 1.0) * 2.0 / kind.levels
    zero = torch.zeros(grid, dtype=torch.int32)
    if kind.quant_min == 0:
        zero = torch.randint(0, int(kind.quant_max), grid, generator=generator, dtype=torch.int32)
    return x, scale, zero


def bits(x: Tensor) -> Tensor:
    """Of floats, with one NaN for all."""
    return torch.where(x.isnan(), torch.tensor(float("nan")), x).view(torch.int32)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("name", GRIDS)
def test_the_definition_to_the_bit(name: str, element: str, instructions: str) -> None:
    x, scale, zero = case(name, element)
    flat = x.view(-1)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3e38, 1e-40])
    flat[: len(special)] = special[: len(flat)]
    scale.view(-1)[-1] *= -1.0  # as a learned one may be
    kind = element_type(element)
    assert serves(x, scale, zero, kind)
    how = {"smallest": 1e-3, "signed_scales": True, "multiplies": False}
    y, used = round_to_grid(x, scale, zero, kind, **how)
    assert torch.equal(used, scale.abs().clamp(min=1e-3).copysign(scale))
    assert torch.equal(bits(y), bits(functional.fake_quantize_blocks(x, used, zero, kind)))
    if not scale.dim():
        how |= {"signed_scales": False, "multiplies": True}
        y, used = round_to_grid(x, scale, zero, kind, **how)
        assert torch.equal(used, scale.clamp(min=1e-3))
        assert torch.equal(bits(y), bits(FAKE_QUANTIZE(x, used, zero, element)))


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("name", GRIDS)
def test_gradients(name: str, element: str, instructions: str) -> None:
    x, scale, zero = case(name, element)
    kind, grad = element_type(element), torch.randn(x.shape) + 0.5
    rounded = functional.fake_quantize_blocks(x, scale, zero, kind)
    found = round_gradient(grad, x, rounded, scale, zero, kind)
    split, blocks = split_blocks(x, scale.shape)
    plain = Rounding(
        grad.reshape(split.shape), split, rounded.reshape(split.shape), scale.reshape(blocks),
        zero.reshape(blocks), kind, "weight", 1,
    )  # fmt: skip
    assert torch.equal(found[0], plain.grad_inside.reshape(x.shape))
    expected = plain.error_inside, plain.ends_outside, plain.sum_outside
    for sums, wanted in zip(found[1:], expected, strict=True):
        assert sums.shape == scale.shape
        # Up to 35 000 products in another order, in float32.
        size = float(grad.abs().max() * max(rounded.abs().max(), 1.0))
        torch.testing.assert_close(sums, wanted.reshape(scale.shape), rtol=1e-4, atol=size * 1e-3)


def test_threads_do_not_change_sums(instructions: str) -> None:
    x, scale, zero = torch.randn(7, 60001), torch.tensor(0.02), torch.tensor(3, dtype=torch.int32)
    kind, before = element_type("uint8"), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y, used = round_to_grid(
                x, scale, zero, kind, smallest=0.0, signed_scales=False, multiplies=True
            )
            found.append((y, *round_gradient(torch.ones_like(x), x, y, used, zero, kind)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.usefixtures("grad")
def test_memory_in_another_order() -> None:
    """Tensors whose gradients are laid out differently, and that have no memory of their own."""
    zero, how = torch.tensor(9, dtype=torch.int32), ("uint4", "float32", "input", "lsq", "")
    grad = torch.randn(4, 5, 6)
    gradients = []
    for x in (torch.randn(6, 5, 4).permute(2, 1, 0), torch.randn(4, 5, 1).expand(4, 5, 6)):
        for each in (x, x.contiguous()):
            leaves = each.detach().requires_grad_(), torch.tensor(0.1).requires_grad_()
            y = TRAINED_FAKE_QUANTIZE(*leaves, zero, *how)
            y.backward(grad)
            gradients.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for one, other in (gradients[:2], gradients[2:]):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        torch.testing.assert_close(one[2], other[2])


@pytest.mark.usefixtures("grad")
def test_gradients_of_gradients() -> None:
    """They are those of the operators, since the kernels have none."""
    x = torch.tensor([0.2, 0.31, 9.0], requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    zero = torch.tensor(0, dtype=torch.int32)
    y = TRAINED_FAKE_QUANTIZE(x, scale, zero, "uint4", "float32", "input", "lsq", "")
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, torch.tensor([2.0, 2.0, 0.0]))


def test_what_is_not_served() -> None:
    x, scale, zero = case("channels", "int2")
    kind = element_type("int2")
    assert serves(x, scale, zero, kind)
    assert not serves(x.double(), scale, zero, kind)
    assert not serves(x, scale, zero.float(), kind)
    assert not serves(x, scale, zero, element_type("float8_e4m3fn"))
    assert not serves(x.transpose(0, 1), scale.transpose(0, 1), zero.transpose(0, 1), kind)
    assert not serves(x, scale[:, 0], zero[:, 0], kind)  # an error of the definition's
    assert not serves(x[:0], scale[:0], zero[:0], kind)
    negative = torch._neg_view  # the numbers are in memory with the other sign
    assert not serves(negative(x), scale, zero, kind)
    assert not serves(x, negative(scale), zero, kind)
    assert not serves(x, scale, negative(zero), kind)
    how = "int2", "float32", "weight", "lsq", ""
    of_view = TRAINED_FAKE_QUANTIZE(negative(x), scale, zero, *how)
    assert torch.equal(of_view, TRAINED_FAKE_QUANTIZE(-x, scale, zero, *how))
    assert not serves(x.to("meta"), scale.to("meta"), zero.to("meta"), kind)
