"""What an accuracy-driven search tried and found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["Trial", "Tuning", "rank"]


def rank(metric: float, higher_is_better: bool) -> float:
    """What is more for a better metric, and least for NaN.

    >>> rank(2.0, higher_is_better=False) < rank(1.0, higher_is_better=False)
    True
    """
    if math.isnan(metric):
        return -math.inf
    return metric if higher_is_better else -metric


@dataclass(frozen=True)
class Trial:
    """One call of ``eval_fn``.

    Args:
        in_float: how many groups of sites were in float; None for the float model itself.
        metric: what ``eval_fn`` gave.
        passed: whether that is within the tolerance.
        seconds: how long it took.
    """

    in_float: int | None
    metric: float
    passed: bool
    seconds: float


@dataclass
class Tuning:
    """What a search found; ``print`` it.

    Args:
        target: the metric to reach.
        groups: how many groups of sites could fall back.
        higher_is_better: the direction of the metric.
        trials: every call of ``eval_fn``, in order.
        names: the sites in float at the end.
        stopped: why the search ended before it was done, empty if it was.
    """

    target: float
    groups: int
    higher_is_better: bool = True
    trials: list[Trial] = field(default_factory=list)
    names: tuple[str, ...] = ()
    stopped: str = ""

    @property
    def quantized(self) -> list[Trial]:
        """The trials of quantized models."""
        return [trial for trial in self.trials if trial.in_float is not None]

    @property
    def reached(self) -> bool:
        """Whether a quantized model is within the tolerance."""
        return any(trial.passed for trial in self.quantized)

    @property
    def best(self) -> Trial:
        """The trial with the fewest layers in float that passed; if none did, the best metric."""
        if passing := [trial for trial in self.quantized if trial.passed]:
            return min(passing, key=lambda trial: trial.in_float or 0)
        return max(self.quantized, key=lambda trial: rank(trial.metric, self.higher_is_better))

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [
            {
                "trial": number,
                "in float": "all (float model)" if trial.in_float is None else trial.in_float,
                "metric": f"{trial.metric:.6g}",
                "within tolerance": "yes" if trial.passed else "no",
                "seconds": f"{trial.seconds:.1f}",
            }
            for number, trial in enumerate(self.trials, 1)
        ]
        sign = ">=" if self.higher_is_better else "<="
        verdict = (
            f"reached with {self.best.in_float} of {self.groups} layers in float"
            if self.reached
            else f"NOT reached; the best is {self.best.metric:.6g} with {self.best.in_float} of "
            f"{self.groups} layers in float"
        )
        lines = [
            tabulate(rows, headers="keys", disable_numparse=True),
            f"target: metric {sign} {self.target:.6g}: {verdict}",
        ]
        if self.names:
            lines.append(f"layers in float, by name: {', '.join(map(repr, self.names))}")
        if self.stopped:
            lines.append(f"stopped early: {self.stopped}")
        return "\n".join(lines)
