"""What new users get wrong: each is taken for what it means, or told with the fix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_quant import FLOAT, InvalidConfig, ModuleFilter, QConfig, Quantizer, recipes

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x) @ self.key(x).t() @ x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Block(), Block())
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


TYPOS = {
    "encoder.0.qeury": r"did you mean encoder\.0\.query",
    "encoder.*.qeury": r"did you mean encoder\.[01]\.query",
    r"re:encoder\.\d\.qeury": "did you mean",
    "encodr": "did you mean encoder",
    "haed": r"did you mean head\?$",
    "linaer": r"did you mean the op type linear\?$",
    "encoder.0.matmull": r"did you mean encoder\.0",
    "encoder.0.query.matmul.weight": "did you mean encoder.0.query",
}
NAMES = (
    "encoder.0.query", "encoder.*.key", "encoder.0.matmul", "encoder.1.matmul_1", "*.matmul_[12]",
    "encoder", "re:.*query", r"re:encoder\.\d\.matmul(_1)?", "encoder.0@1.query", "linear",
)  # fmt: skip


@pytest.mark.parametrize("name", TYPOS)
def test_a_misspelt_override_is_told_before_any_data(name: str) -> None:
    quantizer = Quantizer("reference", overrides={name: None})
    with pytest.raises(InvalidConfig, match=f"override.*matches nothing.*{TYPOS[name]}"):
        quantizer.calib(Net())
    with pytest.raises(InvalidConfig, match=f"override.*matches nothing.*{TYPOS[name]}"):
        quantizer.quantize(Net(), example_inputs=X)


@pytest.mark.parametrize("name", TYPOS)
def test_set_tells_it_once_a_model_is_known(name: str) -> None:
    model, quantizer = Net(), Quantizer("reference")
    quantizer.calib(model)  # no data yet
    with pytest.raises(InvalidConfig, match=f"override.*matches nothing.*{TYPOS[name]}"):
        quantizer.set(name, None)
    assert not quantizer.overrides
    early = Quantizer("reference")
    early.set(name, None)  # which model is not known
    with pytest.raises(InvalidConfig, match="matches nothing"):
        early.calib(model)


def test_a_misspelt_name_of_a_filter() -> None:
    only = ModuleFilter(include_names=["encoder.0.qeury"])
    with pytest.raises(InvalidConfig, match=r"ModuleFilter name.*did you mean encoder\.0\.query"):
        Quantizer("reference", module_filter=only).calib(Net())


@pytest.mark.parametrize("name", NAMES)
def test_names_of_modules_and_of_operators_in_them_are_taken(name: str) -> None:
    model = Net()
    quantizer = Quantizer("reference")
    quantizer.calib(model)
    quantizer.set(name, None)
    other = Quantizer("reference", overrides={name: None})
    other.calib(model)


def test_one_that_can_be_no_operator_is_checked_against_the_sites() -> None:
    """A number that no operator has: known once there are sites."""
    model = Net()
    quantizer = Quantizer("reference", overrides={"encoder.0.matmul_7": None})
    quantizer.calib(model)(X)
    with pytest.raises(InvalidConfig, match=r"matches nothing.*did you mean encoder\.0\.matmul"):
        quantizer.quantize(model)


@pytest.mark.parametrize("value", [None, "float", FLOAT])
def test_float_in_all_its_spellings(value: Any) -> None:
    model = Net()
    quantizer = Quantizer("reference", overrides={"head": value})
    assert quantizer.overrides == {"head": None}
    quantizer.calib(model)(X)
    quantizer.set("encoder", value)
    assert quantizer.explain("head").reason == "left in float by an override"
    assert not quantizer.explain("encoder.0.query").quantized


def test_a_recipe_by_name() -> None:
    dynamic = recipes.int8_dynamic()
    assert Quantizer("int8_dynamic", backend="reference").qconfig == dynamic
    assert Quantizer("reference", qconfig="int8_dynamic").qconfig == dynamic
    quantizer = Quantizer("reference", overrides={"head": "int8_dynamic"})
    assert quantizer.overrides == {"head": dynamic}
    quantizer.set("encoder", "int8_dynamic")
    assert quantizer.overrides["encoder"] == dynamic
    model = Net()
    quantized = Quantizer("int8_dynamic", backend="reference").quantize(model, example_inputs=X)
    assert "head" in quantized.plan.quantized


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "another keyword": ({"recipe": recipes.int8_dynamic()}, r"Quantizer\(recipes\.int8_dynamic"),
    "a misspelt keyword": ({"overides": {}}, "takes no overides=; did you mean overrides"),
    "the model": ({"model": nn.Linear(2, 2)}, r"give the model to calib and quantize"),
    "an uncalled recipe": ({"qconfig": recipes.int8_dynamic}, r"call it.*int8_dynamic\(\)\)"),
    "a misspelt recipe": ({"qconfig": "int8_dinamic"}, "no recipe.*did you mean int8_dynamic"),
    "a dict": ({"qconfig": {"bits": 8}}, "expected a QConfig, such as a recipe gives"),
    "FLOAT": ({"qconfig": FLOAT}, "expected a QConfig"),
    "a list of names": ({"module_filter": ["head"]}, r"ModuleFilter\(exclude_names=\['head'\]\)"),
    "a name": ({"module_filter": "head"}, r"ModuleFilter\(exclude_names="),
    "no names": ({"module_filter": []}, r"ModuleFilter\(exclude_names="),
    "a list": ({"overrides": ["head"]}, r"expected a dict.*overrides=\{'head': None\}"),
    "a misspelt float": ({"overrides": {"head": "flaot"}}, "did you mean float"),
    "an uncalled one": ({"overrides": {nn.Linear: recipes.mxfp4}}, r"call the recipe.*mxfp4\(\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_told_with_the_fix(what: str) -> None:
    arguments, message = MISTAKES[what]
    with pytest.raises(InvalidConfig, match=message):
        Quantizer(**{"backend": "reference", **arguments})


def test_mistakes_by_position() -> None:
    with pytest.raises(InvalidConfig, match=r"call it, as in Quantizer\(recipes\.int8_dynamic\(\)"):
        Quantizer(recipes.int8_dynamic)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match=r"no recipe 'int8_dynamc'.*did you mean int8_dynamic"):
        Quantizer("int8_dynamc")
    with pytest.raises(InvalidConfig, match=r"unknown backend 'onedn'.*did you mean onednn"):
        Quantizer("onedn")
    with pytest.raises(InvalidConfig, match="gives qconfig twice"):
        Quantizer("int8_dynamic", qconfig=QConfig())
    with pytest.raises(InvalidConfig, match="gives backend twice"):
        Quantizer("onednn", backend="reference")
    with pytest.raises(InvalidConfig, match=r"holds.*module classes as exclude_classes"):
        ModuleFilter(exclude_names=[nn.Linear])  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="override 'head' is 3; expected a QConfig or None"):
        Quantizer("reference").set("head", 3)  # type: ignore[arg-type]
