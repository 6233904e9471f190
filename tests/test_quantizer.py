"""The facade: what it hands from one step to the next."""

from __future__ import annotations

import cProfile
import inspect
import io
from typing import Any

import pytest
import torch
from flows import calibrated, run
from models import MODELS, example
from torch import Tensor, fx, nn
from zoo import ZOO, samples

from torch_quant import InvalidConfig, ModuleFilter, QConfig, Quantizer, QuantSpec, recipes, sqnr
from torch_quant.statistics import from_ao


def test_one_calibration_serves_every_backend_and_format() -> None:
    model = MODELS["mlp"]()
    quantizer = calibrated(model, [(example("mlp", 64), {})], backend="reference")
    x = example("mlp", 16)
    expected = model(*x)
    errors = {}
    for bits in (8, 6, 4):
        quantizer.qconfig = QConfig(input=QuantSpec.of(bits=bits))
        errors[bits] = sqnr(expected, quantizer.quantize(model)(*x))
    assert errors[8] > errors[6] + 5 > errors[4] + 10


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_an_observer_of_torch_ao() -> None:
    from torch.ao.quantization import MinMaxObserver

    model = MODELS["small_cnn"]()
    batches = [(example("small_cnn", 32), {})]
    ours = calibrated(model, batches, backend="reference", qconfig=QConfig())
    theirs = calibrated(
        model, batches, backend="reference", qconfig=QConfig(observer=from_ao(MinMaxObserver))
    )
    x = example("small_cnn", 4)
    assert torch.equal(ours.quantize(model)(*x), theirs.quantize(model)(*x))
    with pytest.raises(InvalidConfig, match="unknown statistic"):
        Quantizer("reference").load_state_dict(theirs.state_dict())


def test_overrides_by_name_class_and_op() -> None:
    model = MODELS["small_cnn"]()
    quantizer = calibrated(
        model,
        [(example("small_cnn", 8), {})],
        backend="reference",
        overrides={nn.Linear: None, "conv2d": QConfig(input=QuantSpec.of(bits=5))},
    )
    quantizer.quantize(model)
    for site in quantizer.plan.values():
        if site.op == "linear":
            assert site.reason == "left in float by an override"
        if site.op == "conv2d":
            assert site.activation == QuantSpec.of(bits=5)


def test_coverage_is_a_table_of_shares_and_reasons() -> None:
    model = MODELS["tiny_transformer"]()
    quantizer = Quantizer("reference", module_filter=ModuleFilter(exclude_op_types="embedding"))
    report = quantizer.coverage(model, example_inputs=example("tiny_transformer", 2))
    assert 0.9 < report.share <= 1.0
    assert set(report.reasons.values()) == {"excluded by op type"}
    text = str(report)
    assert "of the multiply-accumulates in int8" in text
    assert "excluded by op type" in text


def test_coverage_names_the_code_between_pieces() -> None:
    from awkward import AWKWARD

    entry = AWKWARD["branch_on_data"]
    quantizer = Quantizer("reference")
    model = entry.build()
    run(quantizer.calib(model), entry.inputs(1))
    assert "what multiplies there is in float" in str(quantizer.coverage(model))


def test_calls_may_be_written_in_any_way() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, scale: Tensor | None = None, *, twice: bool = False) -> Tensor:
            y = self.linear(x) if scale is None else self.linear(x) * scale
            return y * 2 if twice else y

    model, x, scale = Two(), torch.randn(6, 4), torch.rand(4)
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    calls: list[tuple[tuple[Tensor, ...], dict[str, object]]] = [
        ((x,), {}),
        ((x, scale), {}),
        ((x,), {"scale": scale, "twice": True}),
    ]
    for args, kwargs in calls:
        assert torch.equal(calib_model(*args, **kwargs), model(*args, **kwargs))
    quant_model = quantizer.quantize(model)
    for args, kwargs in calls:
        assert sqnr(model(*args, **kwargs), quant_model(*args, **kwargs)) > 25
    assert torch.equal(quant_model(scale=scale, x=x), quant_model(x, scale))


def test_lengths_and_batches_never_calibrated() -> None:
    model = ZOO["bert"].build()
    quantizer = calibrated(model, [((), each) for each in samples("bert", 8)])
    quant_model = quantizer.quantize(model)
    inputs = {name: value[:, :9] for name, value in ZOO["bert"].inputs(5).items()}
    outputs = quant_model(**inputs)
    assert outputs.last_hidden_state.shape[:2] == (5, 9)
    assert sqnr(model(**inputs), outputs) > 20


def test_the_state_is_plain_data() -> None:
    model = MODELS["mlp"]()
    quantizer = calibrated(model, [(example("mlp", 8), {})])
    buffer = io.BytesIO()
    torch.save(quantizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = Quantizer()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert loaded.state.batches == 1
    loaded.calib(model)(*example("mlp", 8))  # and goes on
    assert loaded.state.batches == 2


def test_proxies_have_the_models_signature() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
            return self.linear(x) * scale

    model = Named().eval()
    quantizer = Quantizer()
    calib_model = quantizer.calib(model)
    calib_model(torch.ones(2, 4))
    wanted = inspect.signature(model.forward)
    for proxy in (calib_model, quantizer.amp(model), quantizer.quantize(model)):
        assert inspect.signature(proxy.forward) == wanted


def calls_of_quantize(layers: int) -> int:
    """How many functions ``quantize`` calls for so many layers, however busy the machine is."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)]).eval()
    quantizer = Quantizer("reference")
    quantizer.calib(model)(torch.randn(2, 4))
    quantizer.quantize(model)
    profile = cProfile.Profile()
    profile.runcall(quantizer.quantize, model)
    return sum(entry.callcount for entry in profile.getstats())


def test_quantize_is_linear_in_the_number_of_sites() -> None:
    assert calls_of_quantize(160) <= 4.2 * calls_of_quantize(40)


def test_code_is_made_of_a_graph_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """``fx`` makes it whenever a module gets a graph, which took a third of the time."""
    made: list[fx.Graph] = []
    python_code = fx.Graph.python_code

    def noted(graph: fx.Graph, *args: Any, **options: Any) -> Any:
        made.append(graph)
        return python_code(graph, *args, **options)

    model, x = MODELS["mlp"](), example("mlp", 4)
    quantizer = calibrated(model, [(x, {})], backend="reference")
    quantizer.coverage(model)  # canonical graphs are made once for all
    monkeypatch.setattr(fx.Graph, "python_code", noted)
    quant_model = quantizer.quantize(model)
    assert made == [quant_model.graphs[0].body.graph]


def test_a_calib_proxy_records_what_the_present_settings_want() -> None:
    """In the middle of calibration, as a proxy that is made then does."""
    model = MODELS["mlp"]()
    one, new = (Quantizer(recipes.fast(), backend="reference") for _ in range(2))
    kept = one.calib(model)
    for config in (recipes.fast(), recipes.int8_static(), recipes.fast()):
        one.qconfig = new.qconfig = config
        for proxy in (kept, new.calib(model)):
            proxy(*example("mlp", 4))
        assert str(one.state_dict()) == str(new.state_dict())
    recorded = {what for found in one.state.statistics.values() for what in found}
    assert recorded > {"range", "channels"}
