"""Find the cheapest of several configurations that keeps a metric, with few evaluations.

Every configuration is calibrated, timed, and compared with float32 by its outputs, which is cheap
beside an evaluation on a test set. Configurations that another beats in cost and in SQNR are left
for later. For the rest, more cost means more SQNR, and a metric that follows the SQNR passes from
some place on: it is found by bisection.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from torch_quant.autotuning.configurations import named_configurations
from torch_quant.autotuning.tasks import evaluated, measured, prepared, quantized
from torch_quant.core.naming import did_you_mean
from torch_quant.errors import InvalidConfig, QuantError
from torch_quant.graph.progress import hidden
from torch_quant.profiling import checked_seconds
from torch_quant.quantizer import Quantizer
from torch_quant.report.autotuning import OBJECTIVES, Autotuning, Tried
from torch_quant.trials.goal import Goal, is_number
from torch_quant.trials.journal import Journal, described, key_of
from torch_quant.trials.running import Job, Limits, Stop, Trials, bisected, check_executor

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
    goal, limits = Goal(tolerance, relative, higher_is_better), Limits(max_trials, timeout)
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
    check_executor(executor, model=model, data=batches, eval_fn=eval_fn)
    checked_seconds(seconds)
    journal = Journal(
        log, "autotune", model, eval_fn, lambda: {"data": [described(each) for each in batches]}
    )
    run = _Run(model, batches, eval_fn, Trials(journal, limits, executor), hidden(progress))
    baseline = run.baseline()
    target = goal.target(baseline)
    tried = run.measure(named, objectives, seconds)
    if not limits.stopped and not any(each.sqnr is not None for each in tried):
        raise QuantError(f"no configuration can be quantized; {tried[0].name}: {tried[0].why_not}")
    found = Autotuning(objectives, baseline, target, higher_is_better, tried)
    _Search(found, run, goal, margin).walk()
    found.stopped = limits.stopped
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


class _Run:
    """What is done with configurations, as trials, and the data of those that are still wanted."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        eval_fn: Callable[[nn.Module], Any],
        trials: Trials,
        silent: bool,
    ) -> None:
        self.model, self.batches, self.eval_fn = model, batches, eval_fn
        self.trials, self.found, self.silent = trials, trials.journal.found, silent
        self._quantizers: dict[str, Quantizer] = {}

    def measure(
        self, named: Mapping[str, dict[str, Any]], objectives: Sequence[str], seconds: float
    ) -> list[Tried]:
        """Every configuration with its costs."""
        jobs = {}
        for configuration in named.values():
            key = key_of(configuration)
            if not {"sqnr", *objectives} <= self.found.get(key, {}).keys():  # it may work by now
                jobs[key] = self._job(measured, configuration, objectives, seconds)
        with contextlib.suppress(Stop), self._bar("measuring", len(jobs)) as bar:
            for key, facts in self.trials.done(jobs, bar):
                self.trials.journal.note(key, facts)
        made = []
        for name, configuration in named.items():
            facts = self.found.get(key_of(configuration), {})
            costs = {x: facts[x] for x in ("sqnr", "size", "latency", "why_not") if x in facts}
            made.append(Tried(name, configuration, **costs))
        return made

    def baseline(self) -> float:
        """The metric of float32."""
        job = {key_of(None): self._job(evaluated, None, self.eval_fn, "the float model")}
        with self._bar("evaluating", 1) as bar:
            (facts,) = self.trials.metrics(job, bar, begun=True)
        return float(facts["metric"])

    def evaluate(self, some: Sequence[Tried]) -> list[dict[str, Any]]:
        """The metric of each, and the seconds that it took.

        Raises:
            Stop: there is no time, or no trial, left for them.
        """
        jobs = {
            key_of(x.configuration): self._job(evaluated, x.configuration, self.eval_fn, x.name)
            for x in some
        }
        with self._bar("evaluating", len(jobs)) as bar:
            return self.trials.metrics(jobs, bar)

    def quantizer_of(self, each: Tried) -> Quantizer:
        """That has the data of a configuration."""
        key = key_of(each.configuration)
        if key not in self._quantizers:
            self._quantizers[key] = prepared(self.model, each.configuration, self.batches)
        return self._quantizers[key]

    def keep(self, some: Sequence[Tried]) -> None:
        """Forget the data of all other configurations."""
        keys = {key_of(each.configuration) for each in some}
        self._quantizers = {key: x for key, x in self._quantizers.items() if key in keys}

    def _bar(self, doing: str, total: int) -> Any:
        from tqdm import tqdm

        return tqdm(total=total, desc=doing, disable=self.silent, leave=False)

    def _job(self, task: Callable[..., Mapping[str, Any]], configuration: Any, *more: Any) -> Job:
        def make() -> tuple[Callable[..., Mapping[str, Any]], tuple[Any, ...]]:
            given = (self.model, configuration, self.batches, *more)
            return task, given if self.trials.executor else (*given, self._kept(configuration))

        return make

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

    def __init__(self, found: Autotuning, run: _Run, goal: Goal, margin: float) -> None:
        self.found, self.run, self.goal, self.margin = found, run, goal, margin

    def walk(self) -> None:
        def width() -> int:
            return self.run.trials.width

        try:
            front = self._front()
            self.run.keep(front)
            if len(self.found.objectives) > 1:
                self._all(front)
            else:
                bisected(-1, len(front), lambda some: self._ask([front[i] for i in some]), width)
            self._near()
        except Stop:
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
            width = self.run.trials.width
            some, waiting = waiting[:width], waiting[width:]
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
        for each, facts in zip(some, self.run.evaluate(some), strict=True):
            metric, seconds = float(facts["metric"]), float(facts.get("seconds", 0.0))
            passed = self.goal.passes(metric, found.target)
            place = [x.name for x in found.tried].index(each.name)
            found.tried[place] = replace(each, metric=metric, passed=passed, seconds=seconds)
            verdicts.append(passed)
        return verdicts
