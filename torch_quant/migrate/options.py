"""The options of one configuration of another tool: each is asked for, and none is forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch_quant.core.documents import shown
from torch_quant.errors import InvalidConfig
from torch_quant.migrate.result import Rows

__all__ = ["Options"]


class Options:
    """Options by name; what nobody has asked for is noted by :meth:`finish`.

    Args:
        values: as they were read.
        place: what they are of, in front of each entry of the report: ``"fc1: "``.
        rows: what became of the entries.
        ignored: names that are bookkeeping of the other tool.
    """

    def __init__(
        self, values: Mapping[str, Any], place: str, rows: Rows, ignored: Iterable[str] = ()
    ) -> None:
        self._values, self._left = values, [k for k in values if k not in set(ignored)]
        self.place, self.rows = place, rows

    def take(self, name: str, default: Any, kind: type | tuple[type, ...] | None = None) -> Any:
        """The value of an option, its default if it is not given, or None.

        Of a list, where the tool would try each, the first is taken and the rest is noted.

        Args:
            name: the option.
            default: what the other tool takes where it is not given.
            kind: what a value is expected to be.

        Raises:
            InvalidConfig: it is something else.
        """
        if name in self._left:
            self._left.remove(name)
        value = self._values.get(name)
        if value is None:
            return default
        if isinstance(value, (list, tuple)) and kind is not None and value:
            self.rows.differs(
                f"{self.place}{name} = {shown(list(value))}",
                f"{name} = {shown(value[0])}",
                "a space to search in: the first is taken; torch_quant.tune searches here",
            )
            value = value[0]
        if kind is not None and not _is(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join(each.__name__ for each in kinds)
            raise InvalidConfig(f"{self.place}{name} is {shown(value)}; expected {expected}")
        return value

    def entry(self, *names: str) -> str:
        """Options as they stand in the report.

        >>> Options({"bits": 4}, "fc1: ", Rows()).entry("bits", "group_size")
        'fc1: bits = 4'
        """
        given = [f"{n} = {shown(self._values[n])}" for n in names if n in self._values]
        return self.place + (", ".join(given) or f"{', '.join(names)} by default")

    def left_out(self, name: str, default: Any, why: str) -> None:
        """Note an option without counterpart, where it is not at its default."""
        if self.take(name, default) != default:
            self.rows.left_out(self.entry(name), why)

    def no_effect(self, default: Any, why: str, *names: str) -> None:
        """Note options that change no number, where they are not at their default."""
        for name in names:
            if self.take(name, default) != default:
                self.rows.no_effect(self.entry(name), why)

    def finish(self) -> None:
        """Note what nobody has asked for."""
        for name in self._left:
            self.rows.left_out(self.entry(name), "this package does not know the option")


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether a value is of a kind; True and False are no numbers, and integers are floats."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)
