"""Trials by an executor, where time ends between two of them."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tqdm import tqdm

from torch_quant.trials.journal import Journal
from torch_quant.trials.running import Job, Limits, Stop, Trials


class Candidate:
    pass


def measured(given: float) -> dict[str, Any]:
    return {"metric": given, "seconds": 0.0}


def ending_after(count: int, limits: Limits) -> dict[str, Job]:
    """Four jobs; when the one after ``count`` others is made, there is no time left."""

    def job(place: int) -> Job:
        def make() -> tuple[Any, tuple[Any, ...]]:
            if place == count:
                limits._deadline = 0.0
            return measured, (float(place),)

        return make

    return {f"job {place}": job(place) for place in range(4)}


def trials_of(limits: Limits, executor: Any) -> Trials:
    journal = Journal(None, "a test", None, measured, dict)  # type: ignore[arg-type]
    return Trials(journal, limits, executor)


def test_what_runs_when_time_ends_is_told_of() -> None:
    limits = Limits(None, 1e6)
    with ThreadPoolExecutor(4) as executor, tqdm(disable=True) as bar:
        given = trials_of(limits, executor).done(ending_after(1, limits), bar)
        assert sorted([next(given)[0], next(given)[0]]) == ["job 0", "job 1"]
        with pytest.raises(Stop):
            next(given)
    assert limits.stopped == "timeout=1e+06 s"


def test_trials_of_one_batch_are_begun_together() -> None:
    """A trial that was called is in the table, whenever time ends."""
    limits = Limits(None, 1e6)
    with ThreadPoolExecutor(4) as executor, tqdm(disable=True) as bar:
        trials = trials_of(limits, executor)
        found = trials.metrics(ending_after(0, limits), bar)
        assert [each["metric"] for each in found] == [0.0, 1.0, 2.0, 3.0]
        with pytest.raises(Stop):
            trials.metrics({"another": lambda: (measured, (4.0,))}, bar)


def test_a_candidate_is_gone_before_the_next_is_made() -> None:
    gc.freeze()  # what other tests have left need not be looked through three times
    alive: list[weakref.ref[Candidate]] = []
    left: list[int] = []

    def make() -> tuple[Any, tuple[Any, ...]]:
        gc.collect()
        left.append(sum(each() is not None for each in alive))
        candidate = Candidate()
        alive.append(weakref.ref(candidate))
        return lambda given: measured(1.0), (candidate,)

    with tqdm(disable=True) as bar:
        trials_of(Limits(None, None), None).metrics({"a": make, "b": make, "c": make}, bar)
    assert left == [0, 0, 0]
