"""The JSON summary: there and back bit for bit, edits taken, nonsense refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import BACKENDS, calibrated
from models import MODELS, example

from torch_quant import (
    InvalidConfig,
    NotCalibrated,
    QConfig,
    Quantizer,
    QuantSpec,
    SmoothQuant,
    recipes,
)
from torch_quant.statistics import OBSERVERS


def edit(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.thin
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("observer", sorted(OBSERVERS))
def test_there_and_back(tmp_path: Path, observer: str, backend: str) -> None:
    model = MODELS["tiny_transformer"]()
    batches = [(example("tiny_transformer", 8), {})]
    config = QConfig(observer=observer)
    quantizer = calibrated(model, batches, backend=backend, qconfig=config)
    x = example("tiny_transformer", 3)
    expected = quantizer.quantize(model)(*x)
    quantizer.save_summary(tmp_path / "summary.json")
    other = Quantizer(backend)
    other.load_summary(tmp_path / "summary.json")
    again = other.quantize(model, example_inputs=example("tiny_transformer", 8))
    assert torch.equal(again(*x), expected)
    assert dict(other.plan) == dict(quantizer.plan)


def test_edits_are_taken(tmp_path: Path) -> None:
    model, path = MODELS["mlp"](), tmp_path / "summary.json"
    quantizer = calibrated(model, [(example("mlp", 16), {})], backend="reference")
    quantizer.quantize(model)
    quantizer.save_summary(path)
    data = edit(path)
    data["sites"][0] |= {"quantized": False, "reason": "I say so"}
    data["sites"][1]["activation"]["quant_max"] = 15
    key = data["sites"][2]["inputs"][0]
    data["ranges"][key] = [0.0, 25.5]
    path.write_text(json.dumps(data), encoding="utf-8")
    quantizer.load_summary(path)
    quantizer.quantize(model)
    first, second, third = quantizer.plan.values()
    assert first.reason == "I say so"
    assert second.activation is not None
    assert second.activation.bits == 4
    assert third.activation is not None
    assert float(quantizer.state.qparams(key, third.activation).scale) == pytest.approx(0.1)


def of_version_3(data: dict[str, Any]) -> dict[str, Any]:
    old = copy.deepcopy(data) | {"version": 3}
    del old["capture"], old["means"]
    for site in old["sites"]:
        site["stored"] = site.pop("quantized_output")
    return old


def of_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """A summary as version 0.1 wrote it: integers per tensor and per channel, by their dtype."""
    old = of_version_3(data) | {"version": 1}
    for site in old["sites"]:
        for spec in filter(None, (site["activation"], site["weight"])):
            spec["dtype"] = "int8" if spec.pop("element").startswith("int") else "uint8"
            del spec["scale_type"], spec["dynamic"]
        del site["transforms"], site["method"]
        site["smooth"] = None
    return old


def test_version_3_is_read(tmp_path: Path) -> None:
    """The result of a convolution is quantized for ONNX; it had another name."""
    model, path, x = MODELS["small_cnn"](), tmp_path / "summary.json", example("small_cnn", 4)
    quantizer = calibrated(model, [(x, {})], backend="onnx", qconfig=QConfig())
    quantizer.quantize(model)
    quantizer.save_summary(path)
    data = of_version_3(edit(path))
    assert any(site["stored"] for site in data["sites"])
    path.write_text(json.dumps(data), encoding="utf-8")
    other = Quantizer("onnx")
    other.load_summary(path)
    other.quantize(model, example_inputs=x)
    assert dict(other.plan) == dict(quantizer.plan)
    data["sites"][0]["stored"] = 3
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InvalidConfig, match="'stored' is 3; expected a string"):
        other.load_summary(path)


def test_version_2_is_read(tmp_path: Path) -> None:
    """Of transforms it knew SmoothQuant's alpha only."""
    model, path = MODELS["attention_explicit"](), tmp_path / "summary.json"
    x = example("attention_explicit", 16)
    smooth = QConfig(transforms=[SmoothQuant(0.6)])
    quantizer = calibrated(model, [(x, {})], backend="reference", qconfig=smooth)
    expected = quantizer.quantize(model)(*x)
    quantizer.save_summary(path)
    data = of_version_3(edit(path)) | {"version": 2}
    for site in data["sites"]:
        del site["method"]
        site["smooth"] = next((each["alpha"] for each in site.pop("transforms")), None)
    assert {0.6, None} == {site["smooth"] for site in data["sites"]}
    path.write_text(json.dumps(data), encoding="utf-8")
    other = Quantizer("reference")
    other.load_summary(path)
    assert torch.equal(other.quantize(model, example_inputs=x)(*x), expected)
    assert dict(other.plan) == dict(quantizer.plan)


