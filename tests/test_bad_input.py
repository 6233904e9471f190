"""Bad input gets an error that names the place and the fix, and changes nothing."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import assert_unchanged, calibrated, snapshot
from models import MODELS, example, normal
from torch import Tensor, nn

from torch_quant import (
    Backend,
    BackendUnavailable,
    CaptureFailed,
    InvalidConfig,
    ModuleFilter,
    NotCalibrated,
    QConfig,
    QuantError,
    Quantizer,
    QuantSpec,
    UnsupportedOp,
    export_torchscript,
    recipes,
    sqnr,
    tune,
)

X = normal(4, 8)


def ready(name: str = "mlp", **options: Any) -> tuple[nn.Module, Quantizer]:
    model = MODELS[name]()
    return model, calibrated(model, [(example(name, 32), {})], backend="reference", **options)


def test_quantize_before_calib() -> None:
    with pytest.raises(NotCalibrated, match=r"quantizer\.calib\(model\)"):
        Quantizer("reference").quantize(MODELS["mlp"]())


def test_a_calib_proxy_never_called() -> None:
    model, quantizer = MODELS["mlp"](), Quantizer("reference")
    quantizer.calib(model)
    with pytest.raises(NotCalibrated, match="no calibration data was seen"):
        quantizer.quantize(model)


def test_captured_but_not_calibrated() -> None:
    model, quantizer = MODELS["mlp"](), Quantizer("reference")
    quantizer.calib(model, example_inputs=example("mlp", 2))
    with pytest.raises(NotCalibrated, match="no calibration data was seen"):
        quantizer.quantize(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_data_that_is_not_finite(bad: float) -> None:
    model, quantizer = ready()
    before = snapshot(model)
    state = copy.deepcopy(quantizer.state_dict())
    (x,) = example("mlp", 4)
    x[1, 2] = bad
    with pytest.raises(QuantError, match=r"calibration batch 1, at .*(NaN|Inf)"):
        quantizer.calib(model)(x)
    assert_unchanged(model, before)
    after = quantizer.state_dict()
    assert after["state"]["batches"] == state["state"]["batches"]
    for key, kept in state["state"]["statistics"].items():
        values = kept["range"]
        for name, value in values.items():
            found = after["state"]["statistics"][key]["range"][name]
            assert torch.equal(found, value) if isinstance(value, Tensor) else found == value
    assert sqnr(model(*example("mlp", 4)), quantizer.quantize(model)(*example("mlp", 4))) > 20


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_weights_that_are_not_finite(bad: float) -> None:
    model = MODELS["mlp"]()
    quantizer = calibrated(model, [(example("mlp", 32), {})], backend="reference")
    model[2].weight.data[0, 0] = bad
    with pytest.raises(QuantError, match=r"the weight of 2: the tensor holds (NaN|Inf)"):
        quantizer.quantize(model)


@pytest.mark.parametrize("value", [0.0, 0.25], ids=["zero", "constant"])
def test_a_constant_channel_works(value: float) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model[0].weight.data[3] = value
    model[0].bias.data[3] = 0.0
    model[2].weight.data[1] = 0.0
    x = torch.randn(64, 8)
    quantizer = calibrated(model, [((x,), {})])
    assert sqnr(model(x), quantizer.quantize(model)(x)) > 20


def test_an_all_zero_input_works() -> None:
    model = MODELS["mlp"]()
    zeros = torch.zeros_like(example("mlp", 4)[0])
    quantizer = calibrated(model, [((zeros,), {})])
    assert sqnr(model(zeros), quantizer.quantize(model)(zeros)) > 20


def test_an_empty_batch() -> None:
    model, quantizer = ready()
    with pytest.raises(QuantError, match="calibration batch 1 is empty"):
        quantizer.calib(model)(torch.empty(0, 16))
    assert quantizer.state.batches == 1


def test_a_first_call_that_the_model_refuses_counts_for_nothing() -> None:
    model, quantizer = MODELS["mlp"](), Quantizer("reference")
    with pytest.raises(CaptureFailed, match="the float model itself fails"):
        quantizer.calib(model)(torch.zeros(2, 7))
    with pytest.raises(NotCalibrated, match="no calibration data was seen"):
        quantizer.quantize(model)


def test_an_integer_only_model() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1) % 7

    model, quantizer = Sum(), Quantizer("reference")
    x = torch.arange(12).view(2, 6)
    assert torch.equal(quantizer.calib(model)(x), model(x))
    with pytest.raises(UnsupportedOp, match="nothing in the model can be quantized"):
        quantizer.quantize(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_says_what_to_do(dtype: torch.dtype) -> None:
    model = MODELS["mlp"]().to(dtype)
    with pytest.raises(UnsupportedOp, match=r"0\.weight is .*expected torch\.float32.*\.float\(\)"):
        Quantizer("reference").calib(model)


def test_train_mode_is_captured_as_eval(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)).train()
    before = snapshot(model)
    x = torch.randn(16, 8)
    quantizer = Quantizer("reference")
    with caplog.at_level(logging.INFO, "torch_quant"):
        outputs = quantizer.calib(model)(x)
    assert "train mode" in caplog.text
    assert model.training
    assert_unchanged(model, before)
    assert torch.equal(outputs, copy.deepcopy(model).eval()(x))


def test_a_model_on_another_device() -> None:
    model = MODELS["mlp"]().to("meta")
    backend = next(b for b in (Backend.ONEDNN, Backend.REFERENCE) if b.unavailable() is None)
    if backend is Backend.REFERENCE:
        pytest.skip("needs an x86 CPU: the reference backend takes every device")
    with pytest.raises(InvalidConfig, match=r"on meta, but backend Backend.ONEDNN runs on cpu"):
        Quantizer(backend).calib(model)


def test_unknown_backend_and_observer() -> None:
    with pytest.raises(InvalidConfig, match=r"unknown backend 'onedn'.*Backend\.ONEDNN"):
        Quantizer("onedn")
    with pytest.raises(InvalidConfig, match=r"unknown backend 'TENSORRT'"):
        _ = Backend.TENSORRT
    with pytest.raises(InvalidConfig, match=r"unknown observer 'minmx'.*minmax"):
        QConfig(observer="minmx")


def test_a_backend_that_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(BackendUnavailable, match=r"ONEDNN does not run here.*riscv64"):
        Quantizer("onednn")
    assert Quantizer().backend is Backend.REFERENCE


def test_contradictory_specs() -> None:
    with pytest.raises(InvalidConfig, match="2 to 16 bits"):
        QuantSpec.of(bits=17)
    with pytest.raises(InvalidConfig, match="per_channel, but no kernel"):
        QConfig(input=QuantSpec.of(per_channel=True))
    with pytest.raises(InvalidConfig, match="expected a QuantSpec"):
        QConfig(weight=8)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="expected a QConfig or None"):
        Quantizer("reference", overrides={"0": False})  # type: ignore[dict-item]


def test_wrong_example_inputs() -> None:
    model, quantizer = MODELS["mlp"](), Quantizer("reference")
    with pytest.raises(CaptureFailed, match=r"float model itself fails.*\(2, 5\) float32"):
        quantizer.calib(model, example_inputs=torch.randn(2, 5))
    with pytest.raises(CaptureFailed, match=r"do not fit forward\(.*input"):
        quantizer.calib(model, example_inputs={"pixels": torch.randn(2, 16)})
    quantizer.calib(model)(*example("mlp", 4))  # and it still works


def test_a_wrong_calibration_input_changes_nothing() -> None:
    model, quantizer = ready()
    with pytest.raises((CaptureFailed, RuntimeError)):
        quantizer.calib(model)(torch.randn(2, 5))
    assert quantizer.state.batches == 1
    assert quantizer.quantize(model)(*example("mlp", 4)).shape == (4, 10)


def test_a_quantized_model_names_the_input_it_cannot_take() -> None:
    model, quantizer = ready()
    with pytest.raises(CaptureFailed, match=r"input\.shape\[1\] is 5, but the graph was captured"):
        quantizer.quantize(model)(torch.randn(2, 5))


def test_a_model_changed_after_calibration() -> None:
    model, quantizer = ready()
    model[4] = nn.Linear(32, 3)
    with pytest.raises(NotCalibrated, match=r"4\.weight was \(10, 32\).* is \(3, 32\)"):
        quantizer.quantize(model)
    model[4] = nn.Identity()
    with pytest.raises(NotCalibrated, match="new Quantizer"):
        quantizer.calib(model)


def test_new_values_of_the_weights_are_used() -> None:
    model, quantizer = ready()
    x = example("mlp", 4)
    first = quantizer.quantize(model)(*x)
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, assign=True)
    second = quantizer.quantize(model)(*x)
    assert not torch.equal(first, second)


def test_another_model_needs_another_quantizer() -> None:
    _, quantizer = ready()
    with pytest.raises(NotCalibrated, match="not the one that was calibrated"):
        quantizer.calib(MODELS["small_cnn"]())


def test_a_proxy_is_not_a_model() -> None:
    model, quantizer = ready()
    with pytest.raises(InvalidConfig, match="this is a proxy"):
        quantizer.calib(quantizer.quantize(model))
    with pytest.raises(InvalidConfig, match=r"expected an nn\.Module, got str"):
        quantizer.calib("model")  # type: ignore[arg-type]


def test_filter_names_that_match_nothing() -> None:
    model = MODELS["small_cnn"]()
    first = next(name for name, _ in model.named_modules() if name)
    quantizer = Quantizer("reference", module_filter=ModuleFilter(exclude_names=first + "z"))
    with pytest.raises(
        InvalidConfig, match=rf"matches nothing in the model; did you mean.*{first}"
    ):
        quantizer.coverage(model, example_inputs=example("small_cnn", 4))


def test_filter_of_an_unknown_op_type() -> None:
    model, quantizer = ready(module_filter=ModuleFilter(exclude_op_types="lineer"))
    with pytest.raises(InvalidConfig, match=r"unknown op type 'lineer'; expected one of .*linear"):
        quantizer.quantize(model)


def test_everything_excluded() -> None:
    model, quantizer = ready(module_filter=ModuleFilter(exclude_classes=nn.Linear))
    with pytest.raises(UnsupportedOp, match="excluded by class"):
        quantizer.quantize(model)


def test_coverage_of_a_model_never_run() -> None:
    with pytest.raises(NotCalibrated, match="example_inputs"):
        Quantizer("reference").coverage(MODELS["mlp"]())


def test_a_state_that_is_none() -> None:
    quantizer = Quantizer("reference")
    with pytest.raises(InvalidConfig, match="not a Quantizer state"):
        quantizer.load_state_dict(MODELS["mlp"]().state_dict())
    with pytest.raises(InvalidConfig, match="not a calibration state"):
        quantizer.load_state_dict({"state": {"batches": 1}, "model": {}})


class Branch(nn.Module):
    """Two branches by the data, so captured in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(x) if x.sum().item() > 1e9 else self.low(x)


