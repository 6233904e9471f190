from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD
from models import normal, seeded
from rewriting import Compute, Two, apply, captured, mutating
from torch import Tensor

from torch_quant.graph.calls import flatten_call
from torch_quant.passes.functionalize import functionalize, written_tensors

aten = torch.ops.aten

Function = Callable[[Tensor], Any]


def chained(x: Tensor) -> Tensor:
    return (x * 2).add_(x).relu_().mul_(0.5)


def read_later(x: Tensor) -> Tensor:
    """Who reads ``y`` after the write sees what was written."""
    y = x * 2
    y.relu_()
    return y + x


def read_before(x: Tensor) -> Tensor:
    """Who reads ``y`` before the write does not."""
    y = x * 2
    before = y.abs()
    y.relu_()
    return before + y


def read_by_name_and_by_result(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    z = y.add_(1)
    return y * 3, z


def filled(x: Tensor) -> Tensor:
    y = x * 2
    y.fill_(3.0)
    return y * x


def copied(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.copy_(x[:1])
    return y + 1


def written_with_another(x: Tensor) -> Tensor:
    y, z = x * 2, x.abs()
    y.sub_(z, alpha=2)
    return y - z


REWRITTEN: dict[str, tuple[Function, int]] = {
    "relu_": (lambda x: (x + 1).relu_(), 1),
    "F.relu_": (lambda x: F.relu_(x + 1), 1),
    "inplace=True": (lambda x: F.relu(F.hardtanh(x * 3, inplace=True), inplace=True), 2),
    "add_": (lambda x: (x * 2).add_(x), 1),
    "add_ with alpha": (lambda x: (x * 2).add_(x, alpha=0.5), 1),
    "mul_ by a number": (lambda x: (x + 2).mul_(2.0), 1),
    "clamp_": (lambda x: (x + 2).clamp_(min=0.1, max=1.5), 1),
    "masked_fill_": (lambda x: (x + 2).masked_fill_(x > 0, -1.0), 1),
    "leaky_relu_": (lambda x: F.leaky_relu(x + 2, 0.2, inplace=True), 1),
    "index_fill_": (lambda x: (x + 2).index_fill_(1, torch.arange(3), 7.0), 1),
    "chained": (chained, 3),
    "read later": (read_later, 1),
    "read before": (read_before, 1),
    "read by name and by result": (read_by_name_and_by_result, 1),
    "filled": (filled, 1),
    "copied": (copied, 1),
    "written with another": (written_with_another, 1),
}


def outputs(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def assert_as_the_model(gm: torch.fx.GraphModule, model: torch.nn.Module, *shape: int) -> None:
    """Twice, on inputs of their own: a write must reach exactly what it reached before."""
    for batch in (shape[0], shape[0] + 1):
        first, second = normal(batch, *shape[1:]), normal(batch, *shape[1:])
        expected, actual = outputs(model(first)), outputs(gm(second))
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewritten(name: str) -> None:
    """Bit for bit: the functional operator computes the same."""
    function, count = REWRITTEN[name]
    gm = captured(Compute(function), normal(4, 6))
    assert len(mutating(gm)) == count
    assert apply(functionalize, gm) == count
    assert not mutating(gm)
    assert not written_tensors(gm.graph)
    assert_as_the_model(gm, Compute(function), 4, 6)


def base_of_a_view(x: Tensor) -> Tensor:
    y = x * 2
    part = y[:, 0]
    y.relu_()
    return part


def view_of_a_base(x: Tensor) -> Tensor:
    y = x * 2
    y.view(-1).relu_()
    return y


def slice_assigned(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = 0.5
    y[1:, 2:].mul_(2.0)
    return y


def second_view(x: Tensor) -> Tensor:
    y = (x * 2).transpose(0, 1)
    z = y.unsqueeze(0)
    z.add_(1)
    return y


def input_written(x: Tensor) -> Tensor:
    x.relu_()
    return x + 1


def view_of_the_input_written(x: Tensor) -> Tensor:
    x[0].zero_()
    return x * 2


LEFT: dict[str, Function] = {
    "a view was taken before": base_of_a_view,
    "through a view": view_of_a_base,
    "through slices": slice_assigned,
    "through a view of a view": second_view,
    "the input": input_written,
    "a part of the input": view_of_the_input_written,
}


@pytest.mark.parametrize("name", LEFT)
def test_left_as_it_is(name: str) -> None:
    gm = captured(Compute(LEFT[name]), normal(4, 6))
    before = mutating(gm)
    assert before
    assert apply(functionalize, gm) == 0
    assert mutating(gm) == before
    assert written_tensors(gm.graph)
    assert_as_the_model(gm, Compute(LEFT[name]), 4, 6)


class WritesPart(Two):
    """Writes to a part that an operator with several results gave, then reads the whole."""

    parts: Callable[[Tensor], Any]

    def forward(self, x: Tensor) -> Tensor:
        y = self.l0(x)
        part = type(self).parts(y)[0]
        part.mul_(-1.0)
        return self.l1(y)


class Chunked(WritesPart):
    parts = staticmethod(lambda y: y.chunk(2, -1))


class Unbound(WritesPart):
    parts = staticmethod(lambda y: y.unbind(1))


class Split(WritesPart):
    parts = staticmethod(lambda y: y.split([4, 12], 1))


@pytest.mark.parametrize("build", [Chunked, Unbound, Split])
def test_a_part_of_several_is_a_view_too(build: Callable[[], WritesPart]) -> None:
    model = seeded(build)
    gm = captured(model, normal(4, 16))
    assert apply(functionalize, gm) == 0
    (whole,) = [n for n in gm.graph.nodes if n.target is aten.linear.default][:1]
    assert whole in written_tensors(gm.graph)
    assert_as_the_model(gm, model, 4, 16)


def test_a_wider_operand_does_not_widen_the_result() -> None:
    """Written in place, float32 stays float32; the functional operator would give float64."""

    def compute(x: Tensor) -> Tensor:
        y = x * 2
        return y.add_(torch.ones(6, dtype=torch.float64))

    gm = captured(Compute(compute), normal(4, 6))
    apply(functionalize, gm)
    assert_as_the_model(gm, Compute(compute), 4, 6)


class Running(Two):
    """Writes to its own buffer, and reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.l0(x - self.mean)


def test_a_buffer_is_written_at_every_call() -> None:
    model, same = seeded(Running), seeded(Running)
    gm = captured(model, normal(4, 16))
    apply(functionalize, gm)
    for _ in range(3):
        assert torch.equal(gm(normal(4, 16))[0], same(normal(4, 16)))
    assert torch.equal(model.mean, same.mean)
    assert model.mean.abs().sum() > 0


@pytest.mark.parametrize("name", ["in_place", "in_place_after_read", "in_place_on_input"])
def test_awkward_models(name: str) -> None:
    entry = AWKWARD[name]
    model = entry.build()
    gm = captured(model, *entry.inputs(2)[0])
    apply(functionalize, gm)
    for batch in (2, 3):
        tensors = flatten_call(*entry.inputs(batch)).tensors
        assert torch.equal(gm(*tensors)[0], model(*entry.inputs(batch)[0]))


def test_written_tensors_are_the_base_and_all_its_views() -> None:
    def compute(x: Tensor) -> Tensor:
        clean = x * 2
        base = clean + 1
        view = base.transpose(0, 1)
        row = view[0]
        row.zero_()
        return clean * view.reshape(-1).sum() + base.exp()

    gm = captured(Compute(compute), normal(4, 6))
    dirty = {node.target for node in written_tensors(gm.graph)}
    assert {aten.add.Tensor, aten.transpose.int, aten.select.int, aten.zero_.default} <= dirty
    assert not {aten.exp.default, aten.sum.default} & dirty
    written = {node.name for node in written_tensors(gm.graph)}
    assert not {n.name for n in gm.graph.find_nodes(op="placeholder")} & written
    clean = next(n for n in gm.graph.nodes if n.target is aten.mul.Tensor)
    assert clean not in written_tensors(gm.graph)


def test_a_copy_is_not_the_original() -> None:
    def compute(x: Tensor) -> Tensor:
        y = x * 2
        z = y.clone()
        z[:, 0] = 0.0
        return y + z

    gm = captured(Compute(compute), normal(4, 6))
    dirty = {node.target for node in written_tensors(gm.graph)}
    assert aten.clone.default in dirty
    assert aten.mul.Tensor not in dirty
