"""Weights alone, activations alone, and scales that are chosen at each call."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from flows import IN_PROCESS, calibrated
from models import MODELS, example, normal, seeded
from torch import Tensor, nn

import torch_quant
from torch_quant import (
    FLOAT,
    Backend,
    InvalidConfig,
    NotCalibrated,
    PerChannel,
    PerGroup,
    PerToken,
    QConfig,
    Quantizer,
    QuantSpec,
    SmoothQuant,
    UnsupportedOp,
    available_backends,
    sqnr,
)
from torch_quant.core.functional import fake_quantize
from torch_quant.core.granularity import block_extremes
from torch_quant.core.qparams import choose_qparams
from torch_quant.ops.qdq import CHOOSE_QPARAMS, QUANTIZE

INT4 = QuantSpec.of("int4", granularity=PerGroup(16))
MX = QuantSpec.of("float4_e2m1", granularity=PerGroup(32), scale_type="e8m0")
NO_DATA: dict[str, tuple[QConfig, float]] = {
    "int4 weights": (QConfig(FLOAT, INT4), 15.0),
    "int8 weights": (QConfig(FLOAT), 35.0),
    "dynamic": (QConfig(QuantSpec.of(dynamic=True)), 35.0),
    "dynamic symmetric": (QConfig(QuantSpec.of("int8", dynamic=True)), 35.0),
    "tokens": (QConfig(QuantSpec.of(granularity=PerToken(), dynamic=True)), 38.0),
    "tokens symmetric": (
        QConfig(QuantSpec.of("int8", granularity=PerToken(), dynamic=True)), 35.0
    ),
    "float8 tokens": (
        QConfig(QuantSpec.of("float8_e4m3fn", granularity=PerToken(), dynamic=True)), 25.0
    ),
    "groups": (
        QConfig(QuantSpec.of("float4_e2m1", granularity=PerGroup(32), scale_type="e8m0",
                             dynamic=True), MX), 12.0
    ),
}  # fmt: skip
"""Configurations that need no calibration, and the least output SQNR, dB."""


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 32))
    return layers.eval()


@pytest.mark.parametrize("name", NO_DATA)
def test_the_whole_workflow_without_calibration(name: str, tmp_path: Path) -> None:
    config, least = NO_DATA[name]
    model, x = mlp(), normal(64, 64)
    before = copy.deepcopy(model.state_dict())
    quantizer = Quantizer("reference", qconfig=config)
    quantized = quantizer.quantize(model, example_inputs=x)
    expected = quantized(x)
    assert quantizer.coverage(model).share == 1.0
    assert sqnr(model(x), expected) > least
    assert torch.equal(copy.deepcopy(quantized)(x), expected)
    torch.save(quantized, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), expected)
    torch_quant.save(quantized, tmp_path / "model")
    assert torch.equal(torch_quant.load(tmp_path / "model", model=mlp())(x), expected)

    amp_model = quantizer.amp(model)
    assert torch.equal(amp_model(x), model(x))
    ranked = quantizer.sensitivity(amp_model)
    assert sorted(site.name for site in ranked) == ["0", "2", "3"]
    assert all(site.score > 0.0 for site in ranked)

    quantizer.save_summary(tmp_path / "summary.json")
    read, given = (Quantizer("reference", qconfig=each) for each in (None, config))
    read.load_summary(tmp_path / "summary.json")
    given.load_state_dict(quantizer.state_dict())
    for other in (read, given, Quantizer.from_config(quantizer.to_config())):
        assert torch.equal(other.quantize(model, example_inputs=x)(x), expected)
        assert dict(other.plan) == dict(quantizer.plan)

    assert quantizer.fallback(amp_model, num=3)
    assert torch.equal(quantizer.quantize(model)(x), model(x))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NO_DATA)
def test_calibration_records_nothing(name: str) -> None:
    config, _ = NO_DATA[name]
    model, x = mlp(), normal(8, 64)
    quantizer = Quantizer("reference", qconfig=config)
    assert torch.equal(quantizer.calib(model)(x), model(x))
    assert not any(quantizer.state.statistics.values())
    assert quantizer.quantize(model).plan.coverage == 1.0


def test_a_tensor_is_recorded_if_one_site_wants_its_range() -> None:
    """The head's input, which the layer before it only makes."""
    model, x = mlp(), normal(8, 64)
    quantizer = calibrated(
        model,
        [((x,), {})],
        backend="reference",
        qconfig=QConfig(FLOAT),
        overrides={"3": QConfig()},
        capture="whole",
    )
    assert {key for key, kept in quantizer.state.statistics.items() if kept} == {"2", "3"}
    assert quantizer.quantize(model).plan["3"].activation == QuantSpec()
    quantizer.qconfig = QConfig()
    with pytest.raises(NotCalibrated, match="no calibration data passed"):
        quantizer.quantize(model)


