"""GPTQ: against the formula, against round to nearest, and where there is too little to go by."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from weights import heavy, inputs, output_error, seen

from torch_quant import (
    FLOAT,
    GPTQ,
    InvalidConfig,
    NotCalibrated,
    PerBlock,
    PerChannel,
    PerGroup,
    QConfig,
    Quantizer,
    QuantSpec,
    RoundToNearest,
    recipes,
)
from torch_quant.core.functional import dequantize, quantize
from torch_quant.statistics import HESSIAN, Hessian

GROUPED = QuantSpec.of("int4", granularity=PerGroup(16, 1))
AFFINE = QuantSpec.of("uint4", granularity=PerGroup(16, 1))
FP4 = QuantSpec.of("float4_e2m1", granularity=PerGroup(16, 1))
SPECS = {
    str(spec): spec
    for spec in (
        GROUPED, AFFINE, FP4, QuantSpec.of("int3", granularity=PerChannel(0)),
        QuantSpec.of("int4", granularity=PerBlock((8, 16))),
        QuantSpec.of("float4_e2m1", granularity=PerGroup(32, 1), scale_type="e8m0"),
    )
}  # fmt: skip


def by_the_paper(weight: Tensor, spec: QuantSpec, moments: Tensor, damping: float) -> Tensor:
    """Frantar et al., algorithm 1 without blocks, in float64: the inverse, then its Cholesky."""
    qparams = RoundToNearest().quantize(weight, spec, {})[1]
    hessian = moments.double()
    hessian = hessian + damping * float(hessian.diagonal().mean()) * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    rest, real = weight.double().clone(), torch.empty_like(weight)
    for j in range(weight.shape[1]):
        now = rest.float()
        real[:, j] = dequantize(quantize(now, qparams), qparams)[:, j]
        error = (rest[:, j] - real[:, j]) / upper[j, j]
        rest[:, j:] -= error[:, None] * upper[j, j:]
    return real


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_it_is_the_algorithm_of_the_paper(spec: QuantSpec) -> None:
    weight, statistics = heavy(), seen()
    hessian = statistics[HESSIAN]
    assert isinstance(hessian, Hessian)
    method = GPTQ(act_order=False, clip_search=False)
    real = dequantize(*method.quantize(weight, spec, statistics))
    expected = by_the_paper(weight, spec, hessian.mean, method.damping)
    # Where a value lies between two, float32 may take the other one, and what follows differs.
    assert float((real != expected).float().mean()) < 0.02
    x = inputs(1)
    errors = [(x @ (each - weight).T).square().mean() for each in (real, expected)]
    assert float(errors[0] / errors[1]) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("block_size", [1, 7, 16, 1000])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
def test_blocks_change_nothing(block_size: int, act_order: bool, static_groups: bool) -> None:
    options = {"act_order": act_order, "static_groups": static_groups}
    codes, qparams = GPTQ(block_size=block_size, **options).quantize(heavy(), GROUPED, seen())
    whole, expected = GPTQ(block_size=64, **options).quantize(heavy(), GROUPED, seen())
    # Sums in another order: a value between two may go the other way.
    assert float((codes != whole).float().mean()) < 0.01
    torch.testing.assert_close(qparams.scale, expected.scale, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("clip_search", [False, True])
def test_without_correlation_it_rounds_to_nearest(spec: QuantSpec, clip_search: bool) -> None:
    statistics = seen(torch.eye(64))
    ours = GPTQ(clip_search=clip_search).quantize(heavy(), spec, statistics)
    plain = RoundToNearest(clip_search=clip_search).quantize(heavy(), spec, {})
    assert torch.equal(dequantize(*ours), dequantize(*plain))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_correlated_inputs_pay(spec: QuantSpec) -> None:
    """16 factors behind 64 channels: most of the error can be hidden where inputs never go."""
    assert output_error(GPTQ(), spec) < 0.4
    assert output_error(GPTQ(act_order=False), spec) < 0.5
    assert output_error(GPTQ(act_order=False, static_groups=False), spec) < 0.5


def test_full_range_pays_here_too() -> None:
    assert output_error(GPTQ(full_range=True), GROUPED) < 0.9 * output_error(GPTQ(), GROUPED)


def test_rounding_large_channels_first_pays() -> None:
    """The largest channel is last: nothing is left to make up for what it is rounded by."""
    columns = heavy(), inputs()
    weight, x = (each[:, inputs().square().mean(0).argsort()] for each in columns)
    found = {}
    for act_order in (False, True):
        method = GPTQ(act_order=act_order)
        real = dequantize(*method.quantize(weight, GROUPED, seen(x)))
        found[act_order] = float((x @ (real - weight).T).square().mean())
    assert found[True] < 0.8 * found[False]


def test_dynamic_groups_follow_the_weight() -> None:
    static = GPTQ(act_order=False).quantize(heavy(), GROUPED, seen())[1].scale
    dynamic = GPTQ(act_order=False, static_groups=False).quantize(heavy(), GROUPED, seen())[1].scale
    assert torch.equal(static[:, 0], dynamic[:, 0])  # nothing has come before
    assert not torch.equal(static[:, 1:], dynamic[:, 1:])


@pytest.mark.parametrize("act_order", [True, False])
def test_what_was_recorded_stays_as_it_is(act_order: bool) -> None:
    """Layers that read one tensor share its Hessian: each finds it as it was."""
    method, statistics = GPTQ(act_order=act_order), seen()
    before = statistics[HESSIAN].sums.clone()
    first = method.quantize(heavy(), GROUPED, statistics)
    assert torch.equal(statistics[HESSIAN].sums, before)
    again = method.quantize(heavy(), GROUPED, statistics)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1].scale, again[1].scale)


def test_a_channel_without_data_is_rounded_to_nearest() -> None:
    x = inputs()
    x[:, [3, 40]] = 0.0
    ours, qparams = GPTQ(clip_search=False).quantize(heavy(), GROUPED, seen(x))
    plain = quantize(heavy(), qparams)
    assert torch.equal(ours[:, [3, 40]], plain[:, [3, 40]])
    assert not torch.equal(ours, plain)


def test_too_little_data_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        real = dequantize(*GPTQ().quantize(heavy(), GROUPED, seen(inputs(count=8))))
    assert "fewer calibration vectors than input channels" in caplog.text
    x = inputs(count=8)
    plain = dequantize(*RoundToNearest().quantize(heavy(), GROUPED, {}))
    errors = [float((x @ (each - heavy()).T).square().mean()) for each in (real, plain)]
    assert errors[0] < 0.2 * errors[1]  # 8 vectors in 64 dimensions: there is room for all


def test_more_damping_where_the_factorization_fails(caplog: pytest.LogCaptureFixture) -> None:
    """Rounding has left a negative eigenvalue, which 1 % of the mean does not lift."""
    statistics = seen()
    hessian = statistics[HESSIAN]
    assert isinstance(hessian, Hessian)
    values, vectors = torch.linalg.eigh(hessian.sums)
    values[0] = -0.05 * hessian.sums.diagonal().mean()
    hessian.sums = vectors @ values.diag() @ vectors.T
    with caplog.at_level(logging.WARNING):
        ours = GPTQ().quantize(heavy(), GROUPED, statistics)[0]
    assert not caplog.text
    assert not torch.equal(ours, RoundToNearest().quantize(heavy(), GROUPED, {})[0])


def test_no_factorization_at_all_is_told_with_the_site(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    config = QConfig(FLOAT, GROUPED, method=GPTQ(damping=0.0, clip_search=False))
    quantizer = Quantizer("reference", qconfig=config)
    x = inputs(count=100)
    x[:, 1] = x[:, 0]
    quantizer.calib(model)(x)
    (statistics,) = quantizer.state.statistics.values()
    hessian = statistics[HESSIAN]
    assert isinstance(hessian, Hessian)
    hessian.sums = hessian.sums - 100 * torch.eye(64)
    with caplog.at_level(logging.WARNING):
        quant_model = quantizer.quantize(model)
    assert "0: the Hessian of its input has no Cholesky factor" in caplog.text
    plain = RoundToNearest().quantize(model[0].weight, GROUPED, {})[0]
    assert torch.equal(quant_model.state_dict()["0.weight"], plain)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(64, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out[chosen == i] = expert(x[chosen == i])
        return out


@pytest.mark.parametrize("capture", ["whole", "modules"])
def test_an_expert_that_no_token_reached(capture: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Experts().eval().requires_grad_(False)
    x = inputs(count=2000)
    chosen = model.router(x).argmax(-1)
    config = recipes.int4_weight_only(group_size=16, method=GPTQ(clip_search=False))
    quantizer = Quantizer("reference", qconfig=config, capture=capture)
    quantizer.calib(model)(x[(chosen != 1) & (chosen != 3)])
    with caplog.at_level(logging.WARNING):
        quant_model = quantizer.quantize(model)
    (told,) = [each.message for each in caplog.records if "no calibration data" in each.message]
    assert told.startswith("experts.1, experts.3: no calibration data reached it")
    assert [name for name, site in quantizer.plan.items() if not site.quantized] == ["router"]
    state, spec = quant_model.state_dict(), GROUPED
    for i in (1, 3):
        plain = RoundToNearest().quantize(model.experts[i].weight, spec, {})[0]
        assert torch.equal(state[f"experts.{i}.weight"], plain)
    for i in (0, 2):
        plain = RoundToNearest().quantize(model.experts[i].weight, spec, {})[0]
        assert not torch.equal(state[f"experts.{i}.weight"], plain)


def test_without_calibration_it_says_so() -> None:
    config = recipes.int4_weight_only(group_size=16, method="gptq")
    quantizer = Quantizer("reference", qconfig=config)
    with pytest.raises(NotCalibrated, match=r"hessian of .* were not recorded"):
        quantizer.quantize(nn.Linear(64, 32), example_inputs=inputs(count=2))


def test_a_transposed_convolution_is_rounded_to_nearest() -> None:
    model = nn.ConvTranspose2d(8, 8, 3).requires_grad_(False)
    quantizer = Quantizer("reference", qconfig=recipes.int8_weight_only(method="gptq"))
    quantizer.calib(model)(torch.randn(2, 8, 6, 6))
    quantizer.quantize(model)
    (site,) = quantizer.plan.values()
    assert site.quantized
    assert site.method is None
    assert "linear layers" in quantizer.explain(site.name)["method"].why


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size=0.*integer, 1 or more"),
        ({"block_size": True}, "block_size=True"),
        ({"damping": -0.1}, "damping=-0.1.*from 0 to 1"),
        ({"damping": "0.01"}, "from 0 to 1"),
        ({"act_order": 1}, "act_order=1.*True or False"),
        ({"static_groups": None}, "static_groups=None"),
        ({"clip_search": 0}, "clip_search=0"),
        ({"full_range": 2}, "full_range=2"),
        ({"sequential": ""}, "sequential=''"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        GPTQ(**options)


def test_a_hessian_of_other_channels() -> None:
    with pytest.raises(InvalidConfig, match="a Hessian of 32 channels, a weight of 64"):
        GPTQ().quantize(heavy(), GROUPED, seen(inputs(columns=32)))
