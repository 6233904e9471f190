"""The ranking as something to read, keep and look at: a table, JSON, CSV, two plots."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch_quant.amp.ranking import Ranking, Sensitivity
from torch_quant.errors import BackendUnavailable
from torch_quant.io.files import checked_target, write_atomically
from torch_quant.report.plots import checked_ending
from torch_quant.report.tables import html_page_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SensitivityReport"]

_UNITS = {"output": "share of output noise", "loss": "share of loss change", "sqnr": "noise/signal"}


class SensitivityReport(Ranking):
    """A :class:`Ranking` that can be printed, saved and plotted.

    Args:
        ranking: the sensitivities.
        measured: number of groups in float -> measured output SQNR, dB, where it was asked for.
        rows: how many sites the printed table lists.
    """

    def __init__(
        self, ranking: Ranking, measured: Mapping[int, float] | None = None, rows: int = 25
    ) -> None:
        super().__init__(
            ranking,
            ranking.metric,
            ranking.gram,
            ranking.output_signal,
            ranking.batches,
            ranking.note,
        )
        self.measured, self.rows = dict(measured or {}), rows

    def table(self) -> list[dict[str, Any]]:
        """A row for each site, worst first, in units to read."""
        total = sum(site.score for site in self) or 1.0
        macs = sum(site.macs for site in self) or 1
        rows = []
        for rank, site in enumerate(self, 1):
            only = site.predicted_output_sqnr
            marks = (["in float"] if site.fallen_back else []) + (
                [f"with {', '.join(site.together)}"] if site.together else []
            )
            score = f"{site.score:.3g}" if self.metric == "sqnr" else f"{site.score / total:.1%}"
            rows.append(
                {
                    "": rank,
                    "site": site.name,
                    "op": site.op,
                    _UNITS[self.metric]: score,
                    "output dB": "" if only is None else f"{only:.1f}",
                    "local dB": f"{site.local_sqnr:.1f}",
                    "by weight": f"{site.weight_share:.0%}",
                    "MACs": f"{site.macs / macs:.1%}",
                    "weight kB": f"{site.bytes / 1e3:.0f}" if site.bytes else "",
                }
                | ({"note": "; ".join(marks)} if marks else {})
            )
        return rows

    @property
    def _headline(self) -> str:
        meaning = {
            "output": "by the noise it adds to the outputs (output dB: SQNR there if only this "
            "site is quantized)",
            "loss": "by its effect on the loss",
            "sqnr": "by the noise it adds to its own result",
        }[self.metric]
        return (
            f"{len(self)} {'site' if len(self) == 1 else 'sites'} ranked {meaning}, from "
            f"{self.batches} {'batch' if self.batches == 1 else 'batches'}, worst first"
        )

    def _repr_html_(self) -> str:
        return html_page_table(self._headline, self.note, self.table())

    def __str__(self) -> str:
        from tabulate import tabulate

        parts = [
            self._headline,
            tabulate(self.table()[: self.rows], headers="keys", disable_numparse=True),
        ]
        if len(self) > self.rows:
            parts.append(f"... and {len(self) - self.rows} more")
        if self.metric == "output":
            parts.append(
                f"predicted output SQNR: {self.predicted():.1f} dB with all of them quantized, "
                + ", ".join(
                    f"{sqnr:.1f} with {count}"
                    for count, sqnr in self.curve()
                    if count in (1, 3, 5, 10) and math.isfinite(sqnr)
                )
                + " of the worst in float"
            )
        if self.measured:
            points = (f"{sqnr:.1f} with {k}" for k, sqnr in sorted(self.measured.items()))
            parts.append(f"measured: {', '.join(points)} in float")
        if self.note:
            parts.append(self.note)
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        curve = [
            {
                "in float": count,
                "predicted": _finite(sqnr),
                "measured": _finite(self.measured.get(count)),
            }
            for count, sqnr in self.curve()
        ]
        return super().to_dict() | {"groups": [list(names) for names in self.groups]} | {
            "curve": curve
        }  # fmt: skip

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything as JSON; raises :class:`InvalidConfig` for an unwritable path."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"

        def write(name: str) -> None:
            with open(name, "w", encoding="utf-8") as file:
                file.write(text)

        write_atomically(path, write)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line for each site; raises :class:`InvalidConfig` for an unwritable path."""
        rows = [site.to_dict() for site in self]
        for row in rows:
            for name in ("together", "shares_input"):
                row[name] = " ".join(row[name])

        def write(name: str) -> None:
            with open(name, "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, [field.name for field in fields(Sensitivity)])
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(path, write)

    def plot(self, path: str | os.PathLike[str] | None = None, sites: int = 30) -> Figure:
        """Draw the worst sites as bars, and output SQNR against the number of layers in float.

        Args:
            path: where to save it, ``.png``, ``.svg`` or ``.pdf``; None to only return the figure.
            sites: how many bars.

        Raises:
            BackendUnavailable: matplotlib is missing.
            InvalidConfig: the path cannot be written.
        """
        if path is not None:
            checked_target(path, "figure.png")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise BackendUnavailable("plotting needs it: pip install matplotlib") from error
        count = min(sites, len(self))
        figure = Figure(figsize=(13, max(4.0, 1.6 + 0.24 * count)), layout="constrained")
        suffix = "" if path is None else checked_ending(path, figure)
        bars, curve = figure.subplots(1, 2, width_ratios=(3, 2))
        self.plot_bars(bars, sites)
        self.plot_curve(curve)
        if path is not None:
            write_atomically(path, lambda name: figure.savefig(name, format=suffix, dpi=120))
        return figure

    def plot_bars(self, axes: Axes, sites: int = 30) -> None:
        """Scores of the worst sites, split by weight and activations."""
        worst = list(self)[:sites]
        scale = 1.0 if self.metric == "sqnr" else 100.0 / (sum(site.score for site in self) or 1.0)
        places = range(len(worst))
        by_weight = [site.score * site.weight_share * scale for site in worst]
        by_activation = [site.score * site.activation_share * scale for site in worst]
        axes.barh(places, by_activation, color="tab:blue", label="quantized activations")
        axes.barh(
            places, by_weight, left=by_activation, color="tab:orange", label="quantized weight"
        )
        names = [f"{site.name} (in float)" if site.fallen_back else site.name for site in worst]
        axes.set_yticks(places, [_shortened(name) for name in names], fontsize=8)
        axes.invert_yaxis()
        unit = "" if self.metric == "sqnr" else ", %"
        axes.set_xlabel(_UNITS[self.metric] + unit)
        axes.set_title(f"the {len(worst)} most sensitive of {len(self)} sites")
        axes.grid(axis="x", alpha=0.3)
        axes.legend(loc="lower right")

    def plot_curve(self, axes: Axes) -> None:
        """Output SQNR against how many of the worst layers are in float."""
        points = [(count, sqnr) for count, sqnr in self.curve() if math.isfinite(sqnr)]
        if not points and not self.measured:
            axes.set_axis_off()
            axes.text(0.5, 0.5, "no output SQNR: sensitivity(amp_model, measure=True)", ha="center")
            return
        if points:
            axes.plot(*zip(*points, strict=True), label="predicted", color="tab:blue")
        finite = sorted((k, v) for k, v in self.measured.items() if math.isfinite(v))
        if finite:
            axes.plot(*zip(*finite, strict=True), "o", label="measured", color="tab:red")
        axes.set_xlabel("layers in float, worst first")
        axes.set_ylabel("output SQNR, dB")
        axes.set_title("what falling back buys")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _shortened(name: str, most: int = 48) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"
