"""Configurations as data: both ways in JSON and YAML, and every mistake named with its line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, example
from torch import nn

from torch_quant import (
    BackendUnavailable,
    InvalidConfig,
    ModuleFilter,
    PerGroup,
    QConfig,
    Quantizer,
    QuantSpec,
    RoundToNearest,
    SmoothQuant,
    recipes,
)
from torch_quant.backends import IPEXBackend, ReferenceBackend
from torch_quant.statistics import HistogramObserver, MinMaxObserver

WEIGHT = QuantSpec.of(bits=4, signed=True, symmetric=True, per_channel=True)

FULL: dict[str, Any] = {
    "backend": "reference",
    "qconfig": QConfig(observer="histogram", transforms=[SmoothQuant(0.5)]),
    "overrides": {
        "block.conv1": QConfig(input=QuantSpec.of(bits=6), weight=WEIGHT),
        "block.*": None,
        r"re:block\.conv\d": QConfig(method=RoundToNearest("percentile")),
        "class:torch.nn.Embedding": None,
        nn.Conv2d: QConfig(observer=HistogramObserver),
        "op:linear": QConfig(),
    },
    "module_filter": ModuleFilter(
        exclude_names=["conv", "head"], exclude_classes=nn.LSTM, include_op_types="conv2d"
    ),
    "unseen_calls": "error",
    "dynamic": {"x": [2, 0]},
}


@pytest.mark.parametrize("name", ["q.json", "q.yaml", "q.yml"])
def test_both_ways(tmp_path: Path, name: str) -> None:
    quantizer = Quantizer(**FULL)
    path = tmp_path / name
    data = quantizer.to_config(path)
    assert data == json.loads(json.dumps(data))
    for again in (Quantizer.from_config(path), Quantizer.from_config(str(path)),
                  Quantizer.from_config(data)):  # fmt: skip
        assert again.to_config() == data
        assert again.qconfig == quantizer.qconfig
        assert again.module_filter == quantizer.module_filter
        assert again.overrides["block.conv1"] == FULL["overrides"]["block.conv1"]
        assert list(again.overrides) == [
            "block.conv1", "block.*", r"re:block\.conv\d", "class:torch.nn.Embedding",
            "class:torch.nn.Conv2d", "op:linear",
        ]  # fmt: skip
    assert data["dynamic"] == {"x": [0, 2]}


def test_nothing_given_is_the_default() -> None:
    assert Quantizer().to_config() == {"version": 1}
    assert repr(Quantizer.from_config({})) == repr(Quantizer())


YAML = """\
backend: reference
qconfig: &base
  observer: histogram
overrides:
  block.conv1:
    <<: *base
    input: {bits: 6}
    weight: {bits: 4, signed: true, symmetric: true, per_channel: true}
  class:torch.nn.Linear: float
  op:conv2d: *base
  "re:.*conv2": null
