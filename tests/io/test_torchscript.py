"""Saved files hold the weights as integers, whichever backend made them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from flows import calibrated
from onnx_files import needs
from torch import nn

from torch_quant import Backend, InvalidConfig, export_torchscript
from torch_quant.backends import available_backends

SERVED = [each.name for each in available_backends() if not each.not_in_torchscript]


@pytest.mark.parametrize("backend", [name for name in SERVED if Backend.get(name).frozen])
def test_a_file_is_a_quarter_of_the_float_one(tmp_path: Path, backend: str) -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    x = torch.randn(8, 512)
    quant_model = calibrated(model, [((x,), {})], backend=backend).quantize(model)
    expected = export_torchscript(quant_model, (x,), tmp_path / "int8.pt")(x)
    torch.save(model.state_dict(), tmp_path / "float.pt")
    size, full = ((tmp_path / name).stat().st_size for name in ("int8.pt", "float.pt"))
    assert size <= 0.27 * full
    loaded = torch.jit.load(tmp_path / "int8.pt")
    for _ in range(3):  # compiled ones are fused from their second call on
        actual = loaded(x)
    assert torch.equal(actual, expected)
    assert torch.equal(quant_model(x), expected)


@pytest.mark.parametrize("backend", SERVED)
def test_users_see_no_warning_of_torch_jit(tmp_path: Path, backend: str) -> None:
    """That it is deprecated (and, from torch 2.14 on, said to everybody) is not their doing."""
    model, x = nn.Sequential(nn.Linear(16, 16), nn.GELU()), torch.randn(4, 16)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        quant_model = calibrated(model, [((x,), {})], backend=backend).quantize(model)
        quant_model(x)
        export_torchscript(quant_model, x, tmp_path / "int8.pt")
    assert [str(each.message) for each in warned if "torch.jit" in str(each.message)] == []


@needs("onnx", "onnxscript")
def test_a_model_for_onnx_is_refused(tmp_path: Path) -> None:
    """A process that loads the file would not know its operators."""
    model, x = nn.Linear(8, 8), torch.randn(64, 8)
    quant_model = calibrated(model, [((x,), {})], backend="onnx").quantize(model)
    for each in (quant_model, nn.Sequential(quant_model)):
        with pytest.raises(InvalidConfig, match="export_onnx"):
            export_torchscript(each, x, tmp_path / "int8.pt")
    assert not list(tmp_path.iterdir())