SERVED = {
    "onednn": ("int8 weights", "tokens", "tokens symmetric"),
    **dict.fromkeys(("onnx", *IN_PROCESS), ("int8 weights", "int4 weights")),
}
"""What has kernels there."""
ELSEWHERE = [
    (name, backend.name)
    for name in NO_DATA
    for backend in available_backends()
    if backend.name != "reference" and name not in SERVED.get(backend.name, ())
]


@pytest.mark.parametrize(("name", "backend"), ELSEWHERE)
def test_other_backends_say_why_not(name: str, backend: str) -> None:
    model, x = mlp(), normal(8, 64)
    quantizer = Quantizer(backend, qconfig=NO_DATA[name][0])
    reasons = quantizer.coverage(model, x).reasons
    assert len(reasons) == 3
    said = ("float ones", "not at each call", "per group of a multiple of 32")
    assert all(any(each in reason for each in said) for reason in reasons.values())
    with pytest.raises(UnsupportedOp, match=" or ".join(said).replace(" or ", "|")):
        quantizer.quantize(model)


# Numbers


def of(x: Tensor, spec: QuantSpec) -> Tensor:
    """``x`` on the grid that its extremes give."""
    return fake_quantize(x, choose_qparams(*block_extremes(x, spec.granularity), spec))


def weight_of(layer: nn.Linear) -> Tensor:
    channels = QuantSpec.of("int8", granularity=PerChannel(0))
    return of(layer.weight.detach(), channels)


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("tokens", [False, True], ids=["tensor", "tokens"])
def test_dynamic_numbers_are_what_the_definition_says(tokens: bool, symmetric: bool) -> None:
    """Also for inputs that no calibration would have covered, and one token at a time."""
    layer = mlp()[0]
    granularity = PerToken() if tokens else None
    spec = QuantSpec.of(
        "int8" if symmetric else "uint8", granularity=granularity, dynamic=True, symmetric=symmetric
    )
    quantized = Quantizer("reference", qconfig=QConfig(spec)).quantize(
        nn.Sequential(layer), example_inputs=normal(4, 5, 64)
    )
    for scale in (1.0, 1000.0):
        x = normal(3, 7, 64) * scale
        expected = nn.functional.linear(of(x, spec), weight_of(layer), layer.bias)
        assert sqnr(expected, quantized(x)) > 70.0  # torch rounds some ties otherwise
    if tokens:  # what stands beside a token does not matter
        whole = quantized(x)
        torch.testing.assert_close(quantized(x[:1, 2:3]), whole[:1, 2:3], rtol=1e-5, atol=1e-3)


def test_weights_alone_round_no_activation() -> None:
    layer, x = mlp()[0], normal(16, 64)
    config = QConfig(FLOAT)
    quantized = Quantizer("reference", qconfig=config).quantize(layer, example_inputs=x)
    expected = nn.functional.linear(x, weight_of(layer), layer.bias)
    torch.testing.assert_close(quantized(x), expected, rtol=1e-6, atol=1e-6)
    assert not [name for name in quantized.state_dict() if "input" in name]


def test_activations_alone_keep_the_float_weight() -> None:
    layer, x = mlp()[0], normal(16, 64)
    quantizer = calibrated(layer, [((x,), {})], backend="reference", qconfig=QConfig(weight=FLOAT))
    quantized = quantizer.quantize(layer)
    assert torch.equal(quantized.state_dict()["weight"], layer.weight)
    expected = nn.functional.linear(of(x, QuantSpec()), layer.weight, layer.bias)
    assert sqnr(expected, quantized(x)) > 70.0  # torch rounds some ties otherwise
    assert quantizer.explain("linear")["weight"].value == "float"


