"""Accuracy-driven search: as few layers in float as the user's own metric allows."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any

import torch
from torch import nn

from torch_quant.amp.fallback import precision_of
from torch_quant.amp.proxy import AmpModel
from torch_quant.convert.quantized import QuantizedModule
from torch_quant.errors import InvalidConfig, NotCalibrated
from torch_quant.graph.progress import hidden
from torch_quant.qat.model import QatModel, bond_of
from torch_quant.quantizer import Quantizer
from torch_quant.report.tuning import Trial, Tuning
from torch_quant.trials.goal import Goal, evaluate
from torch_quant.trials.journal import Journal, described, key_of
from torch_quant.trials.running import Job, Limits, Stop, Trials, bisected, check_executor

__all__ = ["Trial", "Tuning", "tune"]

logger = logging.getLogger("torch_quant")


def tune(
    quantizer: Quantizer,
    model: nn.Module,
    eval_fn: Callable[[nn.Module], float],
    tolerance: float = 0.01,
    relative: bool = True,
    *,
    higher_is_better: bool = True,
    metric: str = "output",
    amp_batches: int | None = 32,
    max_trials: int | None = None,
    timeout: float | None = None,
    dtype: torch.dtype = torch.float32,
    executor: Executor | None = None,
    log: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> QuantizedModule:
    """Quantize ``model`` with as few layers in float as keep its metric within a tolerance.

    The float model is evaluated through an AMP proxy, which ranks the layers on the way; then the
    number of worst layers in float is found by bisection: at most ``2 + ceil(log2 L)`` calls of
    ``eval_fn`` for ``L`` layers, the float one included. Trials are run as those of
    :func:`torch_quant.autotune`, which chooses among configurations of the whole model.

    Args:
        quantizer: calibrated; it is left in the state of the model returned, what fell back before
            included, and holds the table of trials as ``quantizer.tuning``.
        model: the model that was calibrated; or what :meth:`Quantizer.qat` made, with the weights
            that were trained: these in float are the float model then.
        eval_fn: takes a model to call, returns its metric, a number.
        tolerance: how much of the float model's metric may be lost: 0.01 is 1 %.
        relative: False if ``tolerance`` is in the metric's own unit.
        higher_is_better: False for a loss, a perplexity, an error rate.
        metric: how layers are ranked, see :meth:`Quantizer.amp`.
        amp_batches: rank on the first so many batches of the float evaluation; None for all.
        max_trials: most calls of ``eval_fn``.
        timeout: seconds after which no further trial is begun.
        dtype: what layers fall back to, ``torch.float32`` or ``torch.bfloat16``.
        executor: of ``concurrent.futures``, or one like it: so many quantized models are made here
            and evaluated there at a time as it has workers. Processes take an ``eval_fn`` that can
            be pickled, and kinds of calls that were calibrated.
        log: a file of JSON lines. A search that was interrupted goes on from it, with a quantizer
            that was calibrated on the same data.
        progress: whether to show a progress bar.

    Returns:
        The quantized model, with at least one layer in int8. If the target was not reached, the
        best one that was found; then ``quantizer.tuning.reached`` is False, and a warning is
        logged.

    Raises:
        NotCalibrated: the quantizer has seen no data, or ``eval_fn`` never called the model.
        InvalidConfig: an argument out of range, a metric that is not a number, or ``log`` is of
            another model or quantizer.

    >>> model, x, quantizer = nn.Linear(4, 2), torch.rand(8, 4), Quantizer("reference")
    >>> _ = quantizer.calib(model)(x)
    >>> best = tune(quantizer, model, lambda candidate: float(candidate(x).mean() > -9.0),
    ...             progress=False)
    >>> quantizer.tuning.reached
    True
    """
    if not isinstance(quantizer, Quantizer):
        raise InvalidConfig(
            f"tune(quantizer, model, eval_fn): expected a Quantizer, got {type(quantizer).__name__}"
        )
    precision = precision_of(dtype)
    goal, limits = Goal(tolerance, relative, higher_is_better), Limits(max_trials, timeout)
    if not callable(eval_fn):
        raise InvalidConfig(f"eval_fn={eval_fn!r}; expected a function of a model")
    check_executor(executor, eval_fn=eval_fn)
    before, plan = dict(quantizer.fallen_back), quantizer.plan
    ranked: Any = model
    if isinstance(model, QatModel):  # ranked by the ranges that were calibrated
        ranked = bond_of(model).session.model
    amp_model = quantizer.amp(ranked, metric=metric, max_batches=amp_batches)
    journal = Journal(log, "tune", model, eval_fn, partial(_described, quantizer))
    ladder = _Ladder(quantizer, model, eval_fn, goal, Trials(journal, limits, executor))
    ladder.show(progress)
    try:
        ladder.rank(amp_model, {"metric": metric, "batches": amp_batches, "in float": before})
        ladder.climb(before, precision)
        result = quantizer.quantize(model)
    except BaseException:
        quantizer.fallen_back, quantizer.plan = before, plan
        raise
    finally:
        ladder.bar.close()
    quantizer.tuning = report = ladder.report
    if not report.reached:
        logger.warning("tuning did not reach its target\n%s", report)
    else:
        logger.info("tuning\n%s", report)
    return result


def _described(quantizer: Quantizer) -> dict[str, list[Any]]:
    """What a search is of beside the model: settings and ranges, but not what fell back.

    The backend stands beside the settings, which may leave it to the machine or its environment.
    """
    state = quantizer.state_dict()
    del state["fallback"]
    return {"quantizer": described([repr(quantizer.backend), quantizer.to_config(), state])}


class _Ladder:
    """The float model, and one quantized for each count of layers in float.

    Args:
        quantizer: its ``fallen_back`` is that of the model on trial.
        model: what is quantized.
        eval_fn: the user's.
        goal: for the metric.
        trials: run it.
    """

    def __init__(
        self,
        quantizer: Quantizer,
        model: nn.Module,
        eval_fn: Callable[[nn.Module], float],
        goal: Goal,
        trials: Trials,
    ) -> None:
        self.quantizer, self.model, self.eval_fn = quantizer, model, eval_fn
        self.goal, self.trials = goal, trials
        self.report = Tuning(math.nan, 0, goal.higher_is_better)
        self.groups: list[list[str]] = []

    def show(self, progress: bool) -> None:
        """Open the bar."""
        from tqdm import tqdm

        self.bar = tqdm(desc="tuning: float model", unit="trial", disable=hidden(progress))

    def rank(self, amp_model: AmpModel, how: Mapping[str, Any]) -> None:
        """Evaluate the float model, and rank the layers on the way."""
        here = Trials(self.trials.journal, self.trials.limits, None)
        job = {key_of({"float32, ranked by": how}): lambda: (self._ranked, (amp_model,))}
        (facts,) = here.metrics(job, self.bar, begun=True)
        self.groups, baseline = facts["groups"], facts["metric"]
        self.report.target, self.report.groups = self.goal.target(baseline), len(self.groups)
        self.report.trials.append(Trial(None, baseline, True, facts["seconds"]))
        self.bar.total = 2 + math.ceil(math.log2(max(len(self.groups), 1)))

    def _ranked(self, amp_model: AmpModel) -> dict[str, Any]:
        found: dict[str, Any] = evaluate(self.eval_fn, amp_model, "the float model")
        self.goal.target(found["metric"])  # raises where it is not finite
        if amp_model.recorder.batches == 0:
            raise NotCalibrated("eval_fn never called the model it was given")
        return found | {"groups": list(map(list, self.quantizer.sensitivity(amp_model).left))}

    def climb(self, before: Mapping[str, str], precision: str) -> None:
        """Find the fewest layers in float, beside those before."""

        def fallen(count: int) -> dict[str, str]:
            names = [name for group in self.groups[:count] for name in group]
            return {**before, **dict.fromkeys(names, precision)}

        def job(count: int) -> Job:
            def make() -> tuple[Any, tuple[Any, ...]]:
                self.bar.set_description(f"tuning: {count} of {len(self.groups)} layers in float")
                self.quantizer.fallen_back = fallen(count)
                quantized = self.quantizer.quantize(self.model)
                return evaluate, (self.eval_fn, quantized, f"{count} layers in float")

            return make

        def ask(counts: Sequence[int], begun: bool = False) -> list[bool]:
            jobs = {key_of({"in float": fallen(count)}): job(count) for count in counts}
            verdicts = []
            found = self.trials.metrics(jobs, self.bar, begun=begun)
            for count, facts in zip(counts, found, strict=True):
                value, target = facts["metric"], report.target
                verdicts.append(self.goal.passes(value, target))
                report.trials.append(Trial(count, value, verdicts[-1], facts["seconds"]))
                self.bar.set_postfix(metric=f"{value:.4g}", target=f"{target:.4g}")
            return verdicts

        report = self.report
        try:
            (enough,) = ask([0], begun=True)
            if not enough:
                bisected(0, len(self.groups), ask, lambda: self.trials.width)
        except Stop:
            report.stopped = self.trials.limits.stopped
        self.quantizer.fallen_back = fallen(report.best.in_float or 0)
        report.names = tuple(self.quantizer.fallen_back)
