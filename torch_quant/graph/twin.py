"""A structural twin of a module tree, so that nothing is ever done to the user's own modules.

The twin has its own module objects and dictionaries and the same Parameter and buffer objects.
Hooks, mode changes and replaced children stay on the twin.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torch_quant.graph.encoders import PaddedEncoder

__all__ = ["twin_of"]

_OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


def twin_of(model: nn.Module, replace: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A twin of ``model`` in eval mode, sharing every parameter and buffer by reference.

    A module that occurs twice in ``model`` occurs twice, as one object, in the twin; scripted
    modules are not copied.

    Args:
        model: any module; it is not touched.
        replace: modules of ``model`` to put others in the place of, wherever they occur.
    """
    twins: dict[int, nn.Module] = {id(old): new for old, new in (replace or {}).items()}

    def twin(module: nn.Module) -> nn.Module:
        if id(module) in twins:
            return twins[id(module)]
        if isinstance(module, torch.jit.ScriptModule):
            return module
        # Not copy.copy: a parametrized module refuses to be pickled, and so to be copied that way.
        cls = PaddedEncoder if module.__class__ is nn.TransformerEncoder else module.__class__
        new: nn.Module = object.__new__(cls)  # its own may want arguments
        twins[id(module)] = new
        state = dict(module.__dict__)
        for name, value in state.items():
            if (name in _OWN or "_hooks" in name) and isinstance(value, (dict, set)):
                state[name] = value.copy()
        new.__dict__.update(state)
        new.__dict__["_modules"] = {
            name: None if child is None else twin(child) for name, child in module._modules.items()
        }
        new.__dict__["training"] = False
        return new

    made = set(twins)
    result = twin(model)
    containers: dict[int, Any] = {}
    # Plain attributes that hold modules (lists, dicts) must lead to the twins as well.
    for module in [new for old, new in twins.items() if old not in made]:
        for name, value in list(module.__dict__.items()):
            if name not in _OWN:
                module.__dict__[name] = _redirect(value, twins, containers)
    return result


def _redirect(value: object, twins: dict[int, nn.Module], made: dict[int, Any]) -> object:
    """An attribute of the twin; ``made`` has the containers so far, which may hold themselves."""
    if isinstance(value, nn.Module):
        return twins.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in twins:
        return types.MethodType(value.__func__, twins[id(value.__self__)])
    if id(value) in made:
        return made[id(value)]
    if type(value) is list:
        items: list[object] = []
        made[id(value)] = items
        items.extend(_redirect(item, twins, made) for item in value)
    elif type(value) is dict:
        entries: dict[object, object] = {}
        made[id(value)] = entries
        entries.update((key, _redirect(item, twins, made)) for key, item in value.items())
    elif type(value) is tuple:
        found = tuple(_redirect(item, twins, made) for item in value)
        made.setdefault(id(value), found)
    return made.get(id(value), value)
