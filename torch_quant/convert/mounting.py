"""Graphs read their tensors from the modules of the quantized model, under the model's own names.

The dictionaries of parameters and buffers of a graph's modules are those of the modules in the
quantized model, so what moves, copies or saves the model does so with what its graphs read. Graphs
that need equal tensors share them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from torch_quant.core.naming import numbered

__all__ = ["linked", "links", "mount", "place_in_memory"]

Links = dict[str, tuple[dict[str, Any], dict[str, Any]]]
"""Path in a graph -> dictionaries of parameters and buffers that its module there has."""


def place_in_memory(x: Tensor) -> tuple[Any, ...]:
    """What two names of one tensor agree on."""
    storage = x.untyped_storage()._cdata
    return storage, x.storage_offset(), tuple(x.shape), x.stride(), x.dtype


def mount(body: fx.GraphModule, home: nn.Module, model: nn.Module) -> fx.GraphModule:
    """``body``, whose tensors are then those of ``home`` and the modules below it.

    A tensor that is there already, by value, is not put there twice. One that is another gets a
    number. What is a parameter in the float module stays one, without a gradient.

    Args:
        body: its tensors have names of the float module, or such with an ending.
        home: the quantized module.
        model: the float module.
    """
    names: dict[str, str] = {}
    attributes: dict[str, Any] = {}
    homes: dict[str, nn.Module] = {}
    for node in body.graph.find_nodes(op="get_attr"):
        target = str(node.target)
        if target not in names:
            value = operator.attrgetter(target)(body)
            names[target] = target
            if isinstance(value, fx.GraphModule):
                _, inner = _module_at(home, target)
                value = mount(value, inner, nn.Module())
            elif isinstance(value, Tensor):
                path, _, name = target.rpartition(".")
                found, owner = _module_at(home, path)
                name = _put(owner, name, value, _is_parameter(model, target, value))
                names[target] = f"{found}.{name}".strip(".")
                homes[found] = owner
                value = operator.attrgetter(name)(_Held(owner))
            attributes[names[target]] = value
        node.target = names[target]
    made = fx.GraphModule(attributes, body.graph)
    return linked(made, {path: (x._parameters, x._buffers) for path, x in homes.items()})


class _Held:
    """The tensors that a module holds, whatever its class has under their names."""

    def __init__(self, module: nn.Module) -> None:
        self.__dict__.update(module._parameters)
        self.__dict__.update(module._buffers)


def _module_at(root: nn.Module, path: str) -> tuple[str, nn.Module]:
    """The module under a dotted path, made where there is none, and its path in fact."""
    found: list[str] = []
    for part in path.split(".") if path else ():
        for name in numbered(part):
            child = root._modules.get(name)
            if child is None and name not in (*root._parameters, *root._buffers):
                child = root._modules[name] = nn.Module()
            if child is not None and not isinstance(child, torch.jit.ScriptModule):
                found.append(name)
                root = child
                break
    return ".".join(found), root


def _put(owner: nn.Module, name: str, value: Tensor, parameter: bool) -> str:
    """Have ``owner`` hold ``value``; under which name it does.

    Two parameters that are trained will not stay equal.
    """
    trained = isinstance(value, nn.Parameter)
    for each in numbered(name):
        held: Tensor | None = owner._parameters.get(each)
        held = owner._buffers.get(each) if held is None else held
        if held is None and owner._modules.get(each) is None:
            for entries in (owner._parameters, owner._buffers, owner._modules):
                entries.pop(each, None)
            if trained:
                owner._parameters[each] = value  # type: ignore[assignment]
            elif parameter:
                owner._parameters[each] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[each] = value
            return each
        if held is not None and (held is value if trained else _equal(held, value)):
            return each
    raise AssertionError("numbers do not end")


def _equal(x: Tensor, y: Tensor) -> bool:
    if x is y or (x.layout == y.layout == torch.strided and _at_one_place(x, y)):
        return True
    alike = x.shape == y.shape and x.dtype == y.dtype and x.device == y.device
    return alike and x.stride() == y.stride() and torch.equal(x, y)


def _at_one_place(x: Tensor, y: Tensor) -> bool:
    return place_in_memory(x) == place_in_memory(y)


def _is_parameter(model: nn.Module, path: str, value: Tensor) -> bool:
    *parts, name = path.split(".")
    for part in parts:
        child = model._modules.get(part)
        if child is None:
            return False
        model = child
    found = model._parameters.get(name)
    return found is not None and value.is_floating_point() and found.shape == value.shape


def links(body: fx.GraphModule) -> Links:
    """The dictionaries that the modules of a graph read."""
    return {path: (module._parameters, module._buffers) for path, module in body.named_modules()}


def linked(body: fx.GraphModule, links: Links) -> fx.GraphModule:
    """``body``, whose modules read these dictionaries from now on."""
    for path, (parameters, buffers) in links.items():
        module = body.get_submodule(path)
        module.__dict__["_parameters"], module.__dict__["_buffers"] = parameters, buffers
    return body
