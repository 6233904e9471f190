from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flows import equal
from models import MODELS, example, images, normal
from rewriting import Compute, apply, captured, operators
from torch import Tensor, fx

from torch_quant.passes.dynamic_sizes import dynamic_sizes

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    # What the tracer thinks might be wrong at other sizes is checked at other sizes.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

Function = Callable[[Tensor], Tensor]


def window(x: Tensor) -> Tensor:
    """As window attention cuts a sequence, and puts it together again."""
    y = x.view(x.shape[0], x.shape[1] // 2, 2, x.shape[2]).transpose(1, 2)
    return y.reshape(x.shape[0], -1, x.shape[2])


def first_half_zeroed(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, : x.shape[1] // 2] = 0.0
    return y


def grown(x: Tensor) -> Tensor:
    zeros = x.new_zeros(x.shape[0], 1, x.shape[2])
    ones = torch.ones(x.shape[0], 1, x.shape[2])
    return torch.cat([zeros, x, ones], 1)


def causal(x: Tensor) -> Tensor:
    length = x.shape[1]
    return torch.full((length, length), 0.5).tril() @ x


SEQUENCES: dict[str, Function] = {
    "slice to a half": lambda x: x[:, : x.shape[1] // 2],
    "slice from a half, with a step": lambda x: x[:, x.shape[1] // 2 :: 2, 1:],
    "slice from the end": lambda x: x[:, x.shape[1] - 3 : -1],
    "slice by a negative axis": lambda x: torch.narrow(x, -2, 1, x.shape[1] - 2),
    "arange": lambda x: x + torch.arange(x.shape[1])[None, :, None],
    "arange from 1, of floats": lambda x: (
        x + torch.arange(1, x.shape[1] + 1, dtype=torch.float32)[None, :, None]
    ),
    "expand": lambda x: x[:, :1].expand(-1, x.shape[1], -1),
    "expand all": lambda x: torch.ones(1).expand(x.shape[0], x.shape[1], 1) * x,
    "repeat": lambda x: x[:1].repeat(x.shape[0], 1, 2),
    "zeros and ones": grown,
    "full and tril": causal,
    "eye": lambda x: torch.eye(x.shape[1]) @ x,
    "view and reshape": window,
    "reshape by a product": lambda x: x.reshape(x.shape[0] * x.shape[1], 2, -1).flatten(1),
    "unflatten": lambda x: x.unflatten(1, (2, x.shape[1] // 2)).sum(1),
    "flatten of a merged axis": lambda x: x.flatten(0, 1).cumsum(0),
    "split in halves": lambda x: x.chunk(2, 1)[1],
    "select the last": lambda x: x.select(1, x.shape[1] - 1),
    "roll": lambda x: x.roll(x.shape[1] // 2, 1),
    "divided by a size": lambda x: x / x.shape[1],
    "times the inverse of a size": lambda x: x * (1 / x.shape[1]),
    "divided by the root of a size": lambda x: x / x.shape[1] ** 0.5,
    "divided by the number of values": lambda x: x / x.numel(),
    "the larger of two sizes": lambda x: x[:, : max(x.shape[1] - 4, 1)],
    "norm over the last axis": lambda x: F.layer_norm(x, x.shape[2:]),
    "padding by a size": lambda x: F.pad(x, (0, x.shape[1])),
    "written into a slice": first_half_zeroed,
    "positions as embedding rows": lambda x: (
        F.embedding(torch.arange(x.shape[1]), torch.eye(32))[:, : x.shape[2]] + x
    ),
}


def small(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2)


IMAGES: dict[str, Function] = {
    "nearest": lambda x: F.interpolate(small(x), size=x.shape[-2:]),
    "nearest-exact": lambda x: F.interpolate(small(x), size=x.shape[-2:], mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(
        small(x), size=x.shape[-2:], mode="bilinear", align_corners=False
    ),
    "bilinear, corners aligned": lambda x: F.interpolate(
        small(x), size=(x.shape[2] + 1, x.shape[3] - 1), mode="bilinear", align_corners=True
    ),
    "unfold and fold": lambda x: F.fold(
        F.unfold(x, 2, stride=2) * 2, (x.shape[2], x.shape[3]), 2, stride=2
    ),
    "bicubic": lambda x: F.interpolate(small(x), size=x.shape[-2:], mode="bicubic"),
    "bilinear, antialiased": lambda x: F.interpolate(
        x, size=(x.shape[2] // 2, x.shape[3] // 2), mode="bilinear", antialias=True
    ),
    "area": lambda x: F.interpolate(x, size=(x.shape[2] // 2, x.shape[3] // 2), mode="area"),
    "linear, 1-D": lambda x: F.interpolate(x.flatten(2), size=x.shape[2], mode="linear"),
    "nearest, 1-D": lambda x: F.interpolate(x.flatten(2), size=x.shape[2]),
    "nearest, 3-D": lambda x: F.interpolate(x[:, None], size=(2, x.shape[2] + 1, x.shape[3])),
    "by a factor": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "adaptive pool to a size": lambda x: F.adaptive_avg_pool2d(x, (x.shape[2] // 2, 3)),
}


def trace(gm: fx.GraphModule, *inputs: Tensor) -> Any:
    return torch.jit.trace(gm, inputs, check_trace=False)


def assert_right_at_other_sizes(function: Function, example: Tensor, *others: Tensor) -> None:
    """Bit for bit: the same operators, by other names."""
    gm = captured(Compute(function), example)
    apply(dynamic_sizes, gm)
    traced = trace(gm, example)
    for x in (example, *others):
        expected = function(x)
        for run in (gm, traced):
            (actual,) = run(x)
            assert actual.shape == expected.shape
            assert torch.equal(actual, expected)


@pytest.mark.sparse
@pytest.mark.parametrize("name", SEQUENCES)
def test_traced_at_one_length_right_at_another(name: str) -> None:
    function = SEQUENCES[name]
    assert_right_at_other_sizes(function, normal(2, 6, 8), normal(3, 10, 8), normal(1, 8, 8))


@pytest.mark.parametrize("name", IMAGES)
def test_traced_at_one_image_size_right_at_another(name: str) -> None:
    assert_right_at_other_sizes(IMAGES[name], images(2, 8), images(3, 12), images(1, 16))


@pytest.mark.parametrize("name", MODELS)
def test_models_at_another_batch_size(name: str) -> None:
    model = MODELS[name]()
    gm = captured(model, *example(name, 2))
    apply(dynamic_sizes, gm)
    traced = trace(gm, *example(name, 2))
    for batch in (1, 2, 5):
        assert equal(traced(*example(name, batch))[0], model(*example(name, batch)))


def test_reads_of_sizes_and_their_users_are_counted() -> None:
    gm = captured(Compute(lambda x: x[None].expand(3, x.shape[0], -1) + 1), normal(2, 6))
    assert apply(dynamic_sizes, gm) == 2
    methods = [node.target for node in gm.graph.nodes if node.op == "call_method"]
    assert methods == ["size", "expand"]
    assert "add" in operators(gm)


def test_nothing_to_change() -> None:
    gm = captured(Compute(lambda x: x.relu()[:, 1:3]), normal(2, 6))
    before = [(node.op, node.target) for node in gm.graph.nodes]
    assert apply(dynamic_sizes, gm) == 0
    assert [(node.op, node.target) for node in gm.graph.nodes] == before


def test_sizes_among_the_outputs() -> None:
    gm = captured(Compute(lambda x: (x + 1, x.shape[1] * 2)), normal(2, 6))
    apply(dynamic_sizes, gm)
    values, size = gm(normal(3, 9))
    assert size == 18
    assert torch.equal(values, normal(3, 9) + 1)
