"""What new users get wrong: each is taken for what it means, or told with the fix."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_quant import (
    FLOAT,
    Backend,
    CaptureFailed,
    InvalidConfig,
    ModuleFilter,
    NotCalibrated,
    QConfig,
    Quantizer,
    QuantSpec,
    UnsupportedOp,
    recipes,
)
from torch_quant.graph.progress import hidden

FOUR = QuantSpec.of(bits=4, signed=True, symmetric=True, per_channel=True)
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
    "the model": ({"model": nn.Linear(2, 2)}, r"takes no model=; it is given to calib"),
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
    with pytest.raises(InvalidConfig, match=r"Linear\(\.\.\.\)\): a model is given to calib"):
        Quantizer(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="gives qconfig twice"):
        Quantizer("int8_dynamic", qconfig=QConfig())
    with pytest.raises(InvalidConfig, match=r"backend='disc', qconfig='int8_dynamic'\)"):
        Quantizer("disc", "int8_dynamic")  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match=r"qconfig='int8_dynamic', backend='disc'\)"):
        Quantizer("int8_dynamic", "disc")  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match=r"coverage\(model, backend='onednn'\)"):
        Quantizer("reference").coverage(Net(), Backend.ONEDNN)
    with pytest.raises(InvalidConfig, match="gives backend twice"):
        Quantizer("onednn", backend="reference")
    with pytest.raises(InvalidConfig, match=r"holds.*module classes as exclude_classes"):
        ModuleFilter(exclude_names=[nn.Linear])  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="override 'head' is 3; expected a QConfig or None"):
        Quantizer("reference").set("head", 3)  # type: ignore[arg-type]


def test_a_model_shows_which_of_its_layers_are_quantized() -> None:
    model = Net()
    quantizer = Quantizer("reference", overrides={"encoder.0": None, "head": QConfig(weight=FOUR)})
    quantizer.calib(model)(X)
    text = repr(quantizer.quantize(model))
    lines = {line.split()[0]: line.strip() for line in text.splitlines() if ":" in line}
    assert text.startswith("QuantizedNet(\n  Backend.REFERENCE: ")
    assert re.search(r"\(0\): Block\(\n +\(query\): Linear\(in_features=16, .*bias=True\)\n", text)
    assert "QuantizedLinear(in_features=16, out_features=16, bias=True, int8)" in text
    assert lines["(head):"].endswith("bias=True, int4 weights, int8 activations)")
    assert text.count("QuantizedLinear") == 3  # of five


def test_what_was_not_reached_is_not_counted_as_quantized() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high, self.spare = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor, high: bool = False) -> Tensor:
            return self.high(x) if high else self.low(x)

    for capture in ("whole", "modules"):
        quantizer = Quantizer("reference", capture=capture)
        headline = str(quantizer.coverage(Branch(), X)).splitlines()[0]
        assert headline.endswith("; not counted: high, spare, which no call has reached"), headline
    assert "not counted" not in str(Quantizer("reference").coverage(Net(), X))


class Branches(nn.Module):
    """One kind of call is a graph, the other asks for values."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.spare = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, high: bool = False) -> Tensor:
        if not high:
            return self.low(x)
        x = self.high(x)
        return x if x.sum() > 0 else -x


def test_what_some_call_has_reached_is_counted() -> None:
    model, quantizer = Branches(), Quantizer("reference")
    calib_model = quantizer.calib(model)
    calib_model(X)
    calib_model(X, high=True)
    calib_model.spare(X)
    assert "not counted" not in str(quantizer.coverage(model))


def test_everything_in_float_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model, quantizer = Net(), Quantizer("reference")
    quantizer.calib(model)(X)
    amp_model = quantizer.amp(model)
    amp_model(X)
    quantizer.fallback(amp_model, num=1)
    quantizer.quantize(model)
    assert "sites are in float" not in caplog.text
    quantizer.fallback(amp_model, num=8)
    assert torch.equal(quantizer.quantize(model)(X), model(X))
    assert "sites are in float" in caplog.text
    assert "quantizer.reset_fallback()" in caplog.text


