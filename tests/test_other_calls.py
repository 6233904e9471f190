"""A quantized model called as it was never calibrated says what differs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from models import normal
from torch import Tensor, nn

from torch_quant import CaptureFailed, Quantizer, load, save, sqnr

X = normal(4, 8)


class Flagged(nn.Module):
    """Another path with ``both``; a mask that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None, both: bool = False) -> Any:
        y = self.linear(x if mask is None else x * mask)
        return (y, x) if both else y


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"x": X.double(), "both": False},
            "x is torch.float64; it was captured for torch.float32",
        ),
        ({"x": X[None], "both": False}, "x has 3 dimensions; it was captured for 2"),
        ({"x": X, "both": True}, "it was captured without both"),
        (
            {"x": X.tolist(), "both": False},
            r"got x\[0\]\[0\]: .* and 24 more",
        ),
        ({"x": X, "mask": X, "both": False}, r"got x: .*, mask: \(4, 8\) .* captured without mask"),
        (
            {"x": X.numpy(), "both": False},
            r"ndarray is neither a tensor \(torch\.from_numpy",
        ),
    ],
    ids=["dtype", "rank", "constant", "list", "more inputs", "numpy"],
)
def test_other_inputs_than_calibrated(inputs: dict[str, Any], message: str) -> None:
    model, quantizer = Flagged().eval(), Quantizer("reference", unseen_calls="error")
    quantizer.calib(model)(x=X, both=False)
    quant_model = quantizer.quantize(model)
    with pytest.raises(CaptureFailed, match=message):
        quant_model(**inputs)


def test_of_several_graphs_the_nearest_is_named() -> None:
    model, quantizer = Flagged().eval(), Quantizer("reference", unseen_calls="error")
    calib_model = quantizer.calib(model)
    for mask in (None, X):
        calib_model(x=X, mask=mask)
    quant_model = quantizer.quantize(model)
    with pytest.raises(CaptureFailed, match="mask has 3 dimensions; it was captured for 2"):
        quant_model(x=X, mask=X[None])
    with pytest.raises(CaptureFailed, match=r"x\.shape\[1\] is 7"):
        quant_model(x=X[:, :7], mask=X[:, :7])
    with pytest.raises(CaptureFailed, match="it was captured without both"):
        quant_model(x=X, both=True)
    assert sqnr(model(x=X), quant_model(x=X, both=False)) > 25


def _renaming(inner: Any) -> Any:
    """A decorator that shows the names of what it takes the place of."""

    @functools.wraps(inner)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _other_names(self, *args, **kwargs)

    return forward


def _other_names(self: Any, hidden: Tensor, factor: Tensor | None = None) -> Tensor:
    y: Tensor = self.fc(hidden)
    return y if factor is None else y * factor


class Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    @_renaming
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        raise NotImplementedError


def test_names_that_a_decorator_hides_go_by_position(tmp_path: Path) -> None:
    model, x = Renamed().eval(), torch.randn(4, 8)
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    for args in ((x,), (x, x[:, :1])):
        assert torch.equal(calib_model(*args), model(*args))
    quant_model = quantizer.quantize(model)
    save(quant_model, tmp_path / "model")
    for each in (quant_model, load(tmp_path / "model", model=Renamed())):
        assert sqnr(model(x, x[:, :1]), each(x, x[:, :1])) > 30  # 8 bits
        assert sqnr(model(x), each(x)) > 30
