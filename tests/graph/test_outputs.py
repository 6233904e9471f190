from __future__ import annotations

import copy
import enum
import pickle
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from awkward import PlainCache
from capturing import Two, capture, executor, serve
from models import normal
from torch import Tensor

from torch_quant.errors import CaptureFailed
from torch_quant.graph.outputs import flatten_output, unflatten_output


class Pair(NamedTuple):
    mean: Any
    scale: Any


class Record:
    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second


class Color(enum.Enum):
    RED = 1


class Answer(dict):  # type: ignore[type-arg]
    """A dict of its own class, with nothing registered."""


class Rows(list):  # type: ignore[type-arg]
    pass


@dataclass
class Scored:
    scores: Tensor
    note: str = ""


@dataclass(slots=True)
class Slotted:
    scores: Tensor
    note: str = ""


def helper() -> None: ...


def same(x: Any, y: Any) -> bool:
    """Equality in type and content, tensors by identity."""
    if isinstance(x, Tensor):
        return x is y
    if type(x) is not type(y):
        return False
    if isinstance(x, dict):
        return list(x) == list(y) and all(same(x[key], y[key]) for key in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(same, x, y))
    if isinstance(x, (Record, Scored, PlainCache)):
        return same(vars(x), vars(y))
    if isinstance(x, Slotted):
        return same([x.scores, x.note], [y.scores, y.note])
    return bool(x == y)


def cache() -> PlainCache:
    made = PlainCache()
    made.states = {0: torch.ones(1), 7: torch.zeros(2)}
    return made


A, B = torch.ones(2), torch.zeros(3)

OUTPUTS = {
    "tensor": A,
    "tuple": (A, B),
    "nested": {"a": [A, (B, {"c": A})], "b": ()},
    "named tuple": Pair(A, [B]),
    "ordered dict": OrderedDict(b=A, a=B),
    "none": (A, None, None),
    "only none": None,
    "numbers": {"size": 3, "ratio": 0.5, "x": A},
    "constants": [A, True, "text", torch.float32, 1 + 2j, b"bytes"],
    "object": Record(A, "text"),
    "dataclass": Scored(A, "note"),
    "object in object": [Record(Record(A, (1, None)), {"b": B}), B],
    "cache": (A, cache()),
    "empty object": PlainCache(),
    "slots": Slotted(A, "note"),
    "enum": (A, Color.RED),
    "function": (A, helper, len, Record),
    "dict of its own class": Answer(logits=A, hidden=[B]),
    "list of its own class": Rows([A, B]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_there_and_back(name: str) -> None:
    leaves, spec = flatten_output(OUTPUTS[name])
    assert all(isinstance(leaf, (Tensor, int, float)) for leaf in leaves)
    assert same(unflatten_output(leaves, spec), OUTPUTS[name])


def test_leaves_are_the_tensors_and_numbers_in_order() -> None:
    leaves, _ = flatten_output({"x": A, "flag": True, "n": 3, "deep": [Record(B, 0.5), None]})
    assert [x if isinstance(x, (int, float)) else id(x) for x in leaves] == [id(A), 3, id(B), 0.5]


def test_other_leaves_make_another_output() -> None:
    output = [Record(A, "text"), Pair(B, 4)]
    _, spec = flatten_output(output)
    made = unflatten_output([torch.full((1,), 5.0), torch.full((1,), 6.0), 7], spec)
    assert made[0] is not output[0]
    assert (float(made[0].first), made[0].second) == (5.0, "text")
    assert (float(made[1].mean), made[1].scale) == (6.0, 7)
    assert output[0].first is A


def test_each_call_makes_a_new_object() -> None:
    leaves, spec = flatten_output(cache())
    first, second = unflatten_output(leaves, spec), unflatten_output(leaves, spec)
    first.states[0] = None
    assert second.states[0] is not None


def test_an_object_that_holds_itself_is_refused() -> None:
    record = Record(A, None)
    record.second = record
    with pytest.raises(CaptureFailed, match="more than 8 deep"):
        flatten_output(record)


class Returns(Two):
    kind = "object"

    def forward(self, x: Tensor) -> Any:
        y = self.l0(x)
        if self.kind == "slots":
            return Slotted(y)
        if self.kind == "dict":
            return Answer(scores=y)
        if self.kind == "list":
            return Rows([y])
        return Record(y, y.shape[0])


def scores(output: Any) -> Tensor:
    if isinstance(output, dict):
        return output["scores"]
    return output[0] if isinstance(output, list) else getattr(output, "scores", None)


@pytest.mark.parametrize("kind", ["slots", "dict", "list"])
def test_a_captured_output_never_loses_its_tensors(kind: str) -> None:
    """What cannot be taken apart may fail to be captured, but must not come back empty or stale."""
    model = Returns()
    model.kind = kind
    x = normal(3, 16)
    expected = scores(model(x))
    run, _ = executor(model)
    run(normal(2, 16))
    assert torch.equal(scores(run(x)), expected)


def test_what_the_model_sets_last_stays_last() -> None:
    """Items of such an output are read by number as well: ``output[1]``."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    output = BaseModelOutputWithPooling(last_hidden_state=A, hidden_states=(B,))
    output.pooler_output = B
    leaves, spec = flatten_output({"text": [A], "image": (output,)})
    for each in (spec, copy.deepcopy(spec)):
        made = unflatten_output(leaves, each)["image"][0]
        assert list(made) == ["last_hidden_state", "hidden_states", "pooler_output"]
        assert made[1] == (B,)
        assert made.pooler_output is B


def test_numbers_follow_the_call() -> None:
    output = serve(capture(Returns(), normal(2, 16)), normal(5, 16))
    assert isinstance(output, Record)
    assert output.second == 5


def test_a_spec_is_copied_and_pickled_in_silence() -> None:
    x = torch.ones(2)
    output = {"a": [x, (x, Pair(x, 3))], "b": OrderedDict(c=x), "d": Record(x, [x, None])}
    leaves, spec = flatten_output(output)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        others = [copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))]
    for other in others:
        assert other == spec
        again = unflatten_output(leaves, other)
        assert isinstance(again["a"][1][1], Pair)
        assert isinstance(again["b"], OrderedDict)
        assert again["d"].second[1] is None
        assert again["d"].first is x
