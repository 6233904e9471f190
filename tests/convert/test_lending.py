"""A quantized model may compute with codes that its quantizer holds; neither reaches the other."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from flows import BACKENDS
from thinning import some
from torch import Tensor, nn

from torch_quant import FLOAT, GPTQ, InvalidConfig, QConfig, Quantizer, recipes
from torch_quant.core.lending import Lender

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


@pytest.mark.thin
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


class Tied(nn.Module):
    """An embedding whose table is the weight of the head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = nn.Embedding(512, 128)
        self.head = nn.Linear(128, 512, bias=False)
        generator = torch.Generator().manual_seed(seed)
        torch.nn.init.normal_(self.table.weight, std=seed, generator=generator)
        self.head.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.table(words))


WORDS = torch.arange(24).reshape(2, 12)


def tied(seed: int) -> tuple[Quantizer, nn.Module]:
    model = Tied(seed).eval().requires_grad_(False)
    quantizer = Quantizer("reference", qconfig=recipes.int8_weight_only())
    quantizer.round_weights(model, [WORDS], progress=False)
    return quantizer, model


@pytest.mark.parametrize("part", ["", "table", "head"])
def test_tied_codes_stay_tied_when_a_part_of_the_model_loads(part: str) -> None:
    quantizer, model = tied(1)
    theirs, mine = (made.quantize(of, example_inputs=WORDS) for made, of in (tied(3), tied(1)))
    borrower = quantizer.quantize(model, example_inputs=WORDS)
    before, codes = borrower(WORDS), memory(each.packed for each in _sites(quantizer))
    own = quantizer.quantize(model, example_inputs=WORDS)
    assert codes & memory(borrower.buffers())
    assert not codes & memory(own.buffers())
    for each in (borrower, own, mine):
        each.get_submodule(part).load_state_dict(theirs.get_submodule(part).state_dict())
        assert torch.equal(each(WORDS), theirs(WORDS))
    assert torch.equal(quantizer.quantize(model, example_inputs=WORDS)(WORDS), before)


def _sites(quantizer: Quantizer) -> list[Any]:
    return list(quantizer.state.rounded.sites.values())


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("bits", BITS)
def test_what_state_dict_gave_follows_what_the_model_loads(bits: int, backend: str) -> None:
    quantizer, model = rounded(bits, backend)
    other, other_model = rounded(bits, backend, seed=1)
    quant_model = quantizer.quantize(model, example_inputs=X)
    theirs = other.quantize(other_model, example_inputs=X)
    before, kept = quant_model(X), quant_model.state_dict()
    quant_model.load_state_dict(theirs.state_dict())
    for name, x in quant_model.state_dict().items():
        assert torch.equal(kept[name], x), name
    assert torch.equal(quantizer.quantize(model, example_inputs=X)(X), before)
    quant_model.load_state_dict(quantizer.quantize(model, example_inputs=X).state_dict())
    assert torch.equal(quant_model(X), before)


def test_codes_written_to_before_the_model_loads_are_noticed_after() -> None:
    quantizer, model = rounded(8, "reference")
    quant_model = quantizer.quantize(model, example_inputs=X)
    quant_model.get_submodule("blocks.0").weight.zero_()
    quant_model.load_state_dict(copy.deepcopy(quant_model.state_dict()))
    with pytest.raises(InvalidConfig, match=r"blocks\.0.*written to.*round_weights"):
        quantizer.quantize(model, example_inputs=X)


def _by_data(x: Tensor) -> None:
    x.data.bitwise_not_()


def _by_array(x: Tensor) -> None:
    values = x.numpy()
    values[...] = ~values


@pytest.mark.parametrize("write", [_by_data, _by_array])
@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("bits", BITS)
def test_writes_that_pytorch_does_not_count_are_noticed(
    bits: int, backend: str, write: Any, tmp_path: Path
) -> None:
    quantizer, model = rounded(bits, backend)
    quant_model = quantizer.quantize(model, example_inputs=X)
    before, codes = quant_model(X), quant_model.get_submodule("blocks.0").weight
    if not memory([codes]) & memory(held(quantizer)):
        pytest.skip("its kernels read the codes in another order")
    version = codes._version
    write(codes)
    assert codes._version == version
    with pytest.raises(InvalidConfig, match=r"blocks\.0.*written to.*round_weights"):
        quantizer.quantize(model, example_inputs=X)
    with pytest.raises(InvalidConfig, match=r"blocks\.0.*written to.*round_weights"):
        quantizer.state_dict()
    with pytest.raises(InvalidConfig, match=r"blocks\.0.*written to.*round_weights"):
        quantizer.save(tmp_path / "ranges")
    write(codes)  # as they were
    assert torch.equal(quantizer.quantize(model, example_inputs=X)(X), before)


KEPT: dict[str, Callable[[nn.Module], Any]] = {
    "state_dict": lambda model: model.state_dict()["blocks.0.weight"],
    "detached": lambda model: model.get_submodule("blocks.0").weight.detach()[:1],
    "array": lambda model: model.get_submodule("blocks.0").weight.numpy(),
    "part": lambda model: model.get_submodule("blocks.0"),
}


@pytest.mark.parametrize("kind", some(KEPT, "array"))
def test_codes_that_outlive_their_model_are_not_lent_again(kind: str) -> None:
    quantizer, model = rounded(8, "reference")
    first = quantizer.quantize(model, example_inputs=X)
    before, codes = first(X), first.get_submodule("blocks.0").weight
    assert memory([codes]) & memory(held(quantizer))
    kept = KEPT[kind](first)
    del first, codes
    gc.collect()
    second = quantizer.quantize(model, example_inputs=X)
    lent = memory(second.buffers()) & memory(held(quantizer))
    assert len(lent) == 2  # the others, which nobody has
    written = kept.weight if kind == "part" else torch.as_tensor(kept)
    written.data.bitwise_not_()
    assert torch.equal(second(X), before)
    with pytest.raises(InvalidConfig, match=r"blocks\.0.*written to"):
        quantizer.quantize(model, example_inputs=X)
    written.data.bitwise_not_()
    del kept, written, second
    gc.collect()
    third = quantizer.quantize(model, example_inputs=X)
    assert len(memory(third.buffers()) & memory(held(quantizer))) == 3
    assert torch.equal(third(X), before)


def test_a_file_with_a_model_and_its_quantizers_state_has_two_of_them(tmp_path: Path) -> None:
    quantizer, model = rounded(8, "reference")
    quant_model = quantizer.quantize(model, example_inputs=X)
    before = quant_model(X)
    torch.save({"state": quantizer.state_dict(), "model": quant_model}, tmp_path / "both.pt")
    both = torch.load(tmp_path / "both.pt", weights_only=False)
    again = Quantizer("reference", qconfig=recipe(8))
    again.load_state_dict(both["state"])
    assert not memory(both["model"].buffers()) & memory(held(again))
    other, other_model = rounded(8, "reference", seed=1)
    theirs = other.quantize(other_model, example_inputs=X)
    both["model"].load_state_dict(theirs.state_dict())
    assert torch.equal(again.quantize(model, example_inputs=X)(X), before)


def test_one_of_many_threads_borrows() -> None:
    held_codes = torch.arange(10_000)
    lenders = [Lender([held_codes]) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda each: each.lent(torch.arange(10_000)), lenders))
    assert sum(x.data_ptr() == held_codes.data_ptr() for x in given) == 1
