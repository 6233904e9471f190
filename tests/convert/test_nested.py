"""Tensors that attributes lead to, through containers and objects, are part of a snapshot too."""

from __future__ import annotations

import copy
import pickle
import threading
import types
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from models import normal, seeded
from torch import Tensor, nn

from torch_quant import Quantizer
from torch_quant.convert.nested import Replaced, tensors_in

Pair = namedtuple("Pair", "word scale")


class Described(Pair):
    """A named tuple with a dictionary."""


@dataclass
class Box:
    scale: Tensor


@dataclass(frozen=True)
class FrozenBox:
    scale: Tensor
    words: list[str] = field(default_factory=list)


class Slots:
    __slots__ = ("__hidden", "scale")

    def __init__(self, scale: Tensor) -> None:
        self.scale = self.__hidden = scale

    @property
    def hidden(self) -> Tensor:
        return self.__hidden


class Attributes(dict):  # type: ignore[type-arg]
    """Its entries are its attributes."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(**entries)
        self.__dict__ = self


class Picky(dict):  # type: ignore[type-arg]
    """Takes other arguments than a dictionary does, and counts what code of it runs."""

    calls = 0

    def __init__(self, scale: Tensor, *, unit: str) -> None:
        super().__init__(scale=scale)
        self.unit = unit

    def __setitem__(self, key: Any, value: Any) -> None:
        raise RuntimeError("read only")


class Method:
    def __init__(self, scale: Tensor) -> None:
        self.scale, self.lock, self.get = scale, threading.Lock(), self.found

    def found(self) -> Tensor:
        return self.scale


def described(scale: Tensor) -> Described:
    made = Described("a word", scale)
    made.more = [scale]
    return made


HOLDERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "list": (lambda t: [t], lambda x: x[0]),
    "dict": (lambda t: {"a": [(1, t)]}, lambda x: x["a"][0][1]),
    "ordered": (lambda t: OrderedDict(a=t), lambda x: x["a"]),
    "default": (lambda t: defaultdict(list, {"a": [t]}), lambda x: x["a"][0]),
    "deque": (lambda t: deque([t], maxlen=2), lambda x: x[0]),
    "named": (lambda t: Pair("a word", t), lambda x: x.scale),
    "described": (described, lambda x: x.more[0]),
    "dataclass": (Box, lambda x: x.scale),
    "frozen": (FrozenBox, lambda x: x.scale),
    "namespace": (lambda t: types.SimpleNamespace(a=Box(t)), lambda x: x.a.scale),
    "slots": (Slots, lambda x: x.hidden),
    "attributes": (lambda t: Attributes(a=t), lambda x: x.a),
    "picky": (lambda t: Picky(t, unit="m"), lambda x: x["scale"]),
    "method": (lambda t: Method(t).found, lambda x: x()),
    "own_method": (Method, lambda x: x.get()),
}
"""Name -> (what holds a tensor, how code reads it)."""
UNCOPYABLE = ("attributes", "picky", "method", "own_method")
"""Of these Python itself makes no deep copy that works."""


class Scaled(nn.Module):
    """Runs as Python, and computes with a tensor that an attribute leads to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.kind, self.held = kind, HOLDERS[kind][0](torch.full((8,), 2.0))

    def scale(self) -> Tensor:
        return HOLDERS[self.kind][1](self.held)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.sum() > 1e9:
            y = y + 1
        return self.head(y * self.scale())


@pytest.mark.parametrize("kind", HOLDERS)
def test_a_snapshot_owns_what_containers_and_objects_hold(kind: str) -> None:
    model, x = seeded(lambda: Scaled(kind)).eval(), normal(3, 8)
    held = model.held
    quantizer = Quantizer("reference")
    assert torch.equal(quantizer.calib(model)(x), model(x))
    first, second = quantizer.quantize(model), quantizer.quantize(model)
    expected = first(x)
    assert type(first.held) is type(held)
    assert model.held is held
    copied = first if kind in UNCOPYABLE else copy.deepcopy(first)
    model.scale().mul_(-3)
    assert torch.equal(first(x), expected)
    assert torch.equal(copied(x), expected)
    first.scale().mul_(5)
    assert not torch.equal(first(x), expected)
    assert torch.equal(second(x), expected)
    assert copied is first or torch.equal(copied(x), expected)


