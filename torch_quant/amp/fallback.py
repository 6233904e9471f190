"""Which sites go back to float: from what an AMP proxy has recorded to names."""

from __future__ import annotations

import copy
import logging
import math
import operator
import time
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_quant.amp.groups import find_groups, shared_inputs
from torch_quant.amp.padding import kept_outputs
from torch_quant.amp.proxy import AmpModel, Latency
from torch_quant.amp.ranking import Ranking, Sensitivity, decibels
from torch_quant.amp.records import SiteStats
from torch_quant.amp.report import SensitivityReport
from torch_quant.amp.selection import fewest_for, most_within
from torch_quant.core.metrics import float_leaves, sqnr
from torch_quant.core.plan import PRECISIONS, QuantPlan
from torch_quant.errors import InvalidConfig

__all__ = ["Fallback", "precision_of"]

logger = logging.getLogger("torch_quant")

_COUNTS = (0, 1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90)
"""Where ``measure=True`` measures the curve."""


def precision_of(dtype: torch.dtype) -> str:
    """The plan's word for a float dtype; raises :class:`InvalidConfig` for another one."""
    name = str(dtype).removeprefix("torch.")
    if name not in PRECISIONS:
        raise InvalidConfig(f"fallback to {dtype}; expected torch.float32 or torch.bfloat16")
    return name


def _count(value: object, name: str) -> int:
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = -1
    if count < 0:
        raise InvalidConfig(f"{name}={value!r}; expected a count of layers, 0 or more")
    return count


