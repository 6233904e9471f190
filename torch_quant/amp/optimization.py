"""What optimizing found, as something to read: a table, JSON, a page in notebooks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch_quant.amp.ranking import decibels
from torch_quant.report.tables import html_page_table

__all__ = ["Optimization", "Treatments"]


@dataclass(frozen=True)
class Treatments:
    """One group of sites, which are treated alike.

    Args:
        sites: their names.
        chosen: the treatment; empty for what was planned.
        planned: energy of the noise that they add to the outputs as planned, in the units of the
            output signal.
        treated: the same with what was chosen.
    """

    sites: tuple[str, ...]
    chosen: str
    planned: float
    treated: float

    @property
    def gain(self) -> float:
        """What the treatment takes off the noise of these sites, dB.

        >>> round(Treatments(("head",), "per token", 1.0, 0.5).gain, 2)
        3.01
        """
        return decibels(self.planned, self.treated)


@dataclass(frozen=True)
class Optimization:
    """Which group of sites got which treatment, and what that buys; ``print`` shows a table.

    Args:
        groups: in the order that they run.
        predicted: output SQNR, dB, as planned before and as chosen, to first order; the second by
            choices from half of the batches on the other half.
        measured: the same of quantized runs over samples that the AMP proxy kept.
        signal: energy of the float outputs.
        kept: False where the choice measured worse than what was there, so that nothing changed.
    """

    groups: tuple[Treatments, ...]
    predicted: tuple[float, float]
    measured: tuple[float, float]
    signal: float
    kept: bool = True

    @property
    def chosen(self) -> dict[str, str]:
        """Site -> its treatment, of those that got one; empty where nothing changed."""
        return self._picked if self.kept else {}

    @property
    def _picked(self) -> dict[str, str]:
        return {site: each.chosen for each in self.groups if each.chosen for site in each.sites}

    @property
    def headline(self) -> str:
        """The result in a line."""
        sites = sum(len(each.sites) for each in self.groups)
        names = ("predicted", "measured")
        parts = (
            f"{name} {before:.1f} -> {after:.1f} dB"
            for name, (before, after) in zip(names, (self.predicted, self.measured), strict=True)
        )
        treated = f"{len(self._picked)} of {sites} sites treated, output SQNR {', '.join(parts)}"
        return treated if self.kept else f"nothing changed, since this measures worse: {treated}"

    def table(self) -> list[dict[str, Any]]:
        """A row for each group that a treatment was chosen for, what buys most first, to read."""
        whole = sum(each.planned for each in self.groups) or 1.0
        found = [each for each in self.groups if each.chosen]
        found.sort(key=lambda each: each.treated - each.planned)
        return [
            {
                "sites": ", ".join(each.sites),
                "treatment": each.chosen,
                "share of the noise": f"{each.planned / whole:.1%}",
                "then": f"{each.treated / whole:.1%}",
                "gain dB": f"{each.gain:.1f}",
            }
            for each in found
        ]

    @property
    def _counts(self) -> str:
        count = Counter(self._picked.values())
        return ", ".join(f"{name}: {number}" for name, number in count.most_common())

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = self.table()
        if not rows:
            return self.headline
        table = tabulate(rows, headers="keys", disable_numparse=True)
        return f"{self.headline}\n{self._counts}\n\n{table}"

    def _repr_html_(self) -> str:
        return html_page_table(self.headline, self._counts, self.table())

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "predicted": list(self.predicted),
            "measured": list(self.measured),
            "kept": self.kept,
            "groups": [
                {
                    "sites": list(each.sites),
                    "treatment": each.chosen,
                    "planned": each.planned,
                    "treated": each.treated,
                }
                for each in self.groups
            ],
        }
