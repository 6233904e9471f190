"""Recurrent layers whose activations are rounded at each call, through the whole workflow."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import normal
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torch_quant
from torch_quant import Backend, InvalidConfig, Quantizer, UnsupportedOp, recipes, sqnr

pytestmark = pytest.mark.sparse

BACKENDS = ["reference", "onednn"]
LAYERS: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False},
}
LEAST = 30.0
"""dB of the outputs on weights as PyTorch makes them."""


def usable(backend: str) -> str:
    if Backend.get(backend).unavailable() is not None:
        pytest.skip(f"{backend}: {Backend.get(backend).unavailable()}")
    return backend


def dynamic(model: nn.Module, backend: str, **options: Any) -> tuple[Quantizer, Any]:
    quantizer = Quantizer(recipes.int8_dynamic(), backend=usable(backend), **options)
    return quantizer, quantizer.quantize


def tensors(output: Any) -> list[Tensor]:
    return pytree.tree_leaves(output)


def close(exact: Any, actual: Any, least: float = LEAST) -> bool:
    pairs = list(zip(tensors(exact), tensors(actual), strict=True))
    return all(a.shape == b.shape and sqnr(a, b) > least for a, b in pairs)


class Tagger(nn.Module):
    """Linear layers around a recurrent one, on sequences that are padded or packed."""

    def __init__(self, layer: type[nn.RNNBase], pack: bool, **options: Any) -> None:
        super().__init__()
        options = {"batch_first": True} | options
        self.stem, self.rnn, self.pack = nn.Linear(10, 16), layer(16, 24, **options), pack
        self.head = nn.Linear(24 * (2 if self.rnn.bidirectional else 1), 5)

    def forward(self, x: Tensor, lengths: Tensor, h: Any = None) -> tuple[Tensor, Any]:
        x = self.stem(x)
        if not self.pack:
            y, h = self.rnn(x, h)
            return self.head(y), h
        lengths = lengths.clamp(max=x.shape[1])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        y, h = self.rnn(packed, h)
        return self.head(nn.utils.rnn.pad_packed_sequence(y, True)[0]), h


def tagger(kind: str, pack: bool, **options: Any) -> Tagger:
    torch.manual_seed(0)
    return Tagger(LAYERS[kind], pack, **options).eval().requires_grad_(False)


def text(batch: int, length: int) -> tuple[Tensor, Tensor]:
    lengths = torch.arange(batch) * 5 % length + 1
    lengths[batch // 2] = length
    return normal(batch, length, 10), lengths


SIZES = [(3, 9), (5, 4), (1, 7), (2, 1), (1, 1), (3, 9)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_layers_without_calibration_and_of_any_length(kind: str, form: str, backend: str) -> None:
    torch.manual_seed(0)
    model = LAYERS[kind](16, 24, **FORMS[form]).eval()
    quantizer, quantize = dynamic(model, backend)
    quant_model = quantize(model, example_inputs=normal(3, 9, 16))
    for batch, length in SIZES:
        x = normal(length, batch, 16)
        assert close(model(x), quant_model(x))
    assert quantizer.coverage(model).share == 1.0
    assert "uint8" in str(quantizer.explain(quantizer.plan.quantized[0])) or "u8" in str(
        quantizer.explain(quantizer.plan.quantized[0])
    )


@pytest.mark.sparse
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_packed_sequences(kind: str, both: bool, backend: str) -> None:
    model = tagger(kind, True, num_layers=2, bidirectional=both)
    quantizer, quantize = dynamic(model, backend)
    quant_model = quantize(model, example_inputs=text(3, 9))
    assert set(quantizer.plan.quantized) == {"stem", "rnn", "head"}
    pickled = pickle.loads(pickle.dumps(quant_model))  # which captures nothing any more
    for batch, length in SIZES:
        inputs = text(batch, length)
        assert close(model(*inputs), quant_model(*inputs))
    for batch, length in SIZES[:2]:
        inputs = text(batch, length)
        assert torch.equal(quant_model(*inputs)[0], pickled(*inputs)[0])


@torch.no_grad()
def test_states_that_are_given_to_packed_sequences() -> None:
    model = tagger("lstm", True)
    quant_model = dynamic(model, "reference")[1](model, example_inputs=text(3, 9))
    h = normal(1, 3, 24)
    assert close(model(*text(3, 9), (h, h / 2)), quant_model(*text(3, 9), (h, h / 2)))
    assert close(model(*text(3, 9)), quant_model(*text(3, 9)))


CELLS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTMCell(16, 24),
    "gru": lambda: nn.GRUCell(16, 24),
    "rnn": lambda: nn.RNNCell(16, 24),
    "relu, no bias": lambda: nn.RNNCell(16, 24, bias=False, nonlinearity="relu"),
}


class Decoder(nn.Module):
    """A cell that runs in Python, a step at a time."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(24, 16)

    def forward(self, x: Tensor, steps: int) -> Tensor:
        state, found = None, []
        for _ in range(steps):
            state = self.cell(x, state)
            h = state[0] if isinstance(state, tuple) else state
            x = self.head(h)
            found.append(x)
        return torch.stack(found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CELLS)
@torch.no_grad()
def test_cells_in_a_loop_of_any_length(kind: str, backend: str) -> None:
    torch.manual_seed(0)
    model = Decoder(CELLS[kind]()).eval()
    quantizer, quantize = dynamic(model, backend)
    quant_model = quantize(model, example_inputs=(normal(3, 16), 4))
    for batch, steps in ((3, 4), (1, 4), (7, 9)):
        x = normal(batch, 16)
        assert close(model(x, steps), quant_model(x, steps), 25.0)
    assert set(quantizer.plan.quantized) == {"cell", "head"}
    assert quantizer.coverage(model).share == 1.0
    one = model.cell(normal(16))  # without a batch
    assert close(one, quant_model.cell(normal(16)))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("symmetric", [False, True])
