"""The summary: plan and ranges as a JSON file that a person can read, edit and give back."""

from __future__ import annotations

import copy
import difflib
import json
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_quant.core.documents import Lines, read_json
from torch_quant.core.granularity import PerChannel
from torch_quant.core.naming import check_names
from torch_quant.core.plan import QuantPlan, SitePlan
from torch_quant.errors import InvalidConfig
from torch_quant.graph.policy import CapturePolicy, checked_capture
from torch_quant.graph.sites import Site
from torch_quant.io.files import write_atomically
from torch_quant.io.kinds import what_it_holds
from torch_quant.io.summary_schema import FORMAT, VERSION, renewed, validate, written
from torch_quant.state import QuantState
from torch_quant.statistics import (
    CHANNELS,
    RANGE,
    ChannelMean,
    MinMaxObserver,
    Observer,
    mean_of,
)

__all__ = [
    "Summary",
    "load_summary",
    "read_summary",
    "save_summary",
    "summary_data",
    "write_summary",
]


@dataclass(frozen=True, eq=False)
class Summary:
    """What a summary file says.

    Args:
        plan: every site: quantized or not and why, formats of activations and weight.
        ranges: tensor key -> (minimum, maximum) that its grid covers.
        channels: tensor key -> minimum and maximum of each channel, shape ``[2, channels]``, of
            tensors that are transformed.
        means: tensor key -> means of its channels, where biases are corrected.
        capture: what was captured as a graph, which decides the names of tensors; None where the
            file does not say.
        lines: where the entries stand in the file.
    """

    plan: QuantPlan
    ranges: Mapping[str, tuple[float, float]]
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    means: Mapping[str, Sequence[ChannelMean]] = field(default_factory=dict)
    capture: CapturePolicy | None = None
    lines: Lines = field(default_factory=Lines)

    def check(self, sites: Collection[Site]) -> None:
        """Raise :class:`InvalidConfig` where the file does not fit the model as it is captured.

        ``macs`` depends on the example, so it need not be the same: it must be possible.
        """
        found: dict[str, list[Site]] = defaultdict(list)
        for site in sites:
            found[site.name].append(site)
        for i, (name, edit) in enumerate(self.plan.items()):
            try:
                check_names([name], found, "summary site")
            except InvalidConfig as error:
                raise self.lines.error(("sites", i, "name"), str(error)) from error
            for entry, message in _misfits(edit, found[name]).items():
                raise self.lines.error(("sites", i, entry), f"{name}: {message}")
        keys = {key for site in sites for key in site.keys}
        for key in self.ranges:
            if key not in keys:
                close = ", ".join(difflib.get_close_matches(key, keys, n=3, cutoff=0.4))
                hint = f"; did you mean {close}?" if close else ""
                message = f"no site of the model reads or writes a tensor {key!r}{hint}"
                raise self.lines.error(("ranges", key), message)
        for key, extremes in self.channels.items():
            widths = {s.weight_shape[-1] for s in sites if s.smoothable and s.inputs == (key,)}
            if extremes.shape[1] not in widths:
                expected = " or ".join(map(str, sorted(widths))) or "none: no layer smooths it"
                message = f"{key!r} has {extremes.shape[1]} channels; expected {expected}"
                raise self.lines.error(("channels", key), message)
        for key, mean in self._means():
            readers = [s for s in sites if s.channels == mean.axis and s.inputs == (key,)]
            if not any(_reads_channels(site, mean.channels) for site in readers):
                message = (
                    f"{key!r} has means of {mean.channels} channels along {mean.label}; no "
                    "linear layer or convolution reads so many there"
                )
                raise self.lines.error(("means", key, mean.label), message)

    def _means(self) -> Iterator[tuple[str, ChannelMean]]:
        return ((key, each) for key, known in self.means.items() for each in known)

    def apply_to(self, state: QuantState) -> None:
        """Put the ranges in the place of what was observed of these tensors."""
        for key, (low, high) in self.ranges.items():
            observer = MinMaxObserver()
            observer.observe(torch.tensor([low, high]))
            state.put(key, RANGE, observer)
        for key, extremes in self.channels.items():
            observer = MinMaxObserver(PerChannel(-1))
            observer.observe(extremes)
            state.put(key, CHANNELS, observer)
        for key, mean in self._means():
            state.put(key, mean.purpose, copy.deepcopy(mean))


def _reads_channels(site: Site, channels: int) -> bool:
    """Whether a linear layer or convolution, of some number of groups, has so many inputs."""
    groups, rest = divmod(channels, site.weight_shape[1])
    return groups > 0 and rest == 0 and site.weight_shape[0] % groups == 0


def _mean(label: str, known: Mapping[str, Any]) -> ChannelMean:
    mean = mean_of(label)
    mean.batches, mean.rows = known["batches"], known["rows"]
    mean.sums = torch.tensor(known["sums"], dtype=torch.float32)
    return mean


