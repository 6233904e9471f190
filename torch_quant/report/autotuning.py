"""What was found among several configurations."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch_quant.report.names import decibels
from torch_quant.report.plots import drawn
from torch_quant.report.tables import html_page_table
from torch_quant.report.tuning import rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["OBJECTIVES", "Autotuning", "Tried"]

OBJECTIVES = {"latency": "time of a call", "size": "bytes of the tensors"}
"""What can be made small, as a share of float32's -> what it is."""


@dataclass(frozen=True)
class Tried:
    """One configuration.

    Args:
        name: what the table calls it.
        configuration: for :meth:`Quantizer.from_config`.
        sqnr: of its outputs against float32 on the data, in dB; None if it cannot be quantized.
        latency: its time of a call, as a share of float32's in the same minute.
        size: its bytes, as a share of float32's.
        why_not: why it cannot be quantized.
        metric: what ``eval_fn`` gave; None where it was not asked.
        passed: whether that is within the tolerance.
        seconds: that ``eval_fn`` took.
    """

    name: str
    configuration: Mapping[str, Any]
    sqnr: float | None = None
    latency: float | None = None
    size: float | None = None
    why_not: str = ""
    metric: float | None = None
    passed: bool = False
    seconds: float = 0.0

    def costs(self, objectives: Sequence[str]) -> tuple[float, ...]:
        """What is to be small; infinite where it cannot be quantized."""
        found = (getattr(self, each) for each in objectives)
        return tuple(math.inf if each is None else float(each) for each in found)


@dataclass
class Autotuning:
    """What :func:`torch_quant.autotune` found; ``print`` it.

    Args:
        objectives: of ``"latency"`` and ``"size"``; the first decides.
        baseline: the metric of the float model.
        target: the metric that is still within the tolerance.
        higher_is_better: the direction of the metric.
        tried: every configuration, in the order given.
        stopped: why the search ended before it was done, empty if it was.
        model: the best one, quantized.
        quantizer: that made it, calibrated.
    """

    objectives: tuple[str, ...]
    baseline: float
    target: float
    higher_is_better: bool = True
    tried: list[Tried] = field(default_factory=list)
    stopped: str = ""
    model: Any = field(default=None, repr=False)
    quantizer: Any = field(default=None, repr=False)

    def __iter__(self) -> Iterator[Tried]:
        return iter(self.tried)

    @property
    def evaluations(self) -> int:
        """How many configurations ``eval_fn`` was asked about; the float model comes on top."""
        return sum(each.metric is not None for each in self.tried)

    @property
    def reached(self) -> bool:
        """Whether a configuration is within the tolerance."""
        return any(each.passed for each in self.tried)

    @property
    def front(self) -> list[Tried]:
        """Those within the tolerance that no other such beats in all objectives."""
        passing = [each for each in self.tried if each.passed]
        return [each for each in passing if not _beaten(each, passing, self.objectives)]

    @property
    def best(self) -> Tried | None:
        """The first of the front by the first objective; if none passed, that of the best metric.

        None if nothing was evaluated.
        """
        if front := self.front:
            return min(front, key=lambda each: each.costs(self.objectives))
        known = [each for each in self.tried if each.metric is not None]
        higher = self.higher_is_better
        return max(known, key=lambda each: rank(each.metric or 0.0, higher), default=None)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Accuracy against the first objective, the front as a line.

        Args:
            path: also write the figure there, as PNG, SVG or PDF by its ending.

        Raises:
            BackendUnavailable: matplotlib is missing.
            InvalidConfig: matplotlib does not write such a file.
        """
        return drawn(path, lambda figure, _: self._draw(figure), None)

    def _draw(self, figure: Figure) -> None:
        first = self.objectives[0]
        figure.set_size_inches(7, 4.5)
        axes = figure.subplots()
        known = [each for each in self.tried if each.metric is not None]
        for passed, color in ((True, "tab:green"), (False, "tab:red")):
            some = [each for each in known if each.passed == passed]
            label = "within the tolerance" if passed else "not"
            points = [(each.costs([first])[0], float(each.metric or 0.0)) for each in some]
            if points:
                axes.scatter(*zip(*points, strict=True), color=color, label=label, zorder=3)
        for each in known:
            place = each.costs([first])[0], float(each.metric or 0.0)
            axes.annotate(each.name, place, (4, 4), textcoords="offset points", fontsize=8)
        front = sorted((each.costs([first])[0], float(each.metric or 0.0)) for each in self.front)
        if len(front) > 1:
            axes.plot(*zip(*front, strict=True), color="tab:green", linewidth=1)
        axes.axhline(self.target, color="gray", linestyle="--", linewidth=1, label="target")
        axes.axhline(self.baseline, color="gray", linewidth=1, label="float32")
        axes.set_xlabel(f"{OBJECTIVES[first]}, share of float32's")
        axes.set_ylabel("metric")
        axes.legend(fontsize=8)

    def _rows(self) -> list[dict[str, str]]:
        best = self.best
        ranked = sorted(self.tried, key=lambda each: each.costs(self.objectives))
        return [
            {
                "": "*" if each is best else "",
                "configuration": each.name,
                "time": _share(each.latency),
                "size": _share(each.size),
                "SQNR": "-" if each.sqnr is None else decibels(each.sqnr),
                "metric": "-" if each.metric is None else f"{each.metric:.6g}",
                "within tolerance": _verdict(each),
            }
            for each in ranked
        ]

    def _notes(self) -> list[str]:
        sign = ">=" if self.higher_is_better else "<="
        best = self.best
        found = "nothing was evaluated"
        if best is not None:
            found = f"{'reached by' if self.reached else 'NOT reached; the best is'} {best.name}"
        lines = [
            f"float32: {self.baseline:.6g}; target: metric {sign} {self.target:.6g}: {found}, with "
            f"{self.evaluations} of {len(self.tried)} configurations evaluated"
        ]
        lines += [f"{each.name}: {each.why_not}" for each in self.tried if each.why_not]
        if self.stopped:
            lines.append(f"stopped early: {self.stopped}")
        return lines

    def _repr_html_(self) -> str:
        return html_page_table("configurations", "\n".join(self._notes()), self._rows())

    def __str__(self) -> str:
        from tabulate import tabulate

        table = tabulate(self._rows(), headers="keys", disable_numparse=True)
        return "\n".join([table, *self._notes()])


def _beaten(one: Tried, all_: Sequence[Tried], objectives: Sequence[str]) -> bool:
    """Whether another is no worse in all objectives and better in one."""
    costs = one.costs(objectives)
    others = (each.costs(objectives) for each in all_)
    return any(
        all(x <= y for x, y in zip(other, costs, strict=True)) and other != costs
        for other in others
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _verdict(each: Tried) -> str:
    if each.why_not:
        return "does not run"
    return "-" if each.metric is None else ("yes" if each.passed else "no")
