"""Find the cheapest of several configurations that keeps a metric, with few evaluations.

Every configuration is calibrated, timed, and compared with float32 by its outputs, which is cheap
beside an evaluation on a test set. Configurations that another beats in cost and in SQNR are left
for later. For the rest, more cost means more SQNR, and a metric that follows the SQNR passes from
some place on: it is found by bisection.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from torch_quant.autotuning.configurations import named_configurations
from torch_quant.autotuning.journal import Journal, key_of
from torch_quant.autotuning.tasks import evaluated, measured, prepared, quantized
from torch_quant.core.naming import did_you_mean
from torch_quant.errors import InvalidConfig, QuantError
from torch_quant.graph.progress import hidden
from torch_quant.profiling import checked_seconds
from torch_quant.quantizer import Quantizer
from torch_quant.report.autotuning import OBJECTIVES, Autotuning, Tried
from torch_quant.tuning import check_limits, is_number, target_of

__all__ = ["autotune"]

logger = logging.getLogger("torch_quant")


def autotune(
    model: nn.Module,
    configurations: Mapping[str, Any] | Iterable[Any],
    data: Iterable[Any],
    eval_fn: Callable[[nn.Module], float],
    objective: str | Sequence[str] = "latency",
    tolerance: float = 0.01,
    relative: bool = True,
    *,
    higher_is_better: bool = True,
    backend: str | None = None,
    margin: float = 1.0,
    max_trials: int | None = None,
    timeout: float | None = None,
    seconds: float = 2.0,
    executor: Executor | None = None,
    log: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Autotuning:
    """The configuration with the least time or size whose metric is within a tolerance.

    ``eval_fn`` is called for the float model, and for about ``log2`` of the configurations.

    Args:
        model: a float32 model; it is not changed.
        configurations: a list, or a dict by names: each the name of a recipe, a :class:`QConfig`,
            a quantizer's configuration as a dict, or a :class:`Quantizer`, whose settings count.
        data: some batches to calibrate with, each as for ``example_inputs`` of
            :meth:`Quantizer.calib`. The first is timed.
        eval_fn: takes a model to call, returns its metric, a number.
        objective: ``"latency"``, ``"size"``, or both: then every configuration is evaluated that no
            other beats in all of them and in SQNR, and :attr:`Autotuning.front` has the trade-off.
        tolerance: how much of the float model's metric may be lost: 0.01 is 1 %.
        relative: False if ``tolerance`` is in the metric's own unit.
        higher_is_better: False for a loss, a perplexity, an error rate.
        backend: where those run that name none; the best of this machine by default.
        margin: in dB; cheaper configurations are evaluated, too, whose SQNR is at most so far below
            that of one that failed, since no metric follows the SQNR exactly.
        max_trials: most calls of ``eval_fn``, the float model's included.
        timeout: seconds after which nothing further is begun.
        seconds: about how long to time each configuration.
        executor: of ``concurrent.futures``, or one like it: configurations are measured and
            evaluated there, several at a time. Processes take an ``eval_fn`` and data that can be
            pickled, and calibrate again for an evaluation.
        log: a file of JSON lines. A run that was interrupted goes on from it.
        progress: whether to show a progress bar.

    Returns:
        What was found; ``print`` shows a table, ``plot`` draws it, ``model`` is the best one.

    Raises:
        InvalidConfig: an argument is wrong, a metric is no number, or ``log`` is of another model
            or other data.
        QuantError: no configuration can be quantized; quotes the first reason.

    >>> import torch
    >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(8, 4)
    >>> found = autotune(model, ["fast", "int8_weight_only"], [x],
    ...                  lambda candidate: float(candidate(x).isfinite().all()), "size",
    ...                  backend="reference", progress=False)
    >>> found.reached, found.best.name
    (True, 'int8_weight_only')
    """
    if not isinstance(model, nn.Module):
        raise InvalidConfig(f"model={model!r}; expected an nn.Module")
    objectives = _objectives(objective)
    check_limits(tolerance, max_trials)
    if timeout is not None and not is_number(timeout):
        raise InvalidConfig(f"timeout={timeout!r}; expected seconds")
    if not (is_number(margin) and margin >= 0):
        raise InvalidConfig(f"margin={margin!r}; expected decibels, 0 or more")
    if not callable(eval_fn):
        raise InvalidConfig(f"eval_fn={eval_fn!r}; expected a function of a model")
    if isinstance(data, (Mapping, Tensor, str)) or not isinstance(data, Iterable):
        raise InvalidConfig(
            f"data is one {type(data).__name__}; expected several batches: data=[batch]"
        )
    batches = list(data)
    if not batches:
        raise InvalidConfig("data has no batches: give some as the model is called with them")
    named = named_configurations(configurations, backend)
    if isinstance(executor, ProcessPoolExecutor):
        _check_pickles(model=model, data=batches, eval_fn=eval_fn)
    journal = Journal(log, model, batches, eval_fn)
    checked_seconds(seconds)
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    run = _Run(model, batches, eval_fn, journal, executor, deadline, max_trials, hidden(progress))
    (baseline,) = run.evaluate([None])
    target = target_of(baseline, tolerance, relative, higher_is_better)
    tried = run.measure(named, objectives, seconds)
    if not run.stopped and not any(each.sqnr is not None for each in tried):
        raise QuantError(f"no configuration can be quantized; {tried[0].name}: {tried[0].why_not}")
    found = Autotuning(objectives, baseline, target, higher_is_better, tried)
    search = _Search(found, run, margin)
    search.walk()
    found.stopped = run.stopped
    best = found.best
    if best is not None:
        found.quantizer = run.quantizer_of(best)
        found.model = quantized(found.quantizer, model, batches)
    level = logging.INFO if found.reached else logging.WARNING
    logger.log(level, "autotune %s its target\n%s", "reached" if found.reached else "missed", found)
    return found


def _objectives(given: str | Sequence[str]) -> tuple[str, ...]:
    names = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for name in names:
        if name not in OBJECTIVES:
            raise InvalidConfig(
                f"objective={given!r}; expected {' or '.join(map(repr, OBJECTIVES))}, or a list of "
                f"them{did_you_mean(name, OBJECTIVES) if isinstance(name, str) else ''}"
            )
    if not names or len(set(names)) < len(names):
        raise InvalidConfig(f"objective={given!r}; expected each of them once")
    return names


def _check_pickles(**given: Any) -> None:
    for name, each in given.items():
        try:
            pickle.dumps(each)
        except Exception as error:  # of any class: what it is made of says
            raise InvalidConfig(
                f"{name} cannot be sent to other processes: {error}. Define it, or its classes, at "
                "the top of a module; or leave executor out"
            ) from error


class _Stop(Exception):
    """There is no time, or no trial, left."""


class _Run:
    """What is called, here or by an executor, and what it gave."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        eval_fn: Callable[[nn.Module], Any],
        journal: Journal,
        executor: Executor | None,
        deadline: float,
        max_trials: int | None,
        silent: bool,
    ) -> None:
        self.model, self.batches, self.eval_fn = model, batches, eval_fn
        self.journal, self.executor, self.deadline = journal, executor, deadline
        self.left = math.inf if max_trials is None else max_trials
        self.silent = silent
        self.stopped = ""
        self._max_trials = max_trials
        self._quantizers: dict[str, Quantizer] = {}
        self._workers = int(getattr(executor, "_max_workers", 1) or 1)

    @property
    def width(self) -> int:
        """How many are evaluated at a time."""
        return int(max(1, min(self._workers, self.left)))

    def measure(
        self, named: Mapping[str, dict[str, Any]], objectives: Sequence[str], seconds: float
    ) -> list[Tried]:
        """Every configuration with its costs."""
        jobs = {}
        for name, configuration in named.items():
            known = self.journal.found.get(key_of(configuration), {})
            if not {"sqnr", *objectives} <= known.keys():  # what failed may work by now
                jobs[name] = (measured, configuration, (objectives, seconds))
        with contextlib.suppress(_Stop):
            for name, facts in self._done(jobs, "measuring"):
                self.journal.note(key_of(named[name]), facts)
        made = []
        for name, configuration in named.items():
            facts = self.journal.found.get(key_of(configuration), {})
            costs = {x: facts[x] for x in ("sqnr", "size", "latency", "why_not") if x in facts}
            made.append(Tried(name, configuration, **costs))
        return made

    def evaluate(self, some: Sequence[Tried | None]) -> list[float]:
        """The metric of each; of float32 for None.

        Raises:
            _Stop: there is no time, or no trial, left for them.
        """
        keys = [key_of(None if each is None else each.configuration) for each in some]
        jobs = {}
        for key, each in zip(keys, some, strict=True):
            if "metric" in self.journal.found.get(key, {}):
                self.left -= 1
                continue
            if self.left < 1:
                self.stopped = f"max_trials={self._max_trials}"
                raise _Stop
            self.left -= 1
            configuration = None if each is None else each.configuration
            what = "the float model" if each is None else each.name
            jobs[key] = (evaluated, configuration, (self.eval_fn, what))
        metrics = {}
        for key, facts in self._done(jobs, "evaluating"):
            metrics[key] = float(facts["metric"])
            if math.isfinite(metrics[key]) or None not in some:
                self.journal.note(key, facts)
        known = self.journal.found
        return [metrics[x] if x in metrics else float(known[x]["metric"]) for x in keys]

    def seconds_of(self, each: Tried) -> float:
        """That its evaluation took."""
        return float(self.journal.found[key_of(each.configuration)].get("seconds", 0.0))

    def quantizer_of(self, each: Tried) -> Quantizer:
        """That has the data of a configuration."""
        key = key_of(each.configuration)
        if key not in self._quantizers:
            self._quantizers[key] = prepared(self.model, each.configuration, self.batches)
        return self._quantizers[key]

    def _done(
        self, jobs: Mapping[str, tuple[Callable[..., Any], Any, tuple[Any, ...]]], doing: str
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """What each job gives, as soon as it is there."""
        from tqdm import tqdm

        with tqdm(total=len(jobs), desc=doing, disable=self.silent, leave=False) as bar:
            left, running = list(jobs.items()), dict[Future[Any], str]()
            try:
                while left or running:
                    while left and len(running) < (self._workers if self.executor else 1):
                        name, (task, configuration, more) = left.pop(0)
                        self._check_time(configuration)
                        arguments = (self.model, configuration, self.batches, *more)
                        if self.executor is None:
                            bar.set_postfix_str(name[:40])
                            yield name, task(*arguments, self._kept(configuration))
                            bar.update()
                        else:
                            running[self.executor.submit(task, *arguments)] = name
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield running.pop(future), future.result()
                        bar.update()
            finally:  # of those that run at an error or a timeout, what they find is kept
                for future in running:
                    future.cancel()

    def _check_time(self, configuration: Any) -> None:
        if configuration is not None and time.monotonic() > self.deadline:
            self.stopped = "timeout"
            raise _Stop

    def keep(self, some: Sequence[Tried]) -> None:
        """Forget the data of all other configurations."""
        keys = {key_of(each.configuration) for each in some}
        self._quantizers = {key: x for key, x in self._quantizers.items() if key in keys}

    def _kept(self, configuration: Mapping[str, Any] | None) -> Quantizer | None:
        """A quantizer of this process, which has the data from one task to the next."""
        if configuration is None:
            return None
        key = key_of(configuration)
        if key not in self._quantizers:
            try:
                self._quantizers[key] = prepared(self.model, configuration, self.batches)
            except QuantError:
                return None  # the task meets it again, and says so
        return self._quantizers[key]


class _Search:
    """Which configurations are evaluated, and when it is enough."""

    def __init__(self, found: Autotuning, run: _Run, margin: float) -> None:
        self.found, self.run, self.margin = found, run, margin

    def walk(self) -> None:
        try:
            front = self._front()
            self.run.keep(front)
            if len(self.found.objectives) > 1:
                self._all(front)
            else:
                self._bisect(front)
            self._near()
        except _Stop:
            pass

    def _front(self) -> list[Tried]:
        """What no other beats in cost and SQNR, the cheapest first."""
        able = [each for each in self.found.tried if each.sqnr is not None]
        points = {each.name: (*self._costs(each), -(each.sqnr or 0.0)) for each in able}
        front = [
            each
            for each in able
            if not any(
                points[other.name] != points[each.name]
                and all(x <= y for x, y in zip(points[other.name], points[each.name], strict=True))
                for other in able
            )
        ]
        return sorted(front, key=self._costs)

    def _bisect(self, front: list[Tried]) -> None:
        low, high = -1, len(front)  # all up to low failed, high passed if it is one
        while high - low > 1:
            width = min(self.run.width, high - low - 1)
            places = [low + (high - low) * (i + 1) // (width + 1) for i in range(width)]
            places = sorted({min(max(place, low + 1), high - 1) for place in places})
            for place, passed in zip(places, self._ask([front[i] for i in places]), strict=True):
                if passed:
                    high = place
                    break
                low = place

    def _near(self) -> None:
        """Cheaper ones that are nearly as good as one that failed, and better by the metric, or
        where none passed: those that are nearly the best."""
        failed = [each.sqnr or 0.0 for each in self._asked(False)]
        if not failed:
            return
        least = max(failed) - self.margin
        rest = [each for each in self.found.tried if each.metric is None and each.sqnr is not None]
        near = [each for each in rest if (each.sqnr or 0.0) >= least]
        self._all(sorted(near, key=self._costs), cheaper=True)

    def _all(self, waiting: list[Tried], cheaper: bool = False) -> None:
        """Evaluate them in order, or those that are cheaper than the best so far."""
        while waiting:
            best = self.found.best if cheaper and self.found.reached else None
            if best is not None:
                waiting = [each for each in waiting if self._costs(each) < self._costs(best)]
            some, waiting = waiting[: self.run.width], waiting[self.run.width :]
            if some:
                self._ask(some)

    def _asked(self, passed: bool) -> list[Tried]:
        return [x for x in self.found.tried if x.metric is not None and x.passed == passed]

    def _costs(self, each: Tried) -> tuple[float, ...]:
        return each.costs(self.found.objectives)

    def _ask(self, some: list[Tried]) -> list[bool]:
        """Evaluate them; whether each is within the tolerance."""
        found = self.found
        verdicts = []
        for each, metric in zip(some, self.run.evaluate(some), strict=True):
            passed = metric >= found.target if found.higher_is_better else metric <= found.target
            seconds = self.run.seconds_of(each)
            place = [x.name for x in found.tried].index(each.name)
            found.tried[place] = replace(each, metric=metric, passed=passed, seconds=seconds)
            verdicts.append(passed)
        return verdicts
