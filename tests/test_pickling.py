"""What may be pickled and copied, and what says what to save instead."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flows import calibrated
from models import example, mlp, normal, seeded
from torch import Tensor, nn

from torch_quant import InvalidConfig, Quantizer

COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": pickle.dumps,
    "torch.save": lambda value: torch.save(value, io.BytesIO()),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_quantizer_says_what_to_save(way: str) -> None:
    model = mlp()
    quantizer = calibrated(model, [(example("mlp", 16), {})], backend="reference")
    for each in (quantizer, Quantizer("reference")):
        with pytest.raises(InvalidConfig, match=r"quantizer\.save\(folder\).*Quantizer\.load"):
            COPIES[way](each)
    assert quantizer.quantize(model)(*example("mlp", 2)).shape == (2, 10)


@pytest.mark.parametrize("way", COPIES)
def test_a_proxy_says_what_to_save(way: str) -> None:
    model, x = mlp(), example("mlp", 16)
    quantizer = calibrated(model, [(x, {})], backend="reference")
    for proxy in (quantizer.calib(model), quantizer.amp(model)):
        proxy(*x)
        with pytest.raises(InvalidConfig, match=r"float model.*quantizer\.save\(folder\)"):
            COPIES[way](proxy)
        assert torch.equal(proxy(*x), model(*x))


RESTORING: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lstm": (lambda: Around(nn.LSTM(8, 8, batch_first=True)), (2, 5, 8)),
    "gru": (lambda: Around(nn.GRU(8, 8, batch_first=True)), (2, 5, 8)),
    "encoder": (lambda: Around(nn.TransformerEncoderLayer(8, 2, 16)), (2, 5, 8)),
    "convolution": (lambda: Around(nn.Conv1d(8, 8, 3, padding=1)), (2, 8, 8)),
}
"""Around modules with a ``__setstate__`` of their own, which expects what a float module has."""


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.out(y[0] if isinstance(y, tuple) else y)


@pytest.mark.parametrize("name", RESTORING)
def test_quantized_models_are_copied_whatever_they_consist_of(name: str) -> None:
    build, shape = RESTORING[name]
    model, x = seeded(build).eval(), normal(*shape)
    quant_model = calibrated(model, [((x,), {})], backend="reference").quantize(model)
    expected = quant_model(x)
    for twin in (copy.deepcopy(quant_model), pickle.loads(pickle.dumps(quant_model))):
        assert torch.equal(twin(x), expected)


def test_a_state_loads_without_running_code() -> None:
    model, x = mlp(), example("mlp", 16)
    quantizer = calibrated(model, [(x, {})], backend="reference")
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    later = Quantizer("reference")
    later.load_state_dict(torch.load(file, weights_only=True))
    again = later.quantize(model, example_inputs=x)
    assert torch.equal(again(*x), quantizer.quantize(model)(*x))


def test_a_quantized_model_is_code_and_loads_only_as_such() -> None:
    model, x = mlp(), example("mlp", 16)
    quant_model = calibrated(model, [(x, {})], backend="reference").quantize(model)
    file = io.BytesIO()
    torch.save(quant_model, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(*x), quant_model(*x))
