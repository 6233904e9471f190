"""The summary: plan and ranges as a JSON file that a person can read, edit and give back."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
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
from torch_quant.io.summary_schema import FORMAT, VERSION, renewed, validate, written
from torch_quant.state import QuantState
from torch_quant.statistics import CHANNELS, RANGE, MinMaxObserver, Observer

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
        capture: what was captured as a graph, which decides the names of tensors; None where the
            file does not say.
        lines: where the entries stand in the file.
    """

    plan: QuantPlan
    ranges: Mapping[str, tuple[float, float]]
    channels: Mapping[str, Tensor] = field(default_factory=dict)
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
    outputs = {each.fused_output for each in sites} | {""}
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


def _channels(plan: QuantPlan, state: QuantState) -> dict[str, list[list[float]]]:
    """Minimum and maximum of each channel, of the tensors where a transform wants them."""
    keys = dict.fromkeys(key for site in plan.values() if site.transforms for key in site.inputs)
    observers = {key: state.find(key, CHANNELS) for key in keys}
    return {
        key: [observer.min_val.flatten().tolist(), observer.max_val.flatten().tolist()]
        for key, observer in observers.items()
        if isinstance(observer, MinMaxObserver)
    }


def save_summary(
    path: str | os.PathLike[str], plan: QuantPlan, state: QuantState, capture: CapturePolicy
) -> None:
    """Write plan and ranges; raises :class:`InvalidConfig` if the path cannot be written."""
    write_summary(path, plan, _ranges(plan, state), _channels(plan, state), capture)


def write_summary(
    path: str | os.PathLike[str],
    plan: QuantPlan,
    ranges: Mapping[str, list[float]],
    channels: Mapping[str, list[list[float]]] | None = None,
    capture: CapturePolicy | None = None,
) -> None:
    """Write a plan, and ranges by tensor key and by channel, in this file's format."""
    data = _data(plan, ranges, channels, capture)
    text = json.dumps(data, indent=1) + "\n"
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def _data(
    plan: QuantPlan,
    ranges: Mapping[str, Sequence[float]],
    channels: Mapping[str, list[list[float]]] | None,
    capture: CapturePolicy | None,
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        **({} if capture is None else {"capture": capture.data()}),
        "sites": [written(site) for site in plan.to_dict()["sites"]],
        "ranges": {key: list(ends) for key, ends in ranges.items()},
        "channels": dict(channels or {}),
    }


def summary_data(summary: Summary) -> dict[str, Any]:
    """A summary that was read, as the data that :func:`read_summary` takes."""
    channels = {key: extremes.tolist() for key, extremes in summary.channels.items()}
    return _data(summary.plan, summary.ranges, channels, summary.capture)


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
        raise InvalidConfig(f"cannot read the summary {path}: {error}") from error
    return read_summary(data, lines)


def read_summary(data: Any, lines: Lines) -> Summary:
    """A summary from its data; raises :class:`InvalidConfig` as :func:`load_summary` does."""
    validate(data, lines)
    ranges = {key: (float(low), float(high)) for key, (low, high) in data["ranges"].items()}
    channels = {
        key: torch.tensor(pair, dtype=torch.float32)
        for key, pair in data.get("channels", {}).items()
    }
    plan = QuantPlan.from_dict({"sites": [renewed(site) for site in data["sites"]]})
    capture = data.get("capture")
    policy = None if capture is None else checked_capture(capture)
    return Summary(plan, ranges, channels, policy, lines)
