"""Operators of other libraries: they need not check what they read, so only real inputs are safe.

PyTorch's own raise on an index out of range. Another library's may read beyond its input instead,
and take the process with it: boxes that name the second image, features cut to the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ForeignOperators", "foreign_operators", "is_foreign", "see_higher_order"]

_KNOWN = ("aten", "prim", "prims", "torch_quant")
"""Libraries whose operators are all known."""
_CHECKING = ("transformers::grouped_mm_fallback",)
"""Operators of others that are made of PyTorch's own, which check."""


def is_foreign(target: Any) -> bool:
    """Whether it is an operator of another library."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in _KNOWN


class ForeignOperators(TorchDispatchMode):
    """Notes the operators of other libraries that run inside and may not check what they read.

    >>> with ForeignOperators() as foreign:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> foreign.names
    set()
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        see_higher_order(ForeignOperators)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if is_foreign(func) and (name := func.name().partition(".")[0]) not in _CHECKING:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def foreign_operators(gm: fx.GraphModule) -> tuple[str, ...]:
    """Names of those in a graph, and in the graphs inside it, that may not check what they read."""
    targets = (
        node.target
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    )
    names = {target.name().partition(".")[0] for target in targets if is_foreign(target)}
    return tuple(sorted(names.difference(_CHECKING)))


def see_higher_order(mode: type[TorchDispatchMode]) -> None:
    """Let higher-order operators run under a mode; the oldest torch asks for it."""
    for operator in list(torch._ops._higher_order_ops.values()):
        if mode not in operator.python_key_table:
            operator.py_impl(mode)(_passed_on(operator))


def _passed_on(operator: Any) -> Callable[..., Any]:
    return lambda mode, *args, **kwargs: operator(*args, **kwargs)
