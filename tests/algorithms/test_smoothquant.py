"""SmoothQuant: its formula, what it gains, and that it holds in every way a plan travels."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from flows import BACKENDS, Inputs, calibrated, equal, run, snapshot
from models import seeded
from onnx_files import check_fused, needs
from torch import Tensor, nn

from torch_quant import InvalidConfig, NotCalibrated, QConfig, Quantizer, SmoothQuant, sqnr
from torch_quant.algorithms.smoothquant import smoothing_factor
from torch_quant.ops.qdq import FAKE_QUANTIZE


class Spiky(nn.Module):
    """Layers behind a norm with two channels a hundred times larger than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.out = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        mixed = torch.sigmoid(self.query(x)) * self.key(x).tanh() + self.value(x)
        return self.out(torch.nn.functional.gelu(mixed + x))


def spiky() -> Spiky:
    model = seeded(Spiky)
    with torch.no_grad():
        spikes = torch.ones(32)
        spikes[[3, 17]] = 100.0
        model.norm.weight.copy_(spikes)
        for layer in (model.query, model.key, model.value, model.out):
            layer.weight.div_(spikes)  # so that every channel matters as much as any other
    return model


def data(count: int, seed: int = 0) -> Inputs:
    return (torch.randn(count, 5, 32, generator=torch.Generator().manual_seed(seed)),), {}


def smoothed(backend: str = "reference", smooth: float | None = 0.5) -> tuple[Spiky, Quantizer]:
    model = spiky()
    config = QConfig(transforms=[] if smooth is None else [SmoothQuant(smooth)])
    return model, calibrated(model, [data(32)], backend=backend, qconfig=config)


def test_factor_is_that_of_the_paper() -> None:
    reach, weight = torch.tensor([16.0, 1.0, 4.0]), torch.tensor([1.0, 4.0, 4.0])
    assert smoothing_factor(reach, weight, 0.5).tolist() == [4.0, 0.5, 1.0]
    assert smoothing_factor(reach, weight, 1.0).tolist() == reach.tolist()
    assert smoothing_factor(reach, weight, 0.0).tolist() == (1 / weight).tolist()


def test_a_channel_of_zeros_stays_as_it_is() -> None:
    factor = smoothing_factor(torch.tensor([0.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]), 0.5)
    assert factor.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_spiky_channels_gain(backend: str) -> None:
    found = {}
    for smooth in (None, 0.5):
        model, quantizer = smoothed(backend, smooth)
        expected = model(*data(64, 1)[0])
        found[smooth] = sqnr(expected, quantizer.quantize(model)(*data(64, 1)[0]))
    assert found[0.5] >= found[None] + 10, found
    assert found[0.5] >= 30, found


def test_layers_of_one_input_share_its_quantization() -> None:
    model, quantizer = smoothed()
    quant_model = quantizer.quantize(model, example_inputs=data(4)[0])
    (graph,) = quant_model.graphs
    quantized = graph.body.graph.find_nodes(op="call_function", target=FAKE_QUANTIZE)
    assert len(quantized) == 2  # the input of the three, and of `out`
    assert [site.transforms for site in quantizer.plan.values()] == [(SmoothQuant(0.5),)] * 4


def test_the_proxy_stays_exact_and_the_model_untouched() -> None:
    model = spiky()
    before = snapshot(model)
    quantizer = Quantizer("reference", qconfig=QConfig(transforms=[SmoothQuant(0.5)]))
    calib_model = quantizer.calib(model)
    assert equal(run(calib_model, data(8)), run(model, data(8)))
    quantizer.quantize(model)
    after = snapshot(model)
    assert before["modules"] == after["modules"]
    assert before["state"].keys() == after["state"].keys()
    for name, (identity, value) in before["state"].items():
        assert after["state"][name][0] == identity
        assert torch.equal(after["state"][name][1], value)