def test_a_layer_that_no_data_reaches(caplog: pytest.LogCaptureFixture) -> None:
    model, quantizer = Branch().eval(), Quantizer("reference")
    quantizer.calib(model)(X)
    quant_model = quantizer.quantize(model)
    quantizer.quantize(model)
    assert caplog.text.count("no call has reached high") == 1
    assert torch.equal(quant_model(X + 1e9), model(X + 1e9))
    text = str(quantizer.coverage(model))
    assert "100.0% of the multiply-accumulates" in text
    assert "no call has reached it" in text


def test_a_layer_whose_weight_alone_is_used(caplog: pytest.LogCaptureFixture) -> None:
    """It is reached, in its way."""

    class Borrows(Branch):
        def forward(self, x: Tensor) -> Tensor:
            y = self.low(x) if x.sum().item() < 1e9 else x
            return nn.functional.linear(y, self.high.weight)

    model, quantizer = Borrows().eval(), Quantizer("reference")
    quantizer.calib(model)(X)
    quantizer.quantize(model)
    assert "no call has reached" not in caplog.text


def test_the_arguments_of_tune_swapped() -> None:
    model, quantizer = ready()
    with pytest.raises(InvalidConfig, match="expected a Quantizer, got Sequential"):
        tune(model, quantizer, lambda candidate: 1.0)  # type: ignore[arg-type]


