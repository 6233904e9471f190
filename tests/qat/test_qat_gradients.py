"""Gradients of the rounding against autograd of the written formulas, and finite differences."""

from __future__ import annotations

import pytest
import torch
from models import normal
from torch import Tensor

from torch_quant.core import functional
from torch_quant.core.elements import element_type
from torch_quant.core.granularity import PerChannel, PerGroup, PerTensor, split_blocks
from torch_quant.core.qparams import choose_qparams
from torch_quant.core.spec import QuantSpec, ScaleType
from torch_quant.qat.fake_quantize import TRAINED_FAKE_QUANTIZE, stored_scale
from torch_quant.qat.methods import QAT_METHODS, qat_method

pytestmark = pytest.mark.usefixtures("grad")

SPECS = {
    "uint8": QuantSpec.of(bits=8),
    "uint4": QuantSpec.of(bits=4),
    "int4 channels": QuantSpec.of("int4", granularity=PerChannel(0)),
    "int2 groups": QuantSpec.of("int2", granularity=PerGroup(4).on(0)),
    "uint3 affine groups": QuantSpec.of("uint3", granularity=PerGroup(4).on(0)),
    "float8": QuantSpec.of("float8_e4m3fn"),
    "float4 groups": QuantSpec.of("float4_e2m1", granularity=PerGroup(4).on(0)),
}


