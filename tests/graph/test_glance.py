"""A quick look at a model sees whatever the thorough one would see."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_quant import QuantError, Quantizer
from torch_quant.graph.facts import attributes
from torch_quant.graph.glance import Glance
from torch_quant.state import QuantState
from torch_quant.statistics import MinMaxObserver


class Settings:
    def __init__(self) -> None:
        self.depth, self.names = 2, ["a"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.tied = self.body[0]
        self.scale, self.offset = 2.0, torch.zeros(4)
        self.settings, self.sizes = Settings(), {"x": (1, 2)}
        self.register_buffer("table", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale + self.offset


CHANGES: dict[str, Callable[[Any], object]] = {
    "a number": lambda m: setattr(m, "scale", 3.0),
    "another number of the kind": lambda m: setattr(m, "scale", float("2.5")),
    "a new attribute": lambda m: setattr(m, "other", 1),
    "one less": lambda m: delattr(m, "scale"),
    "another name": lambda m: (setattr(m, "second", m.scale), delattr(m, "scale")),
    "a tensor in place": lambda m: m.offset.add_(1),
    "an object's own": lambda m: setattr(m.settings, "depth", 3),
    "a list inside": lambda m: m.settings.names.append("b"),
    "a dict": lambda m: m.sizes.update(y=1),
    "a child's": lambda m: setattr(m.body[1], "eps", 0.1),
    "a hook": lambda m: m.body[0].register_forward_hook(lambda *_: None),
    "a parameter": lambda m: setattr(m.body[0], "weight", nn.Parameter(torch.ones(4, 4))),
    "a buffer": lambda m: setattr(m, "table", torch.zeros(4)),
    "a child": lambda m: m.body.__setitem__(0, nn.Linear(4, 4)),
    "one more child": lambda m: m.add_module("extra", nn.ReLU()),
    "a method": lambda m: setattr(m, "forward", lambda x: x),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_change_is_seen(what: str) -> None:
    model = Net().eval()
    glance, before = Glance(model), attributes(model)
    assert glance.agrees(model)
    assert glance.agrees(model)
    CHANGES[what](model)
    assert not glance.agrees(model)
    tensors = ("a parameter", "a buffer", "a child", "one more child")
    assert attributes(model) != before or what in tensors
    assert Glance(model).agrees(model) or what == "a hook"


def test_what_is_no_change() -> None:
    model = Net().eval()
    glance = Glance(model)
    with torch.no_grad():
        model(torch.ones(2, 4))
        model.body[0].weight.add_(1)  # values of parameters are looked after elsewhere
    assert glance.agrees(model)
    assert not glance.agrees(copy.deepcopy(model))


def test_it_does_not_keep_a_model_alive() -> None:
    model = Net()
    glance, gone = Glance(model), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert glance._modules


def test_scripted_parts_are_looked_at_thoroughly() -> None:
    model = nn.Sequential(torch.jit.trace(nn.ReLU(), torch.ones(2)))
    assert not Glance(model).agrees(model)


def test_a_proxy_follows_what_changes_between_batches() -> None:
    model, x = Net().eval(), torch.randn(3, 4)
    calib_model = Quantizer("reference").calib(model)
    for change in ("a number", "an object's own", "a parameter", "a child's", "a buffer"):
        assert torch.equal(calib_model(x), model(x))
        CHANGES[change](model)
        assert torch.equal(calib_model(x), model(x)), change


def test_a_batch_that_fails_leaves_statistics_that_replace_what_they_hold() -> None:
    """A class below, which may write in place, is copied whole unless it says the same."""

    class Counting(MinMaxObserver):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def _record(self, x: Tensor, low: Tensor, high: Tensor) -> None:
            super()._record(x, low, high)
            self.seen.append(x.numel())

    state = QuantState()
    makers: dict[str, Any] = {"range": MinMaxObserver, "counted": Counting}
    with state.batch():
        state.observe("x", makers, torch.ones(3))

    def failing() -> None:
        with state.batch():
            state.observe("x", makers, torch.full((2,), 9.0))
            state.observe("y", makers, torch.full((2,), torch.nan))

    with pytest.raises(QuantError, match="NaN"):
        failing()
    plain, counting = state.statistics["x"].values()
    assert isinstance(plain, MinMaxObserver)
    assert isinstance(counting, Counting)
    assert (plain.batches, float(plain.max_val)) == (1, 1.0)
    assert (counting.batches, float(counting.max_val), counting.seen) == (1, 1.0, [3])
