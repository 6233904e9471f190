from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import normal, seeded
from rewriting import apply, captured, operators
from torch import Tensor, nn

from torch_quant.graph.sites import find_sites, is_constant, name_tensors
from torch_quant.passes.fold_batch_norm import fold_batch_norm

aten = torch.ops.aten

Build = Callable[[], nn.Module]


def pair(first: nn.Module, norm: nn.Module) -> Build:
    return lambda: seeded(lambda: nn.Sequential(first, norm))


FOLDED: dict[str, tuple[Build, tuple[int, ...]]] = {
    "conv1d": (pair(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9)),
    "conv2d": (pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), (2, 4, 7, 7)),
    "conv3d": (pair(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6)), (2, 4, 5, 5, 5)),
    "no bias": (pair(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), (2, 4, 7, 7)),
    "same padding": (pair(nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6)), (2, 4, 7, 7)),
    "strided": (pair(nn.Conv2d(4, 6, 3, 2, 1, 2), nn.BatchNorm2d(6)), (2, 4, 9, 9)),
    "grouped": (pair(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 7, 7)),
    "depthwise": (pair(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), (2, 4, 7, 7)),
    "not affine": (pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), (2, 4, 7, 7)),
    "not affine, no bias": (
        pair(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False)),
        (2, 4, 7, 7),
    ),
    "large eps": (pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.5)), (2, 4, 7, 7)),
    "conv_transpose1d": (
        pair(nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6)),
        (2, 4, 9),
    ),
    "conv_transpose2d": (
        pair(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), nn.BatchNorm2d(6)),
        (2, 4, 7, 7),
    ),
    "as many channels in as out": (
        pair(nn.ConvTranspose2d(6, 6, 3), nn.BatchNorm2d(6)),
        (2, 6, 5, 5),
    ),
    "linear, rows": (pair(nn.Linear(16, 8), nn.BatchNorm1d(8)), (5, 16)),
    "linear, no bias": (pair(nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8)), (5, 16)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name: str) -> None:
    """The scale is applied before the sum and not after: a few roundings more, relative 1e-6."""
    build, shape = FOLDED[name]
    model = build()
    gm = captured(model, normal(*shape))
    assert apply(fold_batch_norm, gm) == 1
    assert "batch_norm" not in operators(gm)
    for batch in (1, 3):
        x = normal(batch, *shape[1:])
        torch.testing.assert_close(gm(x)[0], model(x), rtol=1e-5, atol=1e-5)


def test_the_new_weight_and_bias_are_expressions_over_the_models_own() -> None:
    model = FOLDED["conv2d"][0]()
    values = {name: x.clone() for name, x in model.state_dict().items()}
    gm = captured(model, normal(2, 4, 7, 7))
    own = {id(x) for x in (*model.parameters(), *model.buffers())}
    apply(fold_batch_norm, gm)
    (product,) = gm.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    assert is_constant(product.args[1])
    assert is_constant(product.args[2])
    assert {id(x) for x in (*gm.parameters(), *gm.buffers())} <= own
    assert all(torch.equal(x, values[name]) for name, x in model.state_dict().items())


def test_the_product_stays_a_site_under_its_name() -> None:
    gm = captured(FOLDED["conv2d"][0](), normal(2, 4, 7, 7))
    apply(fold_batch_norm, gm)
    name_tensors(gm.graph)
    ((_, _, site),) = find_sites(gm.graph)
    assert site.name == "0"
    assert site.op == "conv2d"
    assert site.weight_shape == (6, 4, 3, 3)


def test_several() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.BatchNorm2d(4),
        )
    )
    gm = captured(model, normal(2, 3, 8, 8))
    assert apply(fold_batch_norm, gm) == 3  # the last one onto the weight already folded
    x = normal(3, 3, 8, 8)
    torch.testing.assert_close(gm(x)[0], model(x), rtol=1e-5, atol=1e-5)


class Used(nn.Module):
    """The convolution's output is read by someone else as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class MadeWeight(nn.Module):
    """The weight depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.bn = nn.Linear(16, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.linear(x, self.make(x).t() @ x))


class OfTheBatch(nn.Module):
    """Normalizes by the statistics of what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean.clone(), self.var.clone(), training=True)


class Activated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).relu())


LEFT: dict[str, tuple[Build, tuple[int, ...]]] = {
    "grouped transposed: axis 1 is a group's share": (
        pair(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        (2, 4, 7, 7),
    ),
    "linear of sequences: channels are axis 1": (
        pair(nn.Linear(16, 8), nn.BatchNorm1d(8)),
        (2, 8, 16),
    ),
    "unbatched convolution: its rows are the batch": (
        pair(nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)),
        (4, 6),
    ),
    "no running statistics": (
        pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)),
        (2, 4, 7, 7),
    ),
    "statistics of the batch": (lambda: seeded(OfTheBatch), (2, 4, 7, 7)),
    "used twice": (lambda: seeded(Used), (2, 4, 7, 7)),
    "weight that is an activation": (lambda: seeded(MadeWeight), (16, 16)),
    "an activation function between": (lambda: seeded(Activated), (2, 4, 7, 7)),
    "batch norm first": (pair(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), (2, 4, 7, 7)),
    "no product": (pair(nn.ReLU(), nn.BatchNorm2d(4)), (2, 4, 7, 7)),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_as_it_is(name: str) -> None:
    build, shape = LEFT[name]
    model = build()
    x = normal(*shape)
    gm = captured(model, x)
    assert apply(fold_batch_norm, gm) == 0
    assert "batch_norm" in operators(gm)
    assert torch.equal(gm(x)[0], model(x))


class WritesBetween(nn.Module):
    """What the convolution has read is written to before the norm runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        x.mul_(-2.0)
        return self.bn(y) + x.mean()


def test_the_product_still_runs_where_it_ran() -> None:
    model = seeded(WritesBetween)
    gm = captured(model, normal(2, 4, 7, 7))
    apply(fold_batch_norm, gm)
    actual, expected = gm(normal(3, 4, 7, 7))[0], model(normal(3, 4, 7, 7))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


class ComputedGain(nn.Module):
    """The norm's gain is an expression, computed after the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain = nn.Conv2d(4, 6, 3), nn.Parameter(torch.randn(6))
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, self.gain.exp())


class GainOfTheInput(ComputedGain):
    """The norm's gain depends on the input: folded, the weight would be no constant."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, x.mean() * self.gain)


@pytest.mark.parametrize("build", [ComputedGain, GainOfTheInput])
def test_a_computed_gain(build: Build) -> None:
    """Folded or not, the graph stays in order, right, and its convolution a site."""
    model = seeded(build)
    gm = captured(model, normal(2, 4, 7, 7))
    apply(fold_batch_norm, gm)
    name_tensors(gm.graph)
    assert [site.op for _, _, site in find_sites(gm.graph)] == ["conv2d"]
    x = normal(3, 4, 7, 7)
    torch.testing.assert_close(gm(x)[0], model(x), rtol=1e-5, atol=1e-5)
