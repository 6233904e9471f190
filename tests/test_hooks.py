"""Forward hooks run once a call on real data, whether around a module or inside the graph."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
from flows import BACKENDS
from models import normal, seeded, tokens
from torch import Tensor, nn
from zoo_text import SMALL

from torch_quant import Quantizer, sqnr


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_run_once_a_call_on_real_data(backend: str) -> None:
    model, x = seeded(Hooked).eval(), normal(4, 16)
    seen: list[tuple[str, bool]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, *rest: seen.append((name, type(args[0]) is Tensor))

    model.register_forward_pre_hook(note("before all"))
    model.first.register_forward_hook(note("first"))
    model.second.register_forward_hook(lambda module, args, output: output * 2)
    once = [("before all", True), ("first", True)]
    expected = model(x)
    assert seen == once
    quantizer = Quantizer(backend)
    calib_model = quantizer.calib(model)
    for make in (lambda m: calib_model, lambda m: calib_model, quantizer.amp, quantizer.quantize):
        proxy = make(model)
        seen.clear()
        outputs = proxy(x)
        assert seen == once
        assert sqnr(expected, outputs) > 25
        if proxy is calib_model:
            assert torch.equal(outputs, expected)
    assert set(quantizer.plan.quantized) == {"first", "second"}


def test_a_hook_that_comes_later() -> None:
    model, x = seeded(Hooked).eval(), normal(4, 16)
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    calib_model(x)
    handle = model.first.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(calib_model(x), model(x))
    handle.remove()
    assert torch.equal(calib_model(x), model(x))


def test_hooks_by_which_transformers_collects_hidden_states_are_part_of_the_graph() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(**{**SMALL, "output_hidden_states": True, "num_hidden_layers": 1})
    model, ids = seeded(lambda: BertModel(config)).eval(), tokens(2, 7, 128)
    expected = model(input_ids=ids)
    calib_model = Quantizer("reference").calib(model)
    outputs = calib_model(input_ids=ids)
    assert len(outputs.hidden_states) == len(expected.hidden_states) == 2
    for mine, theirs in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(mine, theirs)
    assert not calib_model.captured.root.failure


def test_a_hook_of_no_module() -> None:
    """Its code was compiled without a name for the globals it has."""
    doubled = types.FunctionType((lambda module, x, y: y * 2).__code__, {"__builtins__": {}})
    assert doubled.__module__ is None
    model, x = seeded(Hooked).eval(), normal(4, 16)
    model.first.register_forward_hook(doubled)
    quantizer = Quantizer("reference")
    calib_model = quantizer.calib(model)
    assert torch.equal(calib_model(x), model(x))
    assert sqnr(model(x), quantizer.quantize(model)(x)) > 20
