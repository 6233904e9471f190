"""The kernel of recurrent layers against their definition, on the same integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import normal
from torch import Tensor, nn

from torch_quant import InvalidConfig, sqnr
from torch_quant.native import instruction_sets, library, using
from torch_quant.native.recurrent import DYNAMIC_CELL, DYNAMIC_RECURRENT
from torch_quant.ops.qdq import CHOOSE_QPARAMS, FAKE_QUANTIZE
from torch_quant.ops.stepping import RECURRENT, RECURRENT_CELL

SETS = instruction_sets()
KINDS = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
needs_kernels = pytest.mark.skipif(not SETS, reason=f"kernels: {library.unavailable()}")
LEAST = 50.0
"""dB: a sigmoid that differs in its last bits moves a code here and there."""


def how(signed: bool) -> tuple[Any, ...]:
    return ("int8" if signed else "uint8", signed, "per_token", "float32")


@dataclass
class Layers:
    """Random layers: codes and scales of their matrices, and their biases."""

    kind: str
    inputs: int
    size: int
    layers: int = 1
    both: bool = False
    biased: bool = True

    def __post_init__(self) -> None:
        rows, self.codes, self.scales, self.biases = KINDS[self.kind] * self.size, [], [], []
        directions = 2 if self.both else 1
        for layer in range(self.layers):
            width = directions * self.size if layer else self.inputs
            for salt in range(directions):
                for columns in (width, self.size):
                    w = normal(rows, columns, salt=salt + 7 * layer) / self.size**0.5
                    scale = w.abs().amax(1).clamp(min=1e-6) / 127
                    self.codes.append((w / scale[:, None]).round().to(torch.int8))
                    self.scales.append(scale)
                if self.biased:
                    self.biases += [normal(rows, salt=i) * 0.1 for i in range(2)]

    def states(self, batch: int) -> list[Tensor]:
        count = self.layers * (2 if self.both else 1)
        h = normal(count, batch, self.size) * 0.5
        return [h, h * 2] if self.kind == "lstm" else [h]

    def params(self) -> list[Tensor]:
        """As floats."""
        real = [c * s[:, None] for c, s in zip(self.codes, self.scales, strict=True)]
        found: list[Tensor] = []
        for i in range(0, len(real), 2):
            found += real[i : i + 2] + (self.biases[i : i + 2] if self.biased else [])
        return found

    def run(
        self, x: Tensor, hx: list[Tensor], sizes: Tensor | None, signed: bool, first: bool = False
    ) -> list[Tensor]:
        flags = (sizes, self.kind, self.biased, self.both, first)
        args = (x, hx, self.codes, *flags, self.scales, self.biases, signed)
        return DYNAMIC_RECURRENT(*args)  # type: ignore[no-any-return]

    def defined(
        self, x: Tensor, hx: list[Tensor], sizes: Tensor | None, signed: bool, first: bool = False
    ) -> list[Tensor]:
        rounded = FAKE_QUANTIZE(x, *CHOOSE_QPARAMS(x, *how(signed)), how(signed)[0])
        flags = (sizes, self.kind, self.biased, self.both, first)
        return RECURRENT(rounded, hx, self.params(), *flags, *how(signed))  # type: ignore[no-any-return]


FORMS = [
    ("lstm", 19, 37, {}),
    ("lstm", 64, 64, {"layers": 2, "both": True}),
    ("lstm", 1, 1, {"biased": False}),
    ("gru", 33, 70, {"layers": 2}),
    ("gru", 5, 130, {"both": True, "biased": False}),
    ("rnn_tanh", 16, 65, {"layers": 3}),
    ("rnn_relu", 20, 24, {"both": True}),
]


@needs_kernels
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize(("kind", "inputs", "size", "more"), FORMS)
def test_the_kernel_computes_the_definition(
    kind: str, inputs: int, size: int, more: dict[str, Any], instructions: str
) -> None:
    layers = Layers(kind, inputs, size, **more)
    for steps, batch, signed, first in (
        (9, 5, False, True),
        (3, 1, True, False),
        (1, 33, False, False),
    ):
        shape = (batch, steps, inputs) if first else (steps, batch, inputs)
        x, hx = normal(*shape), layers.states(batch)
        before = [each.clone() for each in hx]
        expected = layers.defined(x, hx, None, signed, first)
        with using(instructions):
            actual = layers.run(x, hx, None, signed, first)
        assert [each.shape for each in actual] == [each.shape for each in expected]
        assert all(torch.equal(a, b) for a, b in zip(hx, before, strict=True))
        for wanted, found in zip(expected, actual, strict=True):
            assert not wanted.any() or sqnr(wanted, found) > LEAST


@needs_kernels
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "lengths"), [(40, (7, 5, 5, 2, 1)), (39, (60, 60, 55, 41, 2, 2))])
def test_packed_sequences_are_those_that_are_run_one_by_one(
    size: int, lengths: tuple[int, ...], kind: str, both: bool
) -> None:
    """Bit for bit: no sequence depends on the others, nor on whether the matrix is packed."""
    layers = Layers(kind, 12, size, layers=2, both=both)
    sequences = [normal(length, 12, salt=i) for i, length in enumerate(lengths)]
    packed = nn.utils.rnn.pack_sequence(sequences)
    hx = layers.states(len(lengths))
    y, *states = layers.run(packed.data, hx, packed.batch_sizes, False)
    back = nn.utils.rnn.PackedSequence(y, packed.batch_sizes)
    padded, _ = nn.utils.rnn.pad_packed_sequence(back)
    for i, sequence in enumerate(sequences):
        alone, *behind = layers.run(
            sequence.unsqueeze(1), [each[:, i : i + 1].contiguous() for each in hx], None, False
        )
        assert torch.equal(padded[: len(sequence), i], alone[:, 0])
        for state, one in zip(states, behind, strict=True):
            assert torch.equal(state[:, i], one[:, 0])


@needs_kernels
@pytest.mark.parametrize("instructions", SETS)
def test_neither_threads_nor_the_batch_change_a_bit(instructions: str) -> None:
    layers = Layers("lstm", 96, 160, both=True)
    x, hx, threads = normal(40, 37, 96), layers.states(37), torch.get_num_threads()
    try:
        with using(instructions):
            torch.set_num_threads(1)
            alone = layers.run(x, hx, None, False)
            torch.set_num_threads(4)
            together = layers.run(x, hx, None, False)
            some = [each[:, 3:9].contiguous() for each in hx]
            part = layers.run(x[:, 3:9].contiguous(), some, None, False)
            first = [each[:, :1].contiguous() for each in hx]
            one = layers.run(x[:, :1].contiguous(), first, None, False)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert all(torch.equal(a[:, 3:9], b) for a, b in zip(alone, part, strict=True))
    assert all(torch.equal(a[:, :1], b) for a, b in zip(alone, one, strict=True))


@needs_kernels
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize(
    "sizes",
    [("lstm", 384, 1), ("gru", 512, 1), ("rnn_tanh", 784, 2), ("lstm", 392, 1), ("lstm", 384, 5)],
    ids=str,
)
def test_threads_share_the_steps_of_few_sequences(
    sizes: tuple[str, int, int], instructions: str
) -> None:
    """Both directions, sequences that end early, and more threads than there are cores."""
    kind, size, batch = sizes
    layers = Layers(kind, 24, size, both=True)
    x, hx, threads = normal(40, batch, 24), layers.states(batch), torch.get_num_threads()
    lengths = torch.tensor([40, 22, 22, 7, 1])[:batch]
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
    found = []
    try:
        with using(instructions):
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                found.append(
                    (
                        *layers.run(x, hx, None, False),
                        *layers.run(packed.data, hx, packed.batch_sizes, False),
                    )
                )
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@needs_kernels
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_stay_in_their_sequence(kind: str, instructions: str) -> None:
    layers, x = Layers(kind, 10, 20), normal(6, 4, 10)
    plain, hx = x.clone(), layers.states(4)
    x[2, 1, 3], x[4, 2, 0] = float("nan"), float("inf")
    with using(instructions):
        actual, expected = (layers.run(each, hx, None, False)[0] for each in (x, plain))
    assert actual[2:, 1].isnan().all()
    assert actual[4:, 2].isnan().all()
    assert torch.equal(actual[:2, 1], expected[:2, 1])
    assert torch.equal(actual[:, (0, 3)], expected[:, (0, 3)])


@needs_kernels
@pytest.mark.parametrize("instructions", SETS)
def test_gates_that_are_far_out_saturate(instructions: str) -> None:
    layers = Layers("lstm", 4, 16)
    layers.scales = [each * 1e4 for each in layers.scales]
    with using(instructions):
        y = layers.run(normal(5, 3, 4) * 1e6, layers.states(3), None, False)[0]
    assert y.isfinite().all()
    assert y.abs().max() <= 1


@needs_kernels
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_is_one_step(kind: str, instructions: str) -> None:
    layers, x = Layers(kind, 30, 50), normal(3, 30)
    hx = [each[0] for each in layers.states(3)]
    rounded = FAKE_QUANTIZE(x, *CHOOSE_QPARAMS(x, *how(True)), "int8")
    expected = RECURRENT_CELL(rounded, hx, layers.params(), kind, True, *how(True))
    with using(instructions):
        actual = DYNAMIC_CELL(x, hx, layers.codes, kind, True, layers.scales, layers.biases, True)
        whole = layers.run(x.unsqueeze(0), [each.unsqueeze(0) for each in hx], None, True)
    for wanted, found, state in zip(expected, actual, whole[1:], strict=True):
        assert sqnr(wanted, found) > LEAST
        assert torch.equal(found, state[0])


def test_without_the_library_it_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x = Layers("gru", 12, 20, layers=2, both=True), normal(5, 3, 12)
    expected = layers.defined(x, layers.states(3), None, False)
    monkeypatch.setattr(library, "_loaded", lambda: (None, "it was not built"))
    monkeypatch.setattr(library, "_warn", lambda why: None)
    actual = layers.run(x, layers.states(3), None, False)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(actual, expected, strict=True))


def test_nothing_to_compute() -> None:
    layers = Layers("lstm", 6, 8)
    y, h, c = layers.run(normal(0, 3, 6), layers.states(3), None, False)
    assert y.shape == (0, 3, 8)
    assert torch.equal(h, layers.states(3)[0])
    y, h, c = layers.run(normal(4, 0, 6), layers.states(0), None, False)
    assert (y.shape, h.shape, c.shape) == ((4, 0, 8), (1, 0, 8), (1, 0, 8))


def test_other_floats_are_computed_in_float32() -> None:
    layers, x = Layers("gru", 12, 20), normal(5, 3, 12).to(torch.bfloat16)
    hx = [each.to(torch.bfloat16) for each in layers.states(3)]
    y, h = layers.run(x, hx, None, False)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.bfloat16)
    exact = layers.run(x.float(), [each.float() for each in hx], None, False)[0]
    assert torch.equal(y, exact.to(torch.bfloat16))


def test_tensors_that_do_not_fit_are_refused() -> None:
    layers, x = Layers("lstm", 12, 20), normal(5, 3, 12)
    hx = layers.states(3)
    with pytest.raises(InvalidConfig, match=r"an int8 matrix of 80 x 11"):
        layers.run(normal(5, 3, 11), hx, None, False)
    with pytest.raises(InvalidConfig, match=r"states of \(1, 3, 20\), got \(1, 2, 20\)"):
        layers.run(x, [each[:, :2] for each in hx], None, False)
    with pytest.raises(InvalidConfig, match=r"an x of 3 dimensions"):
        layers.run(x[0], hx, None, False)
    for sizes in ([3, 3, 4, 3, 2], [3, 3, 3], []):
        with pytest.raises(InvalidConfig, match="which never grow"):
            layers.run(x.reshape(15, 12), hx, torch.tensor(sizes, dtype=torch.int64), False)


@needs_kernels
def test_what_is_known_of_a_cell_is_no_copy_of_it() -> None:
    layers, x = Layers("gru", 12, 20), normal(3, 12)
    hx = [each[0] for each in layers.states(3)]

    def run(x: Tensor, scales: list[Tensor] | None = None) -> Tensor:
        some = layers.scales if scales is None else scales
        found = DYNAMIC_CELL(x, hx, layers.codes, "gru", True, some, layers.biases, False)
        return found[0]  # type: ignore[no-any-return]

    first = run(x)
    assert torch.equal(run(x), first)
    layers.scales[1].mul_(2.0)
    expected = run(x, [each.clone() for each in layers.scales])
    assert torch.equal(run(x), expected)
    assert not torch.equal(expected, first)
    assert torch.equal(run(x, [each.double() for each in layers.scales]), expected)
    with pytest.raises(InvalidConfig, match="an int8 matrix of 60 x 11"):
        run(normal(3, 11))
    with pytest.raises(InvalidConfig, match="60 scales"):
        run(x, [each[:8] for each in layers.scales])
    with pytest.raises(InvalidConfig, match=r"states of \(2, 20\), got \(3, 20\)"):
        run(x[:2])
    assert torch.equal(run(x), expected)
