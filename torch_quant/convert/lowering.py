"""From a captured model and a plan to the quantized module."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType, ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from torch_quant.convert.ownership import Owner, SharedWeights, plain_tensors
from torch_quant.convert.quantization import Quantization
from torch_quant.convert.quantized import (
    QuantizedModule,
    add_graph,
    quantized_module,
)
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.convert.runtime import Runtime
from torch_quant.core.plan import QuantPlan
from torch_quant.core.rounded import Scaling
from torch_quant.graph.binding import signature_of
from torch_quant.graph.capture import CapturedModule, callable_children
from torch_quant.graph.executor import glue
from torch_quant.graph.export import CapturedGraph
from torch_quant.graph.hooks import give_hooks
from torch_quant.graph.kinds import Kind
from torch_quant.graph.twin import twin_of
from torch_quant.model import CapturedModel
from torch_quant.nn.stand_in import StandIn
from torch_quant.passes.base import Draft, Params, Pass, PassContext, copy_graph, run_passes
from torch_quant.passes.constants import settle_names
from torch_quant.passes.dynamic_sizes import dynamic_sizes
from torch_quant.passes.insert_qdq import insert_qdq
from torch_quant.passes.lower_precision import lower_precision
from torch_quant.passes.transform import transform_sites

__all__ = ["QUANTIZE", "Lowering", "holds_tensor"]

QUANTIZE: tuple[Pass, ...] = (lower_precision, transform_sites, insert_qdq)
"""From a canonical graph to one with quantize/dequantize pairs, whatever the backend."""


@dataclass(frozen=True)
class Lowering:
    """One ``quantize``: the same plan, ranges and backend for every module."""

    captured: CapturedModel
    plan: QuantPlan
    backend: Runtime
    params: Params
    scaled: Mapping[str, Scaling] = field(default_factory=dict)
    """Parameters of the model that are other ones in the quantized model."""
    held: Sequence[Tensor] = ()
    """Tensors of the quantizer that may be those of the quantized model, see :mod:`lending`."""
    live: ClassVar[bool] = False
    """Whether graphs read the float model's parameters, which are then kept."""
    declined: dict[str, str] = field(default_factory=dict)
    """Site -> why it runs in float in every graph that was lowered and has it."""
    kept: set[str] = field(default_factory=set)
    """Sites that some graph has as planned."""

    def run(self, *, share: bool = False) -> QuantizedModule:
        """The whole model, quantized; the float model is untouched.

        Args:
            share: let it compute with the large float weights of the float model itself.
        """
        self.captured.tell_unreached()
        shared = SharedWeights() if share else None
        quantized = _Build(self, self._owner(shared)).run()
        how = quantized.quantization
        how.shared = shared
        self.captured.declined[self.backend.name] = dict(self.declined)
        how.plan = self.captured.as_lowered(self.plan, self.backend.name)
        quantized.know_formats()
        return quantized

    def module(self, twin: nn.Module, how: Quantization) -> QuantizedModule:
        """One module of the quantized model; see :func:`quantized_module`."""
        return quantized_module(twin, how, QuantizedModule)

    def _owner(self, shared: SharedWeights | None) -> Owner:
        owner = Owner(self._theirs(), shared, self.held)
        parameters = dict(self.captured.root.module.named_parameters()) if self.scaled else {}
        for name, how in self.scaled.items():
            owner.put(parameters[name], how.apply(parameters[name].detach()))
        return owner

    def _theirs(self) -> dict[str, Tensor]:
        """The tensors of the float model, and those that capturing found in its code."""
        module = self.captured.root.module
        theirs = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, value in plain_tensors(module):
            theirs.setdefault(name, value)
        for number, prepared in enumerate(self.captured.graphs()):
            gm = prepared.canonical
            for node in gm.graph.find_nodes(op="get_attr"):
                value = operator.attrgetter(str(node.target))(gm)
                if isinstance(value, Tensor):
                    theirs.setdefault(f"{node.target} (a constant of graph {number})", value)
        return theirs

    def _graph(self, submodule: CapturedModule, kind: Kind, graph: CapturedGraph) -> QuantizedGraph:
        prepared = self.captured.prepared(submodule, graph)
        body, declined = self._lowered(prepared.canonical)
        self._note({site.name for site, _ in prepared.sites}, declined)
        compiler = self.backend if self.backend.compiles else None
        return QuantizedGraph(body, kind, graph.contract, graph.out_spec, compiler)

    def quantized_graph(
        self,
        submodule: CapturedModule,
        kind: Kind,
        graph: CapturedGraph,
        owner: Owner | None = None,
    ) -> QuantizedGraph:
        """One graph of a module by itself, which owns what it computes with.

        Args:
            module: the module.
            kind: of the calls that the graph serves.
            graph: of the module.
            owner: of the whole quantized model.
        """
        made = self._graph(submodule, kind, graph)
        (owner or self._owner(None)).take(made.modules())
        return made

    def computes_as_float(self, submodule: CapturedModule) -> bool:
        """Whether a piece computes as the float module does, so that this serves other calls.

        Where the code around it calls parts of it too, no part of it may have hooks or a state.
        """
        below = list(submodule.walk())[1:]
        if not submodule.path or not submodule.graphs or submodule.failure:
            return False
        if any(each.state or any(each.hooks.values()) for each in below):
            return False
        prepared = [
            self.captured.prepared(each, graph)
            for each in (submodule, *below)
            for _, graph in each.graphs
        ]
        sites = (self.plan[site.name] for each in prepared for site, _ in each.sites)
        return not any(site.quantized or site.precision != "float32" for site in sites)

    def _note(self, names: set[str], declined: Mapping[str, str]) -> None:
        self.kept.update(names - declined.keys())
        self.declined.update(declined)
        for name in self.kept & self.declined.keys():
            del self.declined[name]

    def graph(self, canonical: fx.GraphModule) -> fx.GraphModule:
        """One canonical graph, or a part of one, on the backend's kernels."""
        lowered, _ = self._lowered(canonical)
        return fx.GraphModule(lowered, lowered.graph)

    def _lowered(self, canonical: fx.GraphModule) -> tuple[Draft, Mapping[str, str]]:
        """A draft of the lowered graph, and its sites that run in float after all: why."""
        context = PassContext(copy_graph(canonical, Draft), self.plan, self.params, self.live)
        run_passes(context, (*QUANTIZE, *self.backend.kernels().passes))
        lowered = self.backend.lower(context)
        run_passes(PassContext(lowered), [dynamic_sizes])
        return settle_names(lowered), context.declined


