"""Ranges, histograms and grids of a quantized model, small enough for a page."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from torch_quant.comparing import Seen
from torch_quant.convert.codes import QuantizedWeight, weights_of
from torch_quant.convert.quantized import QuantizedModule, quantized_graphs
from torch_quant.core.element_type import ElementType
from torch_quant.core.elements import element_type
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import InvalidConfig
from torch_quant.graph.sites import KEY
from torch_quant.ops.qdq import FAKE_QUANTIZE
from torch_quant.state import QuantState
from torch_quant.statistics import HistogramObserver, Observer
from torch_quant.statistics._bins import BinnedObserver, Bins
from torch_quant.statistics.minmax import MinMaxObserver

__all__ = ["Grid", "Values", "activation", "grids_of", "histogram", "weights"]

BINS = 96
"""Of a histogram on the page, at most."""
_SAMPLE = 2**20
"""Codes of a weight that are counted, at most; of a larger one, every so many."""


@dataclass(frozen=True)
class Grid:
    """The values that a quantized activation can have.

    Args:
        key: of the tensor; behind a transform, of what that makes of it.
        source: of the tensor that calibration has recorded.
        element: its element type.
        scale: of one step, ``[]``, or one for each block.
        zero_point: the code of 0, likewise.
    """

    key: str
    source: str
    element: ElementType
    scale: Tensor
    zero_point: Tensor

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value, of any block."""
        scale, zero = self.scale.double(), self.zero_point.double()
        ends = ((end - zero) * scale for end in (self.element.quant_min, self.element.quant_max))
        low, high = (torch.stack([each.min(), each.max()]) for each in ends)
        return float(torch.minimum(low, high).min()), float(torch.maximum(low, high).max())

    def to_dict(self) -> dict[str, Any]:
        """As the page has it; ``values`` are in steps, of elements that are no integers."""
        one = self.scale.numel() == 1
        low, high = self.ends
        integer = self.element.integer
        return {
            "element": self.element.name,
            "levels": len(self.element.values),
            "low": low,
            "high": high,
            "scale": float(self.scale) if one else None,
            "scales": self.scale.numel(),
            "zero_point": float(self.zero_point) if one else None,
            "values": None
            if integer or len(self.element.values) > 256
            else [round(float(x), 6) for x in self.element.values],
        }


def grids_of(simulated: QuantizedModule, plan: QuantPlan) -> dict[str, list[Grid]]:
    """Site -> the grids of the activations that it reads, in its order.

    Args:
        simulated: the model with rounding in float arithmetic.
        plan: its plan.
    """
    found: dict[str, dict[str, Grid]] = {}
    for _, graph in quantized_graphs(simulated):
        for node in graph.body.graph.nodes:
            if node.op != "call_function" or node.target is not FAKE_QUANTIZE:
                continue
            x, scale, zero, element = node.args
            if scale.op != "get_attr" or zero.op != "get_attr" or KEY not in x.meta:
                continue  # chosen at each call, or a weight
            key = str(x.meta[KEY])
            scale, zero = (operator.attrgetter(str(n.target))(graph.body) for n in (scale, zero))
            for site in _readers(node, plan):
                wanted = plan[site].inputs
                source = _source(key, wanted)
                if source is not None:
                    grid = Grid(key, source, element_type(element), scale.detach(), zero.detach())
                    found.setdefault(site, {}).setdefault(source, grid)
    return {
        site: [each[key] for key in dict.fromkeys(plan[site].inputs) if key in each]
        for site, each in found.items()
    }


def _source(key: str, inputs: Iterable[str]) -> str | None:
    """Of the tensors that a site reads, the one that ``key`` is, or is made of."""
    known = set(inputs)
    while key not in known and key.endswith("]"):
        key = key.rpartition("[")[0]
    return key if key in known else None


def _readers(node: fx.Node, plan: QuantPlan) -> Iterator[str]:
    """The sites that compute with a tensor, behind what only moves it."""
    nodes, seen = [node], {node}
    while nodes:
        for user in nodes.pop().users:
            if (name := str(user.meta.get(KEY))) in plan:
                yield name
            elif user not in seen and user.target is not FAKE_QUANTIZE:
                seen.add(user)
                nodes.append(user)


