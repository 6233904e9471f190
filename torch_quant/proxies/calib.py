"""The proxy that records the range of every tensor a site reads or writes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from torch_quant.errors import QuantError
from torch_quant.graph.calls import Call
from torch_quant.graph.capture import CapturedModule, Reopened
from torch_quant.graph.effects import assign
from torch_quant.graph.executor import Executor
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.running import copied as on_copies
from torch_quant.passes.prepare import Prepared, insert_observers
from torch_quant.proxies.agreement import comparable, disagrees, kind_of, raises, settle
from torch_quant.proxies.base import Proxy, check_not_empty
from torch_quant.proxies.sample import Sample
from torch_quant.proxies.values import copied

__all__ = ["CalibModel"]


logger = logging.getLogger("torch_quant")


class _Differs(Exception):
    """What ran gave another result than the float module; nothing of it is kept."""


class CalibModel(Proxy):
    """The proxy that :meth:`Quantizer.calib` makes. Not to be made by hand.

    Args:
        session: the quantizer, which takes the ranges, and the model.
    """

    def _reset(self) -> None:
        super()._reset()
        self._graphs: dict[int, Callable[..., Any]] = {}
        self._keys: dict[int, frozenset[str]] = {}
        self._compared: set[Any] = set()
        self._sample: Sample | None = None
        self._settings = self.session.settings.values()

    def _follow(self) -> None:
        """Changed settings may want other things recorded of the batches that come."""
        super()._follow()
        settings = self.session.settings.values()
        if settings != self._settings:
            self._graphs.clear()
            self._keys.clear()
            self._settings = settings

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the float model and records its ranges; same inputs and outputs as the model."""
        with self.session.state.lock:
            self._follow()
            return self._recorded(self._executor, args, kwargs)

    def _part(self, executor: Executor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A batch of its own: an encoder that ``generate()`` calls, say."""
        with self.session.state.lock:
            version = self._version
            self._follow()
            if self._version != version:  # all executors are new
                executor = self._executor_of(executor.submodule)
            if self.captured.root.by_choice:  # one layer of many: each alone is no batch
                outputs = self._execute(executor, args, kwargs)
                state = self.session.state
                state.version, state.batches = state.version + 1, max(state.batches, 1)
                self.session.seen()
                return outputs
            return self._recorded(executor, args, kwargs)

    def _recorded(self, executor: Executor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_not_empty((args, kwargs), self.session.state.batches)
        kind = executor.submodule.path, kind_of(args, kwargs)
        self._sample = None
        if kind in self._compared:
            with self.session.state.batch():
                outputs = self._execute(executor, args, kwargs)
        else:
            outputs = self._first_of_its_kind(executor, args, kwargs)
            self._compared.add(kind)
        self.session.seen()
        if not executor.submodule.path:
            self.captured.sample, self._sample = self._sample, None
        return outputs

    def _first_of_its_kind(
        self, executor: Executor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs it, compared with the float module if Python code over pieces takes part in it."""
        submodule = executor.submodule
        kept, mine = copied((args, kwargs)), (args, kwargs)
        random, steady = torch.get_rng_state(), True
        while True:
            try:
                with self.session.state.batch():
                    outputs = self._execute(executor, *mine, new=True)
                    pieces = steady and _in_pieces(submodule)
                    if pieces and disagrees(submodule, copied(kept), outputs, random):
                        raise _Differs
                if mine[0] is not args:
                    assign((args, kwargs), mine)  # what the model does to its arguments
                return outputs
            except Reopened:
                logger.debug("called again, in smaller pieces")
            except _Differs:
                steady = settle(submodule, kept, random)
            except QuantError:
                raise
            except Exception:  # the code between pieces raises; so may the model
                if submodule.plain or not comparable(submodule) or raises(submodule, copied(kept)):
                    raise
                if not settle(submodule, kept, random):
                    raise
            self._reset()
            torch.set_rng_state(random)
            executor = self._executor if not submodule.path else self._executor_of(submodule)
            mine = copied(kept)

    def _run(self, submodule: CapturedModule, graph: CapturedGraph, call: Call) -> Any:
        if id(graph) not in self._graphs:
            self._graphs[id(graph)] = self._observed(
                graph, self.captured.prepared(submodule, graph)
            )
        # Where the module itself follows, it must find its inputs as they were.
        tensors = call.tensors if graph.exact else on_copies(call).tensors
        sample = None if submodule.path else Sample.of(graph, call)
        outputs = self._graphs[id(graph)](*tensors)
        if sample is not None and sample.fits(outputs):
            self._sample = sample
        if graph.exact:
            return graph.output(outputs, call)
        args, kwargs = call.source
        return submodule.module(*args, **kwargs)

    def _observed(self, graph: CapturedGraph, prepared: Prepared) -> Callable[..., Any]:
        """The graph of a module with a probe behind every tensor that something is wanted of."""
        if id(graph) not in self._keys:
            # Its sites may want more of a tensor that others give, too.
            keys = self._keys[id(graph)] = frozenset(prepared.observed)
            for other in [each for each in self._graphs if self._keys[each] & keys]:
                del self._graphs[other]
        wanted, state = self.session.wanted(prepared.observed), self.session.state
        return insert_observers(
            prepared,
            lambda key: partial(state.observe, key, wanted[key]) if wanted[key] else None,
        )


def _in_pieces(submodule: CapturedModule) -> bool:
    """Whether Python code over pieces, which may give something else, can be compared."""
    return (
        bool(submodule.failure)
        and not (submodule.plain or submodule.by_choice)
        and comparable(submodule)
    )