@pytest.mark.parametrize("kind", HOLDERS)
def test_copies_are_like_what_they_are_copies_of(kind: str) -> None:
    tensor = torch.ones(2)
    make, read = HOLDERS[kind]
    value = make(tensor)
    assert any(x is tensor for x in tensors_in(value, set()))
    replaced = Replaced()
    assert replaced(value, lambda x: x) is value
    replaced = Replaced()
    new = replaced(value, lambda x: x + 1 if x is tensor else x)
    assert new is not value
    assert type(new) is type(value)
    assert read(value) is tensor
    assert torch.equal(read(new), torch.tensor([2.0, 2.0]))
    assert replaced({"again": value}, lambda x: x + 1 if x is tensor else x)["again"] is new


def test_what_else_there_is_stays() -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2

    picky = Replaced()(Picky(torch.ones(1), unit="m"), double)
    assert (picky.unit, list(picky)) == ("m", ["scale"])
    queue = Replaced()(deque([1, torch.ones(1)], maxlen=3), double)
    assert (queue.maxlen, queue[0]) == (3, 1)
    ordered = OrderedDict(b=torch.ones(1), a=1)
    ordered.move_to_end("b")
    assert list(Replaced()(ordered, double)) == ["a", "b"]
    made = Replaced()(defaultdict(list, a=torch.ones(1)), double)
    assert made["new"] == []
    new = Replaced()(Attributes(a=torch.ones(1)), double)
    assert new.a is new["a"]
    new["b"] = 3
    assert new.b == 3
    method = Method(torch.ones(1))
    copied = Replaced()(method, double)
    assert copied.lock is method.lock
    assert copied.get.__self__ is copied
    words = types.SimpleNamespace(words=["a"], name="b")
    both = Replaced()([words, torch.ones(1)], double)
    assert both[0] is words  # it holds no tensor


def cycles() -> dict[str, Any]:
    tensor, found = torch.ones(2), {}
    listed: list[Any] = [tensor]
    listed.append(listed)
    found["list"] = listed
    named: dict[str, Any] = {"scale": tensor}
    named["itself"] = [named]
    found["dict"] = named
    within: list[Any] = [tensor]
    found["tuple"] = (within, 1)
    within.append(found["tuple"])
    parent, child = types.SimpleNamespace(scale=tensor), types.SimpleNamespace()
    parent.child, child.parent = child, parent
    found["objects"] = child
    return found


@pytest.mark.parametrize("kind", cycles())
def test_what_leads_to_itself(kind: str) -> None:
    value = cycles()[kind]
    assert [x.shape for x in tensors_in(value, set())] == [(2,)]
    new = Replaced()(value, lambda x: x * 2)
    (tensor,) = tensors_in(new, set())
    assert torch.equal(tensor, torch.full((2,), 2.0))
    if kind == "list":
        assert new[1] is new
    elif kind == "dict":
        assert new["itself"][0] is new
    elif kind == "tuple":
        assert new[0][1] is new
    else:
        assert new.parent.child is new


class Cyclic(Scaled):
    def __init__(self, kind: str) -> None:
        super().__init__("list")
        self.held = [self.held[0], cycles()[kind]]
        self.first.registry = self.held


@pytest.mark.parametrize("capture", ["whole", "modules"])
@pytest.mark.parametrize("kind", cycles())
def test_models_whose_attributes_lead_to_themselves(kind: str, capture: Any) -> None:
    model, x = seeded(lambda: Cyclic(kind)).eval(), normal(3, 8)
    quantizer = Quantizer("reference", capture=capture)
    assert torch.equal(quantizer.calib(model)(x), model(x))
    quant_model = quantizer.quantize(model)
    assert set(quantizer.plan.quantized) == {"first", "head"}
    expected = quant_model(x)
    loaded = pickle.loads(pickle.dumps(quant_model))
    model.scale().mul_(-3)
    assert torch.equal(quant_model(x), expected)
    assert torch.equal(loaded(x), expected)


