"""A call like an earlier one goes to the same graph, and gives what the long way gives."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_quant import CaptureFailed, Quantizer
from torch_quant.convert import quantized as module


class Pair(nn.Module):
    """Two tensors, one optional, and constants that change what is computed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, minus: bool = False, power: float = 1.0
    ) -> dict[str, Tensor]:
        u = self.a(x)
        v = u if y is None else self.b(y)
        return {"u": u, "v": (u - v if minus else u + v) * power}


X, Y = (torch.randn(3, 8, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "alone": ((X,), {}),
    "by name": ((), {"x": X, "y": Y}),
    "names the other way": ((), {"y": Y, "x": X}),
    "by position": ((X, Y), {}),
    "exchanged": ((Y, X), {}),
    "the same twice": ((X, X), {}),
    "a constant": ((X, Y), {"minus": True}),
    "its default": ((X, Y), {"minus": False}),
    "a number": ((X, Y), {"power": 2.0}),
    "another number": ((X, Y), {"power": 1}),
    "None": ((X, None), {}),
    "other sizes": ((X[:2], Y[:2]), {}),
    "other sizes again": ((X[:1].expand(5, 8), Y[:1].expand(5, 8)), {"minus": True}),
}


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that were bound."""
    seen, bind = list[Any](), module.bind

    def counted(*given: Any) -> Any:
        seen.append(given[1:])
        return bind(*given)

    monkeypatch.setattr(module, "bind", counted)
    return seen


def quantized(model: nn.Module) -> nn.Module:
    quantizer = Quantizer("reference", capture="whole")
    calib_model = quantizer.calib(model)
    for args, kwargs in CALLS.values():
        calib_model(*args, **kwargs)
    return quantizer.quantize(model)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_each_way_of_calling_it_gives_its_own_result(long_ways: list[Any]) -> None:
    fresh = quantized(Pair().eval())
    expected = {}
    for name, (args, kwargs) in CALLS.items():
        model = copy.deepcopy(fresh)  # which remembers nothing
        expected[name] = model(*args, **kwargs)
    for _ in range(3):
        for name, (args, kwargs) in CALLS.items():
            assert equal(fresh(*args, **kwargs), expected[name]), name
    before = len(long_ways)
    for args, kwargs in CALLS.values():
        fresh(*args, **kwargs)
    # Those with a number, since 1 and 1.0 are equal and yet different calls.
    assert len(long_ways) - before == 2


def test_a_tensor_that_was_given_twice_is_two_in_the_next_call() -> None:
    fresh = quantized(Pair().eval())
    expected = copy.deepcopy(fresh)(X, Y)
    fresh(X, X)
    assert equal(fresh(X, Y), expected)


def test_what_no_graph_takes_is_told_as_before() -> None:
    model = quantized(Pair().eval())
    model(X, Y)
    for _ in range(2):
        with pytest.raises(CaptureFailed, match=r"y\.shape\[0\] is 2, but x\.shape"):
            model(X, Y[:2])
        with pytest.raises(CaptureFailed, match=r"is torch\.float64"):
            model(X, Y.double())


def test_copies_pickles_and_threads() -> None:
    model = quantized(Pair().eval())
    expected = model(X, Y)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.a.bias.add_(1.0)
    assert not equal(moved(X, Y), expected)
    assert equal(model(X, Y), expected)
    assert equal(pickle.loads(pickle.dumps(model))(X, Y), expected)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: model(*(X, Y)[:: 1 - 2 * (i % 2)]), range(40)))
    assert all(equal(each, results[i % 2]) for i, each in enumerate(results))


def test_few_are_remembered() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            total: Tensor = self.fc(x) + y
            return total

    quantizer = Quantizer("reference", capture="whole")
    float_model = Sum().eval()
    quantizer.calib(float_model)(torch.randn(3, 4), torch.randn(3, 4))
    model: Any = quantizer.quantize(float_model)
    for n in range(1, 600):
        x = torch.randn(n, 4)
        assert torch.equal(model(x, x + 1), model(x=x, y=x + 1))
    assert 0 < len(model.quantization.remembered.known) <= 256


class Numbers(nn.Module):
    """An output is a string of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor, tag: str = "") -> tuple[Tensor, str]:
        return self.fc(x) + y, tag


def test_a_string_that_is_handed_on_is_that_of_the_call() -> None:
    float_model, x = Numbers().eval(), torch.randn(2, 4)
    quantizer = Quantizer("reference", capture="whole")
    calib_model = quantizer.calib(float_model)
    for tag in ("a", "b", "c"):
        calib_model(x, x + 1, tag)
    model = quantizer.quantize(float_model)
    for _ in range(2):
        for tag in ("a", "b", "c", "never seen"):
            assert model(x, x + 1, tag)[1] == tag


def test_a_change_of_an_argument_reaches_it_each_time() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, seen: dict[str, Tensor]) -> Tensor:
            y: Tensor = self.fc(x)
            seen["n"] = seen["n"] + 1
            return y

    float_model, x = Counts().eval(), torch.randn(2, 4)
    quantizer = Quantizer("reference", capture="whole")
    quantizer.calib(float_model)(x, {"n": torch.zeros(1)})
    model, seen = quantizer.quantize(float_model), {"n": torch.zeros(1)}
    for _ in range(3):
        model(x, seen)
    assert seen["n"].item() == 3
