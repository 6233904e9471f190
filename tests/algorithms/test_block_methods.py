"""AutoRound, AWQ and TEQ: that each finds what there is to find, and what it does without data."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from decoders import GROUPED, Decoder, data, decoder, quality, quantizer_of
from thinning import rarely, some
from torch import Tensor, nn
from weights import SPECS, heavy

from torch_quant import (
    AWQ,
    GPTQ,
    TEQ,
    AutoRound,
    InvalidConfig,
    NotCalibrated,
    PerGroup,
    QuantSpec,
    RoundToNearest,
    ScaleType,
    Transform,
    WeightMethod,
)
from torch_quant.algorithms.block_training import Rounder
from torch_quant.core.functional import dequantize, fake_quantize

FORMATS = {
    str(spec): spec
    for spec in (
        GROUPED,
        QuantSpec.of("uint4", granularity=PerGroup(16)),
        QuantSpec.of("int3", per_channel=True),
        QuantSpec.of("int4"),
        QuantSpec.of("float4_e2m1", granularity=PerGroup(16)),
        QuantSpec.of("float4_e2m1", granularity=PerGroup(32), scale_type="e8m0"),
    )
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_rounding_with_a_gradient_is_rounding(spec: QuantSpec) -> None:
    weight = heavy()
    expected = RoundToNearest().quantize(weight, spec, {})
    rounder = Rounder.of(weight, spec)
    found = rounder.plain(weight)
    torch.testing.assert_close(found, dequantize(*expected), rtol=1e-6, atol=0.0)
    assert torch.equal(rounder.codes(weight, rounder.grid()[2], None), expected[0])


@pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS)
def test_an_offset_of_half_a_step_reaches_the_other_value(spec: QuantSpec) -> None:
    weight, bound = heavy(), spec.granularity.on(0)
    spec = QuantSpec(spec.element, spec.symmetric, bound, spec.scale_type)
    rounder = Rounder.of(weight, spec)
    scale, zero, qparams = rounder.grid()
    steps = rounder.steps(weight)
    size = torch.ones_like(weight) if steps is None else steps
    up, down = (
        rounder.rounded(weight, scale, zero, sign * 0.49 * size).detach() for sign in (1, -1)
    )
    plain = fake_quantize(weight, qparams)
    # All but what lies at an end of the range, or of floats where the distance of values changes.
    assert float(((up == plain) ^ (down == plain)).float().mean()) > 0.85
    assert bool((up >= plain - 1e-6).all())
    assert bool((down <= plain + 1e-6).all())


@pytest.mark.parametrize("name", some(FORMATS, "u4 affine per-group(16)"))
def test_autoround_pays(name: str) -> None:
    """On data that it has not seen; its head alone has no more weights than samples."""
    spec = FORMATS[name]
    plain, learned = quality(spec=spec), quality(AutoRound(iterations=100), spec=spec)
    assert learned > plain + 1.0


@pytest.mark.long("four seconds, of what the paper says")
def test_more_steps_and_ranges_pay() -> None:
    few, fixed, all_of_it = (
        quality(AutoRound(iterations=n, ranges=ranges, clip_search=False))
        for n, ranges in ((5, True), (100, False), (100, True))
    )
    assert all_of_it > few + 0.5
    assert all_of_it > fixed + 0.5


@pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS)
def test_awq_pays(spec: QuantSpec) -> None:
    clips = not spec.per_tensor and spec.scale_type is not ScaleType.E8M0
    gain = quality(transforms=(AWQ(),), spec=spec) - quality(spec=spec)
    assert gain > (1.0 if clips else -0.1)  # without that, nothing is there to be found


def loud() -> Decoder:
    """Every eighth channel of a norm is thirty times as large, what reads it as much smaller."""
    model = decoder()
    size = torch.ones(64)
    size[::8] = 30.0
    for layer in model.layers:
        assert isinstance(layer.norm, nn.RMSNorm)
        layer.norm.weight.copy_(size)
        for each in (layer.gate, layer.up):
            each.weight.div_(size)
    return model


@pytest.mark.parametrize("transform", [AWQ(clip=False), TEQ(), rarely(TEQ(batch_size=4))], ids=str)
def test_scales_even_out_loud_channels(transform: Transform) -> None:
    """The model is then rounded as well as one without loud channels, to 0.1 dB."""
    spec = QuantSpec.of("int4", granularity=PerGroup(16))
    plain = quality(spec=spec, model=loud())
    scaled = quality(transforms=(transform,), spec=spec, model=loud())
    assert scaled > plain + 1.4
    assert scaled > quality(spec=spec) - 0.1


@pytest.mark.parametrize("transform", [AWQ(), TEQ(iterations=50)], ids=lambda t: t.name)
def test_scales_go_into_what_comes_before(transform: Transform) -> None:
    model = loud()
    quantizer = quantizer_of(transforms=(transform,))
    quantizer.round_weights(model, data(), progress=False)
    scaled = set(quantizer.state.rounded.scaled)
    assert {"layers.0.norm.weight", "layers.0.gate.weight", "layers.0.up.weight"} <= scaled
    # The product of two tensors in between: the one that is not behind a function takes it.
    assert {"layers.0.up.bias", "layers.0.down.weight"} <= scaled
    assert "head.weight" not in scaled  # a sum comes before
    assert torch.equal(model.layers[0].norm.weight, loud().layers[0].norm.weight)


@pytest.mark.parametrize(
    "method", [GPTQ(), rarely(AutoRound(iterations=50))], ids=["gptq", "autoround"]
)
def test_what_rounds_comes_after_what_scales(method: WeightMethod) -> None:
    alone = quality(method, model=loud())
    both = quality(method, (AWQ(clip=False),), model=loud())
    assert both > alone - 0.5
    assert both > quality(transforms=(AWQ(clip=False),), model=loud()) + 1.0


@pytest.mark.long("a quarter of a minute")
def test_a_searched_start_and_the_full_range_pay() -> None:
    paper, searched, full = (
        quality(AutoRound(iterations=100, clip_search=search, full_range=full))
        for search, full in ((False, False), (True, False), (True, True))
    )
    assert searched > paper + 0.3
    assert full > searched + 0.5


def test_the_same_seed_gives_the_same_codes() -> None:
    found = []
    for seed in (0, 0, 1):
        quantizer = quantizer_of(AutoRound(iterations=5, batch_size=2, seed=seed))
        quantizer.round_weights(decoder(), data(), progress=False)
        found.append(quantizer.state.rounded.sites["layers.0.gate"].codes)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_no_block_comes_out_worse_than_rounded_to_nearest() -> None:
    """Steps that are far too large: the state that it began with is taken."""
    wild = quality(AutoRound(iterations=3, learning_rate=1.0))
    assert wild >= quality() - 1e-6
    trained = quality(transforms=(TEQ(iterations=2, learning_rate=1.0),))
    assert trained >= quality() - 0.5  # a block of its own is no worse, on the data that it saw


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = x[:, 0].abs() < 1e9 if i < 2 else x[:, 0].abs() > 1e9
            out[chosen] += expert(x[chosen])
        return out


@pytest.mark.parametrize("method", [GPTQ(), AutoRound(iterations=5)], ids=lambda m: m.name)
def test_an_expert_that_no_token_reached(
    method: WeightMethod, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Experts().requires_grad_(False)
    quantizer = quantizer_of(method, (AWQ(), TEQ(iterations=2)))
    with caplog.at_level(logging.WARNING):
        quantizer.round_weights(model, data(), progress=False)
    (told,) = [each.message for each in caplog.records if "no calibration data" in each.message]
    assert told.startswith("experts.2: no calibration data reached it")
    spec = QuantSpec.of("int3", granularity=PerGroup(16, 1))
    plain = RoundToNearest().quantize(model.experts[2].weight, spec, {})[0]
    assert torch.equal(quantizer.state.rounded.sites["experts.2"].codes, plain)


@pytest.mark.parametrize("transform", [AWQ(), TEQ()], ids=lambda t: t.name)
def test_transforms_need_blocks(transform: Transform) -> None:
    quantizer = quantizer_of(transforms=(transform,))
    with pytest.raises(NotCalibrated, match=f"{transform.name}.* works on blocks of the model"):
        quantizer.quantize(decoder(), example_inputs=data()[0])


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (AutoRound, {"iterations": 0}, "iterations=0.*integer, 1 or more"),
        (AutoRound, {"batch_size": 1.5}, "batch_size=1.5"),
        (AutoRound, {"learning_rate": 0}, "learning_rate=0.*above 0, at most 1, or None"),
        (AutoRound, {"range_learning_rate": 2}, "range_learning_rate=2"),
        (AutoRound, {"ranges": 1}, "ranges=1.*True or False"),
        (AutoRound, {"clip_search": 1}, "clip_search=1"),
        (AutoRound, {"clip_search": False, "full_range": True}, "give clip_search=True"),
        (AutoRound, {"seed": None}, "seed=None.*integer"),
        (AWQ, {"grid": 1}, "grid=1.*integer, 2 or more"),
        (AWQ, {"clip": "no"}, "clip='no'.*True or False"),
        (TEQ, {"iterations": True}, "iterations=True"),
        (TEQ, {"learning_rate": "fast"}, "above 0, at most 1"),
        (TEQ, {"seed": 0.5}, "seed=0.5"),
    ],
)
def test_wrong_options(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        cls(**options)