def test_an_override_of_nothing() -> None:
    with pytest.raises(InvalidConfig, match="override 3: expected a name"):
        Quantizer("reference", overrides={3: None}).calib(MODELS["mlp"]())  # type: ignore[dict-item]


def test_suggestions_are_different_names() -> None:
    with pytest.raises(InvalidConfig, match="did you mean the op type linear") as e:
        ready(overrides={"linaer": None})
    found = str(e.value).partition("did you mean ")[2].rstrip("?").split(", ")
    assert len(set(found)) == len(found)


def test_nothing_to_verify() -> None:
    with pytest.raises(InvalidConfig, match=r"Backend\.REFERENCE runs every kernel"):
        Backend.REFERENCE.verify(MODELS["mlp"]())


def test_an_unwritable_path_leaves_nothing(tmp_path: Path) -> None:
    model, quantizer = ready()
    quant_model = quantizer.quantize(model)
    with pytest.raises(InvalidConfig, match=r"cannot write .*missing"):
        export_torchscript(quant_model, example("mlp", 2), tmp_path / "missing" / "model.pt")
    export_torchscript(quant_model, example("mlp", 2), tmp_path / "model.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


class TiedHead(nn.Module):
    """Looks tokens up in the weight that it multiplies by in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4096, 32)
        self.head = nn.Linear(32, 4096, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def test_a_tied_weight_with_different_wishes(caplog: pytest.LogCaptureFixture) -> None:
    """Each reader has what it is to have; equal wishes keep one tensor."""
    model, ids = TiedHead().eval(), torch.arange(8)[None]
    int4 = recipes.int4_weight_only(group_size=32)

    def quantized(overrides: dict[str, Any]) -> nn.Module:
        quantizer = Quantizer("reference", qconfig=int4, overrides=overrides)
        return quantizer.quantize(model, example_inputs=(ids,))

    same = quantized({})
    assert same.table.weight.data_ptr() == same.head.weight.data_ptr()
    assert "kept once for each" not in caplog.text
    other = quantized({"head": recipes.int8_weight_only()})
    assert int(other.table.weight.abs().max()) <= 8 < int(other.head.weight.abs().max())
    assert "table and head share a weight of 131,072 numbers" in caplog.text
    assert torch.equal(other(ids), other.head(other.table(ids)))
