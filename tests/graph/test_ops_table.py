"""Every row of the op table, by capturing a module that has exactly that operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD
from capturing import Compute, Two, canonical, capture
from models import normal
from torch import Tensor, nn

from torch_quant.graph.sites import find_sites
from torch_quant.ops.attention import sdpa_probabilities
from torch_quant.ops.table import (
    ACTIVATIONS,
    DATA_MOVEMENT,
    IDENTITY,
    INT8_NEVER,
    OPERATORS,
    padding_sizes,
)
from torch_quant.passes.prepare import prepare

aten = torch.ops.aten

Case = tuple[nn.Module, tuple[Tensor, ...], int]


class PlainBag(nn.EmbeddingBag):
    """Called as early versions of PyTorch did, without a padding index."""

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return torch.ops.aten.embedding_bag.default(self.weight, ids, offsets)[0]


class Experts(nn.Module):
    """Two matrices of one tensor, and rows that are sorted by which they want."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(2 * 8, 16))
        self.out_features = 2 * 8

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch.ops.torch_quant.grouped_linear.default(x, self.weight, ends)


def convolved(kind: Callable[..., nn.Module], *shape: int, **options: Any) -> Case:
    """A convolution 4 to 6 over 2 inputs; macs are counted below, by hand."""
    macs = options.pop("macs")
    return kind(4, 6, 3, **options), (normal(2, 4, *shape),), macs


def relu() -> nn.RNN:
    return nn.RNN(8, 6, nonlinearity="relu")


def packed() -> nn.utils.rnn.PackedSequence:
    """Three sequences of 7 rows in all."""
    sequences = [normal(length, 8) for length in (2, 4, 1)]
    return nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)


