"""What is done with one configuration, in this process or another's."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_quant.config import QConfig
from torch_quant.convert.quantized import QuantizedModule
from torch_quant.core.memory import tensor_bytes
from torch_quant.core.metrics import sqnr
from torch_quant.errors import QuantError
from torch_quant.graph.examples import call_example
from torch_quant.graph.running import frozen
from torch_quant.graph.twin import twin_of
from torch_quant.io.saving import save
from torch_quant.profiling import in_turns, undisturbed
from torch_quant.quantizer import Quantizer
from torch_quant.trials.goal import evaluate

__all__ = ["evaluated", "measured", "prepared", "quantized"]

_COMPARED = 4
"""Batches whose outputs are compared with float32's."""


@torch.no_grad()
def prepared(
    model: nn.Module, configuration: Mapping[str, Any], batches: Sequence[Any]
) -> Quantizer:
    """A quantizer that has seen what data its configuration needs."""
    quantizer = Quantizer.from_config(configuration)
    settings = [x for x in (quantizer.qconfig, *quantizer.overrides.values()) if x is not None]
    with frozen(model):
        if any(map(_wants_calibration, settings)):
            calib_model = quantizer.calib(model)
            for batch in batches:
                call_example(calib_model, batch)
        if any(map(_wants_rounding, settings)):
            quantizer.round_weights(model, batches, progress=False)
    return quantizer


def _wants_rounding(config: QConfig) -> bool:
    """A block of the model at a time; statistics are recorded with ranges if these are."""
    method = config.method
    alone = method is not None and method.wants_statistics and not config.needs_ranges
    blocks = method is not None and method.wants_blocks
    return alone or blocks or any(each.wants_blocks for each in config.transforms)


def _wants_calibration(config: QConfig) -> bool:
    some = any(each.wants_statistics and not each.wants_blocks for each in config.transforms)
    return config.needs_ranges or some


def quantized(quantizer: Quantizer, model: nn.Module, batches: Sequence[Any]) -> QuantizedModule:
    """The model that a prepared quantizer makes."""
    example = batches[0] if not quantizer.state.batches else None
    return quantizer.quantize(model, example_inputs=example)


@torch.no_grad()
def measured(
    model: nn.Module,
    configuration: Mapping[str, Any],
    batches: Sequence[Any],
    objectives: Sequence[str],
    seconds: float,
    quantizer: Quantizer | None = None,
) -> dict[str, Any]:
    """What a configuration costs and how far its outputs are from float32's.

    Args:
        model: the float model.
        configuration: for :meth:`Quantizer.from_config`.
        batches: to calibrate with; the first is timed.
        objectives: what is measured beside the SQNR, ``"latency"`` or ``"size"`` or both.
        seconds: about how long to time.
        quantizer: one that is prepared already.

    Returns:
        ``sqnr`` and the objectives, or ``why_not``.
    """
    try:
        quantizer = quantizer or prepared(model, configuration, batches)
        return _measures(model, quantized(quantizer, model, batches), batches, objectives, seconds)
    except QuantError as error:
        return {"why_not": f"{type(error).__name__}: {error}".splitlines()[0]}


def _measures(
    model: nn.Module,
    quant_model: QuantizedModule,
    batches: Sequence[Any],
    objectives: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    floating = twin_of(model)
    with frozen(floating):
        distances = []
        for batch in batches[:_COMPARED]:
            random = torch.get_rng_state()
            expected = call_example(floating, batch)
            torch.set_rng_state(random)  # what it draws, if it draws some
            distances.append(sqnr(expected, call_example(quant_model, batch)))
        worst = min(-math.inf if math.isnan(each) else each for each in distances)
        found = {"sqnr": worst}
        if "size" in objectives:
            found["size"] = _saved_bytes(quant_model) / tensor_bytes(model)
        if "latency" in objectives:
            calls = {"float": floating, "quantized": quant_model}
            times = undisturbed(in_turns(calls, batches[0], seconds)[0])
            medians = {name: statistics.median(each) for name, each in times.items()}
            found["latency"] = medians["quantized"] / medians["float"]
    return found


def _apart(model: nn.Module) -> nn.Module:
    """The same model, whose parameters and buffers may be moved or converted."""
    made = twin_of(model)
    parameters: dict[int, nn.Parameter] = {}
    for module in made.modules():
        own = vars(module)
        if isinstance(module, torch.jit.ScriptModule) or "_parameters" not in own:
            continue
        for x in own["_parameters"].values():
            if x is not None and id(x) not in parameters:
                parameters[id(x)] = nn.Parameter(x.detach(), x.requires_grad)
        own["_parameters"] = {
            name: None if x is None else parameters[id(x)] for name, x in own["_parameters"].items()
        }
        own["_buffers"] = {
            name: None if x is None else x.clone() for name, x in own["_buffers"].items()
        }
    return made


def _saved_bytes(model: QuantizedModule) -> int:
    """Of its files, in which each code has the bits of its format."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder, "model"))
        return sum(path.stat().st_size for path in Path(folder, "model").iterdir())


def evaluated(
    model: nn.Module,
    configuration: Mapping[str, Any] | None,
    batches: Sequence[Any],
    eval_fn: Callable[[nn.Module], Any],
    what: str,
    quantizer: Quantizer | None = None,
) -> dict[str, Any]:
    """The metric of a configuration, of float32 if there is none, and the seconds it took.

    Raises:
        InvalidConfig: ``eval_fn`` gave no number.
    """
    made: nn.Module = _apart(model)
    if configuration is not None:
        quantizer = quantizer or prepared(model, configuration, batches)
        made = quantized(quantizer, model, batches)
    return evaluate(eval_fn, made, what)
