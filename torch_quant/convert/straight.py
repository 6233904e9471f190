"""Whether Python code computes the same, whatever tensor it is given: what is recorded of it holds.

Code is straight if it goes from its first line to its last, and reads nothing but its arguments,
tensors, numbers and children of its module, and functions of PyTorch. A branch, a loop, a size, a
global, an entry of a dictionary or an attribute of another object may be another at the next call.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import textwrap
import types
from typing import Any

import torch
from torch import Tensor, nn

from torch_quant.nn.stand_in import StandIn

__all__ = ["is_straight"]

_EXPRESSIONS = (
    ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Call, ast.keyword, ast.Constant,
    ast.Tuple, ast.List, ast.Load, ast.Store,
)  # fmt: skip
_SIZES = {"shape", "size", "dim", "ndim", "numel", "item", "tolist", "data", "numpy", "storage",
          "untyped_storage", "stride", "grad", "training"}  # fmt: skip
"""What code may decide or calculate by, or write through, beside PyTorch's operators."""
_NUMBERS = (bool, int, float, str, type(None))


def is_straight(module: nn.Module) -> bool:
    """Whether a module's own ``forward``, and those of its children, are.

    >>> is_straight(nn.SiLU())
    True
    """
    kind = type(module)
    if isinstance(module, StandIn) or kind.__module__.startswith("torch.nn."):
        return True
    if kind.__getattr__ is not nn.Module.__getattr__:
        return False
    if (
        kind.__getattribute__ is not object.__getattribute__
        or kind.__call__ is not nn.Module.__call__
    ):
        return False
    return _Code(module).straight(kind.forward)


@functools.lru_cache(maxsize=256)
def _parsed(function: types.FunctionType) -> ast.FunctionDef | None:
    try:
        (found,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # it was typed in, or is a lambda
        return None
    return found if isinstance(found, ast.FunctionDef) else None


class _Code:
    """Of one module.

    Args:
        module: what ``self`` is.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._entered: set[Any] = set()

    def straight(self, function: Any) -> bool:
        """Whether a method is, with those that it calls."""
        if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
            return False
        if function in self._entered or function.__closure__:
            return False
        self._entered.add(function)
        code = _parsed(function)
        if code is None or code.args.vararg or code.args.kwarg or not code.args.args:
            return False
        names = [each.arg for each in (*code.args.args, *code.args.kwonlyargs)]
        return _Body(self, function, names[0], set(names[1:])).holds(code.body)

    def attribute(self, name: str) -> tuple[bool, Any]:
        """Whether what ``self.name`` gives is of the module, and what it is."""
        own = vars(self.module)
        held = (own, own["_parameters"], own["_buffers"], own["_modules"])
        method = isinstance(getattr(type(self.module), name, None), types.FunctionType)
        if name in _SIZES or not (method or any(name in each for each in held)):
            return False, None  # a property, or of the class, where a fact of it is not noticed
        value = getattr(self.module, name)
        if isinstance(value, nn.Module):
            return is_straight(value), value
        if isinstance(value, types.MethodType):
            return value.__self__ is self.module and self.straight(value.__func__), value
        return isinstance(value, (Tensor, *_NUMBERS)) or _of_torch(value), value


class _Body:
    """Of one function.

    Args:
        code: of the module.
        function: it.
        itself: what it calls ``self``.
        known: names of its arguments; those of what it computes come to them.
    """

    def __init__(
        self, code: _Code, function: types.FunctionType, itself: str, known: set[str]
    ) -> None:
        self.code, self.function, self.itself, self.known = code, function, itself, known

    def holds(self, body: list[ast.stmt]) -> bool:
        return all(map(self._statement, body))

    def _statement(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.Return):
            return node.value is not None and self._expression(node.value)
        if isinstance(node, ast.Expr):
            return isinstance(node.value, ast.Constant)  # a docstring
        if isinstance(node, ast.If):
            return self._of_dtypes(node.test) and self.holds([*node.body, *node.orelse])
        if isinstance(node, ast.Assign):
            return self._expression(node.value) and all(map(self._named, node.targets))
        if isinstance(node, (ast.AnnAssign, ast.AugAssign)):
            return (
                isinstance(node.target, ast.Name)
                and node.value is not None
                and self._expression(node.value)
                and self._named(node.target)
            )
        return False

    def _named(self, target: ast.expr) -> bool:
        if isinstance(target, ast.Tuple):
            return all(map(self._named, target.elts))
        if not isinstance(target, ast.Name) or target.id == self.itself:
            return False
        self.known.add(target.id)
        return True

    def _of_dtypes(self, test: ast.expr) -> bool:
        """Whether a condition asks for the type of a tensor of the module alone."""
        for node in ast.walk(test):
            if isinstance(node, ast.Name) and node.id not in (self.itself, "torch"):
                return False
            if isinstance(node, ast.Call):
                return False
        reads = [each.attr for each in ast.walk(test) if isinstance(each, ast.Attribute)]
        return isinstance(test, ast.Compare) and "dtype" in reads and not _SIZES & set(reads)

    def _expression(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.known
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.keyword) and node.arg in (None, "inplace", "out"):
            return False
        inner = ast.iter_child_nodes(node)
        return isinstance(node, _EXPRESSIONS) and all(map(self._expression, inner))

    def _attribute(self, node: ast.Attribute) -> bool:
        path = [node.attr]
        below: ast.expr = node.value
        while isinstance(below, ast.Attribute):
            path.append(below.attr)
            below = below.value
        path.reverse()
        if any(each.endswith("_") for each in path):  # in place
            return False
        if isinstance(below, ast.Name) and below.id not in self.known:
            if below.id != self.itself:
                return self._of_module(below.id, path)
            holds, value = self.code.attribute(path[0])
            # Of a tensor, its methods and its type; of anything else, nothing.
            rest = path[1:]
            return holds and (not rest or (isinstance(value, Tensor) and not _SIZES & set(rest)))
        return not _SIZES & set(path) and (isinstance(below, ast.Name) or self._expression(below))

    def _of_module(self, name: str, path: list[str]) -> bool:
        value = self.function.__globals__.get(name)
        for each in path:
            if not isinstance(value, types.ModuleType) or not _is_known(value.__name__):
                return False
            value = getattr(value, each, None)
        return _of_torch(value) or isinstance(value, torch.dtype)


def _is_known(module: str) -> bool:
    return module == math.__name__ or module.partition(".")[0] == torch.__name__


def _of_torch(value: Any) -> bool:
    """Whether it is a function of PyTorch, which is the same whenever it is called."""
    if isinstance(value, functools.partial):
        given: list[Any] = [*value.args, *value.keywords.values()]
        return _of_torch(value.func) and all(isinstance(each, _NUMBERS) for each in given)
    if not callable(value) or isinstance(value, type):
        return False
    home = getattr(value, "__module__", None) or ""
    return _is_known(home) or getattr(torch, getattr(value, "__name__", ""), None) is value
