"""What ``make test`` takes of long lists of cases; ``make test-long`` (``LONG_TESTS=1``) takes all.

What is left out is said where the cases stand, in one of these ways:

    @pytest.mark.thin                      # each value of each parameter at least once
    @pytest.mark.thin("bits", "backend")   # and each combination of these two
    @pytest.mark.long("half a minute")     # nothing: the long run has it
    @pytest.mark.newest("a minute")        # nothing on the oldest torch
    @pytest.mark.sparse                    # there, every third of its cases

    some(MODELS, "bert", "resnet")         # of one list: these
    third(MODELS, 0)                       # of one list: every third
    rarely(3, {"padding": 1})              # one of a list: the long run has it

Longer lists have a short one beside them and ask :data:`LONG`. The choice depends on the
parameters alone, so it is the same in each run and on each machine with the same backends.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import pytest
import torch
from _pytest.mark import ParameterSet

__all__ = ["LONG", "MARKS", "OLDEST", "covering", "left_out", "rarely", "some", "third"]

LONG = bool(int(os.environ.get("LONG_TESTS") or 0))
"""Whether everything is run."""

OLDEST = torch.__version__.startswith("2.8.")
"""Whether this is the oldest torch, beside which the newest runs the same tests."""

MARKS = (
    "thin(*together): make test takes each value once, and each combination of those named",
    "long(reason): left to make test-long",
    "newest(reason): on the oldest torch left to make test-long",
    "sparse: on the oldest torch every third case, all others by make test-long",
)

_Case = TypeVar("_Case")


def some(values: Iterable[_Case], *chosen: _Case) -> list[_Case]:
    """Those chosen, in the order of ``values``, which the long run has all."""
    every = list(values)
    assert set(chosen) <= set(every), sorted(set(chosen) - set(every))
    return every if LONG else [each for each in every if each in chosen]


def third(values: Iterable[_Case], first: int) -> list[_Case]:
    """Every third from the place ``first``.

    Other tests of the same list begin elsewhere, so that it is not always the same cases that are
    left out; what one of them checks is still checked on its own third alone.
    """
    every = list(values)
    return every if LONG else every[first::3]


def rarely(*values: object) -> ParameterSet:
    """A case of a list of parameters that only the long run takes."""
    return pytest.param(*values, marks=pytest.mark.long("others of its list stand for it"))


def left_out(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """The tests that are for the long run alone."""
    marks = ("long", "newest") if OLDEST else ("long",)
    found = {each for each in items if any(map(each.get_closest_marker, marks))}
    grids: dict[Hashable, list[pytest.Item]] = {}
    for each in items:
        if each.get_closest_marker("thin") and each not in found:
            grids.setdefault((each.path, each.parent, each.originalname), []).append(each)
    if OLDEST:
        cases = [each for each in items if each.get_closest_marker("sparse") and each not in found]
        for _, group in itertools.groupby(cases, lambda each: (each.path, each.originalname)):
            found.update(each for i, each in enumerate(group) if i % 3)
    for cases in grids.values():
        kept = covering(cases, _values)
        found.update(each for each in cases if each not in kept)
    return found


def covering(cases: Iterable[_Case], values: Callable[[_Case], set[Hashable]]) -> list[_Case]:
    """As few of ``cases``, in order, as have all ``values`` that any case has.

    The next one is always that which has most that is still missing; of several, that whose values
    were taken least, the first of these.

    >>> covering(["ab", "a", "bc", "c"], set)
    ['ab', 'c']
    """
    found = [(each, values(each)) for each in cases]
    taken, kept = Counter[Hashable](), set[int]()
    while missing := set().union(*(has for _, has in found)) - set(taken):
        gains = [(len(has & missing), -sum(taken[value] for value in has)) for _, has in found]
        best = gains.index(max(gains))
        kept.add(best)
        taken.update(found[best][1])
    return [each for place, (each, _) in enumerate(found) if place in kept]


def _values(item: pytest.Item) -> set[Hashable]:
    """The values of a test's parameters; those that one list gives together are one."""
    params, mark = item.callspec.params, item.get_closest_marker("thin")
    assert set(mark.args) <= set(params), f"{item.nodeid}: {mark.args} among {sorted(params)}"
    given = [_names(each.args[0]) for each in item.iter_markers("parametrize")]
    fixtures = set(params) - set().union(*given)
    axes = [*given, *((name,) for name in sorted(fixtures)), mark.args]
    return {(names, *(id(params[name]) for name in names)) for names in axes}


def _names(argnames: str | Sequence[str]) -> tuple[str, ...]:
    listed = argnames.split(",") if isinstance(argnames, str) else argnames
    return tuple(name.strip() for name in listed)
