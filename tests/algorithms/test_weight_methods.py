"""What every registered weight method has to do in every format."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from weights import SPECS, heavy, inputs, seen

from torch_quant import FLOAT, PerGroup, QConfig, Quantizer, QuantSpec, RoundToNearest, recipes
from torch_quant.core.functional import dequantize, quantize
from torch_quant.core.methods import WEIGHT_METHODS, WeightMethod, read_weight_method

METHODS = sorted(
    name
    for name, method in WEIGHT_METHODS.items()
    if method.__module__.startswith("torch_quant.algorithms.")
)
"""Those that round any weight; others bring the codes of one model along."""


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> WeightMethod:
    return WEIGHT_METHODS[request.param]()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_codes_of_every_format(method: WeightMethod, spec: QuantSpec) -> None:
    weight = heavy()
    before = weight.clone()
    codes, qparams = method.quantize(weight, spec, seen())
    assert torch.equal(weight, before)
    assert codes.shape == weight.shape
    assert codes.dtype == spec.dtype
    assert qparams.spec == spec
    assert qparams.scale.shape == spec.granularity.grid(weight.shape)
    assert qparams.scale.dtype == torch.float32
    assert bool((qparams.scale > 0).all())
    whole = not spec.float_zero_points
    assert qparams.zero_point.dtype == (torch.int32 if whole else torch.float32)
    assert torch.equal(spec.scale_type.round(qparams.scale), qparams.scale)
    real = dequantize(codes, qparams)
    same = dequantize(quantize(real, qparams), qparams)  # -0 has a code of its own
    assert torch.equal(same, real), "codes stand for no values of the format"
    if spec.levels > 8:  # else GPTQ may move a weight far, for the sake of the output
        assert float((real - weight).square().mean()) < 0.5 * float(weight.square().mean())


@pytest.mark.parametrize("spec", [QuantSpec.of("int4"), QuantSpec.of("uint4")], ids=str)
def test_zeros_stay_zeros(method: WeightMethod, spec: QuantSpec) -> None:
    weight = heavy()
    weight[:, 16:32] = 0.0
    grouped = QuantSpec.of(spec.element, symmetric=spec.symmetric, granularity=PerGroup(16, 1))
    statistics = seen(torch.eye(64))  # else the feedback of GPTQ reaches zeros too
    real = dequantize(*method.quantize(weight, grouped, statistics))
    assert torch.equal(real[:, 16:32], torch.zeros(32, 16))
    assert bool(torch.isfinite(real).all())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 32), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_takes_it_by_name(name: str) -> None:
    config = recipes.int4_weight_only(group_size=16, method=name)
    quantizer = Quantizer("reference", qconfig=config)
    model = net()
    if WEIGHT_METHODS[name].wants_blocks:
        quantizer.round_weights(model, [inputs()], progress=False)
    else:
        quantizer.calib(model)(inputs())
    quant_model = quantizer.quantize(model, example_inputs=inputs())
    assert all(site.quantized and site.method for site in quantizer.plan.values())
    x = inputs(1)
    error = (quant_model(x) - model(x)).square().mean() / model(x).square().mean()
    assert 0 < float(error) < 0.02  # 4 bits: 17 dB at least
    method = read_weight_method({"name": name})
    assert read_weight_method(method.to_dict()) == method


def test_a_group_that_does_not_divide_the_columns_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The site stays in float, as every site that a format does not fit; the reason has the fix."""
    wide = QuantSpec.of("int4", granularity=PerGroup(48))
    overrides = {"up": QConfig(FLOAT, wide, method=RoundToNearest())}
    quantizer = Quantizer("reference", qconfig=recipes.int8_weight_only(), overrides=overrides)
    with caplog.at_level(logging.WARNING):
        quantizer.quantize(net(), example_inputs=inputs())
    reason = quantizer.plan["up"].reason
    assert "per_group(48, 1): dimension 1 of a tensor of shape (32, 64) has 64 elements" in reason
    assert "choose a size that divides it" in reason
    (told,) = [each.message for each in caplog.records if "float" in each.message]
    assert told == f"stays in float: up ({reason})"
