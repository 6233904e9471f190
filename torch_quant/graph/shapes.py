"""Which input shapes a captured graph serves, as a check with a readable error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import SymInt, fx

from torch_quant.errors import CaptureFailed
from torch_quant.graph.calls import Call

__all__ = ["ShapeContract"]


@dataclass
class ShapeContract:
    """For every tensor input: its name and, per dimension, a fixed size or the name of a free one.

    Two dimensions of one name must have one size, and every condition that the code checked while
    it was exported must hold (``if x.shape[1] > 128``), or it would have taken another path.
    """

    names: list[str]
    shapes: list[tuple[int | str, ...]]
    conditions: list[Any] = field(default_factory=list)
    derived: list[tuple[int, int, Any]] = field(default_factory=list)
    _seen: set[tuple[tuple[int, ...], ...]] = field(default_factory=set, repr=False)

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
                    if isinstance(size, SymInt) and not str(size).isidentifier()
                ]
                if symbols and not conditions:
                    conditions = [guard.expr for guard in symbols[0].node.shape_env.guards]
        return cls(example.names(), shapes, list(dict.fromkeys(conditions)), derived)

    def mismatch(self, call: Call) -> str | None:
        """Why ``call`` does not fit, or None."""
        actual = tuple(tuple(_plain(size) for size in x.shape) for x in call.tensors)
        if actual in self._seen:
            return None
        sizes: dict[str, tuple[int, str]] = {}
        for name, want, have in zip(self.names, self.shapes, actual, strict=True):
            for axis, (wanted, size) in enumerate(zip(want, have, strict=True)):
                where = f"{name}.shape[{axis}]"
                if isinstance(wanted, int):
                    if wanted != size:
                        return f"{where} is {size}, but the graph was captured for {wanted}"
                elif wanted.isidentifier():
                    first, source = sizes.setdefault(wanted, (size, where))
                    if first != size:
                        return f"{where} is {size}, but {source} is {first} and both must be equal"
        values = {name: size for name, (size, _) in sizes.items()}
        for i, axis, expression in self.derived:
            if _substitute(expression, values) not in (actual[i][axis], None):
                return (
                    f"{self.names[i]}.shape[{axis}] is {actual[i][axis]}, but the graph was "
                    f"captured for {expression} ({self.describe()})"
                )
        for condition in self.conditions:
            if _holds(condition, values) is False:
                found = ", ".join(f"{where} = {size}" for size, where in sizes.values())
                return f"{found} goes against {condition}, which the captured code relies on"
        if len(self._seen) < 1024:
            self._seen.add(actual)
        return None

    def allowing(self, call: Call) -> ShapeContract:
        """This contract without the conditions that ``call`` does not meet but works all the same.

        (Size-oblivious export leaves such conditions behind for sizes of 1.)
        """
        values = {
            size: actual
            for shape, x in zip(self.shapes, call.tensors, strict=True)
            for size, actual in zip(shape, x.shape, strict=True)
            if isinstance(size, str)
        }
        kept = [c for c in self.conditions if _holds(c, values) is not False]
        return ShapeContract(self.names, self.shapes, kept, self.derived)

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
    """Whether a condition on sizes holds; None where data decide."""
    result = _substitute(condition, values)
    return None if result is None else bool(result)


def _substitute(expression: Any, values: dict[str, int]) -> Any:
    """The expression's value, or None if sizes alone do not give it."""
    known = {s: values[s.name] for s in expression.free_symbols if s.name in values}
    result = expression.subs(known)
    return None if result.free_symbols else result


def _fixed_or_name(size: int | SymInt) -> int | str:
    """A size as the graph knows it: ``12``, or ``"s0"``; a specialized symbol is its number."""
    text = str(size)
    return int(text) if text.isdecimal() else text
