"""Choices that are misspelt are told what is close; data and layers that do not fit, what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from torch_quant import (
    Backend,
    CaptureFailed,
    InvalidConfig,
    QConfig,
    Quantizer,
    QuantSpec,
    recipes,
)
from torch_quant.backends import ReferenceBackend

MISSPELT: dict[str, tuple[Callable[[], object], str]] = {
    "observer": (lambda: QConfig(observer="histogarm"), "histogram"),
    "of a recipe": (lambda: recipes.int8_static(observer="min_max"), "minmax"),
    "smooth": (lambda: recipes.int8_static(smooth="atuo"), "auto"),  # type: ignore[arg-type]
    "method": (lambda: recipes.int4_weight_only(method="gtpq"), "gptq"),
    "small floats": (lambda: recipes.float8(element="float8_e4m3"), "float8_e4m3fn"),
    "element": (lambda: QuantSpec.of("flaot8_e5m2"), "float8_e5m2"),
    "capture": (lambda: Quantizer(capture="module"), "modules"),
    "unseen calls": (lambda: Quantizer(unseen_calls="captur"), "capture"),
    "backend": (lambda: Backend.get("openvno"), "openvino"),
    "simulated backend": (lambda: ReferenceBackend("onedn"), "onednn"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISSPELT)
def test_a_misspelt_choice_is_told_what_is_close(what: str) -> None:
    make, close = MISSPELT[what]
    with pytest.raises(InvalidConfig, match=rf"did you mean {close}"):
        make()


def test_images_of_bytes_are_told_what_to_do() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    calib_model = Quantizer("reference").calib(model)
    with pytest.raises(CaptureFailed, match=r"pixels.*\(input\.float\(\) / 255 - mean\)"):
        calib_model(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(CaptureFailed) as caught:
        calib_model(torch.zeros(2, 4, 8, 8))  # four channels, and floats
    assert "pixels" not in str(caught.value)


def test_layers_that_another_calibration_leaves_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """DISC quantizes results too, which a calibration for other kernels does not record."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    other = Quantizer("onednn")
    other.calib(model)(torch.randn(8, 16))
    quantized = other.quantize(model, backend="disc")
    assert len(quantized.plan.quantized) == 1
    assert "stays in float: 0 (Backend.DISC quantizes its own result" in caplog.text
    assert "calibrate with Quantizer('disc')" in caplog.text
    caplog.clear()
    own = Quantizer("disc")
    own.calib(model)(torch.randn(8, 16))
    assert len(own.quantize(model).plan.quantized) == 2
    assert "stays in float" not in caplog.text
