"""How many, and which: the two small searches behind ``fallback``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["fewest_for", "most_within"]

logger = logging.getLogger("torch_quant")

_GUIDED = 3
"""Measurements that follow the prediction before plain bisection takes over."""


def fewest_for(
    noises: Sequence[float],
    target: float,
    measure: Callable[[int], float],
    signal: float | None = None,
) -> tuple[int, dict[int, float]]:
    """The fewest groups in float whose measured output SQNR reaches a target.

    The prediction picks the first count to measure; each measurement corrects it by the ratio of
    measured to predicted noise.

    Args:
        noises: predicted output noise with the first 0, 1, 2 ... groups in float, in any unit.
        target: SQNR, dB.
        measure: output SQNR, dB, with the first so many groups in float.
        signal: output signal in the unit of ``noises``; None if only their proportions are known.

    Returns:
        The count, all of them if nothing less will do, and the measurements that were made.
    """
    measured: dict[int, float] = {}
    low, high = -1, len(noises)  # too few; enough, since float adds no noise
    per_noise = None if signal is None or signal <= 0.0 else 1.0 / signal
    while high - low > 1:
        if len(measured) >= _GUIDED:
            guess = (low + high) // 2
        elif per_noise is None:
            guess = low + 1
        else:
            allowed = 10.0 ** (-target / 10.0) / per_noise
            guess = next((k for k in range(low + 1, high) if noises[k] <= allowed), high - 1)
        measured[guess] = sqnr = measure(guess)
        if noises[guess] > 0.0 and math.isfinite(sqnr):
            per_noise = 10.0 ** (-sqnr / 10.0) / noises[guess]
        logger.info("%d groups in float: output SQNR %.2f dB", guess, sqnr)
        if sqnr >= target:
            high = guess
        else:
            low = guess
    return high, measured


def most_within(noises: Sequence[float], costs: Sequence[float], budget: float) -> list[int]:
    """The groups that remove the most noise for a bounded cost: a 0/1 knapsack.

        maximize  sum of noise_i x_i   subject to   sum of cost_i x_i <= budget,  x_i in {0, 1}

    Args:
        noises: what each group's return to float removes.
        costs: what it costs, in any unit; negative where float is the faster one.
        budget: in the same unit.

    Returns:
        Indices, in order. Those that are faster in float are always among them.

    Solved by branch and bound (HiGHS, through scipy).
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    if not noises:
        return []
    gain = np.asarray(noises, dtype=float)
    gain = gain / gain.max() if gain.max() > 0.0 else gain
    price = np.asarray(costs, dtype=float)
    unit = np.abs(price).max() or 1.0
    free = np.flatnonzero(price <= 0.0)
    result = milp(
        -(gain + 1e-9),
        constraints=LinearConstraint(price[None] / unit, -np.inf, budget / unit),
        integrality=np.ones_like(gain),
        bounds=Bounds(np.isin(np.arange(len(gain)), free).astype(float), 1.0),
        options={"mip_rel_gap": 1e-9},
    )
    if result.x is None:  # not even the free ones fit: the budget is below their sum
        return [int(i) for i in free]
    return [int(i) for i in np.flatnonzero(np.round(result.x) > 0)]