def _misfits(edit: SitePlan, sites: list[Site]) -> dict[str, str]:
    """Entry -> what is wrong with it, for the site as it is in the graphs of the model."""
    site, wrong = sites[0], {}
    if edit.op != site.op:
        wrong["op"] = f"'op' is {edit.op!r}; in the model it is {site.op!r}"
    inputs = [(*each.inputs, *each.internals) for each in sites]
    if edit.inputs not in inputs:
        wrong["inputs"] = (
            f"'inputs' is {list(edit.inputs)}; in the model they are {list(inputs[0])}"
        )
    outputs = {key for each in sites for key in (each.fused_output, each.result)} | {""}
    if edit.quantized_output not in outputs:
        wrong["quantized_output"] = (
            f"'quantized_output' is {edit.quantized_output!r}; expected "
            + " or ".join(map(repr, outputs))
        )
    unit = math.prod(site.weight_shape) if site.weight_shape and site.macs else 1
    if (edit.macs == 0) != (site.macs == 0) or edit.macs % unit:
        wrong["macs"] = f"'macs' is {edit.macs}; with the captured example it is {site.macs}" + (
            f", with any a multiple of {unit}" if unit > 1 else ""
        )
    if not edit.quantized:
        return wrong
    has = {"activation": bool(inputs[0] or site.fused_output), "weight": bool(site.weight_shape)}
    for name in has:
        if getattr(edit, name) is not None and not has[name]:
            wrong[name] = f"{name!r} is a format; expected null: {site.op} quantizes none here"
    for name, methods in (("transforms", edit.transforms), ("method", (edit.method,))):
        for each in methods:
            if each is not None and (refusal := each.refusal(site)):
                wrong[name] = f"{name!r} has {each}, but {refusal}"
    return wrong


def _ranges(plan: QuantPlan, state: QuantState) -> dict[str, list[float]]:
    ranges = {}
    for site in plan.values():
        for key in (*site.inputs, *([site.quantized_output] if site.quantized_output else [])):
            observer = state.find(key)
            if site.activation is None or site.activation.dynamic:
                continue
            if isinstance(observer, Observer):
                ranges[key] = [float(end) for end in observer.range(site.activation)]
    return ranges


def _transformed(plan: QuantPlan) -> list[str]:
    """The tensors at which a transform may want statistics, once."""
    sites = (site for site in plan.values() if site.transforms)
    return list(dict.fromkeys(key for site in sites for key in site.inputs))


def _channels(plan: QuantPlan, state: QuantState) -> dict[str, list[list[float]]]:
    """Minimum and maximum of each channel, of the tensors where a transform wants them."""
    observers = {key: state.find(key, CHANNELS) for key in _transformed(plan)}
    return {
        key: [observer.min_val.flatten().tolist(), observer.max_val.flatten().tolist()]
        for key, observer in observers.items()
        if isinstance(observer, MinMaxObserver)
    }


def _means(plan: QuantPlan, state: QuantState) -> dict[str, list[ChannelMean]]:
    """The means of channels, of the tensors where a transform wants them."""
    found = {
        key: [each for each in state.statistics.get(key, {}).values() if each.batches]
        for key in _transformed(plan)
    }
    means = {k: [x for x in each if isinstance(x, ChannelMean)] for k, each in found.items()}
    return {key: each for key, each in means.items() if each}


def save_summary(
    path: str | os.PathLike[str], plan: QuantPlan, state: QuantState, capture: CapturePolicy
) -> None:
    """Write plan and ranges; raises :class:`InvalidConfig` if the path cannot be written."""
    known = _channels(plan, state), _means(plan, state)
    write_summary(path, plan, _ranges(plan, state), *known, capture)


def write_summary(
    path: str | os.PathLike[str],
    plan: QuantPlan,
    ranges: Mapping[str, list[float]],
    channels: Mapping[str, list[list[float]]] | None = None,
    means: Mapping[str, Sequence[ChannelMean]] | None = None,
    capture: CapturePolicy | None = None,
) -> None:
    """Write a plan, ranges by tensor key and by channel, and means, in this file's format."""
    data = _data(plan, ranges, channels, means, capture)
    text = json.dumps(data, indent=1) + "\n"
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def _data(
    plan: QuantPlan,
    ranges: Mapping[str, Sequence[float]],
    channels: Mapping[str, list[list[float]]] | None,
    means: Mapping[str, Sequence[ChannelMean]] | None,
    capture: CapturePolicy | None,
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        **({} if capture is None else {"capture": capture.data()}),
        "sites": [written(site) for site in plan.to_dict()["sites"]],
        "ranges": {key: list(ends) for key, ends in ranges.items()},
        "channels": dict(channels or {}),
        "means": {
            key: {
                each.label: {
                    "batches": each.batches,
                    "rows": each.rows,
                    "sums": each.sums.tolist(),
                }
                for each in known
            }
            for key, known in (means or {}).items()
        },
    }


def summary_data(summary: Summary) -> dict[str, Any]:
    """A summary that was read, as the data that :func:`read_summary` takes."""
    channels = {key: extremes.tolist() for key, extremes in summary.channels.items()}
    return _data(summary.plan, summary.ranges, channels, summary.means, summary.capture)


def load_summary(path: str | os.PathLike[str]) -> Summary:
    """Read a summary.

    Raises:
        InvalidConfig: it cannot be read, or an entry is missing or wrong; says which, and its line.
    """
    try:
        data, lines = read_json(Path(path).read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InvalidConfig):
            raise
        why = error.strerror if isinstance(error, OSError) else error
        hint = what_it_holds(path)
        raise InvalidConfig(f"cannot read the summary {path}: {why}{hint}") from error
    return read_summary(data, lines)


def read_summary(data: Any, lines: Lines) -> Summary:
    """A summary from its data; raises :class:`InvalidConfig` as :func:`load_summary` does."""
    validate(data, lines)
    ranges = {key: (float(low), float(high)) for key, (low, high) in data["ranges"].items()}
    channels = {
        key: torch.tensor(pair, dtype=torch.float32)
        for key, pair in data.get("channels", {}).items()
    }
    means = {
        key: [_mean(label, each) for label, each in known.items()]
        for key, known in data.get("means", {}).items()
    }
    plan = QuantPlan.from_dict({"sites": [renewed(site) for site in data["sites"]]})
    capture = data.get("capture")
    policy = None if capture is None else checked_capture(capture)
    return Summary(plan, ranges, channels, means, policy, lines)
