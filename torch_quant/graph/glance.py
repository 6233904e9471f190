"""A quick look whether a model is as it was, which costs a short calibration batch little."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from torch_quant.graph.effects import NOT_STATE, PLAIN
from torch_quant.graph.facts import fact_of, is_empty

__all__ = ["Glance"]


class Glance:
    """What the modules of a model hold, to be compared fast.

    It knows no more than :func:`attributes` and the identities of parameters and buffers do, and
    may find a difference where these find none.

    Args:
        model: no reference to it is kept.

    >>> layer = nn.Linear(2, 1)
    >>> glance = Glance(layer)
    >>> before = glance.agrees(layer)
    >>> layer.scale = 2.0
    >>> before, glance.agrees(layer)
    (True, False)
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[tuple[list[str], list[int]]] = []
        self._plain: list[Any] = []
        """Constants: while they are here, nothing else can have their addresses."""
        self._empty: list[Any] = []
        """Containers of PyTorch's own that held nothing, as those of hooks."""
        self._others: list[tuple[int, str]] = []
        """(number of a module, attribute) of what has insides that may change."""
        seen: set[int] = set()
        for i, module in enumerate(_walk(model)):
            self._modules.append((list(vars(module)), _addresses(module)))
            for name, value in vars(module).items():
                if name in NOT_STATE:
                    continue
                if is_empty(name, value):
                    self._empty += [] if value is None else [value]
                elif value is None or isinstance(value, PLAIN):
                    self._plain.append(value)
                elif id(value) not in seen:
                    seen.add(id(value))
                    self._others.append((i, name))
        self._scripted = any(isinstance(x, torch.jit.ScriptModule) for x in _walk(model))
        self._facts = self._inside(list(_walk(model)))

    def _inside(self, modules: list[nn.Module]) -> list[Any]:
        seen: dict[int, Any] = {}
        return [fact_of(vars(modules[i])[name], seen) for i, name in self._others]

    def agrees(self, model: nn.Module) -> bool:
        """Whether ``model`` still looks so."""
        if self._scripted or any(self._empty):
            return False
        modules = list(_walk(model))
        if len(modules) != len(self._modules):
            return False
        for module, (names, addresses) in zip(modules, self._modules, strict=True):
            if _addresses(module) != addresses or list(vars(module)) != names:
                return False
        return self._inside(modules) == self._facts


def _walk(model: nn.Module) -> Iterator[nn.Module]:
    """Every module once, in the order of the tree."""
    seen: set[int] = set()
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            stack.extend(child for child in module._modules.values() if child is not None)


def _addresses(module: nn.Module) -> list[int]:
    own = vars(module)
    held = map(id, (*module._parameters.values(), *module._buffers.values()))
    return [*map(id, own.values()), *held, *map(id, module._modules.values())]
