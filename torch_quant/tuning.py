"""Accuracy-driven search: as few layers in float as the user's own metric allows."""

from __future__ import annotations

import logging
import math
import numbers
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_quant.amp.fallback import precision_of
from torch_quant.convert.quantized import QuantizedModule
from torch_quant.errors import InvalidConfig, NotCalibrated
from torch_quant.graph.progress import hidden
from torch_quant.qat.model import QatModel, bond_of
from torch_quant.quantizer import Quantizer
from torch_quant.report.tuning import Trial, Tuning

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
    progress: bool = True,
) -> QuantizedModule:
    """Quantize ``model`` with as few layers in float as keep its metric within a tolerance.

    The float model is evaluated through an AMP proxy, which ranks the layers on the way; then the
    number of worst layers in float is found by bisection: at most ``2 + ceil(log2 L)`` calls of
    ``eval_fn`` for ``L`` layers, the float one included.

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
        progress: whether to show a progress bar.

    Returns:
        The quantized model, with at least one layer in int8. If the target was not reached, the
        best one that was found; then ``quantizer.tuning.reached`` is False, and a warning is
        logged.

    Raises:
        NotCalibrated: the quantizer has seen no data, or ``eval_fn`` never called the model.
        InvalidConfig: an argument out of range, or a metric that is not a number.

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
    search = _Search(quantizer, model, eval_fn, precision_of(dtype), progress)
    check_limits(tolerance, max_trials)
    return search.run(
        tolerance, relative, higher_is_better, metric, amp_batches, max_trials, timeout
    )


@dataclass
class _Search:
    quantizer: Quantizer
    model: nn.Module
    eval_fn: Callable[[nn.Module], float]
    precision: str
    progress: bool

    def run(
        self,
        tolerance: float,
        relative: bool,
        higher_is_better: bool,
        metric: str,
        amp_batches: int | None,
        max_trials: int | None,
        timeout: float | None,
    ) -> QuantizedModule:
        from tqdm import tqdm

        quantizer, start = self.quantizer, time.monotonic()
        before, plan = dict(quantizer.fallen_back), quantizer.plan
        model = self.model
        if isinstance(model, QatModel):  # ranked by the ranges that were calibrated
            model = bond_of(model).session.model
        amp_model = quantizer.amp(model, metric=metric, max_batches=amp_batches)
        bar = tqdm(desc="tuning: float model", unit="trial", disable=hidden(self.progress))
        try:
            baseline, seconds = self._evaluate(amp_model, "the float model")
            target = target_of(baseline, tolerance, relative, higher_is_better)
            if amp_model.recorder.batches == 0:
                raise NotCalibrated("eval_fn never called the model it was given")
            groups = quantizer.sensitivity(amp_model).left
            report = Tuning(target, len(groups), higher_is_better)
            report.trials.append(Trial(None, baseline, True, seconds))
            bar.total = 2 + math.ceil(math.log2(max(len(groups), 1)))
            bar.update()

            def attempt(count: int) -> bool:
                bar.set_description(f"tuning: {count} of {len(groups)} layers in float")
                self._take_back(before, groups[:count])
                quantized = quantizer.quantize(self.model)
                value, spent = self._evaluate(quantized, f"{count} layers in float")
                passed = value >= target if higher_is_better else value <= target
                report.trials.append(Trial(count, value, passed, spent))
                bar.set_postfix(metric=f"{value:.4g}", target=f"{target:.4g}")
                bar.update()
                return passed

            low, high = 0, 0 if attempt(0) else len(groups)
            while high - low > 1:
                if max_trials is not None and len(report.trials) >= max_trials:
                    report.stopped = f"max_trials={max_trials}"
                    break
                if timeout is not None and time.monotonic() - start > timeout:
                    report.stopped = f"timeout={timeout:g} s"
                    break
                middle = (low + high) // 2
                low, high = (low, middle) if attempt(middle) else (middle, high)
            self._take_back(before, groups[: report.best.in_float])
            report.names = tuple(quantizer.fallen_back)
            quantizer.tuning = report
            result = quantizer.quantize(self.model)
        except BaseException:
            quantizer.fallen_back, quantizer.plan = before, plan
            raise
        finally:
            bar.close()
        if not report.reached:
            logger.warning("tuning did not reach its target\n%s", report)
        else:
            logger.info("tuning\n%s", report)
        return result

    def _take_back(self, before: dict[str, str], groups: list[tuple[str, ...]]) -> None:
        names = [name for group in groups for name in group]
        self.quantizer.fallen_back = before | dict.fromkeys(names, self.precision)

    def _evaluate(self, model: nn.Module, what: str) -> tuple[float, float]:
        return evaluate(self.eval_fn, model, what)


def evaluate(
    eval_fn: Callable[[nn.Module], float], model: nn.Module, what: str
) -> tuple[float, float]:
    """The metric of a model, and the seconds that it took.

    Args:
        eval_fn: the user's.
        model: float or quantized.
        what: it is, for the message.

    Raises:
        InvalidConfig: ``eval_fn`` gave no number.
    """
    start = time.monotonic()
    value: Any = eval_fn(model)
    try:
        metric = float(value)
    except (TypeError, ValueError) as error:
        raise InvalidConfig(f"eval_fn gave {value!r} for {what}; expected a number") from error
    return metric, time.monotonic() - start


def target_of(baseline: float, tolerance: float, relative: bool, higher_is_better: bool) -> float:
    """The metric that is still within the tolerance of the float model's.

    Raises:
        InvalidConfig: the float model's is not finite.

    >>> target_of(0.8, 0.01, relative=False, higher_is_better=True)
    0.79
    """
    if not math.isfinite(baseline):
        raise InvalidConfig(f"eval_fn gave {baseline} for the float model; it must be finite")
    allowed = tolerance * abs(baseline) if relative else tolerance
    return baseline - allowed if higher_is_better else baseline + allowed


def check_limits(tolerance: float, max_trials: int | None) -> None:
    """Raise :class:`InvalidConfig` where one is out of range."""
    if not (is_number(tolerance) and math.isfinite(tolerance) and tolerance >= 0.0):
        raise InvalidConfig(f"tolerance={tolerance!r}; expected 0 or more, 0.01 for 1 %")
    if max_trials is not None and not (
        isinstance(max_trials, numbers.Integral) and max_trials >= 2
    ):
        raise InvalidConfig(f"max_trials={max_trials!r}; expected at least 2: float, and quantized")


def is_number(value: Any) -> bool:
    """Whether it is one, and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
