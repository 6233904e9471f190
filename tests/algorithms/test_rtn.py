"""Round to nearest: the search of its scales, the full range, and which options go together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flows import BACKENDS
from torch import nn
from weights import SPECS, heavy, inputs, output_error, seen, weight_error

from torch_quant import (
    FLOAT,
    InvalidConfig,
    PerChannel,
    PerGroup,
    QConfig,
    Quantizer,
    QuantSpec,
    RoundToNearest,
    sqnr,
)
from torch_quant.core.functional import dequantize
from torch_quant.statistics import MeanSquare

SEARCH = RoundToNearest(clip_search=True)
GROUPED = QuantSpec.of("int4", granularity=PerGroup(16, 1))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_search_never_costs(spec: QuantSpec) -> None:
    assert weight_error(SEARCH, spec) <= 1.0


@pytest.mark.parametrize(
    ("element", "most"),
    # An outlier decides on the whole range of a channel: the fewer bits, the more there is to gain.
    [("int2", 0.5), ("int3", 0.65), ("int4", 0.85), ("uint4", 0.95), ("float4_e2m1", 0.95)],
)
def test_a_search_pays_for_few_bits(element: str, most: float) -> None:
    spec = QuantSpec.of(element, granularity=PerChannel(0))
    assert weight_error(SEARCH, spec) < most


def test_it_finds_the_best_scale() -> None:
    """As good as trying 400 ranges one by one, but for what least squares adds."""
    weight, spec = heavy(out=8), QuantSpec.of("int4", granularity=PerChannel(0))
    found = dequantize(*SEARCH.quantize(weight, spec, {})) - weight
    whole = RoundToNearest().quantize(weight, spec, {})[1].scale
    tried = []
    for factor in torch.linspace(0.1, 1.0, 400):
        steps = (weight / (whole * factor)).round().clamp(-8, 7)
        tried.append((steps * whole * factor - weight).square().sum(1))
    best = torch.stack(tried).amin(0)
    assert bool((found.square().sum(1) <= best * 1.02).all())


def test_weighted_by_the_inputs_the_output_is_nearer() -> None:
    weighted = RoundToNearest(clip_search=True, weighted=True)
    plain, found = output_error(SEARCH, GROUPED), output_error(weighted, GROUPED)
    assert found < 0.95 * plain


def test_what_is_weighted_is_not_searched_without_weights() -> None:
    weighted = RoundToNearest(clip_search=True, weighted=True)
    for statistics in ({}, {"mean_square": MeanSquare()}):
        ours = weighted.quantize(heavy(), GROUPED, statistics)
        assert torch.equal(ours[0], RoundToNearest().quantize(heavy(), GROUPED, {})[0])


def test_full_range_uses_the_longer_side() -> None:
    weight = torch.tensor([[1.0, 8.0], [-8.0, 1.0], [0.0, 0.0]])
    spec = QuantSpec.of("int4", granularity=PerChannel(0))
    codes, qparams = RoundToNearest(full_range=True).quantize(weight, spec, {})
    assert qparams.scale.flatten().tolist() == [-1.0, 1.0, 1.0]
    assert codes.tolist() == [[-1, -8], [-8, 1], [0, 0]]
    assert torch.equal(dequantize(codes, qparams), weight)


@pytest.mark.parametrize("element", ["int3", "int4", "int8"])
def test_full_range_pays(element: str) -> None:
    spec = QuantSpec.of(element, granularity=PerGroup(16, 1))
    steps = 2 ** (spec.bits - 1)
    # The error grows with the square of the scale, which is smaller by (steps - 1) / steps; half of
    # the blocks' other sides is clipped for it.
    expected = ((steps - 1) / steps) ** 2
    assert weight_error(RoundToNearest(full_range=True), spec) < (1 + expected) / 2
    both = RoundToNearest(clip_search=True, full_range=True)
    assert weight_error(both, spec) < weight_error(SEARCH, spec)


@pytest.mark.parametrize("name", ["uint4", "float4_e2m1", "int8[-127, 127]"])
def test_full_range_is_nothing_without_a_longer_side(name: str) -> None:
    spec = QuantSpec.of(name, granularity=PerGroup(16, 1))
    ours = RoundToNearest(full_range=True).quantize(heavy(), spec, {})
    plain = RoundToNearest().quantize(heavy(), spec, {})
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1].scale, plain[1].scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_take_negative_scales(backend: str) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).requires_grad_(False)
    model[0].weight.copy_(heavy())
    method = RoundToNearest(clip_search=True, full_range=True)
    quantizer = Quantizer(backend, qconfig=QConfig(method=method))
    quantizer.calib(model)(inputs())
    quant_model = quantizer.quantize(model)
    scale = quant_model.state_dict()["0.weight_scale"]
    assert bool((scale < 0).any())
    assert bool((scale > 0).any())
    x = inputs(1)
    reference = quantizer.quantize(model, backend="reference")(x)
    assert sqnr(model(x), reference) > 30
    assert sqnr(reference, quant_model(x)) > 50  # a few codes one step off where sums round


@pytest.mark.parametrize("backend", [each for each in BACKENDS if each != "ipex"])
@pytest.mark.parametrize("bits", [4, 8])
def test_kernels_for_weights_alone_take_negative_scales(backend: str, bits: int) -> None:
    model = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    model[0].weight.copy_(heavy())
    spec = QuantSpec.of(bits=bits, signed=True, symmetric=True, granularity=PerGroup(32))
    config = QConfig(FLOAT, spec, method=RoundToNearest(full_range=True))
    x = inputs(1)
    reference = Quantizer("reference", qconfig=config).quantize(model, example_inputs=x)(x)
    quantizer = Quantizer(backend, qconfig=config)
    quant_model = quantizer.quantize(model, example_inputs=x)
    assert sqnr(model(x), reference) > 15
    assert sqnr(reference, quant_model(x)) > 30  # kernels may round activations to 8 bits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_search": 1}, "clip_search=1.*True or False"),
        ({"full_range": "yes"}, "full_range='yes'.*True or False"),
        ({"weighted": True}, "give clip_search=True"),
        ({"observer": "histogram", "clip_search": True}, "leave the observer out"),
        ({"observer": "nothing"}, "expected one of"),
    ],
)
def test_options_that_say_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        RoundToNearest(**options)


def test_only_weighted_it_asks_for_data() -> None:
    weighted = RoundToNearest(clip_search=True, weighted=True)
    assert not SEARCH.wants_statistics
    assert weighted.wants_statistics
    quantizer = Quantizer("reference", qconfig=QConfig(weight=GROUPED, method=weighted))
    quantizer.calib(layer := nn.Linear(64, 32))(inputs())
    kept = [set(each) for each in quantizer.state.statistics.values()]
    assert {"range", "mean_square"} in kept
    quant_model = quantizer.quantize(layer)
    expected = weighted.quantize(layer.weight, GROUPED, seen())[0]
    assert torch.equal(quant_model.state_dict()["weight"], expected)