class _Build:
    """The modules of one quantized model: each once, with the children that its twin has.

    Args:
        lowering: makes the graphs.
        owner: makes their tensors the quantized model's own.
    """

    def __init__(self, lowering: Lowering, owner: Owner) -> None:
        self.lowering, self.owner = lowering, owner
        submodules = list(lowering.captured.root.walk())
        computers = {code for each in submodules for code in each.computers}
        self.lookers = {code for each in submodules for code in each.lookers} - computers
        """Code that asks parameters for dtype, device and sizes alone."""
        self.lent = {_joined(each.path, name) for each in submodules for name in self.read(each)}
        """Paths of what the code around a piece has read from it."""
        self.parts: dict[int, QuantizedModule] = {}
        self.left: list[tuple[nn.Module, str, Tensor]] = []
        """Small tensors that the twins of the user's own classes have let go of."""

    def run(self) -> QuantizedModule:
        """The whole model."""
        quantized = self.submodule(self.lowering.captured.root)
        for twin, name, value in self.left:  # a method that no call has reached may read it
            if name not in twin._buffers and name not in twin._parameters:
                if isinstance(value, nn.Parameter):
                    twin._parameters[name] = value
                else:
                    twin._buffers[name] = value
        self.owner.take(quantized.modules())
        for module in quantized.modules():
            if isinstance(module, StandIn):
                self.owner.attributes(module._stands_for.attributes)
        return quantized

    def submodule(self, submodule: CapturedModule) -> QuantizedModule:
        """A module that was called, or whose parts were."""
        free = submodule.plain or self.lowering.computes_as_float(submodule)
        pieces = bool(submodule.failure)
        if free:
            twin = twin_of(submodule.module)
        elif submodule.opened:
            twin = glue(submodule, self.child if pieces else self.part)
        else:
            twin = self.whole(submodule.module, submodule.path)
        looked_at = {}
        if not (free or pieces or submodule.entered):
            looked_at = {
                name: (x.dtype, tuple(x.shape), x.requires_grad)
                for name in submodule.readers.keys() - self.read(submodule)
                if (x := twin._parameters.get(name)) is not None
            }
            self.strip(twin, submodule.path)
        how = Quantization(submodule.path, submodule.signature, self.lowering.backend.name)
        how.glue, how.in_pieces = twin if free or pieces else None, free or pieces
        how.state = submodule.state
        quantized = self.lowering.module(twin, how)
        give_hooks(quantized, submodule.hooks)
        for kind, graph in submodule.graphs:
            made = self.lowering.quantized_graph(submodule, kind, graph, self.owner)
            add_graph(quantized, made, submodule.module)
        how.looked_at = {
            name: facts for name, facts in looked_at.items() if name not in quantized._parameters
        }
        quantized.describe_weights()
        return quantized

    def read(self, submodule: CapturedModule) -> set[str]:
        """What the code around a module has read from it, or may have."""
        readers = submodule.readers.items()
        return submodule.borrowed | {x for x, codes in readers if not codes <= self.lookers}

    def child(self, submodule: CapturedModule) -> nn.Module:
        """A child of what runs as Python: in float if no call has reached it."""
        return self.submodule(submodule) if submodule.called else glue(submodule, self.child)

    def part(self, submodule: CapturedModule) -> nn.Module:
        """A child of what runs as one graph: captured when it is called by itself."""
        if submodule.called:
            return self.submodule(submodule)
        return self.uncalled(submodule.module, submodule.path)

    def whole(self, module: nn.Module, path: str) -> nn.Module:
        """A twin whose children are parts that were never called by themselves."""
        children = callable_children(module)
        return twin_of(module, {x: self.uncalled(x, _joined(path, name)) for name, x in children})

    def uncalled(self, module: nn.Module, path: str) -> QuantizedModule:
        """A part of a module that is one graph: it holds tensors, and nothing to run."""
        if id(module) not in self.parts:
            scripted = isinstance(module, torch.jit.ScriptModule)
            twin = nn.Module() if scripted else self.whole(module, path)
            self.strip(twin, path)
            how = Quantization(path, signature_of(module.forward), self.lowering.backend.name)
            self.parts[id(module)] = self.lowering.module(twin, how)
        return self.parts[id(module)]

    def strip(self, twin: nn.Module, path: str) -> None:
        """Let go of what a graph has in its place: tensors of ``twin`` and its containers."""
        if self.lowering.live:
            return
        mine = set(map(id, _own_modules(twin)))
        for name, child in twin._modules.items():
            if child is not None and id(child) in mine:
                self.strip(child, _joined(path, name))
        for entries in (twin._parameters, twin._buffers, vars(twin)):
            for name, value in list(entries.items()):
                kept = name in _TREE or _joined(path, name) in self.lent
                if not kept and holds_tensor(value, mine):
                    del entries[name]
                    if _is_small_and_the_users(twin, entries, value):
                        self.left.append((twin, name, value))


