"""The module that ``quantize`` returns: lowered graphs, and Python glue where needed."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import fx, nn

from torch_quant.backends.base import Backend
from torch_quant.backends.ownership import SharedWeights
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import CaptureFailed, InvalidConfig
from torch_quant.graph.binding import bind
from torch_quant.graph.calls import Call, flatten_call
from torch_quant.graph.kinds import Kind
from torch_quant.graph.outputs import unflatten_output
from torch_quant.graph.running import CAPTURING, no_fastpath
from torch_quant.graph.serialize import pack, unpack
from torch_quant.graph.shapes import ShapeContract
from torch_quant.nn.forward import SignedForward

__all__ = ["Absent", "QuantizedGraph", "QuantizedRegion"]


_MOST_VARIANTS = 8
"""Values of numbers for which a compiled graph is kept."""
_VARIANTS = threading.Lock()
"""Held while such a dictionary is read or changed; a graph with a lock could not be copied."""


def _refuse_loading() -> NoReturn:
    raise InvalidConfig(
        "a quantized model cannot load a state_dict, since scales are part of its graph; "
        "pickle the model, export it, or save the Quantizer's state_dict and quantize again"
    )


class _NeverLoads(nn.Module):
    """Refuses a ``state_dict`` at every entry: the scales of the activations are in the graphs."""

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the scales of the activations are part of the graphs."""
        _refuse_loading()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """What ``load_state_dict`` of a module around it calls; refused if there is a value."""
        if any(key.startswith(prefix) for key in state_dict):
            _refuse_loading()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Absent(nn.Module):
    """In the place of a module that is part of a larger graph and was never called by itself.

    Args:
        path: the module's.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refused."""
        raise CaptureFailed(
            f"{self.path} was never called by itself while calibrating; run quantizer.calib(model) "
            "on inputs that do so too, then quantize again"
        )


