"""Measures models in turns, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from torch_quant.core.metrics import sqnr
from torch_quant.errors import InvalidConfig
from torch_quant.graph.examples import example_call, is_padded
from torch_quant.graph.running import frozen
from torch_quant.graph.twin import twin_of
from torch_quant.report.speed import Profile, Run

__all__ = ["Time", "checked_seconds", "in_turns", "profiled", "undisturbed"]

_LEAST, _MOST = 5, 60
_ONE_THREAD = 1.05
"""Processor time by wall-clock time of calls that keep to one thread, at most."""


class Time(NamedTuple):
    """How long a call took, in milliseconds.

    Args:
        wall: from its beginning to its end.
        processor: that this process was computing meanwhile, all threads together.
    """

    wall: float
    processor: float


def undisturbed(times: Mapping[str, Sequence[Time]]) -> dict[str, list[float]]:
    """Milliseconds of calls: processor time where all keep to one thread, else from end to end.

    What other processes do meanwhile is not in the former.

    Args:
        times: of models, by name.

    >>> undisturbed({"alone": [Time(3.0, 2.0)], "preempted": [Time(9.0, 2.1)]})
    {'alone': [2.0], 'preempted': [2.1]}
    >>> undisturbed({"one": [Time(3.0, 3.0)], "two threads": [Time(2.0, 3.9)]})
    {'one': [3.0], 'two threads': [2.0]}
    """
    alone = all(
        statistics.median(each.processor / max(each.wall, 1e-9) for each in calls) <= _ONE_THREAD
        for calls in times.values()
    )
    return {
        name: [each.processor if alone else each.wall for each in calls]
        for name, calls in times.items()
    }


def profiled(
    model: nn.Module,
    quantized: Mapping[str, nn.Module | str],
    example_inputs: Any,
    *,
    seconds: float,
    compiled: bool,
    names: Mapping[str, str],
) -> Profile:
    """Run a float model and what was made of it, in turns.

    Args:
        model: the float model; it is left as it is.
        quantized: backend -> the quantized model, or why there is none.
        example_inputs: as for :meth:`Quantizer.calib`.
        seconds: about how long to measure.
        compiled: also by ``torch.compile``.
        names: backend -> what the table calls it.

    Raises:
        InvalidConfig: ``seconds`` is no time.
    """
    checked_seconds(seconds)
    floating = twin_of(model)
    calls: dict[str, Callable[..., Any]] = {"float32": floating, "bfloat16": _bfloat16(floating)}
    if compiled:
        calls["float32, compiled"] = torch.compile(floating)
    backends = {names[key]: key for key in quantized}
    refused = {names[key]: each for key, each in quantized.items() if isinstance(each, str)}
    calls |= {names[key]: each for key, each in quantized.items() if isinstance(each, nn.Module)}
    outputs: dict[str, Any] = {}
    with frozen(floating):
        for name, call in list(calls.items()):
            try:
                outputs[name] = _timed(call, example_inputs)[1]
            except Exception as error:
                if name == "float32":
                    raise
                refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                del calls[name]
        times, rounds = in_turns(calls, example_inputs, seconds)
    runs = []
    for name in dict.fromkeys([*calls, *refused]):
        if name in refused:
            runs.append(Run(name, backends.get(name), why_not=refused[name]))
            continue
        distance = None if name == "float32" else sqnr(outputs["float32"], outputs[name])
        ordered = sorted(each.wall for each in times[name])
        p90 = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
        runs.append(Run(name, backends.get(name), statistics.median(ordered), p90, distance))
    return Profile(tuple(runs), torch.get_num_threads(), rounds, is_padded(example_inputs))


def checked_seconds(seconds: float) -> float:
    """A time to measure for; raises :class:`InvalidConfig` if it is none.

    >>> checked_seconds(5)
    5.0
    """
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not seconds > 0:
        raise InvalidConfig(f"seconds={seconds!r}; expected a time of more than 0")
    return float(seconds)


def _bfloat16(model: nn.Module) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(*args, **kwargs)

    return call


@torch.no_grad()
def _timed(call: Callable[..., Any], example_inputs: Any) -> tuple[Time, Any]:
    """How long a call took with inputs of its own, which it may change, and its outputs."""
    args, kwargs = example_call(copy.deepcopy(example_inputs))
    start, before = time.perf_counter(), time.process_time()
    output = call(*args, **kwargs)
    spent, end = time.process_time() - before, time.perf_counter()
    return Time((end - start) * 1e3, spent * 1e3), output


def in_turns(
    calls: Mapping[str, Callable[..., Any]],
    example_inputs: Any,
    seconds: float,
    least: int = _LEAST,
) -> tuple[dict[str, list[Time]], int]:
    """Times of each, and how many; each turn takes them in another order.

    Each is called once before it is timed, since what ran before leaves the caches full of its own.
    """
    once = sum(_timed(call, example_inputs)[0].wall for call in calls.values())
    rounds = min(_MOST, max(least, int(seconds * 1e3 / (2 * once))))
    times: dict[str, list[Time]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            _timed(calls[name], example_inputs)
            times[name].append(_timed(calls[name], example_inputs)[0])
    return times, rounds
