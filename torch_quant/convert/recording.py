"""What a module's own Python computes from one tensor, recorded while it runs.

Nothing is exported: what is recorded is only of use where it is known for what it is, whatever the
sizes, as a norm is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["recorded"]


class _Unknown(Exception):
    """The code does something that a graph of tensors does not say."""


class _Recorder(TorchDispatchMode):
    """Writes operators into a graph.

    Args:
        x: the input.
        held: the module's tensors by name.
    """

    def __init__(self, x: Tensor, held: dict[str, Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.names = {id(value): name for name, value in held.items()}
        self.nodes = {id(x): self.graph.placeholder("x")}
        self.nodes[id(x)].meta["val"] = x
        self.alive: list[Any] = [x]
        """All tensors: none of them may leave its id to another."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = self._noted((args, kwargs))
        if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
            raise _Unknown  # before it does something
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            raise _Unknown
        self.alive.append(result)
        node = self.graph.call_function(func, *given)
        node.meta["val"] = result
        self.nodes[id(result)] = node
        return result

    def _noted(self, value: Any) -> Any:
        """Nodes in the place of tensors."""
        if isinstance(value, Tensor):
            return self.node(value)
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._noted, value))
        if isinstance(value, dict):
            return {name: self._noted(each) for name, each in value.items()}
        return value

    def node(self, x: Tensor) -> fx.Node:
        """The node of a tensor; raises where the code made it from nothing that is known."""
        if id(x) not in self.nodes:
            if id(x) not in self.names:
                raise _Unknown
            node = self.graph.get_attr(self.names[id(x)])
            node.meta["val"] = x
            self.nodes[id(x)] = node
            self.alive.append(x)
        return self.nodes[id(x)]


@torch.no_grad()
def recorded(module: nn.Module, x: Tensor) -> tuple[fx.Graph, Tensor] | None:
    """The operators that ``module(x)`` calls as a graph, and its result.

    Args:
        module: its class's own ``forward`` runs.
        x: the only argument; it is not changed.

    Returns:
        None if it does more than to compute one tensor from this one and its own, or fails.

    >>> graph, y = recorded(nn.ReLU(), torch.ones(2))
    >>> [node.op for node in graph.nodes], y
    (['placeholder', 'call_function', 'output'], tensor([1., 1.]))
    """
    held: dict[str, Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    x = x.detach().clone()
    before = x.clone()
    recorder = _Recorder(x, held)
    try:
        try:
            with recorder:
                y = type(module).forward(module, x)
        except _Unknown:
            raise
        except Exception:  # of the module's code, which is run again and tells it then
            return None
        if not isinstance(y, Tensor):
            return None
        recorder.graph.output(recorder.node(y))
        for node in reversed(recorder.graph.nodes):
            if node.op == "call_function" and not node.users:
                recorder.graph.erase_node(node)  # what layers find out at their first call
    except _Unknown:
        return None
    return (recorder.graph, y) if torch.equal(x, before) else None
