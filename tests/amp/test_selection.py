"""The two searches against trying everything."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from torch_quant.amp.selection import fewest_for, most_within


def curve(random: np.random.Generator, count: int) -> list[float]:
    """SQNR with the first 0, 1, ... groups in float, dB: never falls."""
    steps = random.exponential(3.0, count) * (random.random(count) < 0.7)
    return list(np.cumsum(steps) + random.uniform(0.0, 30.0))


def predictions(random: np.random.Generator, sqnrs: list[float], kind: str) -> list[float]:
    noises = 10.0 ** (-np.asarray(sqnrs) / 10.0)
    wrong = {
        "right": noises,
        "other unit": 1e9 * noises,
        "off by 10 dB": noises * 10.0 ** random.uniform(-1.0, 1.0, len(noises)),
        "random": random.exponential(1.0, len(noises)),
        "upside down": noises[::-1],
        "constant": np.ones_like(noises),
        "zero": np.zeros_like(noises),
    }
    return [float(x) for x in wrong[kind]]


KINDS = ["right", "other unit", "off by 10 dB", "random", "upside down", "constant", "zero"]


@pytest.mark.parametrize("signal", [1.0, None, 0.0], ids=["signal", "no signal", "signal 0"])
@pytest.mark.parametrize("kind", KINDS)
def test_fewest_for_finds_what_brute_force_finds(kind: str, signal: float | None) -> None:
    random = np.random.default_rng(0)
    for _ in range(150):
        count = int(random.integers(1, 40))
        sqnrs = curve(random, count)
        target = float(random.uniform(sqnrs[0] - 3.0, sqnrs[-1] + 3.0))
        asked: list[int] = []

        def measure(k: int, sqnrs: list[float] = sqnrs, asked: list[int] = asked) -> float:
            asked.append(k)
            return sqnrs[k]

        found, measured = fewest_for(predictions(random, sqnrs, kind), target, measure, signal)
        assert found == next((k for k, v in enumerate(sqnrs) if v >= target), count)
        assert len(set(asked)) == len(asked)
        assert measured == {k: sqnrs[k] for k in asked}
        assert len(asked) <= 3 + math.ceil(math.log2(count + 1))


def test_a_right_prediction_needs_two_measurements() -> None:
    """One that is enough, and the one before it, that is not."""
    random = np.random.default_rng(0)
    for _ in range(50):
        sqnrs = list(np.cumsum(random.exponential(3.0, 30)))
        target = float(random.uniform(sqnrs[0], sqnrs[-2]))
        noises = [10.0 ** (-v / 10.0) for v in sqnrs]
        _, measured = fewest_for(noises, target, sqnrs.__getitem__, 1.0)
        assert len(measured) <= 2


def test_what_is_returned_was_measured_to_be_enough() -> None:
    """On a curve that rises and falls too, where the fewest is not promised."""
    random = np.random.default_rng(0)
    for _ in range(200):
        sqnrs = [float(v) for v in random.uniform(0.0, 40.0, int(random.integers(1, 30)))]
        target = float(random.uniform(0.0, 45.0))
        noises = [float(v) for v in random.exponential(1.0, len(sqnrs))]
        found, measured = fewest_for(noises, target, sqnrs.__getitem__, 1.0)
        assert found == len(sqnrs) or measured[found] >= target
        assert found == 0 or measured[found - 1] < target


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf], ids=str)
def test_measurements_that_are_no_numbers(value: float) -> None:
    found, measured = fewest_for([3.0, 2.0, 1.0], 20.0, lambda k: value, 1.0)
    assert found == (0 if value == math.inf else 3)
    assert len(measured) <= 3


def test_nothing_to_take_back() -> None:
    assert fewest_for([], 20.0, lambda k: math.nan, 1.0) == (0, {})
    assert most_within([], [], 1.0) == []


def value(noises: list[float], picked: list[int]) -> float:
    return math.fsum(noises[i] for i in picked)


def brute_force(noises: list[float], costs: list[float], budget: float) -> float:
    subsets = (
        picked
        for size in range(len(noises) + 1)
        for picked in itertools.combinations(range(len(noises)), size)
    )
    return max(value(noises, list(p)) for p in subsets if math.fsum(costs[i] for i in p) <= budget)


@pytest.mark.parametrize("least", [0.0, -30.0], ids=["costs", "some are faster in float"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 2.0])
def test_most_within_removes_as_much_as_brute_force(least: float, share: float) -> None:
    random = np.random.default_rng(0)
    for _ in range(25):
        count = int(random.integers(1, 10))
        noises = [float(x) for x in random.exponential(1e-3, count) ** 2]
        costs = [float(x) for x in random.uniform(least, 100.0, count)]
        budget = share * sum(abs(cost) for cost in costs)
        picked = most_within(noises, costs, budget)
        assert picked == sorted(set(picked))
        # The solver keeps constraints to 1e-6 of the largest cost, and stops at a gap of 1e-9.
        assert math.fsum(costs[i] for i in picked) <= budget + 1e-4
        assert value(noises, picked) == pytest.approx(
            brute_force(noises, costs, budget), rel=1e-6, abs=1e-8 * max(noises)
        )
        assert {i for i, cost in enumerate(costs) if cost <= 0.0} <= set(picked)


def test_a_budget_of_nothing() -> None:
    assert most_within([1.0, 2.0, 3.0], [1.0, 1.0, 1.0], 0.0) == []
    assert most_within([1.0, 2.0, 3.0], [1.0, 0.0, -1.0], 0.0) == [0, 1, 2]
    assert most_within([1.0, 2.0, 3.0], [3.0, 0.0, -1.0], 0.0) == [1, 2]


def test_the_faster_ones_come_even_without_noise() -> None:
    assert most_within([0.0, 0.0], [-1.0, 5.0], 0.0) == [0]
    assert most_within([0.0, 0.0], [0.0, 0.0], 0.0) == [0, 1]


def test_many_groups() -> None:
    random = np.random.default_rng(0)
    noises = [float(x) for x in random.lognormal(0.0, 3.0, 300)]
    costs = [float(x) for x in random.uniform(1.0, 100.0, 300)]
    budget = 0.1 * sum(costs)
    picked = most_within(noises, costs, budget)
    assert math.fsum(costs[i] for i in picked) <= budget + 1e-4
    # No worse than by ratio, which the continuous relaxation bounds from the other side.
    order = sorted(range(300), key=lambda i: -noises[i] / costs[i])
    greedy, spent = 0.0, 0.0
    for i in order:
        if spent + costs[i] <= budget:
            greedy, spent = greedy + noises[i], spent + costs[i]
    assert value(noises, picked) >= greedy * (1.0 - 1e-6)
