"""Trials: here or by an executor, within limits, each kept in a journal as soon as it is done."""

from __future__ import annotations

import math
import numbers
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from typing import Any

from torch_quant.errors import InvalidConfig
from torch_quant.trials.goal import is_number
from torch_quant.trials.journal import Journal

__all__ = ["Job", "Limits", "Stop", "Trials", "bisected", "check_executor"]

Job = Callable[[], tuple[Callable[..., Mapping[str, Any]], tuple[Any, ...]]]
"""Makes a function and its arguments, when it is its turn: only what runs takes memory."""


class Stop(Exception):
    """There is no time, or no trial, left."""


class Limits:
    """When it is enough.

    Args:
        max_trials: most calls of the user's function; None for any number.
        timeout: seconds from now after which nothing further is begun; None for no end.

    Raises:
        InvalidConfig: one is no number, or there are too few trials to compare anything.
    """

    def __init__(self, max_trials: int | None, timeout: float | None) -> None:
        if max_trials is not None and not (
            isinstance(max_trials, numbers.Integral) and max_trials >= 2
        ):
            raise InvalidConfig(
                f"max_trials={max_trials!r}; expected at least 2: float, and quantized"
            )
        if timeout is not None and not is_number(timeout):
            raise InvalidConfig(f"timeout={timeout!r}; expected seconds")
        self.left = math.inf if max_trials is None else int(max_trials)
        self.stopped = ""
        """Why it was enough before the search was done."""
        self._max_trials, self._timeout = max_trials, timeout
        self._deadline = math.inf if timeout is None else time.monotonic() + timeout

    def take(self) -> None:
        """One trial of those that are left; raises :class:`Stop` where there is none."""
        if self.left < 1:
            self.stopped = f"max_trials={self._max_trials}"
            raise Stop
        self.left -= 1

    def check_time(self) -> None:
        """Raises :class:`Stop` where there is none left."""
        if time.monotonic() > self._deadline:
            self.stopped = f"timeout={self._timeout:g} s"
            raise Stop


class Trials:
    """What is called, and what it gave.

    Args:
        journal: keeps it, and may know some.
        limits: on all of it.
        executor: where it is called, several at a time; None for here.
    """

    def __init__(self, journal: Journal, limits: Limits, executor: Executor | None) -> None:
        self.journal, self.limits, self.executor = journal, limits, executor
        self._workers = int(getattr(executor, "_max_workers", 1) or 1) if executor else 1

    @property
    def width(self) -> int:
        """How many are evaluated at a time."""
        return int(max(1, min(self._workers, self.limits.left)))

    def metrics(
        self, jobs: Mapping[str, Job], bar: Any, *, begun: bool = False
    ) -> list[dict[str, Any]]:
        """What is known of each, its metric included: from the journal, or by its job.

        They are begun together, so that each that was called is told of. A metric that is not
        finite is not kept where ``begun``, so that it is asked for again.

        Args:
            jobs: by the key that the journal has; each gives ``metric`` and ``seconds``.
            bar: of progress.
            begun: whether they run however late it is.

        Raises:
            Stop: there is no time, or no trial, left for them.
        """
        missing = {}
        for key, job in jobs.items():
            known = "metric" in self.journal.found.get(key, {})
            if not known or self.limits.left > 0:  # a known one is counted, and never refused
                self.limits.take()
            if not known:
                missing[key] = job
        if missing and not begun:
            self.limits.check_time()
        found = {}
        for key, facts in self.done(missing, bar, begun=True):
            found[key] = dict(facts)
            if math.isfinite(facts["metric"]) or not begun:
                self.journal.note(key, facts)
        return [found.get(key) or self.journal.found[key] for key in jobs]

    def done(
        self, jobs: Mapping[str, Job], bar: Any, *, begun: bool = False
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """What each job gives, as soon as it is there.

        Args:
            jobs: by any name.
            bar: of progress.
            begun: whether they run however late it is.

        Raises:
            Stop: it is too late for those that are left; what ran was given before.
        """
        left, running = list(jobs.items()), dict[Future[Any], str]()
        late: Stop | None = None
        try:
            while left or running:
                while left and len(running) < self._workers:
                    name, job = left.pop(0)
                    try:
                        if not begun:
                            self.limits.check_time()
                    except Stop as stop:
                        left, late = [], stop
                    else:
                        if self.executor is None:
                            yield name, _called(job)
                            bar.update()
                        else:
                            running[_submitted(self.executor, job)] = name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
                    bar.update()
            if late is not None:
                raise late
        finally:
            for future in running:
                future.cancel()


def _called(job: Job) -> Mapping[str, Any]:
    function, arguments = job()
    return function(*arguments)


def _submitted(executor: Executor, job: Job) -> Future[Any]:
    function, arguments = job()
    return executor.submit(function, *arguments)


def bisected(
    low: int, high: int, ask: Callable[[Sequence[int]], Sequence[bool]], width: Callable[[], int]
) -> int:
    """The first place that passes, where all behind it do.

    Args:
        low: a place that fails, or the one before the first.
        high: a place that passes, or the one behind the last.
        ask: whether each of some places passes.
        width: how many are asked about at a time.

    >>> bisected(-1, 100, lambda places: [place >= 37 for place in places], lambda: 3)
    37
    """
    while high - low > 1:
        count = min(width(), high - low - 1)
        places = [low + (high - low) * (i + 1) // (count + 1) for i in range(count)]
        places = sorted({min(max(place, low + 1), high - 1) for place in places})
        for place, passed in zip(places, ask(places), strict=True):
            if passed:
                high = place
                break
            low = place
    return high


def check_executor(executor: Executor | None, **given: Any) -> None:
    """Raise :class:`InvalidConfig` where it is none, or processes cannot be sent what they need."""
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise InvalidConfig(
            f"executor={executor!r}; expected an executor of concurrent.futures, as "
            "ThreadPoolExecutor(2) is"
        )
    if not isinstance(executor, ProcessPoolExecutor):
        return
    for name, each in given.items():
        try:
            pickle.dumps(each)
        except Exception as error:  # of any class: what it is made of says
            raise InvalidConfig(
                f"{name} cannot be sent to other processes: {error}. Define it, or its classes, at "
                "the top of a module; or leave executor out"
            ) from error
