"""The smoke suite: the main path on a tiny model, in seconds, before every commit."""

from __future__ import annotations

import pytest
import torch
from flows import BACKENDS, calibrated
from models import MODELS, example

from torch_quant import Quantizer, cosine, sqnr
from torch_quant.backends import available_backends


@pytest.mark.sparse
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_three_lines(name: str, backend: str) -> None:
    model = MODELS[name]()
    batches = [(example(name, batch), {}) for batch in (4, 8)]
    quantizer = calibrated(model, batches, backend=backend)
    quant_model = quantizer.quantize(model)
    x = example(name, 8)
    expected, actual = model(*x), quant_model(*x)
    assert sqnr(expected, actual) > 20.0
    assert cosine(expected.flatten(1), actual.flatten(1)).min() > 0.99
    assert quantizer.plan.coverage > 0.5


def test_a_traced_model_serves_other_sizes() -> None:
    model = MODELS["mlp"]()
    quantizer = calibrated(model, [(example("mlp", 8), {})], backend="reference")
    quant_model = quantizer.quantize(model)
    traced = torch.jit.trace(quant_model, example("mlp", 2))
    x = example("mlp", 5)
    assert torch.equal(traced(*x), quant_model(*x))


def test_repr_says_which_backend_was_picked() -> None:
    model = MODELS["mlp"]()
    quantizer = Quantizer()
    quantizer.calib(model)(*example("mlp", 8))
    assert repr(available_backends()[0]) in repr(quantizer)
    assert repr(available_backends()[0]) in repr(quantizer.quantize(model))