def test_one_batch_or_many_give_the_same() -> None:
    (x,), _ = data(32)
    model, whole = smoothed()
    batches: list[Inputs] = [((part,), {}) for part in x.split(8)]
    parts = calibrated(
        model, batches, backend="reference", qconfig=QConfig(transforms=[SmoothQuant(0.5)])
    )
    assert torch.equal(whole.quantize(model)(x), parts.quantize(model)(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_and_summary_keep_it(backend: str, tmp_path: Path) -> None:
    model, quantizer = smoothed(backend)
    inputs = data(3, 2)[0]
    expected = quantizer.quantize(model)(*inputs)
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    other = Quantizer(backend, qconfig=QConfig(transforms=[SmoothQuant(0.5)]))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.quantize(model, example_inputs=inputs)(*inputs), expected)
    quantizer.save_summary(tmp_path / "summary.json")
    third = Quantizer(backend)
    third.load_summary(tmp_path / "summary.json")
    assert torch.equal(third.quantize(model, example_inputs=inputs)(*inputs), expected)


def test_alpha_of_one_site_by_override_and_by_summary(tmp_path: Path) -> None:
    model = spiky()
    overrides = {"out": QConfig(transforms=[SmoothQuant(0.8)])}
    quantizer = calibrated(
        model, [data(32)], backend="reference", qconfig=QConfig(), overrides=overrides
    )
    before = quantizer.quantize(model)(*data(8)[0])
    assert [site.transforms for site in quantizer.plan.values()] == [
        (),
        (),
        (),
        (SmoothQuant(0.8),),
    ]
    path = tmp_path / "summary.json"
    quantizer.save_summary(path)
    edited = json.loads(path.read_text())
    edited["sites"][3]["transforms"] = []
    path.write_text(json.dumps(edited))
    quantizer.load_summary(path)
    after = quantizer.quantize(model)(*data(8)[0])
    expected = model(*data(8)[0])
    assert sqnr(expected, after) < sqnr(expected, before)


def test_amp_ranks_smoothed_sites_and_fallback_keeps_float_weights() -> None:
    model, quantizer = smoothed()
    amp_model = quantizer.amp(model)
    assert equal(run(amp_model, data(16)), run(model, data(16)))
    predicted = quantizer.sensitivity(amp_model)
    assert {each.name for each in predicted} == {"query", "key", "value", "out"}
    measured = sqnr(model(*data(64, 1)[0]), quantizer.quantize(model)(*data(64, 1)[0]))
    (name,) = quantizer.fallback(amp_model, num=1)
    better = sqnr(model(*data(64, 1)[0]), quantizer.quantize(model)(*data(64, 1)[0]))
    assert better > measured
    assert not quantizer.plan[name].quantized
    quantizer.fallback(amp_model, num=3)
    assert equal(quantizer.quantize(model)(*data(4)[0]), model(*data(4)[0]))


@needs("onnx", "onnxscript", "onnxruntime")
def test_onnx_file(tmp_path: Path) -> None:
    model, quantizer = smoothed("onnx")
    check_fused(quantizer, model, data(4), data(64, 1), tmp_path / "model.onnx")


def test_a_layer_behind_heads_is_left_alone() -> None:
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.first(x).view(-1, 5, 4, 8).transpose(1, 2)
            return self.second(heads.reshape(-1, 4, 5, 8).transpose(1, 2).reshape(-1, 5, 32))

    model = seeded(Behind)
    config = QConfig(transforms=[SmoothQuant(0.5)])
    quantizer = calibrated(model, [data(16)], backend="reference", qconfig=config)
    quant_model = quantizer.quantize(model)
    assert {n: len(site.transforms) for n, site in quantizer.plan.items()} == {
        "first": 1,
        "second": 0,
    }
    assert sqnr(model(*data(8)[0]), quant_model(*data(8)[0])) >= 30


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(InvalidConfig, match=r"alpha=.*expected a number from 0 to 1"):
        SmoothQuant(alpha)


def test_asked_for_after_calibration() -> None:
    model, quantizer = smoothed(smooth=None)
    quantizer.qconfig = QConfig(transforms=[SmoothQuant(0.5)])
    with pytest.raises(NotCalibrated, match=r"channels of norm.*were not recorded"):
        quantizer.quantize(model)
    run(quantizer.calib(model), data(4))
    with pytest.raises(NotCalibrated, match="in 1 of 2 batches only"):
        quantizer.quantize(model)


def test_summary_that_smooths_what_cannot_be(tmp_path: Path) -> None:
    model = seeded(lambda: nn.Conv1d(5, 4, 3))
    quantizer = calibrated(model, [data(4)], backend="reference")
    quantizer.quantize(model)
    path = tmp_path / "summary.json"
    quantizer.save_summary(path)
    edited = json.loads(path.read_text())
    edited["sites"][0]["transforms"] = ["smoothquant"]
    path.write_text(json.dumps(edited))
    quantizer.load_summary(path)
    with pytest.raises(InvalidConfig, match="only linear layers can be smoothed"):
        quantizer.quantize(model)


def test_a_layer_that_reads_another_tensor_in_another_graph() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 16)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.layer(x if y is None else 30 * x + y)

    model = seeded(Either)
    (x,), _ = data(32)
    both: list[Inputs] = [((x,), {}), ((x, x.flip(0)), {})]
    quantizer = calibrated(
        model, both, backend="reference", qconfig=QConfig(transforms=[SmoothQuant(0.5)])
    )
    quant_model = quantizer.quantize(model)
    for args, _ in both:
        assert sqnr(model(*args), quant_model(*args)) >= 35


def test_a_summary_that_smooths_can_be_calibrated_further(tmp_path: Path) -> None:
    model, quantizer = smoothed()
    quantizer.quantize(model)
    quantizer.save_summary(tmp_path / "summary.json")
    other = Quantizer("reference")
    other.load_summary(tmp_path / "summary.json")
    run(other.calib(model), data(8, 3))
    assert sqnr(model(*data(8)[0]), other.quantize(model)(*data(8)[0])) >= 30


@pytest.mark.parametrize("alpha", [7, "0.5"])
def test_summary_with_a_wrong_alpha(alpha: object, tmp_path: Path) -> None:
    model, quantizer = smoothed()
    quantizer.quantize(model)
    path = tmp_path / "summary.json"
    quantizer.save_summary(path)
    edited = json.loads(path.read_text())
    edited["sites"][0]["transforms"][0]["alpha"] = alpha
    path.write_text(json.dumps(edited))
    with pytest.raises(InvalidConfig, match=r"query: .*alpha=.*expected a number from 0 to 1"):
        Quantizer("reference").load_summary(path)
