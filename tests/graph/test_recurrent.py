"""Every recurrent layer is captured once for every length and batch size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capturing import capture, executor, serve
from models import normal
from torch import Tensor, nn

aten = torch.ops.aten


def relu(*sizes: int, **options: Any) -> nn.RNN:
    return nn.RNN(*sizes, nonlinearity="relu", **options)


KINDS: dict[str, tuple[Any, Any]] = {
    "gru": (nn.GRU, aten.gru.input),
    "rnn_tanh": (nn.RNN, aten.rnn_tanh.input),
    "rnn_relu": (
        lambda *args, **more: nn.RNN(*args, nonlinearity="relu", **more),
        aten.rnn_relu.input,
    ),
    "lstm": (nn.LSTM, aten.lstm.input),
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_capture_serves_every_length_and_batch(kind: str, form: str) -> None:
    build, target = KINDS[kind]
    torch.manual_seed(0)
    model = build(8, 6, **FORMS[form]).eval()
    graph = capture(model, normal(3, 7, 8))
    assert target in {node.target for node in graph.gm.graph.nodes}
    for shape in ((2, 5, 8), (4, 11, 8), (1, 1, 8), (6, 1, 8), (1, 6, 8)):
        actual, expected = serve(graph, normal(*shape)), model(normal(*shape))
        assert torch.equal(actual[0], expected[0])


def test_between_other_layers_with_a_state_given() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.gru, self.head = nn.Linear(8, 8), nn.GRU(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.head(self.gru(self.stem(x), h)[0])

    torch.manual_seed(0)
    model = Tagger().eval()
    run, submodule = executor(model)
    for length, batch in ((7, 3), (1, 3), (5, 1), (1, 1)):
        inputs = normal(length, batch, 8), normal(1, batch, 6, salt=1)
        assert torch.equal(run(*inputs), model(*inputs))
    assert len(submodule.graphs) == 1


def test_packed_sequences_give_what_the_module_gives() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(8, 6)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
            return nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0])[0]

    torch.manual_seed(0)
    model = Packed().eval()
    run, _ = executor(model)
    for lengths in ([7, 5, 2], [4, 4, 1]):
        x, given = normal(max(lengths), 3, 8), torch.tensor(lengths)
        assert torch.equal(run(x, given), model(x, given))


def test_nothing_of_pytorch_stays_changed() -> None:
    before = torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu
    capture(nn.GRU(4, 4).eval(), normal(3, 2, 4))
    assert (torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu) == before
