"""What a migration gives: arguments of a quantizer, and what became of each entry."""

from __future__ import annotations

import enum
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch_quant.config import OverrideKey, QConfig
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import InvalidConfig
from torch_quant.graph.policy import CapturePolicy
from torch_quant.io.summary import write_summary
from torch_quant.module_filter import ModuleFilter
from torch_quant.quantizer import Quantizer
from torch_quant.report.tables import html_page_table

__all__ = ["Migration", "Outcome", "Ranges", "Row", "Rows"]

_WIDEST = 48
"""Characters of an entry and of a reason in a line of the table."""


class Outcome(enum.Enum):
    """What became of an entry."""

    SAME = "same"
    """The same formats, and the same method with the same options."""
    DIFFERS = "differs"
    """Something near to it took its place."""
    LEFT_OUT = "left out"
    """There is nothing like it here."""
    NO_EFFECT = "no effect"
    """It says how the other tool works, and not what comes out."""


@dataclass(frozen=True)
class Row:
    """One entry of what was read.

    Args:
        entry: as it stands there.
        outcome: what became of it.
        here: what it is called here, empty if there is nothing.
        why: the reason, and what to do.
    """

    entry: str
    outcome: Outcome
    here: str = ""
    why: str = ""

    def to_dict(self) -> dict[str, str]:
        """The row as plain data.

        >>> Row("bits = 4", Outcome.SAME, "int4").to_dict()["outcome"]
        'same'
        """
        return {
            "entry": self.entry,
            "outcome": self.outcome.value,
            "here": self.here,
            "why": self.why,
        }


@dataclass
class Rows:
    """Rows while something is read.

    >>> rows = Rows()
    >>> rows.left_out("act_order = True", "no reason")
    >>> rows.found[0].outcome
    <Outcome.LEFT_OUT: 'left out'>
    """

    found: list[Row] = field(default_factory=list)

    def same(self, entry: str, here: str, why: str = "") -> None:
        """Note an entry that gives the same arithmetic here."""
        self._add(Row(entry, Outcome.SAME, here, why))

    def differs(self, entry: str, here: str, why: str) -> None:
        """Note an entry in whose place something near to it stands."""
        self._add(Row(entry, Outcome.DIFFERS, here, why))

    def left_out(self, entry: str, why: str) -> None:
        """Note an entry that has no counterpart."""
        self._add(Row(entry, Outcome.LEFT_OUT, "", why))

    def no_effect(self, entry: str, why: str) -> None:
        """Note an entry that changes no number."""
        self._add(Row(entry, Outcome.NO_EFFECT, "", why))

    def _add(self, row: Row) -> None:
        if row not in self.found:
            self.found.append(row)


@dataclass(frozen=True)
class Ranges:
    """Ranges that were read for the sites of one model.

    Args:
        plan: its sites, with what is quantized and in which format.
        values: tensor key -> the smallest and largest value that its grid covers.
        capture: what was captured as a graph.
    """

    plan: QuantPlan
    values: Mapping[str, list[float]]
    capture: CapturePolicy | None = None


