"""Treatments by effect: which site gets which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from amp_proxies import analysed
from torch import Tensor, nn

from torch_quant import (
    InvalidConfig,
    NotCalibrated,
    QConfig,
    Quantizer,
    QuantSpec,
    SmoothQuant,
    recipes,
    sqnr,
)
from torch_quant.amp.optimization import Optimization
from torch_quant.amp.proxy import AmpModel


class Block(nn.Module):
    """Attention with Q, K and V from one tensor, and a layer behind a GELU with outliers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        with torch.no_grad():
            self.norm.weight[3] = 8.0  # channels that are far larger than the rest, as in BERT
            self.up.bias[5] = 8.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        heads = [
            each(x).unflatten(-1, (2, 16)).transpose(1, 2) for each in (self.q, self.k, self.v)
        ]
        mixed = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        y: Tensor = self.down(nn.functional.gelu(self.up(mixed)))
        return y


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(16, 12, 32, generator=torch.Generator().manual_seed(seed))


def probed(
    backend: str = "reference", config: QConfig | None = None
) -> tuple[nn.Module, Quantizer, AmpModel]:
    model = Block().eval()
    quantizer = Quantizer(backend, qconfig=config or recipes.int8_static(smooth=None))
    # Channels are recorded where a transform asks for them.
    quantizer.qconfig = config or recipes.int8_static()
    quantizer.calib(model)(inputs())
    amp_model = quantizer.amp(model)
    amp_model(torch.cat([inputs(2), inputs(3)]))
    amp_model(torch.cat([inputs(5), inputs(6)]))
    return model, quantizer, amp_model


def output_sqnr(quantizer: Quantizer, model: nn.Module) -> float:
    with torch.no_grad():
        return sqnr(model(inputs(4)), quantizer.quantize(model)(inputs(4)))


@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_it_raises_the_sqnr_on_data_that_it_never_saw(backend: str) -> None:
    model, quantizer, amp_model = probed(backend)
    before = output_sqnr(quantizer, model)
    found = quantizer.optimize(amp_model, progress=False)
    assert found.chosen
    assert found.measured[1] > found.measured[0] + 0.3
    assert abs(found.predicted[1] - found.measured[1]) < 1.5
    assert output_sqnr(quantizer, model) > before + (0.5 if backend == "reference" else -0.2)
    # Layers that read one tensor go together: it is quantized once.
    plan = quantizer.quantize(model).quantization.plan
    assert plan["q"].activation == plan["k"].activation == plan["v"].activation
    assert plan["q"].transforms[:1] == plan["k"].transforms[:1] == plan["v"].transforms[:1]


def test_what_was_scored_is_what_is_quantized() -> None:
    model, quantizer, amp_model = probed()
    found = quantizer.optimize(amp_model, candidates=["clip", "smooth"])
    plan = quantizer.quantize(model).quantization.plan
    for site, treatment in found.chosen.items():
        entry = plan[site]
        smooth = [each.alpha for each in entry.transforms if isinstance(each, SmoothQuant)]
        if treatment.startswith("smooth"):
            assert smooth == [float(treatment.split()[1])]
        elif treatment == "not smoothed":
            assert not smooth
        else:
            assert entry.activation is not None
            assert treatment == f"{entry.activation.clip:.0%} of the range"
    assert not any(each.activation and each.activation.dynamic for each in plan.values())


def test_a_rare_large_value_is_clipped() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).eval()
    quantizer = Quantizer("reference", qconfig=recipes.fast())
    x = inputs()[..., :16].clone()
    x[0, 0, 0] = 60.0
    quantizer.calib(model)(x)
    amp_model = quantizer.amp(model)
    amp_model(torch.cat([inputs(seed) for seed in range(2, 8)])[..., :16])
    found = quantizer.optimize(amp_model, candidates="clip")
    assert found.chosen["0"] == "80% of the range"
    plan = quantizer.quantize(model).quantization.plan
    assert plan["0"].activation == QuantSpec(clip=0.8)
    assert "2" not in found.chosen


@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_a_share_of_the_range_in_a_summary_and_on_kernels(backend: str, tmp_path: Path) -> None:
    model, quantizer, _ = probed(backend, recipes.fast())
    whole = quantizer.quantize(model)(inputs())
    quantizer.qconfig = QConfig(QuantSpec(clip=0.25))
    clipped = quantizer.quantize(model)(inputs())
    assert sqnr(whole, clipped) < 15.0  # so much is cut off
    path = tmp_path / "summary.json"
    quantizer.save_summary(path)
    again = Quantizer("reference", qconfig=recipes.fast())
    again.load_summary(path)
    theirs = again.quantize(model, example_inputs=inputs())(inputs())
    assert sqnr(theirs, clipped) > 35.0


def test_settings_and_ranges_reproduce_it(tmp_path: Path) -> None:
    model, quantizer, amp_model = probed()
    quantizer.optimize(amp_model)
    expected = quantizer.quantize(model)(inputs(4))
    data = json.loads(json.dumps(quantizer.to_config()))
    again = Quantizer.from_config(data)
    again.load_state_dict(quantizer.state_dict())
    with torch.no_grad():
        assert torch.equal(again.quantize(model, example_inputs=inputs(4))(inputs(4)), expected)
        quantizer.save(tmp_path / "ranges")
        loaded = Quantizer.load(tmp_path / "ranges")
        assert torch.equal(loaded.quantize(model, example_inputs=inputs(4))(inputs(4)), expected)