CASES: dict[str, list[Case]] = {
    "aten.linear.default": [
        (nn.Linear(16, 8), (normal(3, 16),), 3 * 16 * 8),
        (nn.Linear(16, 8, bias=False), (normal(3, 5, 16),), 3 * 5 * 16 * 8),
        (nn.Linear(16, 8), (normal(16),), 16 * 8),
    ],
    "torch_quant.grouped_linear.default": [
        (Experts(), (normal(5, 16), torch.tensor([2, 5])), 5 * 8 * 16)
    ],
    "aten.conv1d.default": [
        convolved(nn.Conv1d, 10, macs=2 * 6 * 8 * 4 * 3),
        (nn.Conv1d(4, 6, 3), (normal(4, 10),), 6 * 8 * 4 * 3),
    ],
    "aten.conv1d.padding": [convolved(nn.Conv1d, 10, padding="same", macs=2 * 6 * 10 * 4 * 3)],
    "aten.conv2d.default": [
        convolved(nn.Conv2d, 8, 8, stride=2, macs=2 * 6 * 3 * 3 * 4 * 9),
        convolved(nn.Conv2d, 8, 8, groups=2, macs=2 * 6 * 6 * 6 * 2 * 9),
    ],
    "aten.conv2d.padding": [convolved(nn.Conv2d, 8, 8, padding="valid", macs=2 * 6 * 36 * 4 * 9)],
    "aten.conv3d.default": [convolved(nn.Conv3d, 4, 4, 4, macs=2 * 6 * 8 * 4 * 27)],
    "aten.conv3d.padding": [
        convolved(nn.Conv3d, 4, 4, 4, padding="same", macs=2 * 6 * 64 * 4 * 27)
    ],
    "aten.conv_transpose1d.default": [
        convolved(nn.ConvTranspose1d, 10, stride=2, macs=2 * 4 * 10 * 6 * 3)
    ],
    "aten.conv_transpose2d.input": [
        convolved(nn.ConvTranspose2d, 5, 5, groups=2, macs=2 * 4 * 25 * 3 * 9)
    ],
    "aten.conv_transpose3d.input": [
        convolved(nn.ConvTranspose3d, 3, 3, 3, macs=2 * 4 * 27 * 6 * 27)
    ],
    "aten.matmul.default": [
        (Compute(torch.matmul), (normal(2, 3, 5, 8), normal(2, 3, 8, 7)), 2 * 3 * 5 * 8 * 7),
        (Compute(torch.matmul), (normal(5, 8), normal(8)), 5 * 8),
    ],
    "aten.bmm.default": [(Compute(torch.bmm), (normal(3, 5, 8), normal(3, 8, 7)), 3 * 5 * 8 * 7)],
    "aten.mm.default": [(Compute(torch.mm), (normal(5, 8), normal(8, 7)), 5 * 8 * 7)],
    "aten.scaled_dot_product_attention.default": [
        (
            Compute(F.scaled_dot_product_attention),
            (normal(2, 3, 5, 8), normal(2, 3, 7, 8), normal(2, 3, 7, 6)),
            2 * 3 * 5 * 7 * (8 + 6),
        )
    ],
    "aten.embedding.default": [(nn.Embedding(10, 4), (torch.tensor([[1, 2, 3]]),), 0)],
    "aten.embedding_bag.default": [(PlainBag(10, 4), (torch.tensor([1, 2]), torch.tensor([0])), 0)],
    "aten.embedding_bag.padding_idx": [
        (nn.EmbeddingBag(10, 4, mode=mode), (torch.tensor([[1, 2, 3]]),), 0)
        for mode in ("sum", "mean", "max")
    ],
    "aten.lstm.input": [
        (nn.LSTM(8, 6), (normal(5, 3, 8),), 5 * 3 * 24 * (8 + 6)),
        (
            nn.LSTM(8, 6, 2, bidirectional=True, bias=False),
            (normal(5, 3, 8),),
            5 * 3 * 24 * 2 * (8 + 6 + 12 + 6),
        ),
    ],
    "aten.gru.input": [
        (nn.GRU(8, 6), (normal(5, 3, 8),), 5 * 3 * 18 * (8 + 6)),
        (nn.GRU(8, 6, batch_first=True, bias=False), (normal(3, 5, 8),), 5 * 3 * 18 * (8 + 6)),
    ],
    "aten.rnn_tanh.input": [(nn.RNN(8, 6), (normal(5, 3, 8),), 5 * 3 * 6 * (8 + 6))],
    "aten.rnn_relu.input": [(relu(), (normal(5, 3, 8),), 5 * 3 * 6 * (8 + 6))],
    "torch_quant.packed_lstm.default": [(nn.LSTM(8, 6), (packed(),), 7 * 24 * (8 + 6))],
    "torch_quant.packed_gru.default": [(nn.GRU(8, 6), (packed(),), 7 * 18 * (8 + 6))],
    "torch_quant.packed_rnn_tanh.default": [(nn.RNN(8, 6), (packed(),), 7 * 6 * (8 + 6))],
    "torch_quant.packed_rnn_relu.default": [(relu(), (packed(),), 7 * 6 * (8 + 6))],
    "aten.lstm_cell.default": [
        (nn.LSTMCell(8, 6), (normal(3, 8),), 3 * 24 * (8 + 6)),
        (nn.LSTMCell(8, 6, bias=False), (normal(3, 8),), 3 * 24 * (8 + 6)),
    ],
    "aten.gru_cell.default": [(nn.GRUCell(8, 6), (normal(3, 8),), 3 * 18 * (8 + 6))],
    "aten.rnn_tanh_cell.default": [(nn.RNNCell(8, 6), (normal(3, 8),), 3 * 6 * (8 + 6))],
    "aten.rnn_relu_cell.default": [
        (nn.RNNCell(8, 6, nonlinearity="relu"), (normal(3, 8),), 3 * 6 * (8 + 6))
    ],
}

OVERLOADS = [(pattern, target) for pattern in OPERATORS.values() for target in pattern.targets]


