"""One lowered graph of a quantized model, the calls it serves, and the tensors it reads."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode

from torch_quant.convert.direct import Direct, direct, fixed_width
from torch_quant.convert.mounting import linked, links
from torch_quant.convert.reading import reading
from torch_quant.convert.runtime import Runtime
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import InvalidConfig
from torch_quant.graph.calls import Call
from torch_quant.graph.kinds import Kind
from torch_quant.graph.outputs import unflatten_output
from torch_quant.graph.serialize import pack, unpack
from torch_quant.graph.shapes import ShapeContract

__all__ = ["QuantizedGraph"]

_MOST_VARIANTS = 8
"""Values of numbers for which a compiled graph is kept."""
_VARIANTS = threading.Lock()
"""Held while such a dictionary is read or changed; a graph with a lock could not be copied."""


class QuantizedGraph(nn.Module):
    """One lowered graph, the calls it serves and the output it forms.

    Args:
        body: the graph; its tensors are those of the modules that it is mounted on.
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
        compiler: Runtime | None = None,
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
        contract.prepare()
        self.by_rows = False
        """Whether it is of a layer that computes the rows of a tensor of any rank."""
        self.mode: Hashable = None
        """Of a graph that trains: how its body differs from the one that is deployed."""
        self.modes: dict[Hashable, fx.GraphModule] = {}
        """The bodies of modes that it had; None stands for what is deployed."""
        self._direct: tuple[Any, Direct | None] | None = None
        """For which body and signature, and the shortest way to it."""
        self._reading: tuple[Any, Any, Callable[..., Any]] | None = None
        """For which body and code, and the body as a function of its tensors."""
        self._width: tuple[Any, list[int] | None] | None = None
        """For which body, and the last size that it takes of tensors of any rank."""

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any) -> None:
        """Refused: what a ``state_dict`` has to agree with is known of whole modules."""
        if state_dict:
            raise InvalidConfig(
                "a graph takes no state_dict: quant_model.load_state_dict(...) of the model"
            )

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {
            "compiled": None,
            "variants": {},
            "_direct": None,
            "_reading": None,
            "_width": None,
            "modes": {},
            "mode": None,
        }
        state, modules = self.__dict__ | fresh, dict(self._modules)
        del modules["body"]
        body = self.modes.get(None, self.body)
        state["packed"], state["_modules"] = pack(body), modules
        state["links"] = links(body)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        body = linked(unpack(state.pop("packed")), state.pop("links"))
        super().__setstate__(state)
        self.body = body
        self.contract.prepare()

    def direct(self, signature: Any) -> Direct | None:
        """The shortest way for calls with one tensor, None if there is none, or hooks are to run.

        Args:
            signature: of the module.
        """
        if self._forward_pre_hooks or self._forward_hooks:
            return None
        body = self._modules["body"]
        known = self._direct
        if known is None or known[0] is not body:
            made = None
            if isinstance(body, fx.GraphModule):
                facts = self.kind, self.contract, self.out_spec, signature
                other = None if self.compiler is None else _weak(self)
                made = direct(body, *facts, width=self._fixed_width(), function=other)
            known = self._direct = (body, made)
        return known[1]

    def accept(self, call: Call) -> Call | None:
        """``call`` as the graph takes it, or None if it does not serve it."""
        accepted = self.kind.accept(call)
        if accepted is not None:
            return accepted if self._sizes(accepted) is None else None
        accepted = self._of_another_rank(call)
        return None if accepted is None or self._last_size(accepted) else accepted

    def _fixed_width(self) -> list[int] | None:
        """The last size of tensors of any rank, empty if it is free; None if their rank counts."""
        body = self._modules["body"]
        if not self.by_rows or self.compiler is not None or not isinstance(body, fx.GraphModule):
            return None
        known = self._width
        if known is None or known[0] is not body:
            known = self._width = body, fixed_width(body, self.kind, self.contract)
        return known[1]

    def _of_another_rank(self, call: Call) -> Call | None:
        """``call`` if only its rank is another, and the graph computes each row by itself."""
        width = self._fixed_width()
        if width is None or len(call.positions) != 1:
            return None
        rank = len(call.facts[1][0])
        kind = replace(self.kind, leaves=((self.kind.leaves[0][0], rank),))
        return kind.accept(call) if rank >= len(width) else None

    def _last_size(self, call: Call) -> str | None:
        """Why it does not serve a call of another rank, or None."""
        (shape,) = call.facts[1]
        for size in self._fixed_width() or []:
            if shape[-1] != size:
                where = f"{call.names()[0]}.shape[{len(shape) - 1}]"
                return f"{where} is {shape[-1]}, but the graph was captured for {size}"
        return None

    def mismatch(self, call: Call) -> str | None:
        """Why it does not serve ``call``, or None."""
        accepted = self.kind.accept(call)
        if accepted is not None:
            return self._sizes(accepted)
        accepted = self._of_another_rank(call)
        return call.difference(self.kind) if accepted is None else self._last_size(accepted)

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
        compiler = self.compiler
        if compiler is None:
            return self._function()(*tensors)
        recorded = torch._C._get_tracing_state() is not None
        compiling = torch.compiler.is_compiling() and _is_compiled_here(tensors)
        if compiler.not_recorded and (recorded or compiling):
            if torch.compiler.is_dynamo_compiling():
                from torch_quant.convert.outside import outside

                return outside(self, tensors)
            raise InvalidConfig(f"{compiler!r}: {compiler.not_recorded}")
        if compiling:
            return self.body(*tensors)
        if recorded:
            return compiler.record(self.body, tensors)
        compiled = self.compiled
        if compiled is None or (compiler.fixes_numbers and self.kind.numbers):
            compiled = self.compiled = self._variant(compiler, tensors)
        return compiled(*tensors)

    def _function(self) -> Callable[..., Any]:
        """The body, or what computes the same without looking up each tensor by its path."""
        body: Any = self._modules["body"]
        recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if recorded or body._forward_hooks or body._forward_pre_hooks:
            return body  # type: ignore[no-any-return]
        known, code = self._reading, type(body).forward
        if known is None or known[0] is not body or known[1] is not code:
            made = reading(body) if isinstance(body, fx.GraphModule) else None
            known = self._reading = (body, code, made or body)
        return known[2]

    def _variant(self, compiler: Runtime, tensors: tuple[torch.Tensor, ...]) -> Callable[..., Any]:
        """What is compiled for the numbers among ``tensors``: a compiler takes them for fixed."""
        places = self.kind.numbers if compiler.fixes_numbers else ()
        numbers = tuple(repr(tensors[place].item()) for place in places)
        with _VARIANTS:
            found = self.variants.pop(numbers, None)
            if found is not None:
                self.variants[numbers] = found
                return found
        made = compiler.compile(self, tensors)
        with _VARIANTS:
            found = self.variants.setdefault(numbers, made)  # another thread may be first
            if len(self.variants) > _MOST_VARIANTS:
                del self.variants[next(iter(self.variants))]
        return found


def _weak(graph: QuantizedGraph) -> Callable[[torch.Tensor], Any]:
    """What runs a graph and does not keep it."""
    found = weakref.ref(graph)

    def function(x: torch.Tensor) -> Any:
        owner = found()
        assert owner is not None
        return owner._run(x)

    return function


def _is_compiled_here(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether this thread compiles or exports: of one that exports, PyTorch tells all others."""
    return torch.compiler.is_dynamo_compiling() or detect_fake_mode(tensors) is not None
