"""Which input shapes a captured graph serves, as a check with a readable error."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import SymInt, fx

from torch_quant.errors import CaptureFailed
from torch_quant.graph.calls import Call
from torch_quant.graph.size_checks import Failure, SizeChecks, substitute
from torch_quant.graph.size_text import plain_conditions

__all__ = ["ShapeContract"]


@dataclass
class ShapeContract:
    """For every tensor input: its name and, per dimension, a fixed size or the name of a free one.

    Two dimensions of one name must have one size, and every condition that the code checked while
    it was exported must hold (``if x.shape[1] > 128``), or it would have taken another path.

    A call is checked by one Python function, made of all of that at the first call.
    """

    names: list[str]
    shapes: list[tuple[int | str, ...]]
    conditions: list[Any] = field(default_factory=list)
    derived: list[tuple[int, int, Any]] = field(default_factory=list)
    _checks: SizeChecks | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_checks": None}

    @classmethod
    def of(cls, exported: fx.GraphModule, example: Call) -> ShapeContract:
        """Read the contract off the placeholders of an exported graph."""
        shapes: list[tuple[int | str, ...]] = []
        conditions: list[Any] = []
        derived: list[tuple[int, int, Any]] = []
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                sizes = node.meta["val"].shape
                shapes.append(tuple(_fixed_or_name(size) for size in sizes))
                symbols = [size for size in sizes if isinstance(size, SymInt)]
                derived += [
                    (len(shapes) - 1, axis, size.node.expr)
                    for axis, size in enumerate(sizes)
                    if not str(size).isidentifier() and not str(size).isdecimal()
                ]
                if symbols and not conditions:
                    env = symbols[0].node.shape_env
                    conditions = [env.replace(guard.expr) for guard in env.guards]
                    conditions += _lower_bounds(env, conditions)
        needed = [each for each in dict.fromkeys(conditions) if each != True]  # noqa: E712
        return cls(example.names(), shapes, needed, derived)

    def mismatch(self, call: Call) -> str | None:
        """Why ``call``, whose tensors have the ranks of the example's, does not fit, or None."""
        checks = self._checks or self._compiled()
        sizes: list[Any] = list(chain.from_iterable(call.facts[1]))
        if type(sum(sizes)) is not int:  # some are symbols
            sizes = [_plain(size) for size in sizes]
        failure = checks.failure(sizes)
        return None if failure is None else self._reason(failure, sizes)

    def prepare(self) -> None:
        """Make the function that checks a call, which cannot be done while Dynamo records."""
        if self._checks is None:
            self._compiled()

    def admits(self, sizes: list[int]) -> bool:
        """Whether the graph serves tensors of these sizes, all one after the other."""
        assert self._checks is not None
        return self._checks.admits(sizes)

    def _compiled(self) -> SizeChecks:
        positions = {place: n for n, place in enumerate(self._places())}
        dimensions = [size for shape in self.shapes for size in shape]
        derived = {positions[i, axis]: expression for i, axis, expression in self.derived}
        self._checks = SizeChecks(dimensions, derived, self.conditions)
        return self._checks

    def _places(self) -> list[tuple[int, int]]:
        """The input and the axis of each dimension."""
        return [(i, axis) for i, shape in enumerate(self.shapes) for axis in range(len(shape))]

    def _reason(self, failure: Failure, sizes: list[int]) -> str:
        where = [f"{self.names[i]}.shape[{axis}]" for i, axis in self._places()]
        kind, n, wanted = failure
        if kind == "fixed":
            return f"{where[n]} is {sizes[n]}, but the graph was captured for {wanted}"
        if kind == "equal":
            other, size = where[wanted], sizes[wanted]
            return f"{where[n]} is {sizes[n]}, but {other} is {size} and both must be equal"
        if kind == "derived":
            return (
                f"{where[n]} is {sizes[n]}, but the graph was captured for {wanted} "
                f"({self.describe()})"
            )
        symbols = (self._checks or self._compiled()).symbols
        found = ", ".join(f"{where[n]} = {sizes[n]}" for n in symbols.values())
        return f"{found} goes against {wanted}, which the captured code relies on"

    def allowing(self, call: Call) -> ShapeContract:
        """This contract without the conditions that ``call`` does not meet but works all the same.

        (Size-oblivious export leaves such conditions behind for sizes of 1.)
        """
        values = self.values(call)
        kept = [c for c in self.conditions if _holds(c, values) is not False]
        return ShapeContract(self.names, self.shapes, kept, self.derived)

    def proven(self, points: list[dict[str, int]]) -> ShapeContract:
        """This contract with exceptions for sizes at which the graph is known to be right.

        Each condition is lifted for just the values of its sizes that were tried, and for every
        value of a size that was tried at two.
        """
        import sympy  # type: ignore[import-untyped]

        conditions = []
        for condition in self.conditions:
            names = {symbol.name: symbol for symbol in condition.free_symbols}
            broken = [
                {name: point[name] for name in names if name in point}
                for point in points
                if _holds(condition, point) is False
            ]
            for point in broken:
                free = {
                    name
                    for name in point
                    if any(
                        other[name] != point[name]
                        and all(other[n] == point[n] for n in point if n != name)
                        for other in broken
                    )
                }
                exact = [sympy.Eq(names[n], value) for n, value in point.items() if n not in free]
                condition = sympy.Or(condition, sympy.And(*exact)) if exact else sympy.true
            if condition != True:  # noqa: E712
                conditions.append(condition)
        return ShapeContract(self.names, self.shapes, conditions, self.derived)

    def refusing(self, sizes: dict[str, int]) -> ShapeContract:
        """This contract without calls of all these sizes."""
        import sympy

        symbol = functools.partial(sympy.Symbol, integer=True)
        wrong = sympy.Or(*(sympy.Ne(symbol(name), size) for name, size in sizes.items()))
        return ShapeContract(self.names, self.shapes, [*self.conditions, wrong], self.derived)

    def like(self, call: Call) -> ShapeContract:
        """This contract for 1 where ``call`` has a size of 1, and for 2 and more where it has more.

        What was exported with a size of 2 or more holds for all of them; 1 is a case of its own.
        """
        import sympy

        symbol = functools.partial(sympy.Symbol, integer=True)
        sizes = [(symbol(name), size) for name, size in self.values(call).items()]
        sizes += [(size, call.tensors[i].shape[axis]) for i, axis, size in self.derived]
        alike = [sympy.Ge(x, 2) if size > 1 else sympy.Eq(x, size) for x, size in sizes]
        conditions = [*self.conditions, *(each for each in alike if each != True)]  # noqa: E712
        return ShapeContract(self.names, self.shapes, conditions, self.derived)

    def values(self, call: Call) -> dict[str, int]:
        """The free sizes' names and what they are in ``call``."""
        return {
            size: actual
            for shape, x in zip(self.shapes, call.tensors, strict=True)
            for size, actual in zip(shape, x.shape, strict=True)
            if isinstance(size, str) and size.isidentifier()
        }

    def resized(self, call: Call, sizes: dict[str, int]) -> Call | None:
        """``call`` cut down to these free sizes and what follows of them, or None."""
        values = self.values(call) | sizes
        wanted = {
            (i, axis): values[size]
            for i, shape in enumerate(self.shapes)
            for axis, size in enumerate(shape)
            if isinstance(size, str) and size.isidentifier()
        }
        wanted |= {(i, axis): substitute(e, values) for i, axis, e in self.derived}
        tensors = list(call.tensors)
        for (i, axis), size in wanted.items():
            if size is None or not 0 <= size <= tensors[i].shape[axis]:
                return None
            tensors[i] = tensors[i].narrow(axis, 0, int(size))
        return call.with_tensors(tuple(tensors))

    def fixes(self, name: int | str, size: int) -> bool:
        """Whether conditions on that free size alone leave nothing but ``size``."""
        own = [c for c in self.conditions if {symbol.name for symbol in c.free_symbols} == {name}]
        others = {*range(1, 9), size + 1, 2 * size, 3 * size} - {size}
        return bool(own) and all(
            any(_holds(c, {str(name): other}) is False for c in own) for other in others
        )

    def relied_on(self, call: Call) -> list[str]:
        """The conditions that sizes not far from those of ``call`` break, as text."""
        values = self.values(call)
        broken: dict[Any, None] = {}
        for size in set(values.values()):
            for change in (size + 1, 2 * size, 4 * size, 16 * size, size // 2, size // 4):
                other = max(2, change)  # for all that are equal in the example
                others = {name: other if n == size else n for name, n in values.items()}
                broken |= dict.fromkeys(c for c in self.conditions if _holds(c, others) is False)
        plain = plain_conditions(broken)
        places = zip(self._places(), chain.from_iterable(self.shapes), strict=True)
        names = {size: f"{self.names[i]}.shape[{axis}]" for (i, axis), size in places}
        return [re.sub(r"\w+", lambda m: names.get(m[0], m[0]), str(each)) for each in plain]

    def describe(self) -> str:
        """The inputs and sizes it serves, for messages."""
        return ", ".join(
            f"{name}: ({', '.join(map(str, shape))})"
            for name, shape in zip(self.names, self.shapes, strict=True)
        )

    def check(self, call: Call) -> None:
        """Raise :class:`CaptureFailed` unless ``call`` fits."""
        if reason := self.mismatch(call):
            raise CaptureFailed(reason)


def _plain(size: Any) -> int:
    """A size as a number; while exporting, that of the example."""
    return int(size.node.hint) if isinstance(size, SymInt) else int(size)


def _holds(condition: Any, values: dict[str, int]) -> bool | None:
    """Whether a condition on sizes holds; None where data decide.

    It does not where it has no result for these sizes, as a remainder of ``s // 2`` for 1.
    """
    try:
        result = substitute(condition, values)
        return None if result is None else bool(result)
    except Exception:  # a division by zero, to which sympy answers in many ways
        return False


def _fixed_or_name(size: int | SymInt) -> int | str:
    """A size as the graph knows it: ``12``, or ``"s0"``; a specialized symbol is its number."""
    text = str(size)
    return int(text) if text.isdecimal() else text


def _lower_bounds(env: Any, conditions: list[Any]) -> list[Any]:
    """Sizes that were taken to be 2 at least, without a condition that says so."""
    found = []
    for symbol, bounds in env.var_to_range.items():
        small = {symbol.name: 1}
        known = any(_holds(each, small) is False for each in conditions)
        if symbol not in env.replacements and not known and bool(bounds.lower >= 2):
            found.append(symbol >= 2)
    return found
