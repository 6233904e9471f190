"""What every run takes of a grid: each value of each parameter, and what else is asked for."""

from __future__ import annotations

import itertools

import pytest
from thinning import LONG, OLDEST, covering, left_out, rarely, some


@pytest.fixture(params=["x", "y", "z"])
def fixed(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.thin
@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("c", range(4))
def test_values(a: int, b: int, c: int, fixed: str) -> None:
    assert a * b < 4


@pytest.mark.thin("a", "b")
@pytest.mark.parametrize("a", range(2))
@pytest.mark.parametrize("b", range(3))
@pytest.mark.parametrize("c", range(4))
def test_pairs(a: int, b: int, c: int) -> None:
    assert a + b < 4


@pytest.mark.parametrize("a", [1, rarely(2), 3])
def test_rarely(a: int) -> None:
    assert LONG or a != 2


@pytest.mark.long("to see that it is left out")
def test_in_the_long_run() -> None:
    assert LONG


@pytest.mark.newest("to see where it is left out")
def test_on_the_newest() -> None:
    assert LONG or not OLDEST


def test_what_every_run_takes_of_these(request: pytest.FixtureRequest) -> None:
    module = request.node.getparent(pytest.Module)
    items = [each for each in module.collect() if isinstance(each, pytest.Function)]
    out = left_out(items)
    taken: dict[str, list[list[str]]] = {}
    for name, _, case in (each.name.partition("[") for each in items if each not in out):
        taken.setdefault(name, []).append(case.rstrip("]").split("-"))
    assert len(items) - len(out) > 13
    values = taken["test_values"]
    assert len(values) == 4  # of 36, as many as the longest list
    fixtures, c, first, second = zip(*values, strict=True)
    assert set(c) == set("0123")
    assert set(zip(first, second, strict=True)) == {("1", "1"), ("1", "2"), ("2", "1")}
    assert set(fixtures) == set("xyz")
    pairs = taken["test_pairs"]
    assert len(pairs) == 6  # of 24
    assert {(b, a) for _, b, a in pairs} == set(itertools.product("012", "01"))
    assert {c for c, *_ in pairs} == set("0123")
    assert taken["test_rarely"] == [["1"], ["3"]]
    assert "test_in_the_long_run" not in taken
    assert ("test_on_the_newest" in taken) is not OLDEST


def test_few_cases_have_all_values() -> None:
    cases = list(itertools.product(range(3), range(7), "ab"))
    kept = covering(cases, lambda case: set(enumerate(case)))
    assert kept == covering(cases, lambda case: set(enumerate(case)))
    assert len(kept) == 7
    assert {x[1] for x in kept} == set(range(7))
    assert {x[0] for x in kept} == set(range(3))
    assert abs(sum(x[2] == "a" for x in kept) - 3.5) < 1  # taken in turns


def test_a_name_that_is_in_no_list() -> None:
    with pytest.raises(AssertionError, match="'d'"):
        some("abc", "a", "d")
    assert some("abc", "c", "a") == (list("abc") if LONG else ["a", "c"])
    assert rarely(1, 2).values == (1, 2)