class SaysHow:
    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def __deepcopy__(self, memo: Any) -> SaysHow:
        return self


class Closes(SaysHow):
    closed = 0

    def __del__(self) -> None:
        type(self).closed += 1


class Failure(Exception):
    """Made by C code."""


def failure(scale: Tensor) -> Failure:
    made = Failure()
    made.scale = scale  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    "make",
    [
        SaysHow,
        Closes,
        failure,
        lambda t: types.SimpleNamespace(scale=t, layer=nn.Linear(2, 2)),
        lambda t: types.SimpleNamespace(scale=t, more=[Box(nn.Linear(2, 2).weight), nn.ReLU()]),
        lambda t: types.MappingProxyType({"scale": t}),
        lambda t: {t},
        lambda t: torch.max(t, dim=0),
    ],
    ids=["copies", "closes", "exception", "module", "module_below", "proxy", "set", "result"],
)
def test_what_stays_shared(make: Callable[[Tensor], Any]) -> None:
    value = make(torch.ones(2))
    new = Replaced()([value, torch.ones(1)], lambda x: x * 2)
    assert new[0] is value
    assert Replaced()(value, lambda x: x * 2) is value
    assert Closes.closed <= 1


class Scales:
    """A user's hook, which holds a tensor."""

    called: list[Any] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.scale = torch.full((4,), 2.0)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        Scales.called.append(self)
        return output * self.scale


def test_hooks_are_the_users_own() -> None:
    model, hook, x = seeded(lambda: Scaled("list")).eval(), Scales(), normal(3, 8)
    model.head.register_forward_hook(hook)
    quantizer = Quantizer("reference")
    quantizer.calib(model)(x)
    quant_model = quantizer.quantize(model)
    Scales.called.clear()
    quant_model(x)
    assert all(each is hook for each in Scales.called)
    assert len(Scales.called) == 1


def test_an_object_of_several_modules_stays_one() -> None:
    model, x = (
        seeded(lambda: nn.Sequential(Scaled("dataclass"), nn.Linear(4, 8))).eval(),
        normal(3, 8),
    )
    model.append(Scaled("dataclass").eval())
    model[2].held = model[0].held
    quantizer = Quantizer("reference")
    quantizer.calib(model)(x)
    quant_model = quantizer.quantize(model)
    quant_model(x)
    assert quant_model[0].held is quant_model[2].held
    assert quant_model[0].held is not model[0].held


class Rotary(nn.Module):
    """Reads several tensors of one attribute, of its own and of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tables = [torch.full((4,), 2.0), torch.full((4,), 3.0)]
        self.head.tables = {"a": torch.full((4,), 4.0), "b": [Box(torch.full((4,), 5.0))]}

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.sum() > 1e9:
            y = y + 1
        y = y * self.tables[0] + self.tables[1]
        return self.head(y) * self.head.tables["a"] + self.head.tables["b"][0].scale


@pytest.mark.parametrize("number", range(4))
def test_each_tensor_of_an_attribute_is_part_of_the_snapshot(number: int) -> None:
    model, x = seeded(Rotary).eval(), normal(4, 4)
    quantizer = Quantizer("reference")
    quantizer.calib(model)(x)
    quant_model = quantizer.quantize(model)
    expected = quant_model(x)
    list(tensors_in([model.tables, model.head.tables], set()))[number].mul_(-3)
    assert torch.equal(quant_model(x), expected)


class Neighbours(nn.Module):
    """Computes with a sparse tensor in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.table = [torch.eye(4).to_sparse()]

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.sum() > 1e9:
            y = y + 1
        return self.head(torch.sparse.mm(self.table[0], y))


def test_a_sparse_tensor_is_left_where_it_is() -> None:
    model, x = seeded(Neighbours).eval(), normal(4, 4)
    quantizer = Quantizer("reference")
    quantizer.calib(model)(x)
    quant_model = quantizer.quantize(model)
    assert quant_model.table[0] is model.table[0]
    assert torch.allclose(quant_model(x), model(x), atol=0.05)
