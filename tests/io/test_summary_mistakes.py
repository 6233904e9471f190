"""A hundred mistakes in a summary: each is refused with its line, and nothing is taken."""

from __future__ import annotations

import copy
import functools
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import calibrated
from models import normal, seeded
from torch import Tensor, nn

from torch_quant import InvalidConfig, QConfig, Quantizer, SmoothQuant
from torch_quant.session import Session


class Net(nn.Module):
    """A linear layer that is smoothed, a product of activations, an embedding, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.conv = nn.Conv1d(6, 4, 3)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.conv(torch.matmul(y, y.transpose(1, 2))) + self.embed(ids)[:, :4, :4]


IDS = torch.arange(12).reshape(2, 6) % 10
X = (IDS, normal(2, 6, 8))
Edit = Callable[[dict[str, Any]], Any]


@functools.cache
def made() -> tuple[nn.Module, Quantizer, str]:
    """The model, a quantizer of it, and its summary's text."""
    model = seeded(Net)
    quantizer = calibrated(
        model,
        [(X, {})],
        backend="reference",
        overrides={"[l]inear": QConfig(transforms=[SmoothQuant(0.5)])},
    )
    quantizer.quantize(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "summary.json"
        quantizer.save_summary(file)
        return model, quantizer, file.read_text(encoding="utf-8")


def take(quantizer: Quantizer, path: Path, model: nn.Module) -> None:
    quantizer.load_summary(path)
    quantizer.quantize(model)


def site(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda data: next(each for each in data["sites"] if each["name"] == name)


def setting(at: str, /, **values: Any) -> Edit:
    return lambda data: site(at)(data).update(values)


def spec(name: str, field: str, **values: Any) -> Edit:
    return lambda data: site(name)(data)[field].update(values)


def dropping(name: str, entry: str) -> Edit:
    return lambda data: site(name)(data).pop(entry)


def spec_without(field: str, entry: str) -> Edit:
    return lambda data: site("linear")(data)[field].pop(entry)


def range_of_x(value: Any) -> Edit:
    return lambda data: data["ranges"].update({":x": value})


def channels_of_x(value: Any) -> Edit:
    return lambda data: data["channels"].update({":x": value})


def smoothed_by(alpha: Any) -> Edit:
    return setting("linear", transforms=[{"name": "smoothquant", "alpha": alpha}])


ENTRIES = ("op", "inputs", "activation", "weight", "quantized", "reason", "macs", "precision",
           "quantized_output", "transforms", "method")  # fmt: skip
SPEC = ("element", "symmetric", "granularity", "quant_min", "quant_max", "scale_type", "dynamic")

FLOAT8 = {
    "element": "float8_e4m3fn", "symmetric": True, "granularity": "per_tensor",
    "scale_type": "float32", "dynamic": False,
}  # fmt: skip

EDITS: dict[str, tuple[Edit, str]] = {
    **{f"no {e}": (dropping("linear", e), f"linear lacks '{e}'") for e in ENTRIES},
    "no name": (dropping("linear", "name"), "the name of site"),
    **{f"no {e} of activation": (spec_without("activation", e), f"lacks '{e}'") for e in SPEC},
    **{f"no {e} of weight": (spec_without("weight", e), f"lacks '{e}'") for e in SPEC},
    **{
        f"name {value!r}": (setting("linear", name=value), "the name of site")
        for value in (None, 5, "", ["linear"])
    },
    **{
        f"quantized {value!r}": (setting("linear", quantized=value), "true or false")
        for value in ("false", "true", 0, 1, None, [])
    },
    **{
        f"op {value!r}": (setting("linear", op=value), "'op'")
        for value in (None, 3, "gemm", "conv2d", ["linear"], {})
    },
    **{
        f"inputs {value!r}": (setting("linear", inputs=value), "'inputs'")
        for value in (None, ":x", [], [3], [":x", ":x"], ["conv"], {":x": 1}, [""])
    },
    **{
        f"macs {value!r}": (setting("linear", macs=value), "'macs'")
        for value in (None, "768", -1, 1.5, True, 0, 767, math.inf)
    },
    "macs of an embedding": (setting("embed", macs=64), "'macs'"),
    "macs of a product": (setting("matmul", macs=0), "'macs'"),
    **{
        f"output {value!r}": (setting("conv", quantized_output=value), "'quantized_output'")
        for value in (None, 1, "linear", ["conv"])
    },
    **{
        f"precision {value!r}": (setting("linear", precision=value), "'precision'")
        for value in (None, "int8", "float16", 32, "bfloat16")
    },
    **{
        f"reason {value!r}": (setting("linear", reason=value), "'reason'")
        for value in (None, 1, ["x"])
    },
    **{
        f"transforms {value!r}": (setting("linear", transforms=value), "'transforms'")
        for value in (None, "smoothquant", {}, 0.5)
    },
    **{
        f"transform {value!r}": (setting("linear", transforms=[value]), "the transform")
        for value in (None, "smooth", {"alpha": 0.5}, {"name": "smoothquant", "a": 1}, 0.5, "rtn")
    },
    **{
        f"alpha {value!r}": (smoothed_by(value), "alpha=")
        for value in ("0.5", 1.5, -0.1, True, [0.5], math.nan, None)
    },
    "smoothing of a convolution": (setting("conv", transforms=["smoothquant"]), "only linear"),
    **{
        f"method {value!r}": (setting("linear", method=value), "the weight method")
        for value in ("gptx", {}, {"name": "rtn", "bits": 4}, 4, ["rtn"])
    },
    "observer of a method": (
        setting("linear", method={"name": "rtn", "observer": "max"}), "unknown observer 'max'"
    ),
    **{
        f"activation {value!r}": (setting("linear", activation=value), "'activation'")
        for value in (None, "u8", 8, [], {}, True)
    },
    **{
        f"weight {value!r}": (setting("linear", weight=value), "'weight'")
        for value in (None, "s8", 8, [])
    },
    "weight of a product": (
        lambda d: site("matmul")(d).update(weight=site("linear")(d)["weight"]), "'weight'"
    ),
    "activation of an embedding": (
        lambda d: site("embed")(d).update(activation=site("linear")(d)["activation"]),
        "'activation'",
    ),
    **{
        f"element {value!r}": (spec("linear", "activation", element=value), "'element'")
        for value in (None, "float32", "int32", 8, ["uint8"], "uint8[0, 15]")
    },
    "a float with integer limits": (
        spec("linear", "weight", element="float8_e5m2"), "no integer type, but has 'quant_min'"
    ),
    "a float with a zero point": (
        lambda d: site("linear")(d).update(weight=FLOAT8 | {"symmetric": False}), "'symmetric'"
    ),
    "a power of two with a zero point": (
        spec("linear", "activation", scale_type="e8m0"), "'symmetric'"
    ),
    **{
        f"scale_type {value!r}": (spec("linear", "weight", scale_type=value), "'scale_type'")
        for value in (None, "float64", 32)
    },
    **{
        f"dynamic {value!r}": (spec("linear", "activation", dynamic=value), "'dynamic'")
        for value in (None, "true", 1)
    },
    **{
        f"symmetric {value!r}": (spec("linear", "weight", symmetric=value), "'symmetric'")
        for value in (None, "false", 0)
    },
    **{
        f"granularity {value!r}": (spec("linear", "weight", granularity=value), "'granularity'")
        for value in (None, "per_row", 1, "per_token", "per_group", "per_group(0)")
    },
    "activations per channel": (
        spec("linear", "activation", granularity="per_channel"), "'granularity'"
    ),
    **{
        f"quant_max {value!r}": (spec("linear", "activation", quant_max=value), "'quant_max'")
        for value in (None, "255", 256, 255.0, True, -1, 0)
    },
    "signed codes on one side": (spec("linear", "weight", quant_min=1, quant_max=9), "'quant_min'"),
    "an unknown entry of a format": (spec("linear", "weight", bits=8), "'bits'"),
    "an unknown entry of a site": (setting("linear", Quantized=True), "'Quantized'"),
    "an unknown entry": (lambda d: d.update(site=[]), "'site'"),
    "an unknown site": (setting("linear", name="linaer"), "did you mean linear"),
    "a site twice": (lambda d: d["sites"].append(d["sites"][0]), "twice"),
    "a site that is none": (lambda d: d["sites"].append("linear"), "expected an object"),
    "sites by name": (lambda d: d.update(sites={}), "'sites'"),
    "sites null": (lambda d: d.update(sites=None), "'sites'"),
    "ranges as a list": (lambda d: d.update(ranges=[]), "'ranges'"),
    "no ranges": (lambda d: d.pop("ranges"), "'ranges'"),
    "channels as a list": (lambda d: d.update(channels=[]), "'channels'"),
    "another format": (lambda d: d.update(format="summary"), "no summary"),
    "another version": (lambda d: d.update(version="1"), "version"),
    "a range of an unknown tensor": (
        lambda d: d["ranges"].update({"linaer": [0.0, 1.0]}), "did you mean linear"
    ),
    **{
        f"range {value!r}": (range_of_x(value), "the range of :x")
        for value in (
            None, "0..1", 3, [1.0], [0.0, 1.0, 2.0], ["0", "1"], [None, 1.0], [True, 2.0],
            [-math.inf, 1.0], [0.0, math.inf], [math.nan, 1.0], [0.0, 1e300], [1.0, -1.0], {},
        )
    },
    **{
        f"channels {value!r}": (channels_of_x(value), ":x")
        for value in (
            None, [], "x", [[0.0] * 8], [[0.0] * 8, [1.0] * 7], [[], []], [["0"] * 8, [1.0] * 8],
            [[2.0] * 8, [1.0] * 8], [[0.0] * 8, [math.inf] * 8], [[0.0] * 7, [1.0] * 7],
        )
    },
    "channels of a tensor that nobody smooths": (
        lambda d: d["channels"].update({"matmul": [[0.0] * 6, [1.0] * 6]}), "no layer smooths it"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_a_mistake_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    model, quantizer, text = made()
    edit, message = EDITS[name]
    data = copy.deepcopy(json.loads(text))
    edit(data)
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    other = Quantizer("reference")
    captured = quantizer._sessions[model].captured  # once for all of these tests
    other._sessions[model] = Session(other, captured, model)
    with pytest.raises(InvalidConfig) as info:
        take(other, path, model)
    said = str(info.value)
    assert message in said
    assert f"{path}, line " in said
    line = int(said.split(", line ")[1].partition(":")[0])
    assert 1 <= line <= len(path.read_text(encoding="utf-8").splitlines())


def test_the_line_is_that_of_the_entry(tmp_path: Path) -> None:
    _, _, text = made()
    path = tmp_path / "summary.json"
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if '"quantized": true' in line)
    lines[at] = lines[at].replace("true", '"true"')
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InvalidConfig, match=f"line {at + 1}: "):
        Quantizer("reference").load_summary(path)


def test_a_key_given_twice(tmp_path: Path) -> None:
    _, _, text = made()
    path = tmp_path / "summary.json"
    path.write_text(text.replace('"ranges": {', '"ranges": {\n":x": [0, 1],', 1), encoding="utf-8")
    with pytest.raises(InvalidConfig, match=r"line \d+: ':x' is given twice"):
        Quantizer("reference").load_summary(path)


def test_a_file_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    _, _, text = made()
    quantizer = Quantizer("reference")
    path = tmp_path / "summary.json"
    path.write_text(text, encoding="utf-8")
    quantizer.load_summary(path)
    before = quantizer.state.version, dict(quantizer.settings.summary.plan)
    path.write_text(text.replace('"quantized": true', '"quantized": 1'), encoding="utf-8")
    with pytest.raises(InvalidConfig):
        quantizer.load_summary(path)
    assert (quantizer.state.version, dict(quantizer.settings.summary.plan)) == before


@pytest.mark.parametrize("batch", [1, 2])
def test_the_file_without_mistakes_is_taken(batch: int, tmp_path: Path) -> None:
    model, quantizer, text = made()
    path = tmp_path / "summary.json"
    path.write_text(text, encoding="utf-8")
    other = Quantizer("reference")
    other.load_summary(path)
    quantized = other.quantize(model, example_inputs=(X[0][:batch], X[1][:batch]))
    assert torch.equal(quantized(*X), quantizer.quantize(model)(*X))
