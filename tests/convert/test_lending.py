"""A quantized model may compute with codes that its quantizer holds; neither reaches the other."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import BACKENDS
from torch import Tensor, nn

from torch_quant import FLOAT, GPTQ, InvalidConfig, QConfig, Quantizer, recipes

HERE = sorted({"reference", "onednn"} & set(BACKENDS))
WIDE = 384
"""Codes of 4 bits of a matrix so wide are large enough to be lent."""


class Mixer(nn.Module):
    """Two blocks with a gate between, of which the first layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(WIDE, WIDE, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.twice(x)))
        for block in self.blocks:
            x = x + torch.sigmoid(block(x))
        return x


def mixer(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Mixer().eval().requires_grad_(False)


def texts(seed: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, WIDE, generator=generator) for _ in range(2)]


X = texts(1)[0]


def recipe(bits: int) -> QConfig:
    return recipes.weight_only(bits=bits, group_size=64, method=GPTQ())


def rounded(bits: int, backend: str, seed: int = 0, **options: Any) -> tuple[Quantizer, nn.Module]:
    model = mixer(seed)
    quantizer = Quantizer(backend, qconfig=recipe(bits), **options)
    quantizer.round_weights(model, texts(seed), progress=False)
    return quantizer, model


def memory(tensors: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors if x.numel()}


def held(quantizer: Quantizer) -> list[Tensor]:
    found = quantizer.state.rounded.sites.values()
    return [x for each in found for x in (each.packed, each.qparams.scale, each.qparams.zero_point)]


BITS = [4, 8]


@pytest.mark.parametrize("capture", ["modules", "whole"])
def test_one_living_model_computes_with_the_codes_and_no_other(capture: str) -> None:
    if "onednn" not in HERE:
        pytest.skip("its kernels read the codes as they are held")
    quantizer, model = rounded(4, "onednn", capture=capture)
    codes = memory(each.packed for each in quantizer.state.rounded.sites.values())
    first = quantizer.quantize(model, example_inputs=X)
    assert codes <= memory(first.buffers())
    second = quantizer.quantize(model, example_inputs=X)
    assert not memory(second.buffers()) & memory(held(quantizer))
    assert not memory(second.buffers()) & memory(first.buffers())
    assert torch.equal(first(X), second(X))
    del first
    gc.collect()
    third = quantizer.quantize(model, example_inputs=X)
    assert codes <= memory(third.buffers())
    assert torch.equal(third(X), second(X))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("bits", BITS)
def test_what_becomes_of_the_quantizer_does_not_reach_the_model(bits: int, backend: str) -> None:
    quantizer, model = rounded(bits, backend)
    quant_model = quantizer.quantize(model, example_inputs=X)
    before = quant_model(X)
    other, _ = rounded(bits, backend, seed=1)
    quantizer.load_state_dict(other.state_dict())
    assert torch.equal(quant_model(X), before)
    model.load_state_dict(mixer(1).state_dict())
    quantizer.round_weights(model, texts(3), progress=False)
    assert torch.equal(quant_model(X), before)
    assert not torch.equal(quantizer.quantize(model, example_inputs=X)(X), before)
    del quantizer
    gc.collect()
    assert torch.equal(quant_model(X), before)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("part", ["", "blocks"])
def test_what_the_model_loads_does_not_reach_the_quantizer(
    part: str, bits: int, backend: str
) -> None:
    quantizer, model = rounded(bits, backend)
    quant_model = quantizer.quantize(model, example_inputs=X)
    before, kept = quant_model(X), [x.clone() for x in held(quantizer)]
    other, other_model = rounded(bits, backend, seed=1)
    theirs = other.quantize(other_model, example_inputs=X)
    names = ["twice", "blocks.0", "blocks.1"]
    for name in [""] if not part else names:
        quant_model.get_submodule(name).load_state_dict(theirs.get_submodule(name).state_dict())
    assert torch.equal(quant_model(X), theirs(X))
    changed = [not torch.equal(x, y) for x, y in zip(held(quantizer), kept, strict=True)]
    assert not any(changed)
    assert torch.equal(quantizer.quantize(model, example_inputs=X)(X), before)
    assert torch.equal(other.quantize(other_model, example_inputs=X)(X), theirs(X))


def test_codes_that_somebody_writes_to_by_hand_are_not_used_again(tmp_path: Path) -> None:
    if "onednn" not in HERE:
        pytest.skip("its kernels read the codes as they are held")
    quantizer, model = rounded(4, "onednn")
    quant_model = quantizer.quantize(model, example_inputs=X)
    quant_model.get_submodule("blocks.0").weight.zero_()
    with pytest.raises(InvalidConfig, match=r"blocks\.0.*written to.*round_weights"):
        quantizer.quantize(model, example_inputs=X)
    with pytest.raises(InvalidConfig, match=r"blocks\.0.*written to.*round_weights"):
        quantizer.save(tmp_path / "ranges")
    quantizer.round_weights(model, texts(), progress=False)
    assert not torch.equal(quantizer.quantize(model, example_inputs=X)(X), quant_model(X))


@pytest.mark.parametrize("backend", HERE)
def test_copies_pickles_and_other_kinds_of_calls(backend: str) -> None:
    quantizer, model = rounded(4, backend, capture="whole")
    quant_model = quantizer.quantize(model, example_inputs=X)
    before = quant_model(X)
    copies = [copy.deepcopy(quant_model), pickle.loads(pickle.dumps(quant_model))]
    for each in copies:
        assert not memory(each.buffers()) & memory(held(quantizer))
        assert torch.equal(each(X), before)
    assert torch.equal(quant_model(X[None])[0], before)  # captured now
    assert len(memory(quant_model.buffers())) == len(memory(copies[0].buffers()))
    assert torch.equal(quant_model.to("cpu")(X), before)


def test_round_to_nearest_holds_nothing() -> None:
    quantizer = Quantizer(qconfig=QConfig(FLOAT, recipe(4).weight))
    model = mixer(0)
    first, second = (quantizer.quantize(model, example_inputs=X) for _ in range(2))
    assert not memory(first.buffers()) & memory(second.buffers())
