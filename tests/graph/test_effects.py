from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from capturing import capture
from models import normal
from torch import Tensor, nn

from torch_quant.graph.effects import KeepsState, Watch, assign
from torch_quant.graph.facts import attributes


class Remembers(nn.Module):
    """Writes to itself in one of many ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(16, 16), how
        self.kept: Any = [] if how.startswith("list") else None
        if how.startswith("array"):
            self.kept = np.zeros(1, np.float32)
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.how == "sum":
            y = y if self.kept is None else y + self.kept
            self.kept = y
        elif self.how == "delay":
            y, self.kept = y if self.kept is None else y + self.kept, x
        elif self.how == "first input":
            if self.kept is None:
                self.kept = x.mean(0)
            y = y + self.kept
        elif self.how == "list":
            self.kept.append(y)
            y = torch.stack(list(self.kept)).sum(0)
        elif self.how == "counter":
            self.count += 1
        elif self.how == "last result":
            self.kept = y * 2
        elif self.how == "table":
            if self.kept is None:
                self.kept = torch.arange(16.0)
            y = y + self.kept
        elif self.how.startswith("array"):
            if self.how == "array, read":
                y = y + float(self.kept[0])
            self.kept[0] += 1
        elif self.how == "size":
            self.count = x.shape[0]
        return y


@pytest.mark.parametrize("how", ["sum", "delay", "first input", "list", "counter", "array, read"])
def test_what_a_module_keeps_for_its_next_call_is_found(how: str) -> None:
    model = Remembers(how).eval()
    before = copy.deepcopy(vars(model))
    with pytest.raises(KeepsState, match="count" if how == "counter" else "kept"):
        capture(model, normal(3, 16))
    assert model.kept == before["kept"]
    assert model.count == before["count"]


@pytest.mark.parametrize("how", ["last result", "table", "size", "nothing"])
def test_what_no_call_reads_is_no_state(how: str) -> None:
    model = Remembers(how).eval()
    graph = capture(model, normal(3, 16))
    assert graph.exact
    assert graph.leaves_behind == {"size": ("count",), "nothing": ()}.get(how, ("kept",))
    assert model.kept is None
    assert model.count == 0


def test_an_array_that_no_call_reads_is_no_state() -> None:
    model = Remembers("array").eval()
    assert capture(model, normal(3, 16)).leaves_behind == ("kept",)
    assert model.kept == 0


def test_watch_sees_and_undoes_what_happens_inside() -> None:
    held = SimpleNamespace(items=deque([1, 2]), seen={3}, deep={"a": [torch.zeros(2)]})
    watch = Watch({"held": held})
    assert watch.changed() == []
    held.items.append(4)
    held.seen.add(5)
    held.deep["a"][0].add_(1)
    held.deep["b"] = 6
    held.new = 7
    assert set(watch.changed()) == {
        "held.items", "held.seen", "held.deep.a.0", "held.deep.b", "held.new",
    }  # fmt: skip
    watch.restore()
    assert watch.changed() == ["held.deep.a.0"]  # its value is back, its version is not
    assert held.items == deque([1, 2])
    assert held.seen == {3}
    assert held.deep["a"][0].tolist() == [0, 0]
    assert list(held.deep) == ["a"]
    assert not hasattr(held, "new")


def test_assign_keeps_the_callers_objects() -> None:
    inner: list[Any] = [1]
    old = {"a": inner, "b": (inner, 2), "gone": 3}
    result = assign(old, {"a": [4, 5], "b": ([4, 5], 2), "new": 6})
    assert result is old
    assert old["a"] is inner
    assert old["b"][0] is inner
    assert old == {"a": [4, 5], "b": ([4, 5], 2), "new": 6}


def test_attributes_tell_what_a_user_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model.scale, model.config = 2.0, SimpleNamespace(sizes=[1, 2])
    before = attributes(model)
    model.train()
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert attributes(model) == before
    model.config.sizes[1] = 3
    assert attributes(model) != before
    model.config.sizes[1] = 2
    assert attributes(model) == before
    model.scale = 3.0
    assert attributes(model) != before


@torch.no_grad()
@pytest.mark.parametrize("assigned", [False, True])
def test_weights_that_a_module_lists_are_no_attributes(assigned: bool) -> None:
    """An LSTM keeps a list of its parameters, and weak references to them."""
    model, other = nn.LSTM(4, 4), nn.LSTM(4, 4)
    before = attributes(model)
    model.load_state_dict(other.state_dict(), assign=assigned)
    assert attributes(model) == before


def test_attributes_of_any_type_are_compared() -> None:
    model = nn.Linear(2, 2)
    model._table, model._flag = torch.ones(3), 0
    before = attributes(model)
    assert attributes(model) == before
    model._flag = 1
    assert attributes(model) != before


def test_assign_takes_attributes_away() -> None:
    old = SimpleNamespace(kept=1, gone=2)
    assert assign(old, SimpleNamespace(kept=3)) is old
    assert vars(old) == {"kept": 3}


def test_facts_about_attributes_do_not_keep_the_model() -> None:
    model = Remembers("sum")
    model.kept = functools.partial(model.forward)
    model.helper = SimpleNamespace(call=functools.partial(model), owner=model)
    facts = attributes(model)
    assert facts == attributes(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert facts != attributes(Remembers("sum"))
