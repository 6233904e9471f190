"""Numbers become inputs of a graph and unread strings leave it, wherever that is right."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capturing import executor
from models import normal
from torch import Tensor, nn

from torch_quant.graph.kinds import Number, Unread

pytestmark = pytest.mark.sparse

X = normal(4, 8)


class Layer(nn.Module):
    """A linear layer, and whatever ``compute`` does with it."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.linear, self.compute = nn.Linear(8, 8), compute

    def forward(self, x: Any, *args: Any) -> Any:
        return self.compute(self.linear, x, *args)


def embedded(linear: nn.Module, x: Tensor, timestep: Any) -> Tensor:
    """As diffusion models do it."""
    if not torch.is_tensor(timestep):
        dtype = torch.float64 if isinstance(timestep, float) else torch.int64
        timestep = torch.tensor([timestep], dtype=dtype)
    steps = timestep.expand(x.shape[0])
    angles = steps[:, None].float() * torch.exp(-math.log(100) * torch.arange(4) / 4)
    return linear(x + torch.cat([angles.sin(), angles.cos()], -1))


def looped(linear: nn.Module, x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = linear(x)
    return x


def switched(linear: nn.Module, x: Tensor, mode: str) -> Tensor:
    return linear(x) if mode.startswith("plain") else linear(x).relu()


def kinds(submodule: Any) -> list[Any]:
    return [[first for first, _ in kind.leaves[1:]] for kind, _ in submodule.graphs]


@pytest.mark.parametrize(
    ("compute", "values"),
    [
        (embedded, [10, 0, 999, -3]),
        (lambda linear, x, t: (linear(x) / t).softmax(-1), [0.7, 1.3, 1e-3, -2.0]),
        (lambda linear, x, t: linear(x * t), [3, 0, -2]),
        (lambda linear, x, t: linear(x) + torch.full((x.shape[0], 8), t), [0.5, 2.5]),
        (lambda linear, x, t: linear(x).clamp(max=t), [0.5, -1.0]),
    ],
    ids=["timestep", "temperature", "int", "full", "clamp"],
)
def test_a_number_is_an_input(compute: Any, values: list[Any]) -> None:
    model = Layer(compute)
    run, submodule = executor(model)
    for value in values:
        assert torch.equal(run(X, value), model(X, value))
    assert kinds(submodule) == [[Number]]


@pytest.mark.parametrize(
    ("compute", "values"),
    [
        (looped, [3, 2]),
        (lambda linear, x, t: linear(x) if t > 0.5 else x, [0.7, 0.2]),
        (lambda linear, x, t: linear(x)[:, :t], [3, -1]),
        (lambda linear, x, t: linear(x).cumsum(t), [0, 1]),
        (lambda linear, x, t: {"y": linear(x), "t": 2 * t}, [0.5, 1.5]),
        (lambda linear, x, t: {"y": linear(x), "large": t > 1}, [0.5, 1.5]),
        (lambda linear, x, t: F.dropout(linear(x), t, False), [0.5, 0.1]),
        (embedded, [10.0, 10.5]),
    ],
    ids=["loop", "branch", "slice", "axis", "output", "flag", "probability", "type"],
)
def test_a_number_that_a_graph_cannot_take_stays_fixed(compute: Any, values: list[Any]) -> None:
    model = Layer(compute)
    run, submodule = executor(model)
    for value in [*values, *values]:
        found, expected = run(X, value), model(X, value)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert type(found) is type(expected)
    assert kinds(submodule) in ([[float], [float]], [[int], [int]], [[Number]])


def test_a_number_of_another_type_is_another_graph() -> None:
    model = Layer(lambda linear, x, t: (linear(x) * 8).long() * t)
    run, submodule = executor(model)
    for value in (2, 2.5, 3, 0.5):
        found, expected = run(X, value), model(X, value)
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
    assert kinds(submodule) == [[Number], [Number]]


def test_a_call_that_a_graph_took_is_of_its_kind() -> None:
    run, submodule = executor(Layer(lambda linear, x, t, name: linear(x) * t))
    run(X, 3, "a")
    resolved = submodule.resolve((X, 4, "b"), {})
    assert resolved is not None
    assert submodule.find(resolved[0]) is not None


def test_one_constant_may_be_free_and_another_fixed() -> None:
    def compute(linear: nn.Module, x: Tensor, t: float, times: int, name: str) -> Tensor:
        return looped(linear, x, times) / t

    model = Layer(compute)
    run, submodule = executor(model)
    for args in [(0.7, 2, "a"), (0.8, 2, "b"), (0.9, 3, "a"), (1.0, 3, "c")]:
        assert torch.equal(run(X, *args), model(X, *args))
    assert kinds(submodule) == [[Number, int, Unread]] * 2


def test_a_string_that_nobody_reads_makes_no_graph() -> None:
    def compute(linear: nn.Module, batch: dict[str, Any]) -> Tensor:
        floats = {k: v.float() if torch.is_tensor(v) else v for k, v in batch.items()}
        return linear(floats["x"])

    model = Layer(compute)
    run, submodule = executor(model)
    for name in ("img_1.png", "img_2.png", ""):
        batch = {"x": X, "id": name}
        assert torch.equal(run(batch), model(batch))
    assert kinds(submodule) == [[Unread]]


@pytest.mark.parametrize(
    "compute",
    [
        switched,
        lambda linear, x, mode: linear(x) if mode == "plain" else x,
        lambda linear, x, mode: {"plain": linear}.get(mode, torch.relu)(x),
        lambda linear, x, mode: linear(x) * len(f"{mode}"),
        lambda linear, x, mode: linear(x) * len("".join([mode])),
        lambda linear, x, mode: getattr(torch, {"p": "relu"}.get(mode[:1], "exp"))(linear(x)),
        lambda linear, x, mode: linear(x).div(0.3, rounding_mode=mode),
        lambda linear, x, mode: linear(x) if mode in ("plain",) else x,
        lambda linear, x, mode: {mode: linear(x)}[mode],
        lambda linear, x, mode: linear(x) * len({"mode": mode}["mode"]),
        lambda linear, x, mode: linear(x) if hash(mode) % 2 else x,
    ],
    ids=[
        "method",
        "equal",
        "key",
        "format",
        "join",
        "index",
        "operator",
        "in",
        "keyed",
        "item",
        "hash",
    ],
)
def test_a_string_that_is_read_stays_fixed(compute: Any) -> None:
    model = Layer(compute)
    run, submodule = executor(model)
    values = ("floor", "trunc") if "div" in compute.__code__.co_names else ("plain", "other")
    for value in values * 2:
        assert torch.equal(run(X, value), model(X, value))
    assert kinds(submodule) == [[str], [str]]


class Record:
    """A class that no library knows."""

    def __init__(self, name: Any, y: Any) -> None:
        self.name, self.y = name, y


@pytest.mark.parametrize(
    ("compute", "read"),
    [
        (lambda linear, x, name: {"name": name, "y": linear(x)}, lambda out: out["name"]),
        (lambda linear, x, name: (linear(x), [name, name], x), lambda out: out[1][1]),
        (lambda linear, x, name: Record(name, linear(x)), lambda out: out.name),
    ],
    ids=["dictionary", "nest", "object"],
)
def test_a_string_that_only_goes_into_the_output_makes_no_graph(
    compute: Any, read: Callable[[Any], str]
) -> None:
    model = Layer(compute)
    run, submodule = executor(model)
    for name in ("a", "b", "a", b"bytes"):
        assert read(run(X, name)) == name
    assert kinds(submodule) == [[Unread], [Unread]]  # of the two types


def test_a_string_that_a_module_writes_to_an_argument_makes_no_graph() -> None:
    def compute(linear: nn.Module, out: dict[str, Any], x: Tensor, name: str) -> Any:
        out["name"], out["y"] = name, linear(x)
        return out, name

    model = Layer(compute)
    run, submodule = executor(model)
    for name in ("a", "b"):
        out: dict[str, Any] = {"before": name * 2}
        again, given = run(out, X, name)
        assert again is out
        assert (out["name"], given, out["before"]) == (name, name, name * 2)
    assert len(submodule.graphs) == 1


def test_a_number_that_only_goes_into_the_output_makes_no_graph() -> None:
    model = Layer(lambda linear, x, n, t: {"n": [n], "y": linear(x) * t, "t": t})
    run, submodule = executor(model)
    for n, t in [(1, 0.5), (7, -1.5), (0, 2.0), (2.5, 2.0), (-0.5, 0.25)]:
        found, expected = run(X, n, t), model(X, n, t)
        assert torch.equal(found["y"], expected["y"])
        assert (found["n"], found["t"]) == ([n], t)
        assert type(found["n"][0]) is type(n)
    assert kinds(submodule) == [[Number, Number]] * 2


def test_an_int_that_no_tensor_holds_is_a_constant() -> None:
    model = Layer(lambda linear, x, n: {"n": n, "y": linear(x)})
    run, submodule = executor(model)
    for n in (3, 2**63 + 7, -(2**63), 2**63 + 7, 2**64):
        found = run(X, n)
        assert found["n"] == n
        assert torch.equal(found["y"], model(X, n)["y"])
    assert kinds(submodule) == [[Number], [int], [int]]


def test_a_number_that_is_nan_is_as_any_other() -> None:
    model = Layer(lambda linear, x, t: {"t": t, "y": linear(x)})
    run, submodule = executor(model)
    for t in (math.nan, 0.5, math.inf, math.nan):
        found = run(X, t)["t"]
        assert found == t or (math.isnan(found) and math.isnan(t))
    assert kinds(submodule) == [[Number]]


def test_objects_of_the_call_s_own_numbers_and_strings_alone() -> None:
    model = Layer(lambda linear, x, name, n: (linear(x), Record(name, n), Record("fixed", 3)))
    run, submodule = executor(model)
    for name, n in [("a", 1), ("b", 2), ("", 0)]:
        found = run(X, name, n)
        assert (found[1].name, found[1].y) == (name, n)
        assert vars(found[2]) == {"name": "fixed", "y": 3}
    assert kinds(submodule) == [[Unread, Number]]


def test_a_string_that_changes_on_its_way_to_the_output_stays_fixed() -> None:
    model = Layer(lambda linear, x, name: {"name": name + "!", "y": linear(x)})
    run, submodule = executor(model)
    for name in ("a", "b", "a"):
        assert run(X, name)["name"] == name + "!"
    assert kinds(submodule) == [[str], [str]]


def test_a_model_that_hides_the_use_of_a_string() -> None:
    def compute(linear: nn.Module, x: Tensor, mode: str) -> Tensor:
        try:
            return linear(x) if mode == "plain" else linear(x).relu()
        except RuntimeError:
            return linear(x)

    model = Layer(compute)
    run, submodule = executor(model)
    for value in ("plain", "other"):
        assert torch.equal(run(X, value), model(X, value))
    assert kinds(submodule) == [[str], [str]]


def test_a_constant_that_captures_again_is_told_and_limited(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor, times: int, also: bool = False) -> Tensor:
            return self.linear(x) * 2 if times > 10 else self.linear(x)

    model = Many()
    run, submodule = executor(model)
    with caplog.at_level(logging.WARNING, "torch_quant"):
        for i in range(4):
            run(X, i)
        assert not caplog.messages
        for i in range(4, 8):
            run(X, i)
        assert len(caplog.messages) == 1
        assert "captured anew for every value of times (4 so far)" in caplog.messages[0]
        assert "also" not in caplog.messages[0]
        for i in [*range(8, 30), 3]:
            assert torch.equal(run(X, i), model(X, i))
    assert "from now on its parts are captured" in caplog.messages[1]
    assert len(caplog.messages) == 2
    assert [len(each.graphs) for each in submodule.walk()] == [16, 1]
