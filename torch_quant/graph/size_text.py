"""Conditions on sizes as a person would write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["plain_conditions"]


def plain_conditions(conditions: Iterable[Any]) -> list[Any]:
    """Conditions without ``Min`` and ``Max`` where a comparison says it, and without repetition.

    Args:
        conditions: sympy's, which all hold.

    >>> from sympy import Eq, Min, Or, Symbol
    >>> n = Symbol("n", integer=True, positive=True)
    >>> plain_conditions([Or(Eq(n, Min(512, n)), Eq(Min(512, n), 1)), Eq(Min(512, n), n)])
    [n <= 512]
    """
    import sympy  # type: ignore[import-untyped]

    found: dict[Any, None] = {}
    for each in conditions:
        plain = each.replace(lambda e: isinstance(e, sympy.Eq), _compared)
        found |= dict.fromkeys(plain.args if isinstance(plain, sympy.And) else [plain])
    return [
        each
        for each in found
        if each != True and not (isinstance(each, sympy.Or) and set(each.args) & found.keys())  # noqa: E712
    ]


def _compared(equation: Any) -> Any:
    """``x = min(x, 5)`` is ``x <= 5``, and ``min(x, 5) = 1`` is ``x = 1``."""
    import sympy

    for x, extreme in (equation.args, equation.args[::-1]):
        kind = type(extreme).__name__  # sympy's, or PyTorch's own
        if kind not in ("Min", "Max"):
            continue
        least, rest = kind == "Min", [each for each in extreme.args if each != x]
        if x in extreme.args:
            return sympy.And(*(x <= each if least else x >= each for each in rest))
        idle = [n for n in rest if x.is_number and n.is_number and (n > x if least else n < x)]
        (*others,) = (each for each in rest if each not in idle)
        if idle and len(others) == 1:
            return sympy.Eq(others[0], x)
    return equation
