"""A quantized model as JSON: the tree of its modules, and the graphs that they run."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.backends import Backend
from torch_quant.convert.lowering import holds_tensor
from torch_quant.convert.mounting import linked
from torch_quant.convert.quantization import Quantization
from torch_quant.convert.quantized import QuantizedModule, quantized_module
from torch_quant.convert.quantized_graph import QuantizedGraph
from torch_quant.core.plan import QuantPlan
from torch_quant.errors import BackendUnavailable, InvalidConfig
from torch_quant.graph.binding import CallSignature, signature_of
from torch_quant.graph.hooks import give_hooks, take_hooks, users_hooks
from torch_quant.graph.twin import twin_of
from torch_quant.io.data.fits import check_fit
from torch_quant.io.data.graphs import read_graph, write_graph
from torch_quant.io.data.nests import read_nest, write_nest
from torch_quant.io.data.sizes import read_contract, write_contract
from torch_quant.io.data.trees import read_kind, read_output, write_kind, write_output
from torch_quant.io.data.values import decode, encode, entries, wrong
from torch_quant.nn.stand_in import StandIn, class_of
from torch_quant.ops.functions import path_of

__all__ = ["read_model", "write_model"]

_GRAPH = ("graph", "calls", "sizes", "outputs", "plan", "compiled")
_RUNS = ("backend", "signature", "graphs", "runs_python", "in_pieces", "description", "plan",
         "calibration", "looked_at")  # fmt: skip
_MODULE = ("class", "parameters", "buffers", "transient", "attributes", "values", "nests",
           "hooks", "children", "runs")  # fmt: skip
_HELD = ("_modules", "_parameters", "_buffers")
_KEPT = {*vars(nn.Module()), "quantization", "_stands_for"}
"""What modules of ours and PyTorch's keep of themselves."""


def write_model(model: QuantizedModule) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A quantized model as JSON, and its tensors by name.

    Raises:
        InvalidConfig: a part of it is no data; says which.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    modules: dict[str, Any] = {}
    twins = {id(each) for module in model.modules() for each in _bodies(module)}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in seen:
            modules[path] = {"same": seen[id(module)]}
            continue
        seen[id(module)] = path
        if isinstance(module, torch.jit.ScriptModule):
            raise InvalidConfig(f"{path} is TorchScript, which cannot be saved as data")
        modules[path] = _written(module, path, tensors, twins)
    return {"modules": modules}, tensors


def _bodies(module: nn.Module) -> list[nn.Module]:
    """The module, and the twin whose Python code it runs."""
    inner = module._stands_for.twin if isinstance(module, StandIn) else None
    return [module] if inner is None else [module, inner]


def _written(
    module: nn.Module, path: str, tensors: dict[str, Tensor], twins: Container[int]
) -> dict[str, Any]:
    own = module._stands_for.attributes if isinstance(module, StandIn) else vars(module)
    attributes = {name: x for name, x in own.items() if isinstance(x, Tensor)}
    nests = {
        name: write_nest(value, f"{path}.{name}".strip("."), tensors)
        for name, value in own.items()
        if name not in (*_HELD, *attributes) and holds_tensor(value, twins)
    }
    held: dict[str, Mapping[str, Tensor | None]] = {
        "parameters": module._parameters, "buffers": module._buffers, "attributes": attributes
    }  # fmt: skip
    for entries_ in held.values():
        for name, x in entries_.items():
            if x is not None:
                tensors[f"{path}.{name}".strip(".")] = x
    return {
        "class": path_of(class_of(module)),
        **{what: {n: x is not None for n, x in each.items()} for what, each in held.items()},
        "transient": sorted(module._non_persistent_buffers_set),
        "values": {n: x for n, x in _values(module, own, path).items() if n not in nests},
        "nests": nests,
        "hooks": bool(users_hooks(module)),
        "children": [name for name, child in module._modules.items() if child is not None],
        "runs": _running(module, path) if isinstance(module, QuantizedModule) else None,
    }


