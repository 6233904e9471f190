"""Which input shapes a captured graph serves, as a check with a readable error."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import SymInt, fx

from torch_quant.errors import CaptureFailed
from torch_quant.graph.calls import Call

__all__ = ["ShapeContract"]


@dataclass
class ShapeContract:
    """For every tensor input: its name and, per dimension, a fixed size or the name of a free one.

    Two dimensions of one name must have one size. The exporter's finer conditions (divisibility,
    say) are left to the operators themselves, which raise on sizes they cannot take.
    """

    names: list[str]
    shapes: list[tuple[int | str, ...]]
    _seen: set[tuple[tuple[int, ...], ...]] = field(default_factory=set, repr=False)

    @classmethod
    def of(cls, exported: fx.GraphModule, example: Call) -> ShapeContract:
        """Read the contract off the placeholders of an exported graph."""
        shapes: list[tuple[int | str, ...]] = []
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                sizes = node.meta["val"].shape
                shapes.append(tuple(_fixed_or_name(size) for size in sizes))
        return cls(example.names(), shapes)

    def mismatch(self, call: Call) -> str | None:
        """Why ``call`` does not fit, or None."""
        actual = tuple(tuple(x.shape) for x in call.tensors)
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
        if len(self._seen) < 1024:
            self._seen.add(actual)
        return None

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


def _fixed_or_name(size: int | SymInt) -> int | str:
    """A size as the graph knows it: ``12``, or ``"s0"``; a specialized symbol is its number."""
    text = str(size)
    return int(text) if text.isdecimal() else text
