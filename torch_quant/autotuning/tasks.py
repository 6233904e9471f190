"""What is done with one configuration, in this process or another's."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_quant.config import QConfig
from torch_quant.convert.quantized import QuantizedModule
from torch_quant.core.metrics import sqnr
from torch_quant.errors import InvalidConfig, QuantError
from torch_quant.graph.examples import call_example
from torch_quant.graph.running import frozen
from torch_quant.graph.twin import twin_of
from torch_quant.io.saving import save
from torch_quant.profiling import in_turns, undisturbed
from torch_quant.quantizer import Quantizer

__all__ = ["evaluated", "measured", "prepared", "quantized"]

_COMPARED = 4
"""Batches whose outputs are compared with float32's."""


@torch.no_grad()
def prepared(
    model: nn.Module, configuration: Mapping[str, Any], batches: Sequence[Any]
) -> Quantizer:
    """A quantizer that has seen what data its configuration needs."""
    quantizer = Quantizer.from_config(configuration)
    settings = [quantizer.qconfig, *quantizer.overrides.values()]
    if any(each is not None and each.needs_ranges for each in settings):
        calib_model = quantizer.calib(model)
        for batch in batches:
            call_example(calib_model, batch)
    elif any(each is not None and _wants_data(each) for each in settings):
        quantizer.round_weights(model, batches, progress=False)
    return quantizer


def _wants_data(config: QConfig) -> bool:
    methods = [*config.transforms, *([] if config.method is None else [config.method])]
    return any(each.wants_blocks or each.wants_statistics for each in methods)


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
        quant_model = quantized(quantizer, model, batches)
    except QuantError as error:
        return {"why_not": f"{type(error).__name__}: {error}".splitlines()[0]}
    floating = twin_of(model)
    with frozen(floating):
        distances = [
            sqnr(call_example(floating, batch), call_example(quant_model, batch))
            for batch in batches[:_COMPARED]
        ]
        worst = min(-math.inf if math.isnan(each) else each for each in distances)
        found = {"sqnr": worst}
        if "size" in objectives:
            found["size"] = _saved_bytes(quant_model) / _tensor_bytes(model)
        if "latency" in objectives:
            calls = {"float": floating, "quantized": quant_model}
            times = undisturbed(in_turns(calls, batches[0], seconds)[0])
            medians = {name: statistics.median(each) for name, each in times.items()}
            found["latency"] = medians["quantized"] / medians["float"]
    return found


def _saved_bytes(model: QuantizedModule) -> int:
    """Of its files, in which each code has the bits of its format."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder, "model"))
        return sum(path.stat().st_size for path in Path(folder, "model").iterdir())


def _tensor_bytes(model: nn.Module) -> int:
    """Of all tensors of its ``state_dict``, those that share memory once."""
    tensors = [x for x in model.state_dict().values() if isinstance(x, torch.Tensor)]
    places = {(x.data_ptr() or id(x), x.numel() * x.element_size()) for x in tensors}
    return sum(size for _, size in places)


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
    made: nn.Module = twin_of(model)
    if configuration is not None:
        quantizer = quantizer or prepared(model, configuration, batches)
        made = quantized(quantizer, model, batches)
    start = time.monotonic()
    value: Any = eval_fn(made)
    try:
        metric = float(value)
    except (TypeError, ValueError) as error:
        raise InvalidConfig(f"eval_fn gave {value!r} for {what}; expected a number") from error
    return {"metric": metric, "seconds": time.monotonic() - start}