@torch.no_grad()
def test_the_kernel_gives_what_the_simulation_gives(kind: str, symmetric: bool) -> None:
    usable("onednn")
    model = tagger(kind, True, num_layers=2, bidirectional=True)
    quantizer = Quantizer(recipes.int8_dynamic(symmetric=symmetric), backend="onednn")
    quant_model = quantizer.quantize(model, example_inputs=text(4, 30))
    reference = quantizer.quantize(model, backend="reference")
    codes = quant_model.state_dict()["rnn.weight_hh_l0"]
    assert codes.dtype is torch.int8
    assert torch.equal(codes, reference.state_dict()["rnn.weight_hh_l0"])
    assert close(reference(*text(4, 30)), quant_model(*text(4, 30)), 50.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pack", [False, True])
@torch.no_grad()
def test_copies_files_and_threads(pack: bool, backend: str, tmp_path: Path) -> None:
    model, inputs = tagger("gru", pack), text(4, 6)
    quant_model = dynamic(model, backend)[1](model, example_inputs=text(3, 9))
    expected = quant_model(*inputs)
    torch_quant.save(quant_model, tmp_path)
    loaded = torch_quant.load(tmp_path, model=tagger("gru", pack))
    for other in (loaded, copy.deepcopy(quant_model)):
        assert all(map(torch.equal, tensors(other(*inputs)), tensors(expected)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, tensors(quant_model(*inputs)), tensors(expected)))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.thin
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_compiled_and_exported(kind: str, backend: str) -> None:
    model, inputs = tagger(kind, False), text(3, 6)
    options = {"capture": "whole"}
    quant_model = dynamic(model, backend, **options)[1](model, example_inputs=inputs)
    expected = quant_model(*inputs)
    torch._dynamo.reset()
    compiled = torch.compile(quant_model, backend="aot_eager")
    assert close(expected, compiled(*inputs), 60.0)
    assert close(quant_model(*text(2, 9)), compiled(*text(2, 9)), 60.0)
    exported = torch.export.export(quant_model, inputs, strict=False).module()
    assert close(expected, exported(*inputs), 60.0)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_beside_layers_with_observed_ranges(backend: str) -> None:
    """An override makes one layer dynamic in a model that is calibrated."""
    model, inputs = tagger("gru", False), text(4, 9)
    quantizer = Quantizer(usable(backend), overrides={"op:gru": recipes.int8_dynamic()})
    quantizer.calib(model)(*inputs)
    quant_model = quantizer.quantize(model)
    plan = quantizer.plan
    assert plan["rnn"].activation.dynamic
    assert not plan["stem"].activation.dynamic
    assert quantizer.coverage(model).share == 1.0
    assert close(model(*inputs), quant_model(*inputs), 25.0)


@torch.no_grad()
def test_without_a_wish_a_layer_gets_the_form_that_its_kernel_has() -> None:
    model, inputs = tagger("lstm", False), text(4, 9)
    quantizer = Quantizer(usable("onednn"))
    quantizer.calib(model)(*inputs)
    assert close(model(*inputs), quantizer.quantize(model)(*inputs), 25.0)
    assert quantizer.plan["rnn"].activation.dynamic
    reference = quantizer.quantize(model, backend="reference")  # on observed grids
    assert close(model(*inputs), reference(*inputs), 25.0)


def test_what_is_not_served_says_why() -> None:
    model = nn.LSTM(16, 24, proj_size=8).eval()
    quantizer = Quantizer(recipes.int8_dynamic(), backend="reference")
    x = normal(5, 3, 16)
    coverage = quantizer.coverage(model, x)
    assert coverage.share == 0.0
    assert "projections" in str(coverage)
    with pytest.raises(UnsupportedOp, match="projections"):
        quantizer.quantize(model, example_inputs=x)


def test_packed_sequences_on_observed_grids_stay_in_float() -> None:
    model, inputs = tagger("lstm", True), text(3, 9)
    quantizer = Quantizer("reference")
    quantizer.calib(model)(*inputs)
    quant_model = quantizer.quantize(model)
    assert "recipes.int8_dynamic()" in str(quantizer.coverage(model))
    assert close(model(*inputs), quant_model(*inputs), 25.0)


def test_parts_of_a_packed_sequence_that_do_not_belong_together() -> None:
    """PyTorch's own operators would read beyond them."""
    model = tagger("gru", True)
    quant_model = dynamic(model, "reference")[1](model, example_inputs=text(3, 9))
    packed = nn.utils.rnn.pack_sequence([normal(2, 16), normal(4, 16)], enforce_sorted=False)
    wrong = nn.utils.rnn.PackedSequence(packed.data[:4], *packed[1:])
    with pytest.raises(InvalidConfig, match="expected rows for all batch sizes"):
        quant_model.rnn(wrong)


@torch.no_grad()
def test_per_tensor_on_the_reference() -> None:
    spec = torch_quant.QuantSpec.of("uint8", dynamic=True)
    model, inputs = tagger("gru", True), text(4, 9)
    config = torch_quant.QConfig(spec, recipes.int8_dynamic().weight)
    quantizer = Quantizer(config, backend="reference")
    assert close(model(*inputs), quantizer.quantize(model, example_inputs=inputs)(*inputs), 25.0)
    assert quantizer.coverage(model).share == 1.0
    refused = Quantizer(config, backend=usable("onednn")).coverage(model, inputs)
    assert "scale per token" in str(refused)
