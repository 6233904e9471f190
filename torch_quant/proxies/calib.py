"""The proxy that records the range of every tensor a site reads or writes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from torch_quant.graph.calls import Call
from torch_quant.graph.capture import Region
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.running import copied
from torch_quant.model import CapturedModel
from torch_quant.observers import Observer
from torch_quant.passes.prepare import insert_observers
from torch_quant.proxies.base import Proxy, check_not_empty
from torch_quant.state import QuantState

__all__ = ["CalibModel"]


class CalibModel(Proxy):
    """The proxy that :meth:`Quantizer.calib` makes. Not to be made by hand.

    Args:
        captured: the model's regions and graphs.
        model: the float model.
        state: takes the ranges.
        statistics: the names that a tensor's key is recorded under.
        make: makes the observer of a new name.
        seen: called after every batch that was recorded.
    """

    def __init__(
        self,
        captured: CapturedModel,
        model: nn.Module,
        state: QuantState,
        statistics: Callable[[str], tuple[str, ...]],
        make: Callable[[str], Observer],
        seen: Callable[[], None],
    ) -> None:
        self._state, self._make, self._seen = state, make, seen
        self._statistics = statistics
        super().__init__(captured, model)

    def _reset(self) -> None:
        super()._reset()
        self._graphs: dict[int, Callable[..., Any]] = {}
        self._names: dict[str, tuple[str, ...]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the float model and records its ranges; same inputs and outputs as the model."""
        check_not_empty((args, kwargs), self._state.batches)
        self._follow()
        with self._state.batch():
            outputs = self._executor(*args, **kwargs)
        self._seen()
        return outputs

    def _run(self, region: Region, graph: CapturedGraph, call: Call) -> Any:
        if id(graph) not in self._graphs:
            prepared = self._captured.prepared(region, graph)
            self._names.clear()  # its sites may want more of a tensor
            self._graphs[id(graph)] = insert_observers(prepared, self._observe)
        # Where the module itself follows, it must find its inputs as they were.
        tensors = call.tensors if graph.exact else copied(call).tensors
        outputs = self._graphs[id(graph)](*tensors)
        if graph.exact:
            return graph.output(outputs, call)
        args, kwargs = call.source
        return region.module(*args, **kwargs)

    def _observe(self, key: str, x: Tensor) -> None:
        if key not in self._names:
            self._names[key] = self._statistics(key)
        for name in self._names[key]:
            self._state.observe(name, x, partial(self._make, name))