def test_what_is_not_finite_stays_in_its_token_and_no_token_is_a_call_too() -> None:
    spec = QuantSpec.of("int8", granularity=PerToken(), dynamic=True)
    layer, x = mlp()[0], normal(4, 6, 64)
    quantized = Quantizer("reference", qconfig=QConfig(spec)).quantize(layer, example_inputs=x)
    x[1, 2, 3] = torch.nan
    bad = quantized(x).isnan().all(-1)
    assert bad.nonzero().tolist() == [[1, 2]]
    scale, zero_point = CHOOSE_QPARAMS(x[:0], "int8", True, "per_token", "float32")
    assert scale.shape == zero_point.shape == (0, 6, 1)


# Graphs


class Branches(nn.Module):
    """Two layers on one tensor, which is transposed for a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.c(x.transpose(1, 2)).transpose(1, 2)


def test_scales_are_chosen_once_for_all_that_read_a_tensor_alike() -> None:
    spec = QuantSpec.of(granularity=PerToken(), dynamic=True)
    model, x = seeded(Branches).eval(), normal(2, 8, 8)
    quantizer = Quantizer(QConfig(spec), backend="reference", capture="whole")
    quantized = quantizer.quantize(model, example_inputs=x)
    targets = [node.target for node in quantized.graphs[0].body.graph.nodes]
    assert targets.count(CHOOSE_QPARAMS) == 2  # rows, and columns as rows
    assert QUANTIZE not in targets
    assert sqnr(model(x), quantized(x)) > 35.0
    assert quantized(normal(5, 8, 8)).shape == (5, 8, 8)


@pytest.mark.thin
@pytest.mark.parametrize("name", ["tiny_transformer", "small_cnn", "attention_explicit"])
@pytest.mark.parametrize("config", ["int8 weights", "dynamic", "tokens"])
def test_every_operator_of_a_model(name: str, config: str) -> None:
    model, x = MODELS[name](), example(name, 4)
    quantizer = Quantizer(NO_DATA[config][0], backend="reference", capture="whole")
    quantized = quantizer.quantize(model, example_inputs=x)
    assert sqnr(model(*x), quantized(*x)) > 25.0
    reasons = set(quantizer.coverage(model).reasons.values())
    expected = {
        "int8 weights": "the configuration leaves all that it multiplies in float",
        "tokens": "one scale for the whole tensor",
    }
    assert all(expected[config] in reason for reason in reasons) if reasons else True
    convolutions = name == "small_cnn"  # each place of a result sums up other inputs
    assert bool(reasons) == (config == ("tokens" if convolutions else "int8 weights"))


def test_an_lstm_of_int8_weights() -> None:
    torch.manual_seed(0)
    model, x = nn.LSTM(8, 16, num_layers=2, bidirectional=True).eval(), normal(7, 3, 8)
    quantizer = Quantizer("reference", qconfig=QConfig(FLOAT))
    quantized = quantizer.quantize(model, example_inputs=x)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if name.startswith("weight"):
                spec = QuantSpec.of("int8", granularity=PerChannel(0))
                parameter.copy_(of(parameter, spec))
        expected = rounded(x)[0]
    assert sqnr(expected, quantized(x)[0]) > 100.0
    assert sqnr(model(x)[0], quantized(x)[0]) > 30.0


def test_smoothing_before_dynamic_scales_needs_the_channels_alone() -> None:
    spec = QuantSpec.of(granularity=PerToken(), dynamic=True)
    model, x = mlp(), normal(64, 64) * torch.linspace(0.1, 20.0, 64)
    config = QConfig(spec, transforms=[SmoothQuant(0.5)])
    quantizer = calibrated(model, [((x,), {})], backend="reference", qconfig=config)
    kept = quantizer.state.statistics
    assert {what for each in kept.values() for what in each} == {"channels"}
    plain = Quantizer("reference", qconfig=QConfig(spec)).quantize(model, example_inputs=x)
    smoothed = quantizer.quantize(model)
    assert sqnr(model(x), smoothed(x)) > sqnr(model(x), plain(x))


def test_calls_that_were_not_seen_need_no_ranges() -> None:
    model, x = mlp(), normal(2, 3, 64)
    quantizer = Quantizer("reference", qconfig=NO_DATA["tokens"][0])  # captures what is new
    quantized = quantizer.quantize(model, example_inputs=normal(4, 64))
    assert sqnr(model(x), quantized(x)) > 35.0
    assert not [site.reason for site in quantized.plan.values() if site.reason]


def test_a_quantized_model_with_dynamic_scales_exports_and_compiles(tmp_path: Path) -> None:
    model, x = mlp(), normal(4, 64)
    quantized = Quantizer("reference", qconfig=NO_DATA["tokens"][0]).quantize(
        model, example_inputs=x
    )
    expected = quantized(x)
    traced = torch.jit.trace(quantized, (x,))
    assert torch.equal(traced(x), expected)
    exported = torch.export.export(
        quantized, (x,), dynamic_shapes={"input": {0: torch.export.Dim("b")}}
    )
    assert torch.equal(exported.module()(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(quantized, backend="aot_eager")
    assert sqnr(expected, compiled(x)) > 60.0


# Settings


def test_both_in_float_is_no_configuration() -> None:
    with pytest.raises(InvalidConfig, match="quantizes nothing"):
        QConfig(FLOAT, FLOAT)
    with pytest.raises(InvalidConfig, match="expected a QuantSpec, or FLOAT"):
        QConfig("float")  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="quantizes nothing"):
        Quantizer.from_config({"qconfig": {"input": "float", "weight": "float"}})


def test_configuration_as_data() -> None:
    quantizer = Quantizer.from_config(
        {
            "backend": "reference",
            "qconfig": {"input": "float", "weight": {"bits": 4, "signed": True, "symmetric": True}},
            "overrides": {
                "head": {"input": {"element": "int8", "granularity": "per_token", "dynamic": True}}
            },
        }
    )
    assert quantizer.qconfig.input is FLOAT
    assert quantizer.overrides["head"].input == QuantSpec.of(
        "int8", granularity=PerToken(), dynamic=True
    )
    data = quantizer.to_config()
    assert data["qconfig"]["input"] == "float"
    assert Quantizer.from_config(data).to_config() == data


def test_the_summary_says_what_stays_in_float(tmp_path: Path) -> None:
    model, x = mlp(), normal(8, 64)
    quantizer = Quantizer("reference", qconfig=QConfig(FLOAT), overrides={"2": None})
    quantizer.quantize(model, example_inputs=x)
    quantizer.save_summary(path := tmp_path / "summary.json")
    text = path.read_text()
    assert text.count('"activation": "float"') == 2
    assert text.count('"activation": null') == 1  # the override's, which has no format at all
    path.write_text(text.replace('"activation": "float"', '"activation": null'))
    with pytest.raises(InvalidConfig, match="'activation' is null; expected a format, \"float\""):
        Quantizer("reference").load_summary(path)


def test_explanations_name_no_observer() -> None:
    model, x = mlp(), normal(8, 64)
    quantizer = Quantizer(
        "reference", qconfig=QConfig(FLOAT), overrides={"3": QConfig(weight=FLOAT)}
    )
    quantizer.coverage(model, x)
    found = quantizer.explain("0")
    assert (found["input"].value, found["input"].rule) == ("float", "Quantizer(qconfig=...)")
    assert "observer" not in {each.what for each in found.decisions}
    found = quantizer.explain("3")
    assert found["weight"].value == "float"
    assert {"observer", "method"} & {each.what for each in found.decisions} == {"observer"}


def test_a_simulation_declines_as_its_backend_does() -> None:
    from torch_quant.backends.reference import ReferenceBackend

    backend = ReferenceBackend(Backend.get("onnx"))
    config = NO_DATA["tokens"][0]
    reasons = Quantizer(backend, qconfig=config).coverage(mlp(), normal(8, 64)).reasons
    assert len(reasons) == 3
    assert all("not at each call" in reason for reason in reasons.values())


def test_an_amp_proxy_still_wants_ranges_where_a_site_does() -> None:
    model, x = mlp(), normal(8, 64)
    quantizer = Quantizer("reference", qconfig=QConfig(FLOAT), overrides={"3": QConfig()})
    with pytest.raises(NotCalibrated, match="no calibration data was seen"):
        quantizer.amp(model, example_inputs=x)
