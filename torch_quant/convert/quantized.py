"""What ``quantize`` returns: a twin of the user's module, which runs graphs on a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from torch_quant.convert.formats import Formats
from torch_quant.convert.joint import Begun, first_call, note
from torch_quant.convert.mounting import mount
from torch_quant.convert.quantization import Quantization
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.convert.remembered import Key, key_of
from torch_quant.convert.unserved import unserved
from torch_quant.core.lending import move_lenders
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import CaptureFailed, InvalidConfig
from torch_quant.graph.binding import bind
from torch_quant.graph.calls import Call, flatten_call
from torch_quant.graph.leaves import LEAVES
from torch_quant.graph.running import CAPTURING, no_fastpath
from torch_quant.nn.at_least_one import AtLeastOne
from torch_quant.nn.described import Described
from torch_quant.nn.forward import SignedForward
from torch_quant.nn.stand_in import StandIn, class_of, made

__all__ = [
    "QuantizedModule",
    "add_graph",
    "check_finished",
    "plan_of",
    "quantized_graphs",
    "quantized_module",
    "run",
]

_WITH_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""Modules that compute by one opaque operator unless that is switched off."""
_FACTS = ("graphs", "glue", "path", "signature", "backend", "description", "calibration")


def quantized_graphs(model: nn.Module) -> Iterator[tuple[QuantizedModule, QuantizedGraph]]:
    """Every graph of a quantized model, with the module that it computes."""
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            yield from ((module, graph) for graph in module.quantization.graphs)