@pytest.mark.sparse
@pytest.mark.parametrize(("pattern", "target"), OVERLOADS, ids=[str(t) for _, t in OVERLOADS])
def test_a_module_with_the_operator_has_exactly_that_site(pattern: Any, target: Any) -> None:
    assert str(target) in CASES, f"a new row of the op table: add a case for {target}"
    for model, inputs, macs in CASES[str(target)]:
        gm = canonical(model, *inputs)
        ((node, found, site),) = find_sites(gm.graph)
        assert found is pattern
        assert node.target is target
        assert site.op == pattern.name
        assert site.macs == macs
        assert len(site.inputs) == len(pattern.activations)
        assert len(site.internals) == len(pattern.internals)
        assert bool(site.weight_shape) == (pattern.weight is not None)
        if pattern.steps:
            matrices = [x for name, x in model.named_parameters() if name.startswith("weight")]
            assert site.weight_shape == (sum(x.numel() for x in matrices),)
        elif pattern.weight is not None:
            weight = model.get_parameter("weight")
            assert site.weight_shape == tuple(weight.shape)
            if pattern.activations:  # else axis 0 is the vocabulary, a scale a row
                transposed = isinstance(model, nn.modules.conv._ConvTransposeNd)
                channels = getattr(model, "out_channels", getattr(model, "out_features", 0))
                share = channels // model.groups if transposed else channels
                assert weight.shape[pattern.weight_axis] == share


def test_rows_do_not_overlap() -> None:
    targets = [target for _, target in OVERLOADS]
    assert len(set(targets)) == len(targets)
    assert all(name == pattern.name for name, pattern in OPERATORS.items())
    others = [*DATA_MOVEMENT, *IDENTITY, *ACTIVATIONS, *INT8_NEVER]
    assert len({*targets, *others}) == len(targets) + len(others)


MOVES: dict[str, tuple[Any, ...]] = {
    "aten.view.default": ([6, -1],),
    "aten.reshape.default": ([4, -1],),
    "aten._unsafe_view.default": ([6, 32],),
    "aten.flatten.using_ints": (1, 2),
    "aten.unflatten.int": (1, [2, 2]),
    "aten.transpose.int": (1, -1),
    "aten.permute.default": ([0, 2, 3, 1],),
    "aten.t.default": (),
    "aten.unsqueeze.default": (1,),
    "aten.squeeze.default": (),
    "aten.squeeze.dim": (0,),
    "aten.squeeze.dims": ([0, 1],),
    "aten.expand.default": ([3, 4, 4, 4],),
    "aten.expand_as.default": (torch.zeros(2, 3, 4, 4, 4),),
    "aten.contiguous.default": (),
    "aten.clone.default": (),
    "aten.repeat.default": ([2, 1, 1, 1],),
    "aten.repeat_interleave.self_int": (2, 1),
    "aten.swapaxes.default": (0, 1),
    "aten.movedim.int": (0, 2),
    "aten.alias.default": (),
    "aten.detach.default": (),
    "aten.numpy_T.default": (),
    "aten.flip.default": ([1, 2],),
    "aten.roll.default": ([1], [1]),
    "aten.channel_shuffle.default": (2,),
    "aten.pixel_shuffle.default": (2,),
    "aten.pixel_unshuffle.default": (2,),
}
SHAPES = {
    "aten.t.default": (6, 16),
    "aten.numpy_T.default": (6, 16),
    "aten.squeeze.dims": (1, 1, 9),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=["uint8", "int8"])
@pytest.mark.parametrize("target", sorted(DATA_MOVEMENT, key=str), ids=str)
def test_data_movement_moves_codes_as_it_moves_values(target: Any, dtype: torch.dtype) -> None:
    """Codes go through the operator itself, so it must take both integer types."""
    assert str(target) in MOVES, f"a new row of DATA_MOVEMENT: add a case for {target}"
    shape = SHAPES.get(str(target), (3, 4, 4, 4))
    info = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(info.min, info.max + 1, shape, generator=generator).to(dtype)
    args = MOVES[str(target)]
    moved = target(codes, *args)
    assert moved.dtype == dtype
    assert torch.equal(moved.float(), target(codes.float(), *args))
    assert set(moved.unique().tolist()) <= set(codes.unique().tolist())