def test_version_1_is_read(tmp_path: Path) -> None:
    model, path = MODELS["mlp"](), tmp_path / "summary.json"
    config = QConfig(weight=QuantSpec.of(bits=7, signed=True, symmetric=True, per_channel=True))
    quantizer = calibrated(model, [(example("mlp", 16), {})], backend="reference", qconfig=config)
    expected = quantizer.quantize(model)(*example("mlp", 4))
    quantizer.save_summary(path)
    path.write_text(json.dumps(of_version_1(edit(path))), encoding="utf-8")
    other = Quantizer("reference")
    other.load_summary(path)
    again = other.quantize(model, example_inputs=example("mlp", 16))
    assert torch.equal(again(*example("mlp", 4)), expected)
    assert dict(other.plan) == dict(quantizer.plan)


def test_a_summary_says_what_was_one_graph(tmp_path: Path) -> None:
    """It decides the names of tensors, so a quantizer of other settings has to know it."""
    model, x, path = MODELS["tiny_transformer"](), example("tiny_transformer", 8), tmp_path / "s"
    quantizer = Quantizer(recipes.int8_weight_only(), backend="reference")
    expected = quantizer.quantize(model, example_inputs=x)(*x)
    quantizer.qconfig = QConfig()  # what it has captured stays as it is
    quantizer.save_summary(path)
    assert edit(path)["capture"] == "modules"
    other = Quantizer("reference")
    other.load_summary(path)
    assert torch.equal(other.quantize(model, example_inputs=x)(*x), expected)
    path.write_text(json.dumps(edit(path) | {"capture": []}), encoding="utf-8")
    with pytest.raises(InvalidConfig, match=r"line 1: capture=\[\]; expected \"whole\""):
        other.load_summary(path)


def test_a_summary_of_another_model(tmp_path: Path) -> None:
    model, path = MODELS["mlp"](), tmp_path / "summary.json"
    quantizer = calibrated(model, [(example("mlp", 16), {})], backend="reference")
    quantizer.quantize(model)
    quantizer.save_summary(path)
    other = MODELS["small_cnn"]()
    wrong = calibrated(other, [(example("small_cnn", 4), {})], backend="reference")
    wrong.load_summary(path)
    with pytest.raises(InvalidConfig, match="summary site '0' matches nothing"):
        wrong.quantize(other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the summary"),
        ("{}", "no summary of torch_quant"),
        ('{"format": "torch_quant summary", "version": 9}', "version 9; expected 1 to 4"),
        ('{"format": "torch_quant summary", "version": 1}', "lacks 'sites'"),
        (
            '{"format": "torch_quant summary", "version": 2, "sites": [], "ranges": {"a": [2, 1]}}',
            r"line 1: the range of a is \[2, 1\]",
        ),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidConfig, match=message):
        Quantizer("reference").load_summary(path)


def test_nothing_to_save_yet(tmp_path: Path) -> None:
    with pytest.raises(NotCalibrated, match="quantize"):
        Quantizer("reference").save_summary(tmp_path / "summary.json")
    assert not list(tmp_path.iterdir())