class _Round(torch.autograd.Function):
    """Rounds to values of an element type; its gradient is 1."""

    @staticmethod
    def forward(ctx: object, x: Tensor, element: str) -> Tensor:  # type: ignore[override]
        return element_type(element).round(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def written(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """``scale * (clip(round(x / scale + z)) - z)`` with a straight-through ``round``."""
    split, blocks = split_blocks(x, scale.shape)
    scale, zero = scale.reshape(blocks), zero_point.reshape(blocks)
    clipped = (split / scale + zero).clamp(spec.quant_min, spec.quant_max)
    return ((_Round.apply(clipped, spec.element.name) - zero) * scale).reshape(x.shape)


def tensors(spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Values, a tenth of which the range leaves out on each side, and their scales."""
    x = normal(6, 8)
    grid = spec.granularity.grid(x.shape)
    narrow = torch.full(grid, 1.2)
    qparams = choose_qparams(-narrow, narrow, spec)
    return x, qparams.scale, qparams.zero_point


def gradients(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, role: str, method: str
) -> tuple[Tensor, list[Tensor | None]]:
    """The rounded tensor, and gradients of a weighted sum of it."""
    leaves = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    zero = zero_point.to(torch.float32).requires_grad_()
    rounded = TRAINED_FAKE_QUANTIZE(
        *leaves, zero, spec.element.name, spec.scale_type.value, role, method, ""
    )
    (rounded * normal(6, 8, salt=3)).sum().backward()
    return rounded.detach(), [each.grad for each in (*leaves, zero)]


@pytest.mark.parametrize("role", ["input", "weight"])
@pytest.mark.parametrize("name", SPECS)
def test_lsq_is_autograd_of_the_formula(name: str, role: str) -> None:
    spec = SPECS[name]
    x, scale, zero_point = tensors(spec)
    rounded, (of_x, of_scale, of_zero) = gradients(x, scale, zero_point, spec, role, "lsq_plus")
    expected = functional.fake_quantize_blocks(x, scale, zero_point, spec.element)
    # Per tensor, ATen multiplies by 1 / scale, so a value on a border may go the other way.
    close = {"rtol": 0.0, "atol": 0.0 if role == "weight" or scale.dim() else 1e-6}
    torch.testing.assert_close(rounded, expected, **close)

    leaves = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    zero = zero_point.to(torch.float32).requires_grad_()
    (written(*leaves, zero, spec) * normal(6, 8, salt=3)).sum().backward()
    samples = 6 if role == "input" else 1
    elements = max(x.numel() // (scale.numel() * samples), 1)
    factor = (elements * spec.quant_max) ** -0.5
    torch.testing.assert_close(of_x, leaves[0].grad, rtol=1e-6, atol=0.0)  # times and by a scale
    assert 0 < int((of_x == 0).sum()) < x.numel() / 2  # some are clipped
    # Sums of at most 48 products, in another order: some roundings of float32.
    torch.testing.assert_close(of_scale, leaves[1].grad * factor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_zero, zero.grad * factor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["uint8", "uint4", "int4 channels", "float8"])
def test_lsq_against_finite_differences(name: str) -> None:
    """Outside of the range the function is smooth in the scale, so differences know its slope.

    Inside it is a staircase: there the written formula is all that there is.
    """
    spec = SPECS[name]
    _, scale, zero_point = tensors(spec)
    x = 4.0 * normal(6, 8).sign()  # all clipped
    weights = normal(6, 8, salt=3)

    def value(scale: Tensor) -> Tensor:
        exact = x.double() / scale.double() + zero_point
        codes = exact.clamp(spec.quant_min, spec.quant_max)
        return ((codes - zero_point) * scale.double() * weights).sum()

    _, (_, of_scale, _) = gradients(x, scale, zero_point, spec, "weight", "lsq")
    elements = x.numel() // scale.numel()
    factor = (elements * spec.quant_max) ** -0.5
    for place in range(scale.numel()):
        step = torch.zeros_like(scale.double()).reshape(-1)
        step[place] = 1e-6
        step = step.reshape(scale.shape)
        slope = (value(scale.double() + step) - value(scale.double() - step)) / 2e-6
        ours = of_scale.reshape(-1)[place] / factor
        torch.testing.assert_close(float(ours), float(slope), rtol=1e-4, atol=1e-3)


def test_pact_learns_from_what_is_clipped_alone() -> None:
    """Equation 3 of the paper, by the upper end of the range."""
    spec = QuantSpec.of(bits=4)
    x = torch.tensor([0.2, 0.7, 1.4, 3.0])
    scale, zero_point = torch.tensor(0.1), torch.tensor(0, dtype=torch.int32)
    scale.requires_grad_()
    alpha = 15 * 0.1
    y = TRAINED_FAKE_QUANTIZE(
        x, scale, zero_point, spec.element.name, "float32", "input", "pact", ""
    )
    y.sum().backward()
    clipped = int((x >= alpha).sum())
    assert clipped == 1
    torch.testing.assert_close(scale.grad, torch.tensor(15.0 * clipped))  # dalpha / dscale = 15
    weight = qat_method("pact")
    assert not weight.learns_scale("weight", spec)


@pytest.mark.parametrize("method", ["fixed", "lsq", "lsq_plus", "pact"])
def test_gradients_pass_inside_and_end_outside(method: str) -> None:
    spec = QuantSpec.of("int4")
    x = torch.tensor([-2.0, -0.8, 0.05, 0.7, 5.0])
    scale, zero_point = torch.tensor(0.1), torch.tensor(0, dtype=torch.int32)
    _, (of_x, _, _) = gradients_of(x, scale, zero_point, spec, method)
    assert of_x.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def gradients_of(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, method: str
) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [x.requires_grad_(), scale.requires_grad_()]
    y = TRAINED_FAKE_QUANTIZE(
        *leaves, zero_point, spec.element.name, "float32", "input", method, ""
    )
    y.sum().backward()
    return y, [*(each.grad for each in leaves), None]


def test_a_scale_is_stored_as_its_type_has_it() -> None:
    scale = torch.tensor([3.0, -3.0, 0.0])
    assert stored_scale(scale, ScaleType.E8M0, "weight").tolist()[:2] == [2.0, -2.0]
    assert bool((stored_scale(scale, ScaleType.FLOAT32, "input") > 0).all())
    half = stored_scale(torch.tensor(0.1), ScaleType.FLOAT16, "input")
    assert float(half) == float(torch.tensor(0.1).half())


@pytest.mark.parametrize("name", sorted(QAT_METHODS))
def test_every_method_gives_finite_gradients(name: str) -> None:
    for spec in SPECS.values():
        x, scale, zero_point = tensors(spec)
        for role in ("input", "weight"):
            _, found = gradients(x, scale, zero_point, spec, role, name)
            assert all(bool(each.isfinite().all()) for each in found if each is not None)


def test_types_of_lower_precision_get_theirs_back() -> None:
    spec, x = QuantSpec(), normal(4, 8).to(torch.bfloat16).requires_grad_()
    scale, zero_point = torch.tensor(0.05), torch.tensor(128, dtype=torch.int32)
    y = TRAINED_FAKE_QUANTIZE(
        x, scale, zero_point, spec.element.name, "float32", "input", "lsq", ""
    )
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.float32, torch.bfloat16)
    assert isinstance(spec.granularity, PerTensor)