def histogram(bins: Bins) -> dict[str, Any] | None:
    """A histogram of one block in at most :data:`BINS` bins, without empty ends.

    >>> observer = HistogramObserver()
    >>> observer.observe(torch.linspace(0.0, 1.0, 1000))
    >>> found = histogram(observer.bins)
    >>> len(found["counts"]) <= BINS, sum(found["counts"]), found["low"]
    (True, 1000, 0.0)
    """
    if len(bins.counts) != 1 or not bool(bins.counts.any()):
        return None
    filled = bins.counts[0].nonzero().flatten()
    first, last = int(filled[0]), int(filled[-1]) + 1
    width = -(-(last - first) // BINS)
    counts = bins.counts[0, first:last]
    counts = torch.nn.functional.pad(counts, (0, -len(counts) % width))
    step = float(bins.width[0])
    return {
        "low": (int(bins.first[0]) + first) * step,
        "width": width * step,
        "counts": counts.view(-1, width).sum(dim=1).tolist(),
    }


class Values:
    """Counts the values that quantized activations have, while a model runs on some batches.

    Args:
        grids: which activations.
    """

    def __init__(self, grids: Mapping[str, list[Grid]]) -> None:
        self.observers = {each.key: HistogramObserver() for of in grids.values() for each in of}

    def watch(self, seen: Seen) -> None:
        """Count a batch."""
        for key, observer in self.observers.items():
            for x in seen.get(key, ()):
                finite = x[torch.isfinite(x)] if not bool(torch.isfinite(x).all()) else x
                if finite.numel():
                    observer.observe(finite)


def activation(grid: Grid, state: QuantState, values: Values | None) -> dict[str, Any]:
    """What is known of an activation: its grid, what calibration saw, and how it is distributed.

    Args:
        grid: its grid.
        state: what calibration has recorded.
        values: counts of some batches; None if there are none.
    """
    recorded = state.find(grid.source)
    found: dict[str, Any] = {
        "tensor": grid.source.removeprefix(":"),
        "behind": grid.key[len(grid.source) :],
        "observer": recorded.name if isinstance(recorded, Observer) else None,
        "seen": None,
        "grid": grid.to_dict(),
        "histogram": None,
        "counted": "",
    }
    if isinstance(recorded, MinMaxObserver):
        found["seen"] = [float(recorded.min_val.min()), float(recorded.max_val.max())]
    if isinstance(recorded, BinnedObserver) and grid.key == grid.source:
        found["histogram"], found["counted"] = histogram(recorded.bins), "calibration"
    counted = values.observers.get(grid.key) if values is not None else None
    if found["histogram"] is None and counted is not None and counted.batches:
        found["histogram"], found["counted"] = histogram(counted.bins), "batches"
    found["clipped"] = _clipped(found["histogram"], grid)
    return found


def _clipped(counts: Mapping[str, Any] | None, grid: Grid) -> float | None:
    """The share of values in bins that lie beyond the grid; None where nothing was counted."""
    if counts is None:
        return None
    low, high = grid.ends
    edge = torch.arange(len(counts["counts"]), dtype=torch.float64) * counts["width"]
    edge = edge + counts["low"]
    number = torch.tensor(counts["counts"], dtype=torch.float64)
    beyond = (edge + counts["width"] < low) | (edge > high)
    return float(number[beyond].sum() / number.sum())


def weights(simulated: QuantizedModule, plan: QuantPlan) -> tuple[dict[str, Any], str]:
    """Site -> what its weight became; and why there are none, else an empty string.

    Args:
        simulated: as for :func:`grids_of`.
        plan: its plan.
    """
    try:
        found = weights_of(simulated, plan)
    except InvalidConfig as error:
        return {}, str(error)
    by_module = {module: _weight(each) for module, each in found.items()}
    sites = {
        name: by_module.get(name) or by_module.get(name.partition("@")[0])
        for name, site in plan.items()
        if site.quantized and site.weight is not None
    }
    return {name: each for name, each in sites.items() if each is not None}, ""


def _weight(found: QuantizedWeight) -> dict[str, Any]:
    element = found.spec.element
    flat = found.codes.flatten()
    flat = flat[:: -(-flat.numel() // _SAMPLE)]
    values = element.values
    if element.integer:
        places = flat.to(torch.int64) - int(element.quant_min)
    else:
        places = torch.bucketize(element.decode(flat), values)
    counts = torch.bincount(places.clamp(0, len(values) - 1), minlength=len(values))
    least = -(-len(values) // BINS)
    group = next((n for n in range(least, 2 * least) if len(values) % n == 0), least)
    shown = torch.nn.functional.pad(counts, (0, -len(counts) % group)).view(-1, group).sum(dim=1)
    scale = found.scale.abs().float().flatten()
    marks = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    scale = scale[:: -(-scale.numel() // _SAMPLE)]
    return {
        "format": str(found.spec),
        "shape": list(found.codes.shape),
        "levels": len(values),
        "used": int((counts > 0).sum()),
        "ends": float((counts[0] + counts[-1]) / counts.sum()),
        "scales": found.scale.numel(),
        "scale": scale.quantile(marks).tolist(),
        "codes": {
            "low": float(values[0]),
            "high": float(values[-1]),
            "group": group,
            "counts": shown.tolist(),
        },
    }