@dataclass(frozen=True, eq=False)
class Migration:
    """Settings of another tool as those of this one; ``print`` shows a table of what differs.

    Args:
        origin: what was read.
        qconfig: the formats of what no override covers.
        overrides: the exceptions.
        module_filter: what is quantized at all.
        rows: every entry that was read, and what became of it.
        ranges: where the source had ranges, those.

    >>> found = Migration("an example", QConfig(), rows=(Row("bits = 8", Outcome.SAME, "uint8"),))
    >>> print(found)
    an example: 1 entry the same
    entry     outcome    here    why
    --------  ---------  ------  -----
    bits = 8  same       uint8
    """

    origin: str
    qconfig: QConfig
    overrides: Mapping[OverrideKey, QConfig | None] = field(default_factory=dict)
    module_filter: ModuleFilter = field(default_factory=ModuleFilter)
    rows: tuple[Row, ...] = ()
    ranges: Ranges | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of a :class:`Quantizer`.

        >>> sorted(Migration("an example", QConfig()).arguments)
        ['module_filter', 'overrides', 'qconfig']
        """
        return {
            "qconfig": self.qconfig,
            "overrides": dict(self.overrides),
            "module_filter": self.module_filter,
        }

    @property
    def unmapped(self) -> tuple[Row, ...]:
        """The rows that are left out, or differ.

        >>> Migration("an example", QConfig()).unmapped
        ()
        """
        return tuple(r for r in self.rows if r.outcome in (Outcome.LEFT_OUT, Outcome.DIFFERS))

    @property
    def needs_blocks(self) -> bool:
        """Whether weights are rounded by :meth:`Quantizer.round_weights`, with data.

        >>> from torch_quant import recipes
        >>> Migration("", recipes.int4_weight_only(method="gptq")).needs_blocks
        True
        """
        configs = [self.qconfig, *(each for each in self.overrides.values() if each is not None)]
        methods = [m for c in configs for m in (*c.transforms, c.method) if m is not None]
        return not self.qconfig.needs_ranges and any(
            each.wants_blocks or each.wants_statistics for each in methods
        )

    def quantizer(self, **more: Any) -> Quantizer:
        """A quantizer with these settings, and these ranges if there are any.

        Args:
            more: further arguments of :class:`Quantizer`, such as ``backend=``; they go before.

        Raises:
            InvalidConfig: an argument is wrong.
            BackendUnavailable: the backend does not run on this machine.

        >>> Migration("an example", QConfig()).quantizer(backend="reference").backend
        Backend.REFERENCE
        """
        quantizer = Quantizer(**{**self.arguments, **more})
        if self.ranges is not None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "summary.json")
                self.save_summary(path)
                quantizer.load_summary(path)
        return quantizer

    def to_config(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """The settings as data, for :meth:`Quantizer.from_config` and ``torch-quant quantize``.

        Args:
            path: also write them there, as JSON or YAML by its ending.

        Raises:
            InvalidConfig: a key is a function, or a class that has no path; the path cannot be
                written.

        >>> Migration("an example", QConfig(observer="histogram")).to_config()["qconfig"]
        {'observer': 'histogram'}
        """
        return Quantizer(**self.arguments).to_config(path)

    def save_summary(self, path: str | os.PathLike[str]) -> None:
        """Write the ranges as a summary, for :meth:`Quantizer.load_summary`.

        Raises:
            InvalidConfig: there are none, as in a configuration; the path cannot be written.

        >>> Migration("a file", QConfig()).save_summary("summary.json")
        Traceback (most recent call last):
        torch_quant.errors.InvalidConfig: a file has no ranges: calibrate with a quantizer() of it
        """
        if self.ranges is None:
            raise InvalidConfig(f"{self.origin} has no ranges: calibrate with a quantizer() of it")
        ranges = {key: list(ends) for key, ends in self.ranges.values.items()}
        write_summary(path, self.ranges.plan, ranges, capture=self.ranges.capture)

    def to_dict(self) -> dict[str, Any]:
        """Origin, settings and rows, as JSON has them.

        >>> Migration("an example", QConfig()).to_dict()["rows"]
        []
        """
        return {
            "origin": self.origin,
            "settings": self.to_config(),
            "rows": [row.to_dict() for row in self.rows],
        }

    @property
    def headline(self) -> str:
        """How many entries are the same, differ and so on.

        >>> Migration("an example", QConfig()).headline
        'an example: nothing to map'
        """
        counts = {each: sum(row.outcome is each for row in self.rows) for each in Outcome}
        words = {
            Outcome.SAME: "the same",
            Outcome.DIFFERS: "nearly",
            Outcome.LEFT_OUT: "left out",
            Outcome.NO_EFFECT: "without effect",
        }
        parts = [f"{count} {words[each]}" for each, count in counts.items() if count]
        if parts:
            first, space, rest = parts[0].partition(" ")
            parts[0] = f"{first} {'entry' if first == '1' else 'entries'}{space}{rest}"
        return f"{self.origin}: {', '.join(parts) or 'nothing to map'}"

    def __str__(self) -> str:
        from tabulate import tabulate

        if not self.rows:
            return self.headline
        table = tabulate(
            [list(row.to_dict().values()) for row in self.rows],
            headers=["entry", "outcome", "here", "why"],
            disable_numparse=True,
            maxcolwidths=[_WIDEST, None, 36, _WIDEST],
        )
        return "\n".join(line.rstrip() for line in f"{self.headline}\n{table}".splitlines())

    def _repr_html_(self) -> str:
        return html_page_table(self.headline, "", [row.to_dict() for row in self.rows])

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)