def _number(value: object) -> float:
    """NaN for what is none."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if real else math.nan  # type: ignore[arg-type]


class Fallback:
    """One decision.

    Args:
        amp_model: an AMP proxy with data seen.
        precision: of what falls back now.
    """

    def __init__(self, amp_model: AmpModel, precision: str = PRECISIONS[0]) -> None:
        self.amp_model, self.session = amp_model, amp_model.session
        self.fallen, self._precision = dict(self.session.owner.fallen_back), precision

    def plan(self, names: Iterable[str] = ()) -> QuantPlan:
        """The plan with ``names`` in float."""
        chosen = {name: self.fallen.get(name, PRECISIONS[0]) for name in names}
        return self.session.plan(fallen=chosen)

    @cached_property
    def ranking(self) -> Ranking:
        """Every site that would be quantized if nothing had fallen back."""
        amp_model, plan = self.amp_model, self.plan()
        recorder, captured = amp_model.recorder, amp_model.captured
        local = amp_model.metric == "sqnr"
        gram = None if local else copy.deepcopy(recorder.gram)  # it grows on
        shared = self.session.owner.backend.kernels().share_precision
        groups = {name: names for names in find_groups(captured, plan, shared) for name in names}
        sharing = shared_inputs(plan)
        weights = {site.name: site.weight_shape for site, _ in captured.sites()}
        whole = gram.noise(plan.quantized) if gram is not None else 0.0
        sites = []
        for name in plan.quantized:
            stats = recorder.sites.get(name, SiteStats())
            score = recorder.gram.of_site(name)
            if local:
                score = stats.noise / stats.signal if stats.signal else 0.0
            rest = [other for other in plan.quantized if other not in groups[name]]
            parts = stats.from_weight + stats.from_activation
            share = stats.from_weight / parts if parts else float(plan[name].activation is None)
            predicts = amp_model.metric == "output"
            sites.append(
                Sensitivity(
                    name=name,
                    op=plan[name].op,
                    score=score,
                    gain=score if gram is None else whole - gram.noise(rest),
                    local_sqnr=decibels(stats.signal, stats.noise),
                    predicted_output_sqnr=decibels(recorder.output_signal, score)
                    if predicts
                    else None,
                    weight_share=share,
                    activation_share=1.0 - share,
                    macs=plan[name].macs,
                    bytes=4 * math.prod(weights[name]) if weights[name] else 0,
                    together=tuple(other for other in groups[name] if other != name),
                    shares_input=sharing[name],
                    fallen_back=name in self.fallen,
                )
            )
        signal = recorder.output_signal
        note = "; ".join(part for part in (amp_model.note, self._unreached()) if part)
        return Ranking(sites, amp_model.metric, gram, signal, recorder.batches, note)

    def _unreached(self) -> str:
        """What the reader must know of sites that the numbers say nothing of."""
        recorded = self.amp_model.recorder.sites
        absent = [name for name in self.plan().quantized if name not in recorded]
        note = f"saw no data: {', '.join(absent)}" if absent else ""
        if self.amp_model.metric != "sqnr":
            cut = [name for name, stats in recorded.items() if not stats.reached]
            if cut:
                note += ("; " if note else "") + (
                    f"no gradient reaches them, so their score is 0: {', '.join(cut)}"
                )
        return note

    def report(self, measure: bool | Iterable[int]) -> SensitivityReport:
        """The ranking, with measured points of the curve where asked for."""
        groups = self.ranking.groups
        if isinstance(measure, bool):
            counts = [k for k in _COUNTS if k < len(groups)] if measure else []
        else:
            given = measure if isinstance(measure, Iterable) else [measure]
            counts = sorted({_count(k, "measure") for k in given})
            if counts and not 0 <= counts[0] <= counts[-1] <= len(groups):
                raise InvalidConfig(f"measure={counts}; expected counts from 0 to {len(groups)}")
        measured = {
            count: self.measure({n for names in groups[:count] for n in names}) for count in counts
        }
        return SensitivityReport(self.ranking, measured)

    # Choices

    def choose(
        self,
        num: int | None,
        min_sqnr: float | None,
        max_slowdown: float | None,
        latency: Mapping[str, Latency] | None,
    ) -> list[str]:
        """Names to take to float, worst first; arguments as of :meth:`Quantizer.fallback`."""
        given = [x for x in (num, min_sqnr, max_slowdown) if x is not None]
        if len(given) != 1:
            raise InvalidConfig(
                f"fallback takes one of num=, min_sqnr= and max_slowdown=; {len(given)} were given"
            )
        if num is not None:
            picked = self._worst(num)
        elif min_sqnr is not None:
            picked = self._reaching(min_sqnr)
        else:
            assert max_slowdown is not None
            picked = self._within(max_slowdown, latency)
        return [name for names in picked for name in names]

    def _worst(self, num: int) -> list[tuple[str, ...]]:
        left = self.ranking.left
        count = _count(num, "num")
        if count > len(left):
            logger.warning("num=%d, but only %d are left in int8: all fall back", count, len(left))
        return left[:count]

    def _reaching(self, target: float) -> list[tuple[str, ...]]:
        if not math.isfinite(_number(target)):
            raise InvalidConfig(f"min_sqnr={target!r}; expected decibels")
        left = self.ranking.left
        gone = [[n for names in left[:k] for n in names] for k in range(len(left))]
        noises = [self.ranking.noise({*self.fallen, *names}) for names in gone]
        signal = {"output": self.ranking.output_signal, "sqnr": 1.0, "loss": None}
        count, measured = fewest_for(
            noises,
            target,
            lambda k: self.measure({*self.fallen, *gone[k]}),
            signal[self.ranking.metric],
        )
        if left and count == len(left):
            logger.warning(
                "min_sqnr=%.4g dB is reached only with every layer in float (measured: %s)",
                target,
                ", ".join(f"{v:.1f} dB with {k}" for k, v in sorted(measured.items())),
            )
        return left[:count]

    def _within(
        self, slowdown: float, latency: Mapping[str, Latency] | None
    ) -> list[tuple[str, ...]]:
        if not _number(slowdown) >= 0.0:
            raise InvalidConfig(f"max_slowdown={slowdown!r}; expected 0 or more, 0.05 for 5 %")
        times = self.amp_model.measure_latency() if latency is None else dict(latency)
        left = self.ranking.left
        if missing := [name for names in left for name in names if name not in times]:
            raise InvalidConfig(f"latency has no time for {', '.join(missing)}")
        costs = [sum(times[n].float32 - times[n].quantized for n in names) for names in left]
        whole = self.latency(self.fallen)
        noises = [sum(self.ranking.of(name).score for name in names) for names in left]
        picked = [left[i] for i in most_within(noises, costs, slowdown * whole)]
        names = [name for group in picked for name in group]
        logger.info(
            "%d layers in float: %+.1f %% of %.0f us by the times of the layers, %+.1f %% measured",
            len(picked),
            100.0 * sum(times[n].float32 - times[n].quantized for n in names) / whole,
            whole,
            100.0 * (self.latency({*self.fallen, *names}) / whole - 1.0),
        )
        return picked

    # Trials

    def _quantized(self, names: Iterable[str]) -> nn.Module:
        chosen = {name: self.fallen.get(name, self._precision) for name in names}
        return self.session.lowering(fallen=chosen).run(share=True)

    @torch.no_grad()
    def measure(self, names: Iterable[str]) -> float:
        """Output SQNR, dB, of a quantized run over the samples that the proxy kept."""
        quantized = self._quantized(names)
        expected: list[Tensor] = []
        actual: list[Tensor] = []
        for args, kwargs, outputs in self.amp_model.samples:
            real = self.amp_model.real(args, kwargs)
            expected += kept_outputs(real, float_leaves(outputs))
            found = quantized(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            actual += kept_outputs(real, float_leaves(found))
        return sqnr(expected, actual)

    @torch.no_grad()
    def latency(self, names: Iterable[str], repeats: int = 5) -> float:
        """Median time of one quantized call on the first kept sample batch, microseconds."""
        quantized = self._quantized(names)
        args, kwargs, _ = self.amp_model.samples[0]
        times: list[float] = []
        for _ in range(repeats + 1):
            inputs: Any = copy.deepcopy((args, kwargs))
            start = time.perf_counter()
            quantized(*inputs[0], **inputs[1])
            times.append(1e6 * (time.perf_counter() - start))
        return float(np.median(times[1:]))