@pytest.mark.parametrize("capture", ["whole", "modules"])
def test_a_quantized_model_keeps_its_dtype(capture: str) -> None:
    model = Net()
    quantizer = Quantizer("reference", capture=capture)
    quantizer.calib(model)(X)
    quantized = quantizer.quantize(model)
    expected = quantized(X)
    for change in (
        quantized.half,
        quantized.double,
        quantized.head.bfloat16,
        lambda: quantized.to(torch.bfloat16),
        lambda: quantized.to("cpu", torch.float16),
        lambda: quantized.type(torch.float64),
    ):
        with pytest.raises(InvalidConfig, match=r"is quantized.*cannot become torch\.\w+\. Leave"):
            change()
    same = quantized.float().to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    assert torch.equal(same(X), expected)


def test_inputs_that_the_float_model_refuses_too() -> None:
    model = Net()
    quantizer = Quantizer("reference")
    quantizer.calib(model)(X)
    quantized = quantizer.quantize(model)
    for wrong, why in ((X.half(), "x is torch.float16"), (X[:, :8], r"x\.shape\[1\] is 8")):
        with pytest.raises(CaptureFailed, match=why) as raised:
            quantized(wrong)
        message = str(raised.value)
        assert "float model itself fails" in message
        assert "calib" not in message  # no such data can be had
        assert re.search(r"captured for: x: \(.*, 16\)$", message)


def test_why_a_module_is_no_graph_is_said_in_plain_words() -> None:
    class Asks(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) if x.sum() > 0 else x

    quantizer = Quantizer("reference")
    quantizer.calib(Asks())(X.abs())
    ((_, why), *_) = quantizer.coverage(Asks(), X.abs()).glue
    assert why.startswith("its Python code asks for values of a tensor")
    assert re.search(r"\(test_mistakes\.py:\d+, return self\.head\(x\) if x\.sum\(\) > 0", why)
    assert why.index("PyTorch says: ") > 100


def test_formats_that_no_kernel_takes_are_answered_in_short() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    config = recipes.int4_weight_only(group_size=48)
    with pytest.raises(UnsupportedOp, match=r"not a multiple of 48; .* such as 32"):
        Quantizer("reference", qconfig=config).quantize(model, example_inputs=torch.ones(2, 64))
    if Backend.ONEDNN.unavailable() is None:
        with pytest.raises(UnsupportedOp, match="a multiple of 32 inputs, not s4") as raised:
            Quantizer("onednn", qconfig=config).quantize(model, example_inputs=torch.ones(2, 64))
        assert "quantized activations" not in str(raised.value)  # which are not what is wrong
        assert len(str(raised.value)) < 300


def test_explain_of_a_model_that_was_not_run() -> None:
    model, quantizer = Net(), Quantizer("reference")
    with pytest.raises(NotCalibrated, match=r"quantizer\.explain\(site, model, example_inputs="):
        quantizer.explain("head", model)
    assert quantizer.explain("head", model, X).quantized
    with pytest.raises(InvalidConfig, match="the name of the site comes first"):
        quantizer.explain(model, "head")  # type: ignore[arg-type]


def test_explain_fits_a_terminal() -> None:
    model = Net()
    name = "re:" + "|".join(f"encoder.{i}.query" for i in range(9))
    quantizer = Quantizer("reference", overrides={name: QConfig(observer="histogram")})
    quantizer.calib(model)(X)
    for site in ("head", "encoder.1.query", "encoder.0.matmul"):
        text = repr(quantizer.explain(site))
        own = [line for line in text.splitlines() if name[:20] not in line]
        assert max(map(len, own)) <= 80, text


PROGRAM = """
import logging, sys
import torch
from torch_quant import Quantizer
model = torch.nn.Linear(4, 2)
Quantizer("reference").calib(model)
logging.basicConfig(format="%(name)s|%(message)s")
Quantizer("reference").calib(model)
"""


def test_warnings_and_bars_without_a_terminal() -> None:
    """A warning has the package's name once; a bar does not fill a log."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    first, second = done.stderr.splitlines()
    assert first.startswith("torch_quant: the model is in train mode")
    assert second.startswith("torch_quant|the model is in train mode")


def test_bars_go_to_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert [hidden(), hidden(wanted=False)] == [False, True]
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert hidden()
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert hidden()
