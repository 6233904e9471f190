"""All that a graph asks of its inputs' sizes, as one Python function of integers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch_quant.graph.size_source import NAMESPACE, Unwritable, write

__all__ = ["Failure", "SizeChecks", "substitute"]

_NO_RESULT = (ArithmeticError, ValueError)
"""What integers raise in Python; sympy tells then which condition has no result."""


class Failure(NamedTuple):
    """What a size goes against.

    Args:
        kind: ``"fixed"``, ``"equal"``, ``"derived"`` or ``"condition"``.
        dimension: which dimension, counted over all inputs; -1 for a condition.
        wanted: its fixed size, the dimension it must equal, the expression it must equal, or the
            condition.
    """

    kind: str
    dimension: int
    wanted: Any


class SizeChecks:
    """Tells what the sizes of a call go against.

    Args:
        dimensions: of all inputs, one after the other: a fixed size or a name.
        derived: dimension -> the expression that gives its size.
        conditions: what must hold; those that sizes alone do not decide are left out.
    """

    def __init__(
        self, dimensions: list[int | str], derived: dict[int, Any], conditions: list[Any]
    ) -> None:
        self.symbols: dict[str, int] = {}
        """The name of a free size -> the first dimension of that size."""
        self._checks: list[Failure] = []
        self._left: list[Failure] = []
        lines = []
        for n, wanted in enumerate(dimensions):
            if isinstance(wanted, int):
                lines.append(self._line(f"d{n} != {wanted}", Failure("fixed", n, wanted)))
            elif wanted.isidentifier() and (first := self.symbols.setdefault(wanted, n)) != n:
                lines.append(self._line(f"d{n} != d{first}", Failure("equal", n, first)))
        lines += list(self._written(derived, conditions))
        arguments = [f"{', '.join(f'd{n}' for n in range(len(dimensions)))}, = sizes"]
        self._first = _function([*(arguments if dimensions else []), *lines, "return -1"])
        self._slowly = functools.lru_cache(1024)(self._by_sympy)

    def admits(self, sizes: list[int]) -> bool:
        """Whether they go against nothing, by comparisons alone: Dynamo reads them and guards.

        False where a condition has no such form.
        """
        return not self._left and self._first(sizes) < 0

    def failure(self, sizes: list[int]) -> Failure | None:
        """What the sizes of a call go against, or None."""
        try:
            first = self._first(sizes)
        except _NO_RESULT:
            return self._slowly(tuple(sizes), True)
        if first >= 0:
            return self._checks[first]
        return self._slowly(tuple(sizes), False) if self._left else None

    def _line(self, failing: str, failure: Failure) -> str:
        self._checks.append(failure)
        return f"if {failing}: return {len(self._checks) - 1}"

    def _written(self, derived: dict[int, Any], conditions: list[Any]) -> Iterator[str]:
        names = {name: f"d{n}" for name, n in self.symbols.items()}
        wanted = [Failure("derived", n, expression) for n, expression in derived.items()]
        for failure in [*wanted, *(Failure("condition", -1, each) for each in conditions)]:
            free = {symbol.name for symbol in failure.wanted.free_symbols}
            if free and not free & names.keys():
                continue  # nothing in it is a size
            try:
                source = write(failure.wanted, names)
                is_derived = failure.kind == "derived"
                failing = f"{source} != d{failure.dimension}" if is_derived else f"not {source}"
                compile(failing, "", "eval")
                yield self._line(failing, failure)
            except (Unwritable, RecursionError, MemoryError, SyntaxError):  # or nested too deep
                self._left.append(failure)

    def _by_sympy(self, sizes: tuple[int, ...], everything: bool) -> Failure | None:
        values = {name: sizes[n] for name, n in self.symbols.items()}
        for failure in [*(self._checks if everything else []), *self._left]:
            if failure.kind in ("fixed", "equal"):
                by = failure.wanted if failure.kind == "fixed" else sizes[failure.wanted]
                good = sizes[failure.dimension] == by
            else:
                by = sizes[failure.dimension] if failure.kind == "derived" else True
                good = _holds(failure.wanted, values, by)
            if not good:
                return failure
        return None


def _holds(expression: Any, values: dict[str, int], wanted: int | bool) -> bool:
    """Whether it has that value, or none that sizes decide; not if it has none for these sizes."""
    try:
        result = substitute(expression, values)
    except Exception:  # a division by zero, to which sympy answers in many ways
        return False
    return result is None or bool(result == wanted)


def substitute(expression: Any, values: dict[str, int]) -> Any:
    """The expression's value by sympy, or None if sizes alone do not give it."""
    known = {s: values[s.name] for s in expression.free_symbols if s.name in values}
    result = expression.subs(known)
    return None if result.free_symbols else result


def _function(lines: list[str]) -> Callable[[list[int]], int]:
    source = "def first(sizes):\n" + "".join(f"    {line}\n" for line in lines)
    scope = dict(NAMESPACE)
    exec(compile(source, "<sizes of a captured graph>", "exec"), scope)
    return scope["first"]  # type: ignore[no-any-return]
