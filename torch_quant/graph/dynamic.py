"""Which dimensions of a model's inputs the user wants free: ``dynamic=`` of a quantizer."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch_quant.errors import InvalidConfig
from torch_quant.graph.calls import Call

__all__ = ["Dynamic", "check_arguments", "checked_dynamic", "free_axes"]

Dynamic = Mapping[str, Iterable[int]]
"""An input's name, as messages show it, -> the dimensions that are free."""


def checked_dynamic(dynamic: Dynamic | None) -> dict[str, frozenset[int]]:
    """``dynamic`` as a copy in one form; empty for None.

    Raises:
        InvalidConfig: it is no mapping of names to dimensions.

    >>> checked_dynamic({"input_ids": [0, 1]})
    {'input_ids': frozenset({0, 1})}
    """
    if dynamic is not None and not isinstance(dynamic, Mapping):
        raise _wrong("", dynamic)
    found: dict[str, frozenset[int]] = {}
    for name, axes in (dynamic or {}).items():
        if not isinstance(name, str) or isinstance(axes, (str, bytes, Mapping)):
            raise _wrong(f"[{name!r}]", axes)
        if not isinstance(axes, Iterable):
            raise _wrong(f"[{name!r}]", axes)
        found[name] = frozenset(axes := list(axes))
        if any(type(axis) is not int or axis < 0 for axis in axes):
            raise _wrong(f"[{name!r}]", axes)
    return found


def _wrong(where: str, value: Any) -> InvalidConfig:
    return InvalidConfig(
        f"dynamic{where} is {value!r}; expected the name of an input and its free dimensions, "
        'counted from 0: dynamic={"input_ids": [0, 1]}'
    )


def check_arguments(dynamic: Mapping[str, frozenset[int]], signature: inspect.Signature) -> None:
    """Raise :class:`InvalidConfig` for the name of an input that ``forward`` cannot have."""
    if {p.kind for p in signature.parameters.values()} & _OPEN:
        return  # known once it is called
    known = _arguments(signature)
    for name in dynamic:
        if _argument(name) not in known:
            raise _unknown(name, known)


def free_axes(
    dynamic: Mapping[str, frozenset[int]], call: Call, signature: inspect.Signature
) -> list[frozenset[int]]:
    """The free dimensions of each tensor of ``call``; all of an input that is not named.

    Args:
        dynamic: what the user asked for.
        call: the example.
        signature: of the model's ``forward``.

    Raises:
        InvalidConfig: the name of what is no tensor, or a dimension that it does not have.
    """
    names = call.names()
    given = {_argument(name) for name in names}
    by_place = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
    absent = set() if by_place else set(_arguments(signature)) - given
    for name in dynamic.keys() - set(names):
        if _argument(name) not in absent:
            raise _unknown(name, names)
    found = []
    for name, x in zip(names, call.tensors, strict=True):
        axes = dynamic.get(name, frozenset(range(x.dim())))
        if beyond := [axis for axis in sorted(axes) if axis >= x.dim()]:
            have = f"its dimensions are 0 to {x.dim() - 1}" if x.dim() else "it has none"
            raise InvalidConfig(
                f"dynamic[{name!r}] names dimension {beyond[0]}, but {name} has shape "
                f"{tuple(x.shape)}: {have}"
            )
        found.append(axes)
    return found


_OPEN = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


def _arguments(signature: inspect.Signature) -> list[str]:
    """The names of its arguments in a call, as far as they are known."""
    return [
        f"args[{i}]" if p.kind is p.POSITIONAL_ONLY else name
        for i, (name, p) in enumerate(signature.parameters.items())
        if p.kind not in _OPEN
    ]


def _argument(name: str) -> str:
    """The argument that an input is part of: ``batch['x']`` -> ``batch``."""
    parts = name.split("[")
    return "[".join(parts[: 2 if parts[0] == "args" else 1])


def _unknown(name: str, known: list[str]) -> InvalidConfig:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:8]
    return InvalidConfig(
        f"dynamic names {name!r}, which is no tensor among the model's inputs; did you mean "
        f"{', '.join(close)}?"
    )
