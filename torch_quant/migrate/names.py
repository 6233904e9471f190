"""What other tools call layers, as keys of overrides."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from torch_quant.core.naming import class_path
from torch_quant.errors import InvalidConfig
from torch_quant.ops.table import OPERATORS

__all__ = ["class_key", "prefix_pattern"]

_FUNCTIONS = {getattr(functional, name, None): name for name in OPERATORS} | {
    torch.matmul: "matmul",
    torch.bmm: "matmul",
}
"""PyTorch's functions, most of which are called as the operators are."""


def class_key(key: Any) -> str | None:
    """The key of an override for a module class or a function, None if it is none of here.

    Args:
        key: a class, a function, or how a tool writes one: ``"Linear"``, ``"torch.nn.Linear"``,
            ``"<class 'torch.nn.modules.linear.Linear'>"``, ``"Linear&Relu"`` for a fused one.

    >>> class_key(nn.Linear), class_key("Conv2d&Relu"), class_key(torch.matmul), class_key("fc1")
    ('class:torch.nn.Linear', 'class:torch.nn.Conv2d', 'op:matmul', None)
    """
    if isinstance(key, type):
        if not issubclass(key, nn.Module):
            return None
        try:
            return f"class:{class_path(key)}"
        except InvalidConfig:
            return None
    if isinstance(key, str):
        written = re.fullmatch(r"<class '([\w.]+)'>", key)
        path = written[1] if written else key.partition("&")[0]
        prefix, _, name = path.rpartition(".")
        found = getattr(nn, name, None)
        known = prefix == "" or prefix == "torch.nn" or prefix.startswith("torch.nn.modules")
        if known and isinstance(found, type) and issubclass(found, nn.Module):
            return f"class:torch.nn.{name}"
        return None
    try:
        name = _FUNCTIONS.get(key, "")
    except TypeError:  # not hashable
        return None
    return f"op:{name}" if name else None


def prefix_pattern(expression: str, what: str) -> str:
    """A key for what ``re.match(expression, name)`` finds: names that begin so.

    All of these are equally specific, so the last given holds where several match.

    Args:
        expression: a regular expression.
        what: what it is, for messages.

    Raises:
        InvalidConfig: it is no regular expression.

    >>> prefix_pattern("encoder.layer.0", "x")
    're:(?:encoder.layer.0).*'
    """
    try:
        re.compile(expression)
    except re.error as error:
        raise InvalidConfig(f"{what} is no regular expression of Python: {error}") from error
    return f"re:(?:{expression}).*"
