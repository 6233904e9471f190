from __future__ import annotations

import functools
import inspect
import pickle
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torch_quant.errors import CaptureFailed
from torch_quant.graph.binding import bind, signature_of
from torch_quant.graph.calls import Call, flatten_call
from torch_quant.graph.shapes import ShapeContract


def plain(x: Any, y: Any = None, *, flag: bool = True) -> None: ...


def sized(x: Any, size: Any = (2, 2), rate: float = 0.0) -> None: ...


def positional_only(x: Any, /, y: Any = None) -> None: ...


def keywords(x: Any, **rest: Any) -> None: ...


def variadic(*parts: Any, **named: Any) -> None: ...


def bound(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return bind(signature_of(function), args, kwargs)


def call(*args: Any, **kwargs: Any) -> Call:
    return flatten_call(args, kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((1, 2), {}), ((1,), {"y": 2}), ((), {"x": 1, "y": 2}), ((), {"y": 2, "x": 1})],
)
def test_all_ways_of_writing_a_call_are_one(args: Any, kwargs: Any) -> None:
    normal_form = bound(plain, *args, **kwargs)
    assert normal_form == ((), {"x": 1, "y": 2})
    assert list(normal_form[1]) == ["x", "y"]  # in order too: it decides the flat form


def test_defaults_are_left_to_the_module() -> None:
    assert bound(plain, 1) == ((), {"x": 1})
    assert bound(plain, 1, None) == ((), {"x": 1})
    assert bound(plain, x=1, flag=True, y=None) == ((), {"x": 1})
    assert bound(plain, 1, flag=False) == ((), {"x": 1, "flag": False})


@pytest.mark.parametrize("value", [1, 1.0, -0.0, "1"])
def test_a_value_of_another_type_or_sign_is_not_the_default(value: Any) -> None:
    assert bound(plain, 0, flag=value) == ((), {"x": 0, "flag": value})
    named = bound(sized, 0, rate=value)[1]
    assert list(named) == ["x", "rate"]
    assert repr(named["rate"]) == repr(value)


def test_a_tuple_may_be_a_default() -> None:
    assert bound(sized, 0, (2, 2), 0.0) == ((), {"x": 0})
    assert bound(sized, 0, (2, 2.0)) == ((), {"x": 0, "size": (2, 2.0)})
    assert bound(sized, 0, [2, 2]) == ((), {"x": 0, "size": [2, 2]})


def test_a_decorator_may_tell_a_default_from_no_argument() -> None:
    @functools.wraps(plain)
    def decorated(*args: Any, **kwargs: Any) -> None:
        plain(*args, **{"flag": False, **kwargs})

    assert bound(decorated, 1, flag=True) == ((), {"x": 1, "flag": True})


def test_positional_only_stay_positional() -> None:
    assert bound(positional_only, 1, 2) == ((1,), {"y": 2})


def test_keywords_of_any_name() -> None:
    assert bound(keywords, 1, mask=2, x_extra=3) == ((), {"x": 1, "mask": 2, "x_extra": 3})


@pytest.mark.parametrize("function", [plain, positional_only, keywords, variadic, sized])
@pytest.mark.parametrize("args", [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)])
@pytest.mark.parametrize("names", [(), ("x",), ("flag",), ("rate", "y"), ("y", "x"), ("size",)])
def test_binding_fast_is_binding(function: Any, args: Any, names: Any) -> None:
    kwargs = dict.fromkeys(names, 9)

    def outcome(signature: inspect.Signature) -> Any:
        try:
            positional, named = bind(signature, args, kwargs)
        except CaptureFailed as error:
            return str(error)
        return positional, list(named.items())

    assert outcome(signature_of(function)) == outcome(inspect.signature(function))


def test_a_signature_is_pickled() -> None:
    signature = pickle.loads(pickle.dumps(signature_of(sized)))
    assert str(signature) == str(signature_of(sized))
    assert bind(signature, (1, (2, 2)), {}) == ((), {"x": 1})


def test_variadic_calls_stay_as_written() -> None:
    assert bound(variadic, 1, 2, bias=3) == ((1, 2), {"bias": 3})


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((1, 2, 3), {}), ((1,), {"x": 1}), ((1,), {"mask": 2})],
    ids=["missing", "too many", "twice", "unknown"],
)
def test_arguments_that_do_not_fit(args: Any, kwargs: Any) -> None:
    with pytest.raises(CaptureFailed) as caught:
        bound(plain, *args, **kwargs)
    message = str(caught.value)
    assert "forward" + str(inspect.signature(plain)) in message
    assert f"{len(args)} positional" in message
    assert all(name in message for name in kwargs)


def test_flatten_and_rebuild() -> None:
    x, y, z = torch.ones(2, 3), torch.zeros(4), torch.ones(1)
    flat = call([{"a": x}, 2], mask=(y, None), act="gelu", dtype=torch.int8, z=z)
    assert [t.shape for t in flat.tensors] == [x.shape, y.shape, z.shape]
    args, kwargs = flat.rebuild(flat.tensors)
    assert args[0][0]["a"] is x
    assert args[0][1] == 2
    assert kwargs["mask"][0] is y
    assert kwargs["mask"][1] is None
    assert (kwargs["act"], kwargs["dtype"]) == ("gelu", torch.int8)
    new = flat.with_tensors((x + 1, y, z))
    assert torch.equal(new.rebuild(new.tensors)[0][0][0]["a"], x + 1)
    assert flat.tensors[0] is x