@pytest.mark.parametrize("target", sorted(IDENTITY, key=str), ids=str)
def test_identities_return_their_input(target: Any) -> None:
    x = normal(2, 3, 4)
    args = (0.5, False) if "dropout" in str(target) else ()
    assert torch.equal(target(x, *args), x)


@pytest.mark.parametrize("target", sorted(ACTIVATIONS, key=str), ids=str)
def test_activations_are_elementwise(target: Any) -> None:
    x = normal(64)
    args = (-0.5, 0.5) if target is aten.clamp.default else ()
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(target(x[shuffled], *args), target(x, *args)[shuffled])


class InSubgraph(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = self.l0(x)
        return self.l1(x)


class AddMatrix(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x, self.l0(x), self.l1.weight)


REPORTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lstm": (AWKWARD["lstm_middle"].build, (2, 7, 16)),
    "gru": (AWKWARD["gru_middle"].build, (2, 7, 16)),
    "rnn": (lambda: nn.RNN(16, 8, batch_first=True), (2, 7, 16)),
    "einsum": (AWKWARD["einsums"].build, (2, 5, 16)),
    "bilinear": (lambda: Compute(nn.Bilinear(16, 16, 4)), (2, 16)),
    "baddbmm": (AWKWARD["batched_products"].build, (2, 4, 6, 16)),
    "addmm with a matrix to add": (AddMatrix, (16, 16)),
    "a product in a subgraph": (InSubgraph, (2, 16)),
}


@pytest.mark.parametrize("name", REPORTED)
def test_products_are_sites_or_reported(name: str) -> None:
    """Else coverage would claim more than is true."""
    build, shape = REPORTED[name]
    inputs = (normal(*shape),) * (2 if name == "bilinear" else 1)
    prepared = prepare(capture(build(), *inputs).gm)
    products = len(prepared.sites) + len(prepared.float_ops)
    expected = {"lstm": 3, "gru": 3, "einsum": 4, "baddbmm": 3}
    expected |= {"addmm with a matrix to add": 2, "a product in a subgraph": 2}
    assert products == expected.get(name, 1)
    assert all(op.reason and op.macs for op in prepared.float_ops)


def test_hidden_probabilities_of_a_fully_masked_row_are_zero() -> None:
    q, k, v = (normal(1, 2, 3, 4, salt=i) for i in range(3))
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    probabilities = sdpa_probabilities(q, k, v, mask)
    assert torch.equal(probabilities[..., 1, :], torch.zeros(1, 2, 3))
    torch.testing.assert_close(probabilities.sum(-1)[..., [0, 2]], torch.ones(1, 2, 2))
    assert torch.equal(probabilities[..., 0, 1], torch.zeros(1, 2))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding", ["same", "valid", 2, [2], [1, 2]])
@pytest.mark.parametrize("kernel", [(3, 5), (2, 3), (2, 4)])
@pytest.mark.parametrize("dilation", [1, [3], [1, 2]])
def test_padding_in_numbers(padding: Any, kernel: tuple[int, int], dilation: Any) -> None:
    x, weight = normal(1, 1, 16, 15), normal(1, 1, *kernel)
    expected = F.conv2d(x, weight, padding=padding, dilation=dilation)
    sides, far = padding_sizes(padding, kernel, dilation)
    plain = F.conv2d(x, weight, padding=sides, dilation=dilation)
    assert bool(far) == (plain.shape != expected.shape)
    x = F.pad(x, far)
    torch.testing.assert_close(F.conv2d(x, weight, padding=sides, dilation=dilation), expected)
