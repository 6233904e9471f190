"""Every recipe runs on REFERENCE through the whole workflow, and is data both ways."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from flows import calibrated
from models import MODELS, example
from torch import nn

import torch_quant
from torch_quant import (
    FLOAT,
    Backend,
    InvalidConfig,
    NotCalibrated,
    QConfig,
    Quantizer,
    recipes,
    sqnr,
)
from torch_quant.config import RECIPES

LEAST = {
    "int8_static": 30.0, "int8_dynamic": 33.0, "int8_weight_only": 35.0, "int4_weight_only": 14.0,
    "weight_only": 14.0, "float8": 24.0, "mxfp8": 24.0, "mxfp6": 24.0, "mxfp4": 11.0,
    "mxint8": 33.0, "fast": 30.0, "bfloat16": 45.0,
}  # fmt: skip
"""Output SQNR on random weights, dB: what the bits of a recipe give, a few dB less."""


def wide() -> nn.Module:
    """Groups of 128 and blocks of 32 divide its inputs."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128), nn.LayerNorm(128))
    return layers.eval().requires_grad_(False)


def inputs() -> torch.Tensor:
    return torch.randn(32, 128, generator=torch.Generator().manual_seed(1))


def test_all_of_them_are_tried_here_and_are_listed() -> None:
    assert set(LEAST) == set(RECIPES) == set(recipes.__all__)


@pytest.mark.parametrize("name", LEAST)
def test_a_recipe_through_the_workflow(name: str, tmp_path: Path) -> None:
    config, model, x = RECIPES[name](), wide(), inputs()
    quantizer = calibrated(model, [((x,), {})], backend="reference", qconfig=config)
    quant_model = quantizer.quantize(model)
    assert sqnr(model(x), quant_model(x)) > LEAST[name]
    assert quantizer.coverage(model).share == float(name != "bfloat16")
    torch_quant.save(quant_model, tmp_path / "model")
    assert torch.equal(torch_quant.load(tmp_path / "model", model=wide())(x), quant_model(x))
    quantizer.save(tmp_path / "ranges")
    again = Quantizer.load(tmp_path / "ranges")
    assert again.qconfig == config
    assert torch.equal(again.quantize(model, example_inputs=x)(x), quant_model(x))


@pytest.mark.parametrize("name", [n for n in LEAST if n not in ("int8_static", "fast", "float8")])
def test_these_need_no_data(name: str) -> None:
    model, x = wide(), inputs()
    quantizer = Quantizer("reference", qconfig=RECIPES[name]())
    assert sqnr(model(x), quantizer.quantize(model, example_inputs=x)(x)) > LEAST[name]


def test_a_recipe_may_come_first() -> None:
    config = recipes.int8_dynamic()
    for quantizer in (
        Quantizer(config, backend="reference"),
        Quantizer("reference", qconfig=config),
        Quantizer(Backend.REFERENCE, qconfig=config),
        Quantizer(backend="reference", qconfig=config),
    ):
        assert (quantizer.qconfig, quantizer.backend) == (config, Backend.REFERENCE)
    assert Quantizer(config).qconfig == config
    with pytest.raises(InvalidConfig, match=r"Quantizer\(QConfig\(.*gives qconfig twice"):
        Quantizer(config, qconfig=config)
    with pytest.raises(InvalidConfig, match=r"'onednn', backend='reference'\) gives backend twice"):
        Quantizer("onednn", backend="reference")
    with pytest.raises(InvalidConfig, match="backend"):
        Quantizer(recipes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LEAST)
def test_files_name_them(name: str, tmp_path: Path) -> None:
    path = tmp_path / "q.yaml"
    path.write_text(
        f"backend: reference\nqconfig: {name}\noverrides:\n  head: {{recipe: {name}}}\n"
    )
    quantizer = Quantizer.from_config(path)
    assert quantizer.qconfig == quantizer.overrides["head"] == RECIPES[name]()
    quantizer.to_config(tmp_path / "again.json")
    assert Quantizer.from_config(tmp_path / "again.json").qconfig == quantizer.qconfig


def test_options() -> None:
    read = QConfig.from_dict
    found = read({"recipe": "int4_weight_only", "group_size": 64, "symmetric": False})
    assert found == recipes.int4_weight_only(group_size=64, symmetric=False)
    assert found.input is FLOAT
    method = {"name": "rtn", "observer": "histogram"}
    assert read({"recipe": "int8_weight_only", "method": method}).method.observer == "histogram"
    assert read({"recipe": "int8_static", "smooth": 0.5}) == recipes.int8_static(smooth=0.5)
    assert recipes.mxfp4(weight_only=True).input is FLOAT


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("qconfig: int8_statik", 1, "the recipe is .*did you mean int8_static"),
        ("qconfig:\n  recipe: int4_weight_only\n  group: 64", 3, "'group'.*group_size"),
        ("qconfig:\n  recipe: int8_static\n  smooth: 2", 1, "expected a number from 0 to 1"),
        ("qconfig: {recipe: int4_weight_only, group_size: -1}", 1, "-1"),
        ("qconfig: {recipe: int4_weight_only, method: gptqq}", 1, "weight method is 'gptqq'"),
        ("qconfig: {recipe: 5}", 1, "the recipe is 5; expected one of"),
        ("qconfig: {recipe: float8, element: int9}", 1, "int9"),
    ],
)
def test_mistakes_are_named_with_their_line(
    text: str, line: int, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "q.yaml"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=f"q.yaml, line {line}: .*{message}"):
        Quantizer.from_config(path)


def test_they_are_documented_with_an_example() -> None:
    for function in RECIPES.values():
        assert ">>>" in (inspect.getdoc(function) or "")


def test_some_layers_otherwise() -> None:
    model, x = MODELS["mlp"](), example("mlp", 16)
    overrides = {"4": recipes.int8_weight_only(), "0": None}
    quantizer = calibrated(
        model, [(x, {})], backend="reference", qconfig=recipes.int8_dynamic(), overrides=overrides
    )
    quantizer.quantize(model)
    assert quantizer.plan["4"].activation is None
    assert quantizer.plan["2"].activation is not None
    assert quantizer.plan["2"].activation.dynamic
    assert not quantizer.plan["0"].quantized


@pytest.mark.parametrize("name", ["int8_dynamic", "int4_weight_only"])
def test_without_an_example_the_message_asks_for_one(name: str) -> None:
    """Not for data, which such a recipe needs none of."""
    with pytest.raises(NotCalibrated, match=r"quantizer\.quantize\(model, example_inputs=\.\.\.\)"):
        Quantizer("reference", qconfig=RECIPES[name]()).quantize(wide())