def _values(module: nn.Module, own: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Plain attributes: Python code of the model may have written them.

    What the model was seen to keep between its calls has to be among them, or a tensor.
    """
    found = {}
    for name, value in own.items():
        if name.startswith("_") or name == "training" or isinstance(value, Tensor):
            continue
        with contextlib.suppress(InvalidConfig):  # an object, which is that of the class
            found[name] = encode(value)
    kept = module.quantization.state if isinstance(module, QuantizedModule) else ()
    for name in kept:
        *parts, last = name.split(".")
        owner: Any = module
        for part in parts:
            owner = getattr(owner, part, None)
        value = getattr(owner, last, None)
        if not isinstance(value, Tensor):
            try:
                encode(value)
            except InvalidConfig as error:
                where = f"{path}.{name}".strip(".")
                raise InvalidConfig(f"{where}, which the model keeps: {error}") from error
    return found


def _running(module: QuantizedModule, path: str) -> dict[str, Any]:
    how = module.quantization
    if how.shared:
        raise InvalidConfig(
            "the quantized model shares weights with the float model; quantize with "
            "share_float_weights=False to save it"
        )
    return {
        "backend": how.backend,
        "signature": _signature(how.signature),
        "graphs": [_graph(each, path) for each in how.graphs],
        "runs_python": how.glue is not None,
        "in_pieces": how.in_pieces,
        "description": how.description,
        "plan": how.plan.to_dict(),
        "calibration": how.calibration,
        "looked_at": {
            n: [encode(kind), [*sizes], trains]
            for n, (kind, sizes, trains) in how.looked_at.items()
        },
    }


def _graph(graph: QuantizedGraph, path: str) -> dict[str, Any]:
    compiler = graph.compiler
    if (
        compiler is not None
        and Backend.get(compiler.name) is not compiler
        and (not isinstance(compiler, Backend) or compiler.has_options)
    ):
        raise InvalidConfig(f"{compiler!r} was made with options of its own, which are no data")
    return {
        "graph": write_graph(graph.body, lambda name, x: None),  # the modules hold its tensors
        "calls": write_kind(graph.kind),
        "sizes": write_contract(graph.contract),
        "outputs": write_output(graph.out_spec),
        "plan": graph.plan.to_dict(),
        "compiled": None if compiler is None else compiler.name,
    }


_BY_POSITION = "by position"
"""Of a signature whose decorator hides other names."""


def _signature(signature: inspect.Signature) -> Any:
    """Names, kinds and defaults of parameters; None where a default is no data."""
    try:
        return {
            "decorated": (
                _BY_POSITION
                if getattr(signature, "by_position", False)
                else bool(getattr(signature, "decorated", False))
            ),
            "parameters": [
                [each.name, each.kind.name, each.default is not each.empty,
                 None if each.default is each.empty else encode(each.default)]
                for each in signature.parameters.values()
            ],
        }  # fmt: skip
    except InvalidConfig:
        return None


def read_model(
    data: Any, tensors: Mapping[str, Tensor], model: nn.Module | None
) -> QuantizedModule:
    """Undo :func:`write_model`.

    Args:
        data: JSON.
        tensors: by name.
        model: one of the class that was quantized, for its Python code and its attributes.

    Raises:
        InvalidConfig: the data are wrong; ``model`` is another one, or is needed.
    """
    modules = entries(data, "the model", "modules")["modules"]
    if not isinstance(modules, dict) or "" not in modules:
        raise wrong("the model", modules, "modules by path")
    reader = _Reader(modules, tensors, model)
    try:
        found = reader.module("", model)
        if not isinstance(found, QuantizedModule):
            raise wrong("the model", modules[""], "a quantized module")
        reader.mount()
        found.know_formats()
    except InvalidConfig:
        raise
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise InvalidConfig(
            f"the saved model is not as it was written ({type(error).__name__}: {error}): the file "
            "was changed"
        ) from error
    return found


class _Reader:
    """Builds the modules of a saved model, children first."""

    def __init__(
        self, modules: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module | None
    ) -> None:
        self.modules, self.tensors, self.model = modules, tensors, model
        self.made: dict[str, nn.Module] = {}
        self.replaced: dict[nn.Module, nn.Module] = {}
        """Module of the user's -> what takes its place."""
        self.held: dict[int, nn.Parameter] = {}

    def module(self, path: str, theirs: nn.Module | None) -> nn.Module:
        """The module at ``path``, in the place of one of the user's if there is one."""
        about = self.modules.get(path)
        if isinstance(about, dict) and set(about) == {"same"}:
            if about["same"] not in self.made:
                raise wrong(f"the module {path}", about["same"], "one that comes before")
            return self.made[about["same"]]
        about = {"nests": {}, **about} if isinstance(about, dict) else about  # none before 3
        found = entries(about, f"the module {path or 'itself'}", *_MODULE)
        if not isinstance(found["children"], list):
            raise wrong(f"the children of {path}", found["children"], "names")
        if self.model is not None and not isinstance(theirs, torch.jit.ScriptModule):
            check_fit(theirs, path, found["class"], found["children"], self.tensors)
        children = {}
        for name in found["children"]:
            if not isinstance(name, str) or not name or "." in name:
                raise wrong(f"a child of {path}", name, "a name")
            child = None if theirs is None else theirs._modules.get(name)
            children[name] = self.module(f"{path}.{name}".strip("."), child)
        if theirs is None or isinstance(theirs, torch.jit.ScriptModule):
            own, theirs = nn.Module(), None
        else:
            own = twin_of(theirs, self.replaced)
        hooks = take_hooks(own)
        if found["hooks"] and not hooks:
            raise InvalidConfig(
                f"{path or 'the model'} had forward hooks of the user's, which are code: give a "
                "model with them, torch_quant.load(folder, model=...)"
            )
        own._modules.clear()
        own._modules.update(children)
        self._fill(own, path, found)
        made = own
        if found["runs"] is not None:
            runs = entries(found["runs"], f"how {path or 'the model'} runs", *_RUNS)
            how = self._running(path, theirs, runs)
            how.glue = own if runs["runs_python"] else None
            made = quantized_module(own, how, QuantizedModule)
            give_hooks(made, hooks)
            made.describe_weights()
        self.made[path] = made
        if theirs is not None:
            self.replaced[theirs] = made
        return made

    def _fill(self, module: nn.Module, path: str, found: Mapping[str, Any]) -> None:
        """Give a module the saved tensors in the place of its own."""
        module._parameters.clear()
        module._buffers.clear()
        module._non_persistent_buffers_set = set(map(str, found["transient"]))
        for what in ("parameters", "buffers", "attributes"):
            if not isinstance(found[what], dict):
                raise wrong(f"the {what} of {path}", found[what], "an object")
            for name, there in found[what].items():
                at = f"{path}.{name}".strip(".")
                x = self._tensor(at, what == "parameters") if there else None
                if what == "parameters":
                    module._parameters[name] = x  # type: ignore[assignment]
                elif what == "buffers":
                    module._buffers[name] = x
                else:
                    vars(module)[name] = x
        for name, value in found["values"].items():
            if not name.startswith("_") and name not in _KEPT:
                vars(module)[name] = decode(value, f"{path}.{name}")
        for name, value in found["nests"].items():
            if name in _KEPT or name.startswith("__") or hasattr(nn.Module, name):
                raise wrong(f"the attributes of {path}", name, "one that holds tensors")
            vars(module)[name] = read_nest(value, f"{path}.{name}".strip("."), self._tensor)
        runs = found["runs"]
        if runs is not None and not runs["runs_python"]:
            for name, value in list(vars(module).items()):
                listed = name in found["attributes"] or name in found["nests"]
                if not listed and not name.startswith("_") and holds_tensor(value):
                    del vars(module)[name]  # graphs have what they need of it

    def _tensor(self, name: str, parameter: bool) -> Tensor:
        """One object for each tensor, under however many names it was saved."""
        if name not in self.tensors:
            raise wrong("a tensor of the model", name, "the name of a saved tensor")
        x = self.tensors[name]
        if not parameter:
            return x
        return self.held.setdefault(id(x), nn.Parameter(x, requires_grad=False))

    def _running(
        self, path: str, theirs: nn.Module | None, runs: Mapping[str, Any]
    ) -> Quantization:
        where = path or "the model"
        about = self.modules[path]
        if runs["runs_python"] and theirs is None:
            raise InvalidConfig(
                f"{where} runs Python code of {about['class']}: give a model of that class, "
                "torch_quant.load(folder, model=...); its weights are not read, so it may be on "
                "the meta device"
            )
        signature = self._signature(where, theirs, runs["signature"])
        how = Quantization(path, signature, _backend(runs["backend"], where))
        how.in_pieces, how.description = runs["in_pieces"] is True, str(runs["description"])
        how.plan = QuantPlan.from_dict(runs["plan"])
        how.calibration = runs["calibration"]
        for name, (dtype, sizes, *trains) in runs["looked_at"].items():  # earlier ones say no more
            kind = decode(dtype, f"the dtype of {name}")
            how.looked_at[name] = kind, tuple(map(int, sizes)), trains == [True]
        how.graphs = [_read_graph(each, where, self._reading(path)) for each in runs["graphs"]]
        return how

    def _reading(self, path: str) -> Any:
        return lambda name: self.tensors[f"{path}.{name}".strip(".")]

    @staticmethod
    def _signature(where: str, theirs: nn.Module | None, data: Any) -> inspect.Signature:
        hidden = isinstance(data, dict) and data.get("decorated") == _BY_POSITION
        if theirs is not None:
            known = signature_of(theirs.forward)
            return known.with_positions() if hidden else known
        if data is None:
            raise InvalidConfig(
                f"{where} has defaults that are no data: torch_quant.load(folder, model=...)"
            )
        found = entries(data, f"the signature of {where}", "decorated", "parameters")
        parameters = []
        for name, kind, has_default, default in found["parameters"]:
            parameters.append(
                inspect.Parameter(
                    name,
                    inspect._ParameterKind[kind],
                    default=decode(default, where) if has_default else inspect.Parameter.empty,
                )
            )
        decorated = hidden or found["decorated"] is True
        return CallSignature(parameters, decorated=decorated, by_position=hidden)

    def mount(self) -> None:
        """Have every graph read the tensors of the modules, as what was saved did."""
        for module in self.made.values():
            if isinstance(module, QuantizedModule):
                for graph in module.quantization.graphs:
                    homes = {}
                    for path, _ in graph.body.named_modules():
                        home = module.get_submodule(path)
                        homes[path] = home._parameters, home._buffers
                    linked(graph.body, homes)


def _backend(name: Any, where: str) -> str:
    if not isinstance(name, str):
        raise wrong(f"the backend of {where}", name, "a name")
    backend = Backend.get(name)
    if reason := backend.unavailable():
        raise BackendUnavailable(f"the model was quantized for {backend!r}: {reason}")
    return name


def _read_graph(data: Any, where: str, tensor: Any) -> QuantizedGraph:
    found = entries(data, f"a graph of {where}", *_GRAPH)
    body: fx.GraphModule = read_graph(found["graph"], where, tensor)
    compiler = None if found["compiled"] is None else Backend.get(found["compiled"])
    kind = read_kind(found["calls"], where)
    outputs = read_output(found["outputs"], where, kind)
    made = QuantizedGraph(body, kind, read_contract(found["sizes"], where), outputs, compiler)
    made.plan = QuantPlan.from_dict(found["plan"])
    return made