def test_with_tensors_wants_as_many() -> None:
    with pytest.raises(ValueError, match="shorter"):
        call(torch.ones(1), torch.ones(1)).with_tensors((torch.ones(1),))


def test_names_and_description() -> None:
    flat = call(
        torch.ones(2, 3),
        [torch.ones(1), {"left": torch.ones(1, dtype=torch.int64)}],
        pixel_values=torch.ones(4, dtype=torch.bool),
        masks=(None, torch.ones(1)),
    )
    names = ["args[0]", "args[1][0]", "args[1][1]['left']", "pixel_values", "masks[1]"]
    assert flat.names() == names
    assert flat.describe()[0] == "args[0]: (2, 3) float32"
    assert flat.describe()[2:4] == ["args[1][1]['left']: (1,) int64", "pixel_values: (4,) bool"]


class Pair(NamedTuple):
    mean: Tensor
    scale: Tensor


def test_names_of_named_tuples() -> None:
    names = call(
        Pair(torch.ones(1), torch.ones(1)), pair=Pair(torch.ones(1), torch.ones(1))
    ).names()
    assert len(set(names)) == 4
    assert all("mean" in name or "scale" in name for name in names)
    assert not any("Key(" in name for name in names), "a pytree class is no name"


def test_signature_ignores_sizes_and_values() -> None:
    first = call(torch.ones(2, 3), n=1, mask=None)
    second = call(torch.zeros(7, 5), n=1, mask=None)
    assert first.signature == second.signature


@pytest.mark.parametrize(
    "other",
    [
        call(torch.ones(2, 3, dtype=torch.float64), n=1),
        call(torch.ones(2), n=1),
        call(torch.ones(2, 3), n=2),
        call(torch.ones(2, 3), n=None),
        call(torch.ones(2, 3), n=torch.ones(1)),
        call([torch.ones(2, 3)], n=1),
        call(torch.ones(2, 3)),
        call(torch.ones(2, 3), m=1),
    ],
    ids=["dtype", "rank", "constant", "none", "tensor", "nesting", "absent", "name"],
)
def test_signature_tells_apart(other: Call) -> None:
    assert call(torch.ones(2, 3), n=1).signature != other.signature


@pytest.mark.parametrize("other", [True, 1.0])
def test_signature_tells_equal_constants_of_other_types_apart(other: Any) -> None:
    """``x * 1`` and ``x * 1.0`` differ for integers, and code may ask for the type."""
    assert call(torch.ones(2), n=1).signature != call(torch.ones(2), n=other).signature


class Opaque:
    pass


@pytest.mark.parametrize("value", [Opaque(), {1, 2}, object()], ids=["class", "set", "object"])
def test_objects_are_refused_by_type(value: Any) -> None:
    with pytest.raises(
        CaptureFailed, match=r"neither a tensor .*a constant nor a registered pytree"
    ) as e:
        call(torch.ones(1), state=[value])
    assert type(value).__qualname__ in str(e.value)


def test_a_cache_is_taken_apart_at_once() -> None:
    """The Python code that runs for a call does not grow with the layers of its cache."""

    def steps(layers: int) -> int:
        past = [(torch.zeros(1, 2), torch.zeros(1, 2)) for _ in range(layers)]
        first = call(past=past)
        contract = ShapeContract(["x"] * 2 * layers, [(1, "s0")] * 2 * layers)
        kind, count = first.signature, 0
        assert kind.accept(first) is first
        assert contract.mismatch(first) is None

        def note(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event == "call"

        sys.setprofile(note)
        try:
            again = kind.accept(call(past=past))
            assert again is not None
            assert contract.mismatch(again) is None
        finally:
            sys.setprofile(None)
        return count

    assert steps(3) == steps(30) < 40


class Kept:
    """A registered container with what pytree calls a context."""

    def __init__(self, x: Tensor, context: Any) -> None:
        self.x, self.context = x, context


pytree.register_pytree_node(
    Kept, lambda k: ([k.x], k.context), lambda x, context: Kept(*x, context)
)


@pytest.mark.parametrize("other", [{"a": [True]}, {"a": [1.0]}, {"b": [1]}, {"a": (1,)}])
def test_contexts_of_containers_tell_calls_apart(other: Any) -> None:
    x = torch.zeros(2)
    first = call(Kept(x, {"a": [1]}))
    assert call(Kept(x, {"a": [1]})).spec is first.spec  # not made again
    assert call(Kept(x, other)).nesting != first.nesting
    assert first.rebuild((x,))[0][0].context == {"a": [1]}


def test_contexts_that_hold_types() -> None:
    x = torch.zeros(2)
    nestings = {call(Kept(x, [each, 1])).nesting for each in (int, float, int)}
    assert len(nestings) == 2