class QuantizedGraph(_NeverLoads):
    """One lowered graph, the calls it serves and the output it forms.

    Args:
        body: the graph.
        kind: of the calls it serves.
        contract: the sizes it serves.
        out_spec: how its outputs nest.
        compiler: the backend, if its kernels come from a compiler.
    """

    def __init__(
        self,
        body: fx.GraphModule,
        kind: Kind,
        contract: ShapeContract,
        out_spec: Any,
        compiler: Backend | None = None,
    ) -> None:
        super().__init__()
        self.body: fx.GraphModule = body
        self.compiler = compiler
        self.compiled: Callable[..., Any] | None = None
        self.variants: dict[tuple[Any, ...], Callable[..., Any]] = {}
        """The numbers that a call gives -> what was compiled for them, last used last."""
        self.plan = QuantPlan()
        """Its sites, if it was captured after the model was quantized."""
        self.kind, self.contract, self.out_spec = kind, contract, out_spec

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"compiled": None, "variants": {}}
        modules = dict(self._modules)
        del modules["body"]
        state["packed"], state["_modules"] = pack(self.body), modules
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        body = unpack(state.pop("packed"))
        super().__setstate__(state)
        self.body = body

    def accept(self, call: Call) -> Call | None:
        """``call`` as the graph takes it, or None if it does not serve it."""
        accepted = self.kind.accept(call)
        return accepted if accepted is not None and self._sizes(accepted) is None else None

    def mismatch(self, call: Call) -> str | None:
        """Why it does not serve ``call``, or None."""
        accepted = self.kind.accept(call)
        if accepted is None:
            return call.difference(self.kind)
        return self._sizes(accepted)

    def _sizes(self, call: Call) -> str | None:
        """Which size of an accepted call it does not serve, or None."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return None  # sizes are symbols there
        return self.contract.mismatch(call)

    def forward(self, *tensors: torch.Tensor, source: Any = None) -> Any:
        """The module's output.

        Args:
            tensors: those of the call.
            source: its ``(args, kwargs)``, if arguments that the module changes are to be changed.
        """
        return unflatten_output(self._run(*tensors), self.out_spec, source)

    def _run(self, *tensors: torch.Tensor) -> Any:
        if self.compiler is None or torch.compiler.is_compiling():
            return self.body(*tensors)
        if torch._C._get_tracing_state() is not None:
            return self.compiler.record(self.body, tensors)
        compiled = self.compiled
        if compiled is None or self.kind.numbers:
            compiled = self.compiled = self._variant(self.compiler, tensors)
        return compiled(*tensors)

    def _variant(self, compiler: Backend, tensors: tuple[torch.Tensor, ...]) -> Callable[..., Any]:
        """What is compiled for the numbers among ``tensors``: a compiler takes them for fixed."""
        numbers = tuple(repr(tensors[place].item()) for place in self.kind.numbers)
        with _VARIANTS:
            found = self.variants.pop(numbers, None)
            if found is not None:
                self.variants[numbers] = found
                return found
        made = compiler.compile(self.body, tensors)
        with _VARIANTS:
            found = self.variants.setdefault(numbers, made)  # another thread may be first
            if len(self.variants) > _MOST_VARIANTS:
                del self.variants[next(iter(self.variants))]
        return found


class Unseen(Protocol):
    """Makes graphs for calls that a region has none for."""

    def graph(self, path: str, call: Call, served: Sequence[Kind]) -> QuantizedGraph:
        """Raises :class:`CaptureFailed`, saying why, where it cannot."""


class QuantizedRegion(_NeverLoads):
    """A region of the model on its backend; called like the float module.

    Args:
        path: its path in the model.
        signature: the float module's signature.
        graphs: its lowered graphs.
        glue: for a region captured in pieces, its Python code over quantized children.
    """

    def __init__(
        self,
        path: str,
        signature: inspect.Signature,
        graphs: list[QuantizedGraph],
        glue: nn.Module | None,
    ) -> None:
        super().__init__()
        self.path, self.signature = path, signature
        self.graphs = nn.ModuleList(graphs)
        self.glue = glue
        self.description = ""
        self.backend = ""
        self.in_pieces = glue is not None
        """Whether its Python code serves every call that no graph does."""
        self.shared: SharedWeights | None = None
        self.unseen: Unseen | None = None
        self._plan = QuantPlan()
        self.calibration: dict[str, Any] = {}
        self.forward = SignedForward(self.run, signature)
        self.eval()

    @property
    def plan(self) -> QuantPlan:
        """What runs how; sites of graphs that were captured since are the last."""
        graphs = [module for module in self.modules() if isinstance(module, QuantizedGraph)]
        return self._plan.joined(graph.plan for graph in graphs)

    @plan.setter
    def plan(self, plan: QuantPlan) -> None:
        self._plan = plan

    def train(self, mode: bool = True) -> QuantizedRegion:
        """Stays in eval mode, as it was captured."""
        return super().train(False)

    def __getattr__(self, name: str) -> Any:
        """In pieces: what the float module's own code has (a method, the state it keeps)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            rest = self.__dict__.get("_modules", {}).get("glue")
            if rest is None or name.startswith("__"):
                raise
            return getattr(rest, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._container())

    def __getitem__(self, index: Any) -> Any:
        return self._container()[index]

    def __len__(self) -> int:
        return len(self._container())

    def __bool__(self) -> bool:
        return True

    def _container(self) -> Any:
        """Glue that calls the layers of a sequence one by one."""
        if self.glue is None:
            raise TypeError(f"{self.path or 'the quantized model'} is one graph, not a sequence")
        return self.glue

    def extra_repr(self) -> str:
        return self.description

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What ``forward`` does."""
        if self.shared and not torch.compiler.is_compiling():
            self.shared.check()
        args, kwargs = bind(self.signature, args, kwargs)
        if self.glue is not None and not len(self.graphs):
            return self._run_glue(args, kwargs)
        try:
            call = flatten_call(args, kwargs)
        except CaptureFailed:
            if self.glue is None:
                raise
            return self._run_glue(args, kwargs)
        found = self._find(call)
        if found is None and self.in_pieces:
            return self._run_glue(args, kwargs)
        graph, accepted = found or self._capture(call)
        return graph(*accepted.tensors, source=accepted.source)

    def _find(self, call: Call) -> tuple[QuantizedGraph, Call] | None:
        """The graph that serves ``call``, and the call as it takes it."""
        for graph in tuple(self.graphs):  # another thread may add one
            accepted = graph.accept(call)  # type: ignore[operator]
            if accepted is not None:
                return graph, accepted  # type: ignore[return-value]
        return None

    def _capture(self, call: Call) -> tuple[QuantizedGraph, Call]:
        """A new graph for ``call``; raises :class:`CaptureFailed` where there can be none."""
        recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if self.unseen is None:
            reason = ""
        elif recorded:
            reason = ". It cannot be captured while the model is traced: call it so before"
        else:
            with CAPTURING:
                try:
                    if self._find(call) is None:
                        made = self.unseen.graph(self.path, call, [g.kind for g in self._served()])
                        if made.accept(call) is not None:
                            self.graphs.append(made)
                    if found := self._find(call):
                        return found
                    reason = ""
                except CaptureFailed as error:
                    reason = f". It cannot be captured now: {error}"
        raise CaptureFailed(
            f"{self.path or 'the model'} was quantized for other inputs: got "
            f"{', '.join(call.describe())}; {self._difference(call)}{reason}. Run "
            "quantizer.calib(model) on such inputs too, then quantize again"
        )

    def _served(self) -> list[QuantizedGraph]:
        return [graph for graph in self.graphs if isinstance(graph, QuantizedGraph)]

    def _difference(self, call: Call) -> str:
        """What keeps ``call`` from the graph that comes nearest."""
        inputs = set(call.paths())
        nearest = min(
            self._served(),
            key=lambda g: (call.distance(g.kind), len(inputs.symmetric_difference(g.kind.names))),
        )
        return str(nearest.mismatch(call))

    def _run_glue(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.glue is not None
        with no_fastpath():
            return self.glue(*args, **kwargs)
