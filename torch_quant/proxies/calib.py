"""The proxy that records the range of every tensor a site reads or writes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from torch_quant.errors import QuantError
from torch_quant.graph.calls import Call
from torch_quant.graph.capture import Region, Reopened
from torch_quant.graph.effects import assign
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.running import copied as on_copies
from torch_quant.model import CapturedModel
from torch_quant.observers import Observer
from torch_quant.passes.prepare import insert_observers
from torch_quant.proxies.agreement import comparable, disagrees, kind_of, raises, settle
from torch_quant.proxies.base import Proxy, check_not_empty
from torch_quant.proxies.values import copied
from torch_quant.state import QuantState

__all__ = ["CalibModel"]


logger = logging.getLogger("torch_quant")


class _Differs(Exception):
    """What ran gave another result than the float module; nothing of it is kept."""


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
        self._compared: set[Any] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the float model and records its ranges; same inputs and outputs as the model."""
        with self._state.lock:
            check_not_empty((args, kwargs), self._state.batches)
            self._follow()
            kind = kind_of(args, kwargs)
            if kind in self._compared:
                with self._state.batch():
                    outputs = self._executor(*args, **kwargs)
            else:
                outputs = self._first_of_its_kind(args, kwargs)
                self._compared.add(kind)
            self._seen()
            return outputs

    def _first_of_its_kind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs it, compared with the float module if Python code over pieces takes part in it."""
        region = self._captured.region
        kept, mine = copied((args, kwargs)), (args, kwargs)
        while True:
            try:
                with self._state.batch():
                    outputs = self._executor(*mine[0], **mine[1])
                    in_pieces = region.failure and not region.plain and comparable(region)
                    if in_pieces and disagrees(region, copied(kept), outputs):
                        raise _Differs
                if mine[0] is not args:
                    assign((args, kwargs), mine)  # what the model does to its arguments
                return outputs
            except Reopened:
                logger.debug("called again, in smaller pieces")
            except _Differs:
                settle(region, kept)
            except QuantError:
                raise
            except Exception:  # the code between pieces raises; so may the model
                if region.plain or not comparable(region) or raises(region, copied(kept)):
                    raise
                settle(region, kept)
            self._reset()
            mine = copied(kept)

    def _run(self, region: Region, graph: CapturedGraph, call: Call) -> Any:
        if id(graph) not in self._graphs:
            prepared = self._captured.prepared(region, graph)
            self._names.clear()  # its sites may want more of a tensor
            self._graphs[id(graph)] = insert_observers(prepared, self._observe)
        # Where the module itself follows, it must find its inputs as they were.
        tensors = call.tensors if graph.exact else on_copies(call).tensors
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