_SMALL = 2**14
"""Bytes up to which a tensor is kept that only a method of the user's may read."""
_TREE = ("_parameters", "_buffers", "_modules")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}".strip(".")


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The module and those below that nothing stands for."""
    yield module
    for child in module._modules.values():
        if child is not None and not isinstance(child, (StandIn, torch.jit.ScriptModule)):
            yield from _own_modules(child)


def _is_small_and_the_users(twin: nn.Module, entries: Any, value: Any) -> bool:
    held = entries is twin._parameters or entries is twin._buffers
    own = not type(twin).__module__.startswith("torch.nn.")
    return held and own and isinstance(value, Tensor) and value.nbytes < _SMALL


def holds_tensor(value: Any, twins: Container[int] = (), seen: set[int] | None = None) -> bool:
    """Whether a tensor, or a module of the float model, can be reached from an attribute.

    Args:
        value: the attribute.
        twins: ids of modules that are none of the float model's.
        seen: ids of what was looked at.
    """
    seen = set() if seen is None else seen
    if isinstance(value, (StandIn, type, ModuleType)) or id(value) in seen or id(value) in twins:
        return False
    if isinstance(value, (Tensor, nn.Module)):
        return True
    seen.add(id(value))
    inner: Iterable[Any]
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        inner = value
    elif isinstance(value, MethodType):
        inner = (value.__self__,)
    else:
        inner = vars(value).values() if hasattr(value, "__dict__") else ()
    return any(holds_tensor(each, twins, seen) for each in list(inner))
