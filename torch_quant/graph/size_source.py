"""Expressions on sizes as Python source: sympy takes milliseconds for what Python does in one.

Only what gives the same number in both is written; the rest is left to sympy. ``torch.export``
records its guards in sympy's classes and in its own (``torch.utils._sympy.functions``), which are
known here by their names, since both are slow to import.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

__all__ = ["NAMESPACE", "Unwritable", "write"]

NAMESPACE: dict[str, Any] = {"Fraction": Fraction, "math": math}
"""What the source refers to."""

_INT, _RATIONAL, _FLOAT, _BOOL = "int", "rational", "float", "bool"
_Written = tuple[str, str]
"""Source and kind of its value."""

_RELATIONS = {
    "Equality": "==", "Unequality": "!=", "StrictLessThan": "<", "LessThan": "<=",
    "StrictGreaterThan": ">", "GreaterThan": ">=",
}  # fmt: skip
_INTEGERS = {
    "FloorDiv": "({} // {})", "CleanDiv": "({} // {})", "Mod": "({} % {})",
    "PythonMod": "({} % {})", "LShift": "({} << {})",
    "RShift": "({} >> {})", "ModularIndexing": "({} // {} % {})",
}  # fmt: skip
"""Functions of integers that give an integer."""
_ROUNDED = {
    "floor": "math.floor({})", "ceiling": "math.ceil({})", "FloorToInt": "math.floor({})",
    "CeilToInt": "math.ceil({})", "TruncToInt": "math.trunc({})",
}  # fmt: skip
"""Functions of a number that give an integer."""


class Unwritable(Exception):
    """The expression holds something that Python might compute otherwise."""


def write(expression: Any, symbols: Mapping[str, str]) -> str:
    """Python source of ``expression`` with each symbol under the name that ``symbols`` gives it.

    >>> import sympy
    >>> s = sympy.Symbol("s0", integer=True)
    >>> write(sympy.And(sympy.Ne(s, 1), 2 * s <= 7), {"s0": "a"})
    '((a != 1) and ((2 * a) <= 7))'

    Raises:
        Unwritable: it has an unknown symbol or function.
    """
    return _write(expression, symbols)[0]


def _write(expression: Any, symbols: Mapping[str, str]) -> _Written:
    kind = type(expression).__name__
    if kind == "Symbol":
        if expression.name not in symbols or not expression.is_integer:
            raise Unwritable(f"symbol {expression}")
        return symbols[expression.name], _INT
    if not expression.args:
        return _constant(expression, kind)
    args = [_write(each, symbols) for each in expression.args]
    sources, kinds = [source for source, _ in args], {kind for _, kind in args}
    if (kind in _RELATIONS and kinds <= {_INT, _RATIONAL}) or (
        kind in _RELATIONS and kinds == {_FLOAT}
    ):
        return f"({sources[0]} {_RELATIONS[kind]} {sources[1]})", _BOOL
    if kind in ("And", "Or") and kinds == {_BOOL}:
        return f"({f' {kind.lower()} '.join(sources)})", _BOOL
    if kind == "Not" and kinds == {_BOOL}:
        return f"(not {sources[0]})", _BOOL
    if kind in _INTEGERS and kinds == {_INT}:
        return _INTEGERS[kind].format(*sources), _INT
    if kind in _ROUNDED and kinds <= {_INT, _RATIONAL, _FLOAT}:
        return _ROUNDED[kind].format(*sources), _INT
    if kind in ("Min", "Max") and kinds == {_INT}:
        return f"{kind.lower()}({', '.join(sources)})", _INT
    if kind in ("IntTrueDiv", "ToFloat") and kinds == {_INT}:
        return ("({} / {})" if kind == "IntTrueDiv" else "float({})").format(*sources), _FLOAT
    return _arithmetic(expression, kind, sources, kinds)


def _constant(expression: Any, kind: str) -> _Written:
    if kind in ("BooleanTrue", "BooleanFalse"):
        return str(kind == "BooleanTrue"), _BOOL
    if expression.is_Integer:
        return f"({int(expression)})" if expression < 0 else str(int(expression)), _INT
    if expression.is_Rational:
        return f"Fraction({int(expression.p)}, {int(expression.q)})", _RATIONAL
    raise Unwritable(kind)


def _arithmetic(expression: Any, kind: str, sources: list[str], kinds: set[str]) -> _Written:
    if not kinds <= {_INT, _RATIONAL}:
        raise Unwritable(f"{kind} of {', '.join(sorted(kinds))}")  # floats: the order would matter
    result = _INT if kinds == {_INT} else _RATIONAL
    if kind in ("Add", "Mul"):
        return f"({(' + ' if kind == 'Add' else ' * ').join(sources)})", result
    if kind == "Pow" and expression.exp.is_Integer:
        if expression.exp > 0:
            return f"({sources[0]} ** {sources[1]})", result
        return f"(Fraction({sources[0]}) ** {sources[1]})", _RATIONAL
    raise Unwritable(kind)
