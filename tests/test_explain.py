"""``explain``: who decided what about a site; ``set``: overrides that come later."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from flows import calibrated
from models import MODELS, example
from torch import Tensor, nn

from torch_quant import (
    Backend,
    InvalidConfig,
    ModuleFilter,
    NotCalibrated,
    QConfig,
    Quantizer,
    QuantSpec,
    SiteInfo,
    SmoothQuant,
)
from torch_quant.backends.int8 import symmetric_weight

SIX = QuantSpec.of(bits=6)
FOUR = QuantSpec.of(bits=4, signed=True, symmetric=True, per_channel=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        return self.head(scores.softmax(-1) @ x)


IDS = torch.arange(10).reshape(2, 5)


def ready(**options: object) -> tuple[Net, Quantizer]:
    model = Net()
    return model, calibrated(model, [((IDS,), {})], **{"backend": "reference", **options})


def test_every_source_of_a_decision() -> None:
    model, quantizer = ready(
        qconfig=QConfig(transforms=[SmoothQuant(0.5)]),
        overrides={"q": QConfig(input=SIX, observer="histogram"), nn.Linear: QConfig(weight=FOUR)},
        module_filter=ModuleFilter(exclude_op_types="embedding", exclude_names="matmul_1"),
    )
    q, head = quantizer.explain("q"), quantizer.explain("head")
    assert q.quantized
    assert (q["input"].value, q["input"].rule) == (SIX, "override 'q'")
    assert q["weight"].rule == "Backend.REFERENCE"
    assert q["weight"].value == symmetric_weight()
    assert (q["observer"].value, q["observer"].rule) == ("histogram", "override 'q'")
    assert q["method"].rule == "the default"
    assert q.overrides == ("'q'", "Linear")
    assert (head["weight"].value, head["weight"].rule) == (FOUR, "override Linear")
    assert head.overrides == ("Linear",)
    k = quantizer.explain("k")["observer"]  # it reads the tensor that q reads
    assert (k.value, k.rule) == ("histogram", "override 'q'")
    assert k.why == "decided at q, which shares the tensor"
    embed = quantizer.explain("embed")
    assert not embed.quantized
    assert embed["quantized"].rule == "module_filter, exclude_op_types='embedding'"
    assert quantizer.explain("matmul_1")["quantized"].rule == (
        "module_filter, exclude_names='matmul_1'"
    )
    assert quantizer.explain("matmul")["smoothquant"].why.startswith("only linear layers")
    with pytest.raises(InvalidConfig, match="nothing was decided about 'weight' of embed; only"):
        embed["weight"]
    for name in quantizer._sessions[model].plan(Backend.REFERENCE):
        assert quantizer.explain(name).site == name


def test_the_backends_refusal() -> None:
    affine = QConfig(weight=QuantSpec.of(signed=True, per_channel=True))
    _, quantizer = ready(overrides={"head": affine})
    found = quantizer.explain("head", backend="onednn")
    assert found["quantized"].rule == "Backend.ONEDNN"
    assert "oneDNN wants a signed symmetric per-channel weight" in found.reason
    assert found["weight"].rule == "override 'head'"
    assert quantizer.explain("head").quantized
    dynamic = QConfig(QuantSpec.of(dynamic=True))
    _, quantizer = ready(overrides={"op:matmul": dynamic})
    reason = quantizer.explain("matmul", backend="onednn").reason
    assert "chosen while calibrating, not at each call" in reason


def test_fallback_summary_and_override(tmp_path: Path) -> None:
    model, quantizer = ready()
    amp_model = quantizer.amp(model)
    amp_model(IDS)
    (name,) = quantizer.fallback(amp_model, num=1, dtype=torch.bfloat16)
    found = quantizer.explain(name)
    assert (found["quantized"].rule, found.precision) == ("quantizer.fallback()", "bfloat16")
    assert "bfloat16, fallen back" in repr(found)
    quantizer.reset_fallback()
    quantizer.set("head", None)
    quantizer.quantize(model)
    quantizer.save_summary(tmp_path / "summary.json")
    later = Quantizer("reference")
    later.load_summary(tmp_path / "summary.json")
    later.calib(model, example_inputs=(IDS,))
    assert later.explain("head")["quantized"].rule == "the summary"
    assert later.explain("q")["input"].rule == "the summary"
    assert later.explain("q").quantized


def test_what_the_model_itself_forbids() -> None:
    from awkward import AWKWARD

    entry = AWKWARD["in_place_after_read"]
    quantizer = Quantizer("reference")
    model = entry.build()
    args, kwargs = entry.inputs(2)
    quantizer.calib(model)(*args, **kwargs)
    found = quantizer.explain("l1")
    assert found["quantized"].rule == "the model"
    assert "written to in place" in found.reason


def test_a_name_that_is_no_site() -> None:
    _, quantizer = ready()
    with pytest.raises(InvalidConfig, match=r"the model has no site 'haed'; did you mean head"):
        quantizer.explain("haed")
    deep = MODELS["small_cnn"]()
    quantizer = calibrated(deep, [(example("small_cnn", 4), {})], backend="reference")
    with pytest.raises(InvalidConfig, match=r"'block' is no site but covers block.conv1, block.c"):
        quantizer.explain("block")


def test_which_model_is_meant() -> None:
    quantizer = Quantizer("reference")
    with pytest.raises(InvalidConfig, match="no model was captured by this"):
        quantizer.explain("head")
    model = Net()
    with pytest.raises(NotCalibrated):
        quantizer.explain("head", model)
    quantizer.calib(model, example_inputs=(IDS,))
    assert "nothing recorded yet" in quantizer.explain("head")["observer"].why
    other = Net()
    quantizer.coverage(other, (IDS,))
    with pytest.raises(InvalidConfig, match="2 models were captured"):
        quantizer.explain("head")
    assert quantizer.explain("head", other).quantized


def test_the_repr_is_to_be_read() -> None:
    _, quantizer = ready(overrides={"head": QConfig(input=SIX)})
    lines = repr(quantizer.explain("head")).splitlines()
    assert lines[0] == "head (linear) on Backend.REFERENCE: int8 weights, int6 activations"
    assert any(line.split() == ["input", "u6", "affine", "per-tensor", "override", "'head'"]
               for line in lines)  # fmt: skip
    assert all(len(line) <= 120 for line in lines)


# set


def test_set_after_calibration_changes_formats() -> None:
    model, quantizer = ready()
    before = quantizer.quantize(model)(IDS)
    quantizer.set("head", QConfig(weight=FOUR))
    assert quantizer.explain("head")["weight"].value == FOUR
    after = quantizer.quantize(model)(IDS)
    assert not torch.equal(before, after)
    assert quantizer.plan["head"].weight == FOUR
    same = calibrated(
        model, [((IDS,), {})], backend="reference", overrides={"head": QConfig(weight=FOUR)}
    )
    assert torch.equal(after, same.quantize(model)(IDS))


def test_set_again_goes_to_the_end() -> None:
    _, quantizer = ready(overrides={"h*": None, "*d": QConfig()})
    assert quantizer.explain("head").quantized
    quantizer.set("h*", None)
    assert list(quantizer.overrides) == ["*d", "h*"]
    assert not quantizer.explain("head").quantized


def test_set_takes_a_function() -> None:
    def narrow(site: SiteInfo) -> bool:
        return isinstance(site.module, nn.Linear) and site.module.out_features < 4

    model, quantizer = ready()
    quantizer.set(narrow, None)
    quantizer.quantize(model)
    assert not quantizer.plan["head"].quantized
    assert quantizer.plan["q"].quantized
    assert quantizer.explain("head").overrides == (f"{narrow.__qualname__}()",)


@pytest.mark.parametrize(
    ("key", "config", "message"),
    [
        ("haed", None, r"override 'haed' matches nothing in the model; did you mean head"),
        ("op:linaer", None, "did you mean linear"),
        ("re:(", None, "no regular expression"),
        ("head", "int4", "expected a QConfig or None"),
    ],
)
def test_a_mistake_in_set_changes_nothing(key: str, config: object, message: str) -> None:
    model, quantizer = ready(overrides={"q": None})
    quantizer.quantize(model)
    plan = quantizer.plan
    with pytest.raises(InvalidConfig, match=message):
        quantizer.set(key, config)  # type: ignore[arg-type]
    assert quantizer.overrides == {"q": None}
    assert quantizer.plan is plan


def test_an_amp_proxy_notices_set(caplog: pytest.LogCaptureFixture) -> None:
    model, quantizer = ready()
    amp_model = quantizer.amp(model)
    amp_model(IDS)
    quantizer.set("head", QConfig(weight=FOUR))
    with pytest.raises(NotCalibrated, match="overrides changed since the AMP proxy"):
        quantizer.sensitivity(amp_model)


def test_an_observer_set_after_calibration_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, quantizer = ready()
    with caplog.at_level(logging.WARNING, "torch_quant"):
        quantizer.quantize(model)
        assert "observers" not in caplog.text
        quantizer.set("head", QConfig(observer="histogram"))
        quantizer.quantize(model)
    assert "recorded were head by 'minmax', not 'histogram'" in caplog.text
    found = quantizer.explain("head")["observer"]
    assert (found.value, found.rule) == ("minmax", "override 'head'")
    assert "histogram was asked for" in found.why


def test_smoothing_set_after_calibration_is_refused() -> None:
    model, quantizer = ready(qconfig=QConfig())  # the default records what smoothing wants
    quantizer.set("head", QConfig(transforms=[SmoothQuant(0.5)]))
    with pytest.raises(NotCalibrated, match="channels"):
        quantizer.quantize(model)


def test_a_misspelt_override_does_not_wait_for_data() -> None:
    with pytest.raises(InvalidConfig, match=r"override 'haed' matches nothing"):
        Quantizer("reference", overrides={"haed": None}).calib(Net())


@pytest.mark.parametrize("name", ["matmul_1", "matmul*", "re:matmul.*"])
@pytest.mark.parametrize("option", ["overrides", "module_filter"])
def test_an_operator_of_the_root_is_no_misspelt_module(name: str, option: str) -> None:
    model = Net()
    options = {"overrides": {name: None}, "module_filter": ModuleFilter(exclude_names=name)}
    quantizer = calibrated(model, [((IDS,), {})], backend="reference", **{option: options[option]})
    quantizer.quantize(model)
    left = [n for n, site in quantizer.plan.items() if not site.quantized]
    assert left == ([name] if "1" in name else ["matmul", "matmul_1"])


@pytest.mark.parametrize("reader", ["0", "1", "01"])
def test_whose_observer_a_shared_tensor_has(reader: str) -> None:
    """What an override asks for is not lost because another layer makes the tensor."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    overrides = {name: QConfig(observer="histogram") for name in reader}
    quantizer = calibrated(
        model, [((torch.ones(2, 4),), {})], backend="reference", overrides=overrides
    )
    names = {key: kept["range"].name for key, kept in quantizer.state.statistics.items()}
    found = quantizer.explain("1")["observer"]
    assert names["0"] == found.value == "histogram"
    assert found.rule == f"override {reader[-1]!r}"
    assert found.why == ("" if "1" in reader else "decided at 0, which shares the tensor")
