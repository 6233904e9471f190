"""What it gains to quantize each part of a model: measured on this machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch_quant.errors import InvalidConfig
from torch_quant.report.tables import html_page_table

__all__ = ["Difference", "Region", "Regions"]

_CHANCE = 0.003
"""How likely a difference may lie outside of its interval."""
_LEAST = 0.005
"""Share of a call's time; of smaller differences nothing is said."""


@dataclass(frozen=True)
class Difference:
    """How much longer one model takes than another, by calls that were made in turns.

    Args:
        milliseconds: the median of the differences; below 0 where it takes less.
        noise: how far below it the interval begins that holds the true median, whatever the
            differences are distributed like; as order statistics tell.
        whole: the median of the other model's times.

    >>> Difference.of([3.0, 3.1, 3.2], [1.0, 1.1, 1.3]).certain
    True
    >>> Difference.of([3.0, 1.1, 3.2], [1.0, 3.1, 3.1]).certain
    False
    """

    milliseconds: float
    noise: float
    whole: float

    @classmethod
    def of(cls, times: Sequence[float], others: Sequence[float]) -> Difference:
        """Of two models that were called in turns.

        Args:
            times: of each call, in milliseconds.
            others: of the other model's calls, in the same turns.

        Raises:
            InvalidConfig: they are not the same number, or too few.
        """
        if len(times) != len(others) or len(times) < 3:
            raise InvalidConfig(
                f"{len(times)} times and {len(others)} of the other model; expected three or more "
                "of each, of calls that were made in turns"
            )
        apart = sorted(a - b for a, b in zip(times, others, strict=True))
        middle = statistics.median(apart)
        return cls(middle, middle - apart[_below(len(apart))], statistics.median(others))

    @property
    def certain(self) -> bool:
        """Whether it takes longer by more than chance."""
        return self.milliseconds > max(self.noise, _LEAST * self.whole)


def _below(count: int) -> int:
    """Of so many sorted numbers, how many are left out below the interval of their median.

    That the true median lies below the first, or above the last, is as likely as that all coins of
    so many fall alike.
    """
    outside, left_out = 2.0 / 2**count, 0
    while outside <= _CHANCE:
        left_out += 1
        outside += 2.0 * math.comb(count, left_out) / 2**count
    return max(left_out - 1, 0)


@dataclass(frozen=True)
class Region:
    """Some sites of a model, with the quantizers around them.

    Args:
        name: what they have in common.
        sites: their names.
        gain: how much longer a call of the model takes with these in float.
        loss: how much longer it takes with these quantized; the opposite of ``gain``.
        in_float: whether they were taken back to float for that.
        kept: why they stay quantized although they are slower, else empty.
    """

    name: str
    sites: tuple[str, ...]
    gain: Difference
    loss: Difference
    in_float: bool = False
    kept: str = ""

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.in_float:
            return "taken back to float"
        if self.kept:
            return self.kept
        if self.loss.certain:
            return "slower"
        return "faster" if self.gain.certain else "no difference"


@dataclass(frozen=True)
class Regions:
    """What :meth:`Quantizer.profile_regions` measured; ``print`` it.

    Args:
        regions: the largest gain first.
        backend: where they ran.
        whole: median of a call with all of them quantized, in milliseconds.
        float32: median of a call of the float model.
        threads: of PyTorch, with which it was measured.
        against: how much longer the resulting model takes than the float one.
        asked: sites that were not tried in float, since an override says what they are.
    """

    regions: tuple[Region, ...]
    backend: str
    whole: float
    float32: float
    threads: int
    against: Difference
    asked: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Region]:
        return iter(self.regions)

    @property
    def slower(self) -> tuple[str, ...]:
        """The sites that were taken back to float."""
        return tuple(name for each in self.regions if each.in_float for name in each.sites)

    def _rows(self) -> list[dict[str, object]]:
        return [
            {
                "region": each.name,
                "sites": len(each.sites),
                "in float, ms": f"{each.gain.milliseconds:+.3f}",
                "noise": f"{each.gain.noise:.3f}",
                "quantized": each.verdict,
            }
            for each in self.regions
        ]

    def _notes(self) -> list[str]:
        lines = [
            f"{self.backend}, {self.threads} threads: a call takes {self.whole:.3g} ms quantized, "
            f"{self.float32:.3g} ms in float32"
        ]
        if self.slower:
            now = self.float32 + self.against.milliseconds
            lines.append(f"with {len(self.slower)} sites taken back to float, {now:.3g} ms")
        if self.asked:
            names = ", ".join(self.asked[:3]) + (", ..." if self.asked[3:] else "")
            lines.append(f"not tried, since an override says what they are: {names}")
        return lines

    def _repr_html_(self) -> str:
        first, *rest = self._notes()
        return html_page_table(first, "\n".join(rest), self._rows())

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = self._rows()
        lines = [tabulate(rows, headers="keys", disable_numparse=True)] if rows else []
        return "\n".join([*lines, *self._notes()])
