"""Where operators of this package are defined: ``torch.ops.torch_quant``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["NAMESPACE", "define_operator", "library", "plain_function", "unwatched"]

NAMESPACE = "torch_quant"
library = torch.library.Library(NAMESPACE, "DEF")
_PLAIN: dict[Any, Callable[..., Any]] = {}
"""Operators that are a Python function on CPUs, and nothing elsewhere."""


def define_operator(
    schema: str,
    compute: Callable[..., Any] | None,
    fake: Callable[..., Any] | None,
    *,
    keys: Sequence[str] = ("CompositeExplicitAutograd",),
) -> Any:
    """Define an operator that graphs can call.

    Args:
        schema: its name, arguments and results: ``"twice(Tensor x) -> Tensor"``.
        compute: what it does; None for one that is only written to files.
        fake: its result on tensors without data, which exporting and compiling ask for; None where
            ``compute`` gives that too.
        keys: dispatch keys that ``compute`` serves: of all devices, by default.

    Returns:
        The overload that graphs call.
    """
    name = schema.partition("(")[0]
    library.define(schema)
    if compute is not None:
        for key in keys:
            library.impl(name, compute, key)
    if fake is not None:
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    if compute is not None and tuple(keys) == ("CPU",):
        _PLAIN[operator] = compute
    return operator


def plain_function(operator: Any) -> Callable[..., Any] | None:
    """The function that an operator is on a CPU; None if it is more than that.

    PyTorch takes longer to call an operator than to run the function, where that is a small kernel.

    Args:
        operator: the target of a node.

    >>> plain_function(torch.ops.aten.relu.default) is None
    True
    """
    return _PLAIN.get(operator)


def unwatched(tensors: Iterable[Tensor]) -> bool:
    """Whether operators may be called as the functions that they are on a CPU.

    Not so while somebody follows operators (a profiler, a mode, ``vmap``), and where a gradient
    is asked for, of which PyTorch says that there is none.

    Args:
        tensors: all that come from outside.

    >>> with torch.no_grad():
    ...     unwatched([torch.ones(2)]), unwatched([torch.ones(2, device="meta")])
    (True, False)
    """
    if _dispatch_modes() or _function_modes() or _profiled() or _transformed() is not None:
        return False
    for x in tensors:
        if type(x) not in _TYPES or not x.is_cpu or (x.requires_grad and torch.is_grad_enabled()):
            return False
    return True


_TYPES = (Tensor, torch.nn.Parameter)
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_profiled: Callable[[], bool] = torch._C._autograd._profiler_enabled
_transformed: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
