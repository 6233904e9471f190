"""The summary: plan and ranges as a JSON file that a person can read, edit and give back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_quant.algorithms.smoothquant import channels_key
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import InvalidConfig
from torch_quant.io.files import write_atomically
from torch_quant.observers import MinMaxObserver, Observer
from torch_quant.state import QuantState

__all__ = ["Summary", "load_summary", "save_summary", "write_summary"]

_FORMAT = "torch_quant summary"
_VERSION = 1


@dataclass(frozen=True)
class Summary:
    """What a summary file says.

    Args:
        plan: every site: quantized or not and why, formats of activations and weight.
        ranges: tensor key -> (minimum, maximum) that its grid covers.
        channels: tensor key -> minimum and maximum of each channel, shape ``[2, channels]``, of
            tensors that are smoothed.
    """

    plan: QuantPlan
    ranges: Mapping[str, tuple[float, float]]
    channels: Mapping[str, Tensor] = field(default_factory=dict)

    def apply_to(self, state: QuantState) -> None:
        """Put the ranges in the place of what was observed of these tensors."""
        observers: dict[str, Observer] = {}
        for key, (low, high) in self.ranges.items():
            observers[key] = MinMaxObserver()
            observers[key].observe(torch.tensor([low, high]))
        for key, extremes in self.channels.items():
            observers[channels_key(key)] = MinMaxObserver(ch_axis=-1)
            observers[channels_key(key)].observe(extremes)
        state.put(observers)


def _ranges(plan: QuantPlan, state: QuantState) -> dict[str, list[float]]:
    ranges = {}
    for site in plan.values():
        for key in (*site.inputs, *([site.stored] if site.stored else [])):
            observer = state.observers.get(key)
            if site.activation is not None and observer is not None and observer.batches:
                ranges[key] = [float(end) for end in observer.range(site.activation)]
    return ranges


def _channels(plan: QuantPlan, state: QuantState) -> dict[str, list[list[float]]]:
    """Minimum and maximum of each channel, of the tensors that the plan smooths."""
    keys = dict.fromkeys(site.inputs[0] for site in plan.values() if site.smooth is not None)
    observers = {key: state.observers.get(channels_key(key)) for key in keys}
    return {
        key: [observer.min_val.tolist(), observer.max_val.tolist()]
        for key, observer in observers.items()
        if isinstance(observer, MinMaxObserver)
    }


def save_summary(path: str | os.PathLike[str], plan: QuantPlan, state: QuantState) -> None:
    """Write plan and ranges; raises :class:`InvalidConfig` if the path cannot be written."""
    write_summary(path, plan, _ranges(plan, state), _channels(plan, state))


def write_summary(
    path: str | os.PathLike[str],
    plan: QuantPlan,
    ranges: Mapping[str, list[float]],
    channels: Mapping[str, list[list[float]]] | None = None,
) -> None:
    """Write a plan, and ranges by tensor key and by channel, in this file's format."""
    data = {
        "format": _FORMAT,
        "version": _VERSION,
        "sites": plan.to_dict()["sites"],
        "ranges": dict(ranges),
        "channels": dict(channels or {}),
    }
    text = json.dumps(data, indent=1) + "\n"
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def load_summary(path: str | os.PathLike[str]) -> Summary:
    """Read a summary; raises :class:`InvalidConfig` naming what is missing or wrong in it."""
    try:
        data: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"cannot read the summary {path}: {error}") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise InvalidConfig(f"{path} is no summary of torch_quant: it lacks format: {_FORMAT!r}")
    if data.get("version") != _VERSION:
        raise InvalidConfig(f"{path} has version {data.get('version')}; expected {_VERSION}")
    try:
        ranges = {key: (float(low), float(high)) for key, (low, high) in data["ranges"].items()}
        channels = {key: torch.tensor(pair) for key, pair in data.get("channels", {}).items()}
        plan = QuantPlan.from_dict(data)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidConfig(f"{path}: {type(error).__name__}: {error}") from error
    for key, (low, high) in ranges.items():
        if not low <= high:
            raise InvalidConfig(
                f"{path}: the range of {key} is [{low}, {high}]; expected low <= high"
            )
    for key, pair in channels.items():
        if pair.dim() != 2 or len(pair) != 2 or not bool((pair[0] <= pair[1]).all()):
            raise InvalidConfig(
                f"{path}: the channels of {key} are of shape {tuple(pair.shape)}; expected as many "
                "minima as maxima, none above its maximum"
            )
    return Summary(plan, ranges, channels)
