"""Functions that a graph may call beside operators: what is here by its path can be saved."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverloadPacket
from torch.nn import functional

from torch_quant.ops.decomposed import NAMESPACE, decomposed

__all__ = [
    "DENIED",
    "FUNCTIONS",
    "find_operator",
    "function_at",
    "graph_function",
    "is_method",
    "operator_name",
    "path_of",
]

F = TypeVar("F", bound=Callable[..., Any])

_SIZES = {
    operator: (
        "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "invert", "le", "lshift",
        "lt", "mod", "mul", "ne", "neg", "not_", "or_", "pos", "pow", "rshift", "sub", "truediv",
        "xor",
    ),
    builtins: ("abs", "bool", "float", "int", "len", "max", "min", "round"),
    math: ("ceil", "floor", "sqrt", "trunc"),
    torch: tuple(name for name in dir(torch) if name.startswith("sym_")),
}  # fmt: skip
"""Arithmetic of sizes, and parts of tuples."""
_BY_NAME = {
    "torch": torch,
    "torch.nn.functional": functional,
    "torch._C._nn": torch._C._nn,
}
"""Where an operator of ATen may be called by its Python name."""
_READS = ("size", "numel", "interpolate", "getitem")
DENIED = ("from_file",)
"""Operators that do more than compute."""


def operator_name(target: Any) -> str | None:
    """The name of an operator overload, None for anything else; see :func:`find_operator`.

    >>> operator_name(torch.ops.aten.add.Tensor)
    'aten.add.Tensor'
    """
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target.name()}"
    return str(target) if hasattr(target, "_schema") else None


def find_operator(name: str) -> Any:
    """What has that name in ``torch.ops``; raises AttributeError where there is none."""
    if name.startswith(f"{NAMESPACE}."):
        decomposed()  # a new process may not have them yet
    return operator.attrgetter(name)(torch.ops)


def path_of(thing: Any) -> str:
    """Module and name of a function or class."""
    for module, found in _BY_NAME.items():
        name = getattr(thing, "__name__", "")
        if name and getattr(found, name, None) is thing and _computes(name):
            return f"{module}.{name}"
    module = getattr(thing, "__module__", "")
    module = "operator" if module == "_operator" else module
    return f"{module}.{getattr(thing, '__qualname__', thing)}"


def _computes(name: str) -> bool:
    """Whether it is the name of an operator of ATen, or one that reads a size."""
    known = isinstance(getattr(torch.ops.aten, name, None), OpOverloadPacket)
    return name not in DENIED and (name in _READS or known)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    path_of(found): found
    for module, names in _SIZES.items()
    for found in (getattr(module, name) for name in names)
}
"""Path -> function."""


def graph_function(function: F) -> F:
    """Decorator: graphs with calls of this function can be saved, and loaded where it is imported.

    >>> @graph_function
    ... def twice(x: Tensor) -> Tensor:
    ...     return x + x
    >>> function_at(path_of(twice)) is twice
    True
    """
    FUNCTIONS[path_of(function)] = function
    return function


def function_at(path: str) -> Callable[..., Any] | None:
    """The function at a path, if a graph may call it.

    >>> function_at("torch.arange") is torch.arange
    True
    >>> function_at("torch.load") is None
    True
    """
    if path in FUNCTIONS:
        return FUNCTIONS[path]
    module, _, name = path.rpartition(".")
    found = getattr(_BY_NAME.get(module), name, None) if _computes(name) else None
    return found if callable(found) else None


def is_method(name: str) -> bool:
    """Whether a graph may call this method of a tensor.

    >>> is_method("size"), is_method("__and__"), is_method("__getattribute__")
    (True, True, False)
    """
    return name.isidentifier() and hasattr(Tensor, name) and _computes(name)
