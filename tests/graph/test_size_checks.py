"""The compiled check of sizes says what sympy says, on guards of every kind that is recorded."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import sympy
import torch
from capturing import Compute, capture
from models import normal
from torch.utils._sympy import functions as functions_of_torch

from torch_quant.graph.size_checks import SizeChecks, substitute
from torch_quant.graph.size_source import NAMESPACE, Unwritable, write

A, B = sympy.symbols("s0 s1", integer=True, nonnegative=True)
NAMES = {"s0": "a", "s1": "b"}
RELATIONS = (sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge)
OF_TWO = (
    *(getattr(functions_of_torch, name) for name in ("FloorDiv", "PythonMod", "Mod", "Max", "Min")),
    functions_of_torch.CleanDiv,
    sympy.Mod, sympy.Min, sympy.Max, sympy.Add, sympy.Mul,
    lambda x, y: sympy.floor(x / y), lambda x, y: sympy.ceiling(x / y), lambda x, y: x / y,
    lambda x, y: functions_of_torch.ModularIndexing(x, y, 3),
    lambda x, y: functions_of_torch.FloorToInt(functions_of_torch.IntTrueDiv(x, y)),
    lambda x, y: functions_of_torch.CeilToInt(functions_of_torch.IntTrueDiv(x, y)),
    lambda x, y: functions_of_torch.TruncToInt(functions_of_torch.ToFloat(x)) - y,
    lambda x, y: x**2 - y,
)  # fmt: skip


def number(rng: random.Random, depth: int) -> Any:
    if depth == 0 or rng.random() < 0.2:
        return rng.choice([A, B, A, B, sympy.Integer(rng.randint(1, 9)), sympy.Rational(1, 2)])
    return rng.choice(OF_TWO)(number(rng, depth - 1), number(rng, depth - 1))


def condition(rng: random.Random, depth: int) -> Any:
    if depth == 0 or rng.random() < 0.5:
        return rng.choice(RELATIONS)(number(rng, 2), number(rng, 2))
    if rng.random() < 0.2:
        return sympy.Not(condition(rng, depth - 1))
    return rng.choice([sympy.And, sympy.Or])(condition(rng, depth - 1), condition(rng, depth - 1))


def made(make: Any, seed: int) -> Any:
    """An expression of that seed, or None where its functions do not take such arguments."""
    try:
        return make(random.Random(seed), 2)
    except Exception:  # sympy raises much on what no guard is
        return None


def by_sympy(expression: Any, values: dict[str, int]) -> Any:
    try:
        return substitute(expression, values)
    except Exception:  # as above
        return None


@pytest.mark.parametrize("make", [number, condition])
def test_source_gives_what_sympy_gives(make: Any) -> None:
    written = compared = 0
    for seed in range(120):
        expression = made(make, seed)
        if expression is None:
            continue
        try:
            source = write(expression, NAMES)
        except Unwritable:
            continue
        written += 1
        rng = random.Random(seed)
        for _ in range(4):
            sizes = [rng.choice([0, 1, 2, 3, 7, 16, 31, 224]) for _ in range(2)]
            expected = by_sympy(expression, dict(zip(NAMES, sizes, strict=True)))
            try:
                actual = eval(source, dict(NAMESPACE), dict(zip("ab", sizes, strict=True)))
            except ArithmeticError:
                continue  # left to sympy
            if expected is not None and expected.is_finite is not False:
                # SymPy calls a float no integer, from 1.13 on
                same = expected == sympy.sympify(actual) or float(expected) == float(actual)
                assert same, (expression, source, sizes)
                compared += 1
    assert written > 30
    assert compared > 100


GUARDED: dict[str, Any] = {
    "chunks": lambda x: torch.cat([a @ a.mT for a in x.chunk(2, 1)]),
    "windows": lambda x: x.view(x.shape[0], x.shape[1] // 4, 4, -1).sum(2),
    "padded": lambda x: torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 4)).unfold(1, 4, 4),
    "parity": lambda x: x * 2 if x.shape[1] % 2 else x[:, : x.shape[1] // 2],
}


@pytest.mark.parametrize("name", GUARDED)
def test_real_guards(name: str) -> None:
    """Of a real capture, each alone and all together."""
    contract = capture(Compute(GUARDED[name]), normal(2, 8, 8)).contract
    dimensions = list(contract.shapes[0])
    free = [size for size in dimensions if isinstance(size, str)]
    assert contract.conditions
    together = SizeChecks(dimensions, {}, contract.conditions)
    assert not together._left
    for sizes in itertools.product([1, 2, 3, 4, 8, 9, 32], [0, 1, 3, 8, 16, 100], [8]):
        values = {name: size for name, size in zip(dimensions, sizes, strict=True) if name in free}
        verdicts = [by_sympy(each, values) for each in contract.conditions]
        failing = [verdict for verdict in verdicts if not verdict]
        found = together.failure(list(sizes))
        fixed = all(s == d for s, d in zip(sizes, dimensions, strict=True) if isinstance(d, int))
        assert (found is None) == (fixed and not failing)


def test_what_cannot_be_written_is_left_to_sympy() -> None:
    condition = sympy.sqrt(A) > 3
    with pytest.raises(Unwritable):
        write(condition, NAMES)
    checks = SizeChecks(["s0"], {}, [condition])
    for _ in range(2):
        assert checks.failure([10]) is None
        failure = checks.failure([9])
        assert failure is not None
        assert failure.wanted is condition


def test_a_condition_without_a_result_is_refused() -> None:
    condition = sympy.Ge(1 / B, sympy.Rational(1, 3))
    checks = SizeChecks(["s0", "s1"], {}, [sympy.Ne(A, 7), condition])
    assert checks.failure([8, 3]) is None
    assert checks.failure([8, 4]) == ("condition", -1, condition)
    assert checks.failure([8, 0]) == ("condition", -1, condition)
    assert checks.failure([7, 0]) == ("condition", -1, sympy.Ne(A, 7))


def test_conditions_nested_too_deep_for_python() -> None:
    condition = sympy.Gt(A, 0)
    for i in range(70):
        condition = sympy.Or(sympy.Eq(A, i + 5), sympy.And(condition, sympy.Ne(A, 2 * i)))
    checks = SizeChecks(["s0"], {}, [condition])
    for size in (0, 3, 5, 7, 8, 74, 130):
        assert (checks.failure([size]) is None) == bool(substitute(condition, {"s0": size}))


def test_inputs_without_dimensions() -> None:
    assert SizeChecks([], {}, []).failure([]) is None
    assert SizeChecks([3], {}, []).failure([4]) is not None
