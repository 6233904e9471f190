from __future__ import annotations

import pickle

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod

from torch_quant.errors import CaptureFailed
from torch_quant.graph.calls import Call, flatten_call
from torch_quant.graph.shapes import ShapeContract


def call(*shapes: tuple[int, ...]) -> Call:
    return flatten_call(tuple(torch.zeros(shape) for shape in shapes), {})


@pytest.fixture
def contract() -> ShapeContract:
    return ShapeContract(["ids", "mask"], [("s0", "s1", 16), ("s0", "2*s1")])


def test_free_sizes(contract: ShapeContract) -> None:
    for batch, length in ((1, 1), (3, 5), (0, 2), (1000, 1)):
        assert contract.mismatch(call((batch, length, 16), (batch, 2 * length))) is None


def test_a_fixed_size(contract: ShapeContract) -> None:
    reason = contract.mismatch(call((2, 3, 8), (2, 6)))
    assert reason == "ids.shape[2] is 8, but the graph was captured for 16"


def test_sizes_that_must_be_equal(contract: ShapeContract) -> None:
    reason = contract.mismatch(call((2, 3, 16), (4, 6)))
    assert reason == "mask.shape[0] is 4, but ids.shape[0] is 2 and both must be equal"


def test_check_raises_the_reason(contract: ShapeContract) -> None:
    contract.check(call((2, 3, 16), (2, 6)))
    with pytest.raises(CaptureFailed, match=r"ids\.shape\[2\] is 8"):
        contract.check(call((2, 3, 8), (2, 6)))


def test_a_size_is_refused_each_time(contract: ShapeContract) -> None:
    """What was seen is remembered, so a refusal must not be taken for a success."""
    for _ in range(2):
        assert contract.mismatch(call((2, 3, 8), (2, 6))) is not None
        assert contract.mismatch(call((2, 3, 16), (2, 6))) is None


def test_describe(contract: ShapeContract) -> None:
    assert contract.describe() == "ids: (s0, s1, 16), mask: (s0, 2*s1)"


def with_condition() -> ShapeContract:
    """A graph that took the path for lengths above 4, and saw no size of 1."""
    batch, length = sympy.Symbol("s0", integer=True), sympy.Symbol("s1", integer=True)
    return ShapeContract(["x"], [("s0", "s1")], [sympy.Ne(batch, 1), length > 4])


def test_conditions_of_the_captured_code() -> None:
    contract = with_condition()
    assert contract.mismatch(call((2, 5))) is None
    reason = contract.mismatch(call((2, 4)))
    assert reason is not None
    assert "x.shape[1] = 4" in reason
    assert "s1 > 4" in reason
    assert contract.mismatch(call((1, 5))) is not None


def test_a_call_that_was_seen_to_work_lifts_the_conditions_it_breaks() -> None:
    contract = with_condition()
    contract = contract.allowing(call((1, 8)))
    assert contract.mismatch(call((1, 5))) is None
    assert contract.mismatch(call((1, 4))) is not None


def test_conditions_on_what_the_data_decide_are_left_to_the_operators() -> None:
    contract = ShapeContract(["x"], [("s0",)], [sympy.Symbol("u0") > 2])
    assert contract.mismatch(call((1,))) is None


def test_sizes_that_follow_from_others() -> None:
    twice = 2 * sympy.Symbol("s0", integer=True)
    contract = ShapeContract(["x", "y"], [("s0",), ("2*s0",)], [], [(1, 0, twice)])
    assert contract.mismatch(call((3,), (6,))) is None
    reason = contract.mismatch(call((3,), (7,)))
    assert reason is not None
    assert "y.shape[0] is 7" in reason
    assert "2*s0" in reason


def test_a_contract_can_be_pickled() -> None:
    contract = pickle.loads(pickle.dumps(with_condition()))
    assert contract.mismatch(call((2, 5))) is None
    assert contract.mismatch(call((2, 4))) is not None


def test_inputs_of_one_shape_are_each_checked() -> None:
    wanted: list[tuple[int | str, ...]] = [("s0", 4), ("s0", 4), (3, "s0"), ("s0", 4)]
    contract = ShapeContract(["a", "b", "c", "d"], wanted)
    good = [torch.ones(2, 4), torch.ones(2, 4), torch.ones(3, 2), torch.ones(2, 4)]
    assert contract.mismatch(flatten_call(tuple(good), {})) is None
    for i, wrong in enumerate(
        [torch.ones(5, 4), torch.ones(2, 5), torch.ones(3, 7), torch.ones(7, 4)]
    ):
        call = flatten_call((*good[:i], wrong, *good[i + 1 :]), {})
        assert contract.mismatch(call) is not None


def test_conditions_without_a_result_at_small_sizes() -> None:
    """A reshape to ``(s // 2, -1)`` asks for a remainder, and 1 // 2 is nothing to divide by."""
    size = sympy.Symbol("s0", integer=True, positive=True)
    pairs = FloorDiv(size, 2)
    remainder, quotient = sympy.Eq(Mod(12 * size, pairs), 0), sympy.Eq(FloorDiv(size, pairs), 2)
    for conditions in ([remainder], [remainder, quotient], [quotient]):
        halved = ShapeContract(["x"], [("s0", 12)], conditions)
        assert not halved.fixes("s0", 4)  # of 2 and 6 it holds as well
        assert halved.mismatch(call((6, 12))) is None
        assert halved.mismatch(call((1, 12))) is not None
        assert halved.relied_on(call((4, 12))) is not None
        assert halved.allowing(call((1, 12))).mismatch(call((1, 12))) is None
        assert halved.proven([{"s0": 1}]).mismatch(call((6, 12))) is None
