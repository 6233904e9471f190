"""A loss of the user's: what it is given, and what is said of one that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from amp_proxies import MODES, assert_same, facts, ready
from flows import calibrated
from models import MODELS, example
from torch import Tensor

from torch_quant import InvalidConfig


@pytest.mark.parametrize("call", ["one", "several", "keywords"])
def test_loss_fn_is_given_outputs_and_batch(call: str) -> None:
    model, x = MODELS["tiny_transformer"](), example("tiny_transformer", 8)
    quantizer = calibrated(model, [(x, {})], backend="reference")
    seen: list[tuple[Any, Any]] = []
    labels = torch.arange(8)

    def loss_fn(outputs: Any, batch: Any) -> Tensor:
        seen.append((outputs, batch))
        return F.cross_entropy(outputs, labels)

    amp_model = quantizer.amp(model, loss_fn=loss_fn)
    calls: dict[str, tuple[tuple[Tensor, ...], dict[str, Tensor]]] = {
        "one": (x[:1], {}),
        "several": (x, {}),
        "keywords": ((), {"ids": x[0], "mask": x[1]}),
    }
    args, kwargs = calls[call]
    assert_same(amp_model(*args, **kwargs), model(*args, **kwargs))
    ((outputs, batch),) = seen
    assert torch.equal(outputs, model(*args, **kwargs))
    if call == "one":
        assert torch.equal(batch, x[0])
    elif call == "several":
        assert isinstance(batch, tuple)
        assert all(map(torch.equal, batch, x))
    else:
        assert isinstance(batch, dict)
        assert set(batch) == {"ids", "mask"}
    ranking = quantizer.sensitivity(amp_model)
    assert ranking.metric == "loss"
    assert any(site.score > 0.0 for site in ranking)
    assert all(site.predicted_output_sqnr is None for site in ranking)
    assert "by its effect on the loss" in str(ranking)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda outputs, batch: outputs, r"gave a tensor of shape \(4, 10\); expected a scalar"),
        (lambda outputs, batch: None, "gave None; expected a scalar"),
        (lambda outputs, batch: float(outputs.detach().sum()), "expected a scalar"),
        (lambda outputs, batch: outputs.detach().sum(), "differentiable.*argmax"),
        (lambda outputs, batch: outputs.argmax(1).sum(), "differentiable.*argmax"),
    ],
    ids=["not a scalar", "None", "a number", "detached", "argmax"],
)
def test_a_loss_that_cannot_be_used(loss_fn: Callable[[Any, Any], Any], message: str) -> None:
    model = MODELS["mlp"]()
    quantizer = ready(model, *example("mlp", 16))
    amp_model = quantizer.amp(model, loss_fn=loss_fn)
    with pytest.raises(InvalidConfig, match=message):
        amp_model(*example("mlp", 4))
    assert amp_model.recorder.batches == 0
    assert amp_model.samples == []
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_raises_records_nothing() -> None:
    model = MODELS["mlp"]()
    quantizer = ready(model, *example("mlp", 16))
    fail = [False]

    def loss_fn(outputs: Tensor, batch: Tensor) -> Tensor:
        if fail[0]:
            raise KeyError("labels")
        return outputs.square().sum()

    amp_model = quantizer.amp(model, loss_fn=loss_fn)
    amp_model(*example("mlp", 4))
    before = facts(amp_model)
    fail[0] = True
    with pytest.raises(KeyError, match="labels"):
        amp_model(*example("mlp", 4))
    assert facts(amp_model) == before


def test_loss_fn_under_every_grad_mode() -> None:
    model, x = MODELS["mlp"](), example("mlp", 4)
    quantizer = ready(model, *example("mlp", 16))
    found = []
    for mode in MODES.values():
        amp_model = quantizer.amp(model, loss_fn=lambda outputs, batch: outputs.square().mean())
        with mode():
            assert_same(amp_model(*x), model(*x).detach())
        found.append(amp_model.recorder.gram.matrix)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