def test_calls_after_each_other() -> None:
    model, quantizer, amp_model = probed()
    quantizer.fallback(amp_model, num=1)
    (fallen,) = quantizer.fallen_back
    first = quantizer.optimize(amp_model)
    assert fallen not in first.chosen
    assert not quantizer.quantize(model).quantization.plan[fallen].quantized
    second = quantizer.optimize(amp_model, seed=1)  # the proxy's samples still hold
    assert second.measured[0] == first.measured[1]
    assert second.measured[1] >= second.measured[0] or not second.kept
    quantizer.reset_fallback()
    quantizer.set("down", None)
    third = quantizer.optimize(amp_model)
    assert "down" not in third.chosen
    quantizer.load_state_dict(quantizer.state_dict())
    assert quantizer.optimize(amp_model).measured[0] == pytest.approx(third.measured[1], abs=1e-3)
    with pytest.raises(NotCalibrated, match="overrides, ranges changed"):
        quantizer.sensitivity(amp_model)
    amp_model(inputs(2))  # it starts anew, with what was chosen
    assert quantizer.sensitivity(amp_model).names


def test_a_choice_that_measures_worse_is_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    batches = [torch.randn(16, 32) for _ in range(4)]
    quantizer = Quantizer("onnx", overrides={"op:linear": recipes.int8_static()})
    for x in batches[:2]:
        quantizer.calib(model)(x)
    amp_model = quantizer.amp(model)
    for x in batches:
        amp_model(x)
    expected, overrides = quantizer.quantize(model)(batches[3]), dict(quantizer.overrides)
    found = quantizer.optimize(amp_model, progress=False)
    assert found.measured[1] < found.measured[0]
    assert not found.kept
    assert not found.chosen
    assert not found.to_dict()["kept"]
    assert str(found).startswith("nothing changed, since this measures worse: 1 of 2 sites")
    assert found.headline in caplog.text
    assert quantizer.overrides == overrides
    assert torch.equal(quantizer.quantize(model)(batches[3]), expected)
    assert quantizer.sensitivity(amp_model).names  # what the proxy saw still holds


def test_more_data_and_training_after_it() -> None:
    model, quantizer, amp_model = probed()
    quantizer.optimize(amp_model)
    quantizer.calib(model)(inputs(20))  # of layers per token, channels are recorded and no ranges
    quantized = quantizer.quantize(model)(inputs(4))
    assert sqnr(model(inputs(4)).detach(), quantized) > 39.5
    assert quantizer.optimize(amp_model).measured[1] > 39.5
    with torch.enable_grad():
        quantizer.qat(model)(inputs()).sum().backward()


def test_configurations_of_the_users() -> None:
    model, quantizer, amp_model = probed()
    fine = recipes.int8_static(smooth=0.7)
    coarse = QConfig(weight=QuantSpec.of("int4", per_channel=True))
    found = quantizer.optimize(amp_model, candidates={"fine": fine, "coarse": coarse})
    assert set(found.chosen.values()) <= {"fine"}
    assert all(config == fine for config in quantizer.overrides.values())
    assert quantizer.quantize(model)(inputs()).shape == (16, 12, 32)


def test_reports() -> None:
    _, quantizer, amp_model = probed()
    found = quantizer.optimize(amp_model)
    assert "sites treated, output SQNR predicted" in str(found)
    assert str(found).count("\n") > len(found.table())
    assert "<table>" in found._repr_html_()
    data = json.loads(json.dumps(found.to_dict()))
    assert data["measured"] == list(found.measured)
    assert len(data["groups"]) == len(found.groups)
    untreated = Optimization((), (1.0, 1.0), (1.0, 1.0), 1.0)
    assert str(untreated).startswith("0 of 0 sites")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ["clips"]}, "no kind of candidates 'clips'.*did you mean clip"),
        ({"candidates": []}, "no candidates"),
        ({"candidates": 3}, "candidates=3"),
        ({"min_gain": 2}, "min_gain=2; expected a share"),
        ({"min_gain": True}, "min_gain=True"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    _, quantizer, amp_model = analysed()
    with pytest.raises(InvalidConfig, match=message):
        quantizer.optimize(amp_model, **options)
    assert quantizer.overrides == {}


def test_wrong_moments() -> None:
    model, quantizer, amp_model = probed()
    with pytest.raises(NotCalibrated, match="no data was run through the AMP proxy"):
        quantizer.optimize(quantizer.amp(model))
    with pytest.raises(InvalidConfig, match="another model or another quantizer"):
        Quantizer("reference").optimize(amp_model)
    weights = Quantizer("reference", qconfig=recipes.int8_weight_only())
    theirs = weights.amp(model)
    theirs(inputs())
    with pytest.raises(InvalidConfig, match="no candidate applies to any site"):
        weights.optimize(theirs)
    weights.round_weights(model, [inputs()], progress=False)
    with pytest.raises(InvalidConfig, match="call optimize first"):
        weights.optimize(theirs)
    with torch.no_grad():
        model.get_parameter("down.weight").mul_(1.5)
    with pytest.raises(NotCalibrated, match="weights changed"):
        quantizer.optimize(amp_model)


def test_what_gives_no_gradient_is_refused() -> None:
    class Rounding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return (self.layer(x) > 0).to(torch.int64)

    model = Rounding().eval()
    quantizer = Quantizer("reference")
    quantizer.calib(model)(torch.randn(4, 8))
    amp_model = quantizer.amp(model)
    amp_model(torch.randn(4, 8))
    with pytest.raises(NotCalibrated, match="needs noise at the outputs"):
        quantizer.optimize(amp_model)
    assert quantizer.overrides == {}
