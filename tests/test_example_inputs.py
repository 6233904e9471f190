"""``example_inputs`` mean one thing, whoever is given them."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import BACKENDS
from models import normal
from torch import Tensor, nn

from torch_quant import (
    Backend,
    CaptureFailed,
    InvalidConfig,
    Quantizer,
    export_onnx,
    export_torchscript,
)

X, Y = normal(4, 8), normal(4, 8, salt=1)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)


class One(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Two(Sum):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x + y)


class Images(Sum):
    """As detectors take them."""

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.linear(images[0] + images[1])


class Batch(Sum):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.linear(batch["x"] + batch["y"])


FORMS: dict[str, tuple[type[nn.Module], Any, tuple[Any, ...]]] = {
    "tensor": (One, X, (X,)),
    "tuple of one": (One, (X,), (X,)),
    "tuple": (Two, (X, Y), (X, Y)),
    "dict": (Two, {"y": Y, "x": X}, (X, Y)),
    "mapping": (Two, UserDict({"y": Y, "x": X}), (X, Y)),
    "list": (Images, [X, Y], ([X, Y],)),
    "tuple with a list": (Images, ([X, Y],), ([X, Y],)),
    "tuple with a dict": (Batch, ({"x": X, "y": Y},), ({"x": X, "y": Y},)),
}
"""Form -> model, example_inputs, and the call they stand for."""

Entry = Callable[[nn.Module, Any, tuple[Any, ...], Path], Any]
ENTRIES: dict[str, Entry] = {}


def entry(function: Entry) -> Entry:
    ENTRIES[function.__name__] = function
    return function


def _calibrated(model: nn.Module, call: tuple[Any, ...], backend: str) -> Quantizer:
    quantizer = Quantizer(backend)
    quantizer.calib(model)(*call)
    return quantizer


@entry
def calib(model: nn.Module, example: Any, call: tuple[Any, ...], folder: Path) -> Any:
    return Quantizer("reference").calib(model, example)(*call)


@entry
def amp(model: nn.Module, example: Any, call: tuple[Any, ...], folder: Path) -> Any:
    first = _calibrated(model, call, "reference")
    later = Quantizer("reference")
    later.load_state_dict(first.state_dict())
    return later.amp(model, example_inputs=example)(*call)


@entry
def quantize(model: nn.Module, example: Any, call: tuple[Any, ...], folder: Path) -> Any:
    first = _calibrated(model, call, "reference")
    later = Quantizer("reference")
    later.load_state_dict(first.state_dict())
    return later.quantize(model, example_inputs=example)(*call)


@entry
def coverage(model: nn.Module, example: Any, call: tuple[Any, ...], folder: Path) -> Any:
    assert "linear" in Quantizer("reference").coverage(model, example).plan
    return model(*call)


@entry
def to_torchscript(model: nn.Module, example: Any, call: tuple[Any, ...], folder: Path) -> Any:
    quant_model = _calibrated(model, call, "reference").quantize(model)
    export_torchscript(quant_model, example, folder / "m.ts")
    loaded = torch.jit.load(folder / "m.ts")
    return loaded(**example) if isinstance(example, (dict, UserDict)) else loaded(*call)


@entry
def to_onnx(model: nn.Module, example: Any, call: tuple[Any, ...], folder: Path) -> Any:
    if reason := Backend.ONNX.unavailable():
        pytest.skip(reason)
    quant_model = _calibrated(model, call, "onnx").quantize(model)
    (file,) = export_onnx(quant_model, example, folder / "m.onnx", progress=False)
    assert file.exists()
    return quant_model(*call)


@entry
def ipex(model: nn.Module, example: Any, call: tuple[Any, ...], folder: Path) -> Any:
    if "ipex" not in BACKENDS:
        pytest.skip("IPEX needs torch 2.8")
    quant_model = _calibrated(model, call, "ipex").quantize(model, example_inputs=example)
    assert Backend.IPEX.verify(quant_model, example).complete
    return quant_model(*call)


@pytest.mark.thin
@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_stands_for_one_call(form: str, name: str, tmp_path: Path) -> None:
    cls, example, call = FORMS[form]
    torch.manual_seed(0)
    model = cls().eval()
    found = ENTRIES[name](model, example, call, tmp_path)
    torch.testing.assert_close(found, model(*call), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in ("coverage", "ipex")])
def test_keywords_that_are_no_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"one is 0; .*example_inputs=\(batch,\)"):
        ENTRIES[name](One().eval(), {0: X}, (X,), tmp_path)


def test_a_list_where_several_inputs_are_meant() -> None:
    with pytest.raises(CaptureFailed, match=r"a list, which is one input; several are a tuple"):
        Quantizer("reference").calib(Two().eval(), [X, Y])
    with pytest.raises(CaptureFailed, match=r"a list, which is one input; several are a tuple"):
        Quantizer("reference").coverage(One().eval(), [X])


def test_no_example(tmp_path: Path) -> None:
    model = One().eval()
    quant_model = _calibrated(model, (X,), "reference").quantize(model)
    with pytest.raises(InvalidConfig, match="example_inputs is None"):
        export_torchscript(quant_model, None, tmp_path / "m.ts")
