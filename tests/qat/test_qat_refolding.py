"""A weight that is folded with a norm, rounded and unfolded: the kernels against the operators."""

from __future__ import annotations

import pytest
import torch
from models import MODELS, example
from qat_training import FOUR_BITS
from torch import Tensor, nn

from torch_quant import Quantizer, native
from torch_quant.convert.quantized import quantized_graphs
from torch_quant.qat import refolding
from torch_quant.qat.refolding import refolded

pytestmark = [
    pytest.mark.skipif(not native.instruction_sets(), reason=f"{native.unavailable()}"),
    pytest.mark.usefixtures("grad"),
]

HOW = "int4", "float32", "weight", "lsq", ""
EPS = 1e-5


def case(shape: tuple[int, ...], grid: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    return {
        "weight": torch.randn(shape, generator=generator).requires_grad_(),
        "gain": torch.randn(shape[0], generator=generator).requires_grad_(),
        "var": torch.rand(shape[0], generator=generator) + 0.1,
        "scale": (torch.rand(grid, generator=generator) * 0.3 + 0.05).requires_grad_(),
        "zero": torch.zeros(grid, dtype=torch.int32),
    }


def results(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Tensor | None], kernels: bool
) -> list[Tensor]:
    """The weight, and the gradients of weight and scale."""
    weight, gain, var, scale, zero = given.values()
    assert weight is not None
    assert scale is not None
    shape = [-1, *[1] * (weight.dim() - 1)]
    with monkeypatch.context() as patch:
        patch.setattr(refolding, "_LARGEST", 2**18 if kernels else -1)
        y = refolded(weight, gain, var, EPS, shape, scale, zero, *HOW)
    assert ("_Refold" in str(y.grad_fn)) is kernels
    weighing = torch.arange(y.numel()).reshape(y.shape).sin()
    gradients = torch.autograd.grad((y * weighing).sum(), [weight, scale])
    return [y.detach(), *gradients]


@pytest.mark.parametrize("change", ["none", "without gain", "a tiny gain", "a negative scale"])
@pytest.mark.parametrize(
    ("shape", "grid"),
    [((6, 3, 3, 3), (6, 1, 1, 1)), ((5, 64), ()), ((4, 1, 3), (4, 1, 1)), ((5, 64), (5, 4))],
)
def test_the_operators_to_the_bit(
    shape: tuple[int, ...], grid: tuple[int, ...], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Tensor | None] = dict(case(shape, grid))
    with torch.no_grad():
        if change == "without gain":
            given["gain"] = None
        elif change == "a tiny gain":
            given["gain"][1] = 0.0  # type: ignore[index]
        elif change == "a negative scale":
            given["scale"].view(-1)[-1] *= -1.0  # type: ignore[union-attr]
    ours, theirs = (results(monkeypatch, given, kernels) for kernels in (True, False))
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one, two)
    if change == "a tiny gain":
        assert torch.equal(ours[0][1], given["weight"][1])  # type: ignore[index]


def test_gradients_of_gradients() -> None:
    given = case((3, 2), (3, 1))
    weight, gain, var, scale, zero = given.values()
    y = refolded(weight, gain, var, EPS, [-1, 1], scale, zero, *HOW)
    (first,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    inside = first != 0
    torch.testing.assert_close(second, torch.where(inside, 2.0, 0.0))


def test_a_frozen_weight() -> None:
    weight, gain, var, scale, zero = case((3, 2), (3, 1)).values()
    y = refolded(weight.detach(), gain, var, EPS, [-1, 1], scale, zero, *HOW)
    y.sum().backward()
    assert scale.grad is not None
    assert gain.grad is None


def test_other_layouts_are_computed_by_operators() -> None:
    """A norm over the second dimension, and a weight in another order of memory."""
    weight, gain, var, scale, zero = case((6, 3, 3, 3), (6, 1, 1, 1)).values()
    last = weight.detach().to(memory_format=torch.channels_last).requires_grad_()
    y = refolded(last, gain, var, EPS, [-1, 1, 1, 1], scale, zero, *HOW)
    assert "_Refold" not in str(y.grad_fn)
    expected = refolded(weight, gain, var, EPS, [-1, 1, 1, 1], scale, zero, *HOW)
    assert torch.equal(y, expected)
    y = refolded(weight, gain[:3], var[:3], EPS, [1, -1, 1, 1], scale, zero, *HOW)
    assert "_Refold" not in str(y.grad_fn)


def test_a_model_in_train_mode_has_them() -> None:
    model, inputs = MODELS["mobile_cnn"](), example("mobile_cnn", 8)
    quantizer = Quantizer("reference", qconfig=FOUR_BITS)
    with torch.no_grad():
        quantizer.calib(model)(*inputs)
    qat_model = quantizer.qat(model).train()
    qat_model(*inputs)
    ((_, graph),) = quantized_graphs(qat_model)
    found = graph.body.graph.find_nodes(op="call_function", target=refolded)
    norms = [x for x in model.modules() if isinstance(x, nn.BatchNorm2d)]
    assert len(found) == len(norms)
