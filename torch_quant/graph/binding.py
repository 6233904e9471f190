"""One normal form for all ways of writing a call."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import FunctionType, MethodType
from typing import Any

import torch

from torch_quant.errors import CaptureFailed
from torch_quant.graph.kinds import equal

__all__ = ["CallSignature", "bind", "signature_of"]

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_COMPARED = (type(None), bool, int, float, str, torch.dtype, torch.device)


class CallSignature(inspect.Signature):
    """A signature that binds fast, and knows what may be left out of a call.

    Args:
        decorated: another function stands before the one that has these defaults, and may do
            something else with an argument that is given than with one that is not.
        by_position: what stands behind the decorator has other names, so that arguments go by
            position.
    """

    def __init__(
        self,
        parameters: Sequence[inspect.Parameter] | None = None,
        *,
        return_annotation: Any = inspect.Signature.empty,
        decorated: bool = False,
        by_position: bool = False,
    ) -> None:
        super().__init__(parameters, return_annotation=return_annotation)
        self.decorated, self.by_position = decorated, by_position
        # All of it now: a compiler cannot follow the lock of a property that is computed once.
        every = list(self.parameters.values())
        kinds, named = [p.kind for p in every], [p for p in every if p.kind in _NAMED]
        by_name = [p.name for p in every if p.kind is not p.VAR_KEYWORD]
        self.names = tuple(by_name) if len(by_name) == len(named) else None
        """Its parameters, if all of them can go by name."""
        self.positional = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
        """How many can also go by position."""
        self.open = inspect.Parameter.VAR_KEYWORD in kinds
        """Whether it takes any other name."""
        self.required = frozenset(p.name for p in every if p.default is p.empty)
        """Parameters without a default."""
        constants = {p.name: p.default for p in named if _constant(p.default)}
        self.defaults: dict[str, Any] = {} if decorated else constants
        """Constants that an argument may be given as or left out, which is the same call."""

    def __reduce__(self) -> Any:
        parameters = list(self.parameters.values())
        return _made, (parameters, self.return_annotation, self.decorated, self.by_position)

    def with_positions(self) -> CallSignature:
        """The same for a function that takes other names than it shows."""
        return _made(list(self.parameters.values()), self.return_annotation, self.decorated, True)


def signature_of(forward: Callable[..., Any]) -> CallSignature:
    """The signature of a module's ``forward``; modules of one class share it."""
    if isinstance(forward, MethodType) and isinstance(forward.__func__, FunctionType):
        return _signature_of_method(forward.__func__)
    return _signature_of(forward)


@lru_cache(maxsize=1024)
def _signature_of_method(function: FunctionType) -> CallSignature:
    return _signature_of(MethodType(function, function))


def _signature_of(forward: Callable[..., Any]) -> CallSignature:
    given = inspect.signature(forward)
    decorated = hasattr(forward, "__wrapped__") or hasattr(forward, "__signature__")
    return _made(list(given.parameters.values()), given.return_annotation, decorated)


def _made(
    parameters: list[inspect.Parameter], result: Any, decorated: bool, by_position: bool = False
) -> CallSignature:
    return CallSignature(
        parameters, return_annotation=result, decorated=decorated, by_position=by_position
    )


def bind(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One normal form for all ways of writing a call: what can go by name goes by name.

    A constant that is given as its default is left out.

    Raises:
        CaptureFailed: the arguments do not fit the signature.
    """
    if not isinstance(signature, CallSignature):
        return _bind_slowly(signature, args, kwargs)
    names = signature.names
    if names is None or len(args) > signature.positional:
        return _bind_slowly(signature, args, kwargs)
    named = dict(zip(names[: len(args)], args, strict=True))
    taken = 0
    for name in names[len(args) :]:
        if name in kwargs:
            named[name] = kwargs[name]
            taken += 1
        elif name in signature.required:
            return _bind_slowly(signature, args, kwargs)
    if taken < len(kwargs):
        if not signature.open or any(name in kwargs for name in names[: len(args)]):
            return _bind_slowly(signature, args, kwargs)
        named.update((name, value) for name, value in kwargs.items() if name not in named)
    for name, default in signature.defaults.items():
        if name in named and _same(named[name], default):
            del named[name]
    return _by_position(signature, named) if signature.by_position else ((), named)


def _by_position(
    signature: CallSignature, named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first arguments by position, as far as they are given without a gap."""
    names = list(signature.parameters)[: signature.positional]
    leading = list(itertools.takewhile(named.__contains__, names))
    return tuple(named.pop(name) for name in leading), named


def _bind_slowly(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        return args, dict(kwargs)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureFailed(
            f"the inputs do not fit forward{signature}: {error}; got {len(args)} positional and "
            f"the keywords {sorted(kwargs)}"
        ) from error
    positional: list[Any] = []
    named: dict[str, Any] = {}
    defaults = getattr(signature, "defaults", {})
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.POSITIONAL_ONLY:
            positional.append(value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif name not in defaults or not _same(value, defaults[name]):
            named[name] = value
    return tuple(positional), named


def _constant(value: Any) -> bool:
    return all(map(_constant, value)) if type(value) is tuple else isinstance(value, _COMPARED)


def _same(value: Any, default: Any) -> bool:
    if value is default:
        return True
    if type(value) is not type(default):
        return False
    if type(value) is tuple:
        return len(value) == len(default) and all(map(_same, value, default))
    return equal(value, default)