class QuantizedModule(StandIn):
    """A module on its backend, called like the float module, and of its class to ``isinstance``.

    It has the float module's attributes and methods. Where it holds integers, those have the names
    of the float weights. What quantization knows of it is in ``quantization``; its ``plan``,
    ``graphs`` and ``backend`` can be asked of the module itself, unless the float module has
    attributes of these names.

    """

    quantization: Quantization
    plan: QuantPlan
    graphs: list[QuantizedGraph]
    _unfinished: ClassVar[str] = ""
    """Why it is not to be saved or exported, and what to do."""
    _runs: ClassVar[Callable[..., Any] | None] = None
    """Called in the place of :func:`run`."""

    def _graph_was_added(self) -> None:
        """What a subclass does about a new graph."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            how: Quantization | None = self.__dict__.get("quantization")
            if how is None or name not in ("plan", *_FACTS):
                raise
        return plan_of(self) if name == "plan" else getattr(how, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _begin(self)

    def know_formats(self) -> None:
        """Let the modules of this whole model know what a ``state_dict`` has to agree with."""
        root = self.quantization
        of_sites, lower = Formats.of_sites(root.plan), Formats.of_lower(root.plan)
        formats = Formats(root.backend, of_sites, lower=lower)
        for module, graph in quantized_graphs(self):
            formats.note(module.quantization.path, graph.body)
            if graph.compiler is not None:
                formats.refusal = f"{root.backend} compiles its kernels with the weights"
        if root.shared:
            formats.refusal = "it shares weights with the float model, which would be changed"
        for part in self.modules():
            if isinstance(part, QuantizedModule):
                part.quantization.formats = formats

    def describe_weights(self) -> None:
        """Show dtype, device and sizes of weights that are integers to code that asks for them."""
        how = self.quantization
        tensors = (*self.buffers(), *self.parameters()) if how.looked_at else ()
        for name, (dtype, shape, trains) in how.looked_at.items():
            where = f"{how.path}.{name}".strip(".")
            self.__dict__[name] = Described(shape, dtype, tensors[0].device, where, trains)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        """What ``to`` and its kin do; raises :class:`InvalidConfig` for another dtype."""
        self._check_dtype(fn)
        nn.Module._apply(self, fn, recurse)
        for name, (dtype, shape, trains) in self.quantization.looked_at.items():
            old: Described = self.__dict__[name]
            new = fn(torch.empty(0, dtype=dtype, device=old.device))
            self.quantization.looked_at[name] = new.dtype, shape, trains
            self.__dict__[name] = Described(shape, new.dtype, new.device, old.weight_path, trains)
        return self

    def _check_dtype(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Raise :class:`InvalidConfig` if ``fn`` gives floats of another dtype."""
        tensors = (*self.buffers(), *self.parameters())
        device = next((x.device for x in tensors), torch.device("cpu"))
        dtype = fn(torch.empty(0, device=device)).dtype
        if dtype != torch.float32:
            raise InvalidConfig(
                f"{self.quantization.path or 'the model'} is quantized, and its graphs and scales "
                f"are made for float32: it cannot become {dtype}. Leave it as it is and give it "
                "float32 inputs; for layers in bfloat16, quantizer.fallback(..., "
                "dtype=torch.bfloat16) before quantize()"
            )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        metadata, formats = getattr(destination, "_metadata", None), self.quantization.formats
        if metadata is not None and formats is not None:
            formats.describe(metadata[prefix[:-1]])

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of any module, from a quantized model with the same graphs.

        Args:
            state_dict: what ``state_dict()`` of that model returned.
            args: as for ``nn.Module``.
            kwargs: likewise.

        Raises:
            InvalidConfig: its formats are others, or not known; says where.
        """
        return nn.Module.load_state_dict(self, state_dict, *args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        """What ``load_state_dict`` of a module around it calls; checked if there is a value."""
        how = self.quantization
        given = {k.removeprefix(prefix): x for k, x in state_dict.items() if k.startswith(prefix)}
        if given:
            if how.formats is None:
                raise InvalidConfig(f"{how.path or 'the model'} is not made yet")
            where = how.path or "the quantized model"
            how.formats.check(local_metadata, where, given, self.state_dict)
            how.formats.loaded = True
            move_lenders(self)
        nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, *args)

    def _formats_inside(self) -> list[str]:
        """Of the sites that are quantized in it, each once."""
        how = self.quantization
        return [] if how.formats is None else how.formats.inside(how.path)

    def _get_name(self) -> str:
        whole = not self.quantization.path
        name = self._stands_for.cls.__name__
        return f"Quantized{name}" if whole or self._formats_inside() else name

    def extra_repr(self) -> str:
        if self.quantization.description:
            return self.quantization.description
        try:
            own = str(self._stands_for.cls.extra_repr(self))
        except Exception:  # it may read what the quantized module does not have
            own = ""
        inside = any(isinstance(each, QuantizedModule) for each in self.children())
        known, path, formats = self.quantization.formats, self.quantization.path, list[str]()
        if path and not inside and known is not None:
            formats = known.inside(path) + known.inside(path, lower=True)
        return ", ".join([*([own] if own else []), *formats])

    def train(self, mode: bool = True) -> QuantizedModule:
        """Stays in eval mode, as it was captured."""
        return nn.Module.train(self, False)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """What is left in float; an empty parameter if nothing is, whose device can be asked."""
        return AtLeastOne(self)(recurse)


def check_finished(model: nn.Module) -> None:
    """Raise :class:`InvalidConfig` if a quantized model is not to be saved or exported."""
    if isinstance(model, QuantizedModule) and model._unfinished:
        raise InvalidConfig(model._unfinished)


M = TypeVar("M", bound=QuantizedModule)


def quantized_module(twin: nn.Module, how: Quantization, base: type[M]) -> M:
    """A module on its backend.

    Args:
        twin: a twin of the float module, whose children are quantized.
        how: it runs.
        base: its class.
    """
    if how.glue is not None:  # its own Python asks the twin
        vars(twin)["parameters"] = AtLeastOne(twin)
        how.traceable = not any(isinstance(each, _WITH_FAST_PATH) for each in twin.modules())
    new = made(base, twin, runs=how.glue is not None)
    new.__dict__["quantization"] = how
    _begin(new)
    return new


def _begin(module: QuantizedModule) -> None:
    for graph in module.quantization.graphs:
        graph.by_rows = class_of(module) in LEAVES
    called = MethodType(type(module)._runs or run, module)
    module.__dict__["forward"] = SignedForward(called, module.quantization.signature)


def plan_of(module: QuantizedModule) -> QuantPlan:
    """What runs how; sites of graphs that were captured since are the last."""
    return module.quantization.plan.joined(graph.plan for _, graph in quantized_graphs(module))


def add_graph(module: QuantizedModule, graph: QuantizedGraph, model: nn.Module) -> None:
    """Serve more calls by a graph, which reads its tensors from ``module`` from now on.

    Args:
        module: quantized.
        graph: of the float module.
        model: that.
    """
    graph.body = mount(graph.body, module, model)
    graph.by_rows = class_of(module) in LEAVES
    module.quantization.graphs.append(graph)
    if module.quantization.formats is not None:
        module.quantization.formats.note(module.quantization.path, graph.body)
    module._graph_was_added()


def run(module: QuantizedModule, *args: Any, **kwargs: Any) -> Any:
    """Call a quantized module."""
    how = module.quantization
    if how.shared and not torch.compiler.is_compiling():
        how.shared.check()
    alone = len(args) == 1 and not kwargs
    joint = None if torch.compiler.is_dynamo_compiling() else how.joint
    if joint is not None and alone and (y := joint(args[0])) is not None:
        return y
    if alone and how.glue is None and not _recording():
        for graph in how.graphs:
            way = graph.direct(how.signature)
            if way is not None and way.takes(args[0]):
                note(how, graph, way, args[0])
                (result,) = way.function(args[0])
                return result
    key: Key | None = None
    given: tuple[Any, ...] = ()
    if how.glue is None and not _recording():
        given = (*args, *kwargs.values())
        key = key_of(given, tuple(kwargs))
        if key is not None and (seen := how.remembered.known.get(key)) is not None:
            graph, places = seen
            return graph(*[given[i] for i in places])
    args, kwargs = bind(how.signature, args, kwargs)
    if how.glue is not None and not how.graphs:
        return _run_glue(module, how, args, kwargs)
    if torch.compiler.is_dynamo_compiling():
        for graph in how.graphs:
            tensors = graph.kind.tensors(args, kwargs)
            if tensors is None:
                continue
            if graph.contract.admits([size for x in tensors for size in x.shape]):
                return graph(*tensors, source=(args, kwargs))
    try:
        call = flatten_call(args, kwargs)
    except CaptureFailed:
        if how.glue is None:
            raise
        return _run_glue(module, how, args, kwargs)
    found = _graph_for(how, call)
    if found is None and how.in_pieces:
        return _run_glue(module, how, args, kwargs)
    graph, accepted = found or _capture(module, call)
    if key is not None:
        how.remembered.keep(key, given, graph, accepted)
    return graph(*accepted.tensors, source=accepted.source)


def _recording() -> bool:
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _graph_for(how: Quantization, call: Call) -> tuple[QuantizedGraph, Call] | None:
    """The graph that serves ``call``, and the call as it takes it."""
    for graph in tuple(how.graphs):  # another thread may add one
        accepted = graph.accept(call)
        if accepted is not None:
            return graph, accepted
    return None


def _run_glue(
    module: QuantizedModule, how: Quantization, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    assert how.glue is not None
    if torch.compiler.is_dynamo_compiling() and how.traceable:
        return how.glue(*args, **kwargs)
    if how.begun is None and type(module)._runs is None and not _recording():
        how.begun = Begun()
        with first_call(how.glue), no_fastpath():
            return how.glue(*args, **kwargs)
    with no_fastpath():
        return how.glue(*args, **kwargs)


def _capture(module: QuantizedModule, call: Call) -> tuple[QuantizedGraph, Call]:
    """A new graph for ``call``; raises :class:`CaptureFailed` where there can be none."""
    recorded, how, reason = _recording(), module.quantization, ""
    refused: CaptureFailed | None = None
    if how.formats is not None and how.formats.loaded:
        reason = "It has values of a state_dict, which the float model does not have"
    elif how.unseen is None:
        pass
    elif recorded:
        reason = "It cannot be captured while the model is traced: call it so before"
    else:
        with CAPTURING:
            try:
                if _graph_for(how, call) is None:
                    kinds = [graph.kind for graph in how.graphs]
                    made, model = how.unseen.graph(how.path, call, kinds)
                    if made.accept(call) is not None:
                        add_graph(module, made, model)
                if found := _graph_for(how, call):
                    return found
            except CaptureFailed as error:
                reason, refused = f"It cannot be captured now: {error}", error
    raise unserved(how.path or "the model", how.graphs, call, reason, refused) from refused
