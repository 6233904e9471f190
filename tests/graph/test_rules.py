"""Which override holds for a site in any order, and what is said of those that are none."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from models import MODELS, example
from torch import Tensor, nn

from torch_quant import InvalidConfig, ModuleFilter, QConfig, Quantizer, QuantSpec, SiteInfo
from torch_quant.config import OverrideKey
from torch_quant.core.naming import class_named, class_path, matches_name, plain_depth
from torch_quant.graph.rules import rules_for, rules_of
from torch_quant.graph.sites import Site


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Attention(), Attention())


def small(site: SiteInfo) -> bool:
    return isinstance(site.module, nn.Linear) and site.module.in_features == 4


ROOT = Root()
QUERY = Site("encoder.1.query", "linear", "encoder.1.query", ("x",), (), "y", 1, (4, 4))
MODULES = (ROOT, ROOT.encoder, ROOT.encoder[1], ROOT.encoder[1].query)
A, B = QConfig(input=QuantSpec.of(bits=7)), QConfig(input=QuantSpec.of(bits=6))

ORDER: list[OverrideKey] = [
    "encoder.1.query",
    "encoder.1.*",
    "encoder.1",
    "encoder.*.query",
    "encoder",
    "*.query",
    small,
    nn.Linear,
    Attention,
    nn.Sequential,
    "op:linear",
]
"""From the most specific to the least."""


@pytest.mark.parametrize("place", range(len(ORDER) - 1))
@pytest.mark.parametrize("turned", [False, True], ids=["before", "behind"])
def test_the_more_specific_holds_wherever_it_stands(place: int, turned: bool) -> None:
    overrides = dict(zip(ORDER[place : place + 2], (A, B), strict=True))
    if turned:
        overrides = dict(reversed(overrides.items()))
    found = rules_for(QUERY, MODULES, overrides)
    assert [rule.value for rule in found] == [A, B]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("encoder.1.*", r"re:encoder\.1\..*"),
        ("op:linear", "linear"),
        (small, lambda site: True),
        (nn.Linear, "class:torch.nn.Linear"),
    ],
    ids=["patterns", "op types", "functions", "classes"],
)
def test_of_equals_the_last_given_holds(first: OverrideKey, second: OverrideKey) -> None:
    for overrides in ({first: B, second: A}, {second: B, first: A}):
        assert [rule.value for rule in rules_for(QUERY, MODULES, overrides)] == [A, B]


def test_a_later_call_beats_the_name_of_all_calls() -> None:
    again = Site("l0@1", "linear", "l0@1", ("x",), (), "y", 1, (4, 4))
    for overrides in ({"l0": B, "l0@1": A}, {"l0@1": A, "l0": B}):
        assert rules_for(again, (ROOT,), overrides)[0].value is A
    assert rules_for(again, (ROOT,), {"l?": B, "l0": A})[0].value is A


def test_the_most_derived_class_holds() -> None:
    for overrides in ({nn.Module: B, nn.Linear: A}, {nn.Linear: A, nn.Module: B}):
        assert rules_for(QUERY, MODULES, overrides)[0].value is A


@pytest.mark.parametrize(
    ("pattern", "covers", "depth"),
    [
        ("encoder.1", True, 2),
        ("encoder.2", False, 2),
        ("*", True, 0),
        ("*query", True, 0),
        ("enc*.1.query", True, 0),
        ("encoder.?.query", True, 1),
        (r"re:encoder\.\d+\.query", True, 1),
        (r"re:encoder\.1\.query", True, 2),
        (r"re:enc.*", True, 0),
        ("re:query", False, 0),
        (r"re:(?i)ENCODER\.1", True, 0),
    ],
)
def test_how_deep_a_pattern_leads(pattern: str, covers: bool, depth: int) -> None:
    assert matches_name("encoder.1.query", pattern) is covers
    assert plain_depth(pattern) == depth


def test_a_whole_name_beats_the_same_as_an_expression() -> None:
    for overrides in ({QUERY.name: A, r"re:encoder\.1\.query": B},
                      {r"re:encoder\.1\.query": B, QUERY.name: A}):  # fmt: skip
        assert rules_for(QUERY, MODULES, overrides)[0].value is A


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("op:linaer", r"override 'op:linaer': unknown op type 'linaer'; did you mean linear"),
        ("re:(", r"override 're:\(': .*no regular expression of Python: missing \)"),
        ("class:torch.nn.Linaer", r"override 'class:torch.nn.Linaer': torch.nn has no class "
                                  r"'Linaer'; did you mean Linear"),
        ("class:no_such_package.Layer", r"no module of the class 'no_such_package.Layer' is imp"),
        ("class:torch.Tensor", r"'torch.Tensor' is no class of torch.nn.Module"),
        ("class:Linear", r"write the whole path, as in 'torch.nn.Linear'"),
        ("", r"override '': expected a name"),
        (3, r"override 3: expected a name, an op type, a module class or a function"),
        (torch.Tensor, r"expected a name, an op type, a module class or a function"),
    ],
)  # fmt: skip
def test_a_key_that_is_none(key: Any, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        Quantizer("reference", overrides={key: None})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda site: site.name, r"returns '0' for the site 0; expected True or False"),
        (lambda site: site.nothing, r"<lambda>\(\) fails for the site 0: AttributeError: .*noth"),
        (lambda: True, r"fails for the site 0: TypeError"),
    ],
    ids=["no bool", "raises", "signature"],
)
def test_a_function_that_fails_says_where(function: Any, message: str) -> None:
    model = MODELS["mlp"]()
    quantizer = Quantizer("reference", overrides={function: None})
    with pytest.raises(InvalidConfig, match=message):
        quantizer.calib(model)(*example("mlp", 4))


def test_every_kind_in_one_model() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.blocks = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.stem(x).mean((2, 3))))

    model, x = Net(), torch.randn(4, 3, 5, 5)
    bits = {n: QConfig(input=QuantSpec.of(bits=n)) for n in range(3, 8)}
    quantizer = Quantizer(
        "reference",
        overrides={
            "op:conv2d": bits[3],
            "class:torch.nn.Linear": bits[4],
            lambda site: site.name.startswith("blocks") and site.op == "linear": bits[5],
            r"re:blocks\.[12]": bits[6],
            "blocks.2": bits[7],
        },
    )
    quantizer.calib(model)(x)
    quantizer.quantize(model)
    found = {n: s.activation.bits for n, s in quantizer.plan.items() if s.activation is not None}
    assert found == {"stem": 3, "head": 4, "blocks.0": 5, "blocks.1": 6, "blocks.2": 7}


def test_an_expression_that_matches_nothing() -> None:
    model = MODELS["small_cnn"]()
    quantizer = Quantizer("reference", overrides={r"re:block\.cnov\d": None})
    with pytest.raises(InvalidConfig, match=r"matches nothing in the model; did you mean .*block"):
        quantizer.coverage(model, example("small_cnn", 2))


def test_paths_of_classes() -> None:
    assert class_path(nn.LSTM) == "torch.nn.LSTM"
    for cls in (nn.modules.batchnorm._BatchNorm, Attention):
        assert class_named(class_path(cls)) is cls
    local = type("Local", (nn.Module,), {"__qualname__": "f.<locals>.Local"})
    with pytest.raises(InvalidConfig, match="cannot be found by its path"):
        class_path(local)


def test_a_configuration_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(sys.modules)
    with pytest.raises(InvalidConfig, match="a configuration imports nothing"):
        class_named("wsgiref.util.Thing")
    assert "wsgiref" not in set(sys.modules) - before
    holder = types.ModuleType("holder_of_layers")
    holder.Layer = Attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "holder_of_layers", holder)
    assert class_named("holder_of_layers.Layer") is Attention


def test_rules_keep_the_order_given() -> None:
    assert [rule.key for rule in rules_of({"b": None, "a": None})] == ["b", "a"]


def test_a_pattern_may_say_that_it_may_match_nothing() -> None:
    """As one does in a file that serves several models; its place among the others is the same."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(1, 4)
    overrides = {"re?:.*head": None, "re?:1.*": None, "re:.*": QConfig()}
    quantizer = Quantizer("reference", overrides=overrides)
    quantizer.calib(model)(x)
    quantizer.quantize(model)
    assert quantizer.plan.quantized == ("0", "1"), "of equals, the last given holds"
    again = Quantizer.from_config(quantizer.to_config())
    assert [*again.overrides] == [*overrides]
    with pytest.raises(InvalidConfig, match=r"'re\?:\(' is no regular expression"):
        Quantizer("reference", overrides={"re?:(": None})
    filtered = Quantizer("reference", module_filter=ModuleFilter(exclude_names="re?:.*head"))
    filtered.calib(model)(x)
