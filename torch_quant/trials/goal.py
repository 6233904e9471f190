"""The metric that is to be reached, and the user's function that gives it."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_quant.errors import InvalidConfig

__all__ = ["Goal", "evaluate", "is_number"]


@dataclass(frozen=True)
class Goal:
    """How much of the float model's metric may be lost.

    Args:
        tolerance: as a share of the metric, or in its own unit.
        relative: which of the two.
        higher_is_better: False for a loss.

    Raises:
        InvalidConfig: the tolerance is no number, not finite, or negative.
    """

    tolerance: float
    relative: bool
    higher_is_better: bool

    def __post_init__(self) -> None:
        tolerance = self.tolerance
        if not (is_number(tolerance) and math.isfinite(tolerance) and tolerance >= 0.0):
            raise InvalidConfig(f"tolerance={tolerance!r}; expected 0 or more, 0.01 for 1 %")

    def target(self, baseline: float) -> float:
        """The metric that is still within the tolerance of the float model's.

        Raises:
            InvalidConfig: the float model's is not finite.

        >>> Goal(0.01, relative=False, higher_is_better=True).target(0.8)
        0.79
        """
        if not math.isfinite(baseline):
            raise InvalidConfig(f"eval_fn gave {baseline} for the float model; it must be finite")
        allowed = self.tolerance * abs(baseline) if self.relative else self.tolerance
        return baseline - allowed if self.higher_is_better else baseline + allowed

    def passes(self, metric: float, target: float) -> bool:
        """Whether a metric is as good as the target.

        >>> Goal(0.01, relative=True, higher_is_better=False).passes(float("nan"), 1.0)
        False
        """
        return metric >= target if self.higher_is_better else metric <= target


def evaluate(eval_fn: Callable[[nn.Module], Any], model: nn.Module, what: str) -> dict[str, float]:
    """The metric of a model, and the seconds that it took.

    Args:
        eval_fn: the user's.
        model: float or quantized.
        what: it is, for the message.

    Raises:
        InvalidConfig: ``eval_fn`` gave no number.

    >>> evaluate(lambda model: 1, nn.Identity(), "it")["metric"]
    1.0
    """
    start = time.monotonic()
    value: Any = eval_fn(model)
    try:
        metric = float(value)
    except (TypeError, ValueError) as error:
        raise InvalidConfig(f"eval_fn gave {value!r} for {what}; expected a number") from error
    return {"metric": metric, "seconds": time.monotonic() - start}


def is_number(value: Any) -> bool:
    """Whether it is one, and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