"""


def test_a_file_as_people_write_it(tmp_path: Path) -> None:
    path = tmp_path / "q.yaml"
    path.write_text(YAML)
    model = MODELS["small_cnn"]()
    quantizer = Quantizer.from_config(path)
    quantizer.calib(model)(*example("small_cnn", 8))
    quantizer.quantize(model)
    plan = quantizer.plan
    assert not plan["head"].quantized
    assert not plan["block.conv2"].quantized
    assert (plan["block.conv1"].activation, plan["block.conv1"].weight) == (
        QuantSpec.of(bits=6), WEIGHT,
    )  # fmt: skip
    assert quantizer.explain("conv")["observer"].value == "histogram"
    same = Quantizer.from_config(quantizer.to_config())
    same.calib(model)(*example("small_cnn", 8))
    x = example("small_cnn", 4)
    assert torch.equal(same.quantize(model)(*x), quantizer.quantize(model)(*x))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"bits": 6}, QuantSpec.of(bits=6)),
        ({"element": "int4", "granularity": "per_group(32)"},
         QuantSpec.of("int4", granularity=PerGroup(32))),
        ({"element": "float4_e2m1", "granularity": "per_group(32)", "scale_type": "e8m0"},
         QuantSpec.of("float4_e2m1", granularity=PerGroup(32), scale_type="e8m0")),
        ({"element": "float8_e4m3fn", "per_channel": True},
         QuantSpec.of("float8_e4m3fn", per_channel=True)),
    ],
    ids=["bits", "group", "mx", "float8"],
)  # fmt: skip
def test_formats_in_short_and_whole(given: dict[str, Any], expected: QuantSpec) -> None:
    found = QConfig.from_dict({"weight": given})
    assert found == QConfig(weight=expected)
    assert QConfig.from_dict(found.to_dict()) == found


MISTAKES = {
    "a key": ("backned: reference", 1, "has 'backned'; expected .*; did you mean backend"),
    "a backend": ("\nbackend: onednnn", 2, "'backend': unknown backend 'onednnn'.*onednn"),
    "no name": ("backend: 3", 1, "'backend' is 3; expected a string"),
    "an observer": ("qconfig:\n  observer: histogramm", 2,
                    "'observer' is \"histogramm\"; expected one of .*did you mean histogram"),
    "alpha": ("qconfig:\n\n  transforms:\n  - {name: smoothquant, alpha: 2}", 4,
              r"alpha=2\): expected a number from 0 to 1"),
    "alpha true": ("qconfig: {transforms: {name: smoothquant, alpha: true}}", 1,
                   r"alpha=True\): expected a number"),
    "a transform": ("qconfig: {transforms: [smooth]}", 1,
                    "the transform is 'smooth'; expected one of awq, bias_correction, outlier"),
    "a method": ("qconfig: {method: {name: rtn, observe: x}}", 1,
                 "'rtn' has 'observe'; expected observer"),
    "no method": ("qconfig:\n  method: {observer: minmax}", 2,
                  "the weight method has no 'name'; expected one of adaround, autoround, gptq"),
    "its observer": ("qconfig:\n  method: {name: rtn, observer: x}", 2, "unknown observer 'x'"),
    "bits": ("qconfig:\n  input:\n    bits: 8.0", 3, "'bits' is 8.0; expected an integer"),
    "many bits": ("qconfig:\n  input:\n    bits: 80", 2, "80"),
    "signed": ("qconfig:\n  weight:\n    signed: 'yes'", 3, "'signed' is \"yes\"; expected true"),
    "per channel": ("qconfig:\n  input:\n    per_channel: true", 2, "no kernel"),
    "a format": ("qconfig:\n  weight:\n    bitz: 4", 3, "'bitz'.*did you mean bits"),
    "half a format": ("qconfig:\n  weight:\n    quant_min: 4", 2, "QuantSpec"),
    "a granularity": ("qconfig:\n  weight: {granularity: per_goup(32)}", 2, "expected per_tensor"),
    "an element": ("qconfig:\n  weight: {element: int44}", 2, "unknown element type 'int44'"),
    "two widths": ("qconfig:\n  weight: {element: int4, bits: 4}", 2, "leave those out"),
    "an override": ("overrides:\n  a: {}\n  b: int4", 3,
                    "expected an object, the name of a recipe, or null or 'float'; did you mean"),
    "its key": ("overrides:\n  op:linaer: null", 2, "unknown op type 'linaer'; did you mean lin"),
    "its class": ("overrides:\n  class:torch.nn.Linaer: null", 2, "did you mean Linear"),
    "its expression": ("overrides:\n  'a': null\n  're:(': null", 3, "no regular expression"),
    "its value": ("overrides:\n  a:\n    smoth: 1", 3, "override 'a' has 'smoth'.*did you mean"),
    "a number as key": ("overrides:\n  0: null", 2, "the key 0 is no string; write '0', in quotes"),
    "a filter": ("module_filter:\n  exclude_name: a", 2, "did you mean exclude_names"),
    "a filter's class": ("module_filter:\n  exclude_classes:\n  - torch.nn.LSTM\n  - torch.nn.LTSM",
                         4, "torch.nn has no class 'LTSM'; did you mean"),
    "a filter's names": ("module_filter:\n  exclude_names: [3]", 2, "expected a list of names"),
    "twice": ("backend: onednn\nbackend: ipex", 2, "'backend' is given twice"),
    "unseen": ("unseen_calls: never", 1, "expected \"capture\" or \"error\""),
    "dynamic": ("dynamic:\n  x: first", 2, "dynamic.'x'. is 'first'"),
    "newer": ("version: 2", 1, "this has version 2; this torch_quant reads 1"),
    "a list": ("- backend", 1, "expected an object"),
    "no yaml": ("a: [", 1, "no plain YAML"),
    "an object": ("backend: !!python/object/apply:os.getcwd []", 1, "not allowed|no plain YAML"),
    "itself": ("overrides: &a\n  b: *a", 2, "refers to itself"),
    "a date": ("backend: 2020-01-01", 1, "expected a string"),
    "no date": ("backend: 2020-13-45", 1, "no plain value: month.*; write it in quotes"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, case: str) -> None:
    text, line, message = MISTAKES[case]
    path = tmp_path / "q.yaml"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=message) as error:
        Quantizer.from_config(path)
    assert str(error.value).startswith(f"{path}, line "), error.value
    found = int(str(error.value).partition("line ")[2].partition(":")[0])
    assert found == line


def test_json_names_lines_too(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    text = '{\n "qconfig": {\n  "transforms": [{"name": "smoothquant",\n "alpha": NaN}]\n }\n}\n'
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=r"q.json, line 3: 'qconfig': SmoothQuant.alpha=nan"):
        Quantizer.from_config(path)
    path.write_text("{,}")
    with pytest.raises(InvalidConfig, match=r"cannot read the configuration .*q.json"):
        Quantizer.from_config(path)


def test_a_mapping_names_the_entry() -> None:
    with pytest.raises(InvalidConfig, match=r"the configuration: 'qconfig' has 'smoth'"):
        Quantizer.from_config({"qconfig": {"smoth": 1}})
    with pytest.raises(InvalidConfig, match=r"has 3; expected version"):
        Quantizer.from_config({3: 4})  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["missing.yaml", "missing.json", "q.toml", ""])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidConfig, match=r"cannot read the configuration|expected a file that"):
        Quantizer.from_config(tmp_path / name)


def test_without_pyyaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "q.yaml"
    path.write_text("backend: reference")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(InvalidConfig, match="pip install pyyaml, or write the same as JSON"):
        Quantizer.from_config(path)
    with pytest.raises(InvalidConfig, match="pip install pyyaml"):
        Quantizer("reference").to_config(tmp_path / "new.yaml")
    assert not (tmp_path / "new.yaml").exists()


class Mine(MinMaxObserver):
    name = "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": {lambda site: True: None}}, r"<lambda>\(\) is a function, which is no data"),
        ({"qconfig": QConfig(observer=Mine)}, "object of Python.*register_statistic"),
        ({"overrides": {"a": QConfig(method=RoundToNearest(Mine))}}, "override 'a': the observer"),
        ({"backend": ReferenceBackend()}, "options of its own"),
        ({"module_filter": ModuleFilter(exclude_classes=type("A", (nn.Module,), {}))}, "its path"),
    ],
    ids=["function", "observer", "override", "backend", "class"],
)
def test_what_is_python_alone(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    quantizer = Quantizer(**{"backend": "reference", **options})
    with pytest.raises(InvalidConfig, match=message):
        quantizer.to_config(tmp_path / "q.json")
    assert not list(tmp_path.iterdir())


def test_the_environment_is_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_QUANT_BACKEND", "reference")
    quantizer = Quantizer.from_config({"backend": "onednn"})
    assert "in the place of Backend.ONEDNN" in repr(quantizer)
    assert quantizer.to_config()["backend"] == "onednn"
    quantizer.backend = ReferenceBackend.get("onnx")
    assert quantizer.to_config()["backend"] == "onnx"


def test_a_backend_that_does_not_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IPEXBackend, "unavailable", lambda self: "it is elsewhere")
    with pytest.raises(BackendUnavailable, match="it is elsewhere"):
        Quantizer.from_config({"backend": "ipex"})


def test_what_is_set_is_written_down() -> None:
    quantizer = Quantizer("reference")
    quantizer.set("head", QConfig(transforms=[SmoothQuant(0.5)]))
    quantizer.qconfig = QConfig(observer=HistogramObserver)
    assert quantizer.to_config() == {
        "version": 1,
        "backend": "reference",
        "qconfig": {"observer": "histogram"},
        "overrides": {
            "head": {"transforms": [{"name": "smoothquant", "alpha": 0.5, "min_gain": 0.0}]}
        },
    }


def test_the_name_of_a_recipe_is_an_override(tmp_path: Path) -> None:
    path = tmp_path / "q.yaml"
    path.write_text("overrides:\n  head: bfloat16\n  '*.query': float\n")
    overrides = Quantizer.from_config(path).overrides
    assert overrides == {"head": recipes.bfloat16(), "*.query": None}
