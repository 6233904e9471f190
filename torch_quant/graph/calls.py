"""A call of a module as data: its tensors, and everything that decides the graph it takes."""

from __future__ import annotations

import builtins
import inspect
import keyword
import math
import re
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torch_quant.errors import CaptureFailed

__all__ = ["Call", "bind", "flatten_call", "identifiers"]

_CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call, flattened: ``leaves`` in ``spec``'s order, tensors at ``positions``.

    ``source`` is what the caller gave, ``(args, kwargs)``; None for a call that was made up.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    positions: tuple[int, ...]
    source: Any = field(default=None, repr=False, compare=False)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.leaves[i] for i in self.positions)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a graph may not vary in: nesting, constants, and each tensor's dtype and rank."""
        return (
            repr(self.spec),
            tuple(
                (x.dtype, x.dim()) if isinstance(x, Tensor) else (type(x), x) for x in self.leaves
            ),
        )

    def rebuild(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` of the same call with other tensors."""
        args, kwargs = pytree.tree_unflatten(self.with_tensors(tensors).leaves, self.spec)
        return args, kwargs

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Call:
        """The same call with other tensors."""
        leaves = list(self.leaves)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        return Call(tuple(leaves), self.spec, self.positions)

    def names(self) -> list[str]:
        """A readable name for each tensor, such as ``pixel_values`` or ``args[0]``."""
        paths = [path for path, _ in pytree.tree_flatten_with_path(self.rebuild(self.tensors))[0]]
        return [_path_name(paths[i]) for i in self.positions]

    def describe(self) -> list[str]:
        """Name, shape and dtype of each tensor and the value of what is none, for messages."""
        paths = pytree.tree_flatten_with_path(self.rebuild(self.tensors))[0]
        found = [f"{_path_name(path)}: {_facts(leaf)}" for path, leaf in paths if leaf is not None]
        return [*found[:_MOST], f"and {len(found) - _MOST} more"] if len(found) > _MOST else found

    def distance(self, signature: tuple[Any, ...]) -> float:
        """How far this call is from that signature; infinite if it has other inputs.

        A tensor of another dtype or rank counts one, a tensor in the place of a constant two.
        """
        (nesting, kinds), (mine, found) = signature, self.signature
        if nesting != mine:
            return math.inf
        pairs = [pair for pair in zip(kinds, found, strict=True) if pair[0] != pair[1]]
        tensors = [all(isinstance(first, torch.dtype) for first, _ in pair) for pair in pairs]
        return float(2 * len(pairs) - sum(tensors))

    def difference(self, signature: tuple[Any, ...]) -> str:
        """The first input in which this call is not of that signature; empty if they are others."""
        nesting, kinds = signature
        if nesting != repr(self.spec):
            return ""
        paths = pytree.tree_flatten_with_path(self.rebuild(self.tensors))[0]
        for (path, leaf), kind in zip(paths, kinds, strict=True):
            first, second = kind
            if isinstance(leaf, Tensor) and isinstance(first, torch.dtype):
                if leaf.dtype != first:
                    return f"{_path_name(path)} is {leaf.dtype}; it was captured for {first}"
                if leaf.dim() != second:
                    return (
                        f"{_path_name(path)} has {leaf.dim()} dimensions; it was captured for "
                        f"{second}"
                    )
            elif isinstance(leaf, Tensor) or kind != (type(leaf), leaf):
                wanted = "a tensor" if isinstance(first, torch.dtype) else repr(second)
                found = "a tensor" if isinstance(leaf, Tensor) else repr(leaf)
                return f"{_path_name(path)} is {found}; it was captured for {wanted}"
        return ""


_TAKEN = frozenset({"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"}) | (
    frozenset(dir(builtins)) - {"input"}
)
"""Names that code generated from a graph means something else by."""


def identifiers(names: list[str], taken: Container[str] = ()) -> list[str]:
    """``names`` as arguments of code generated from a graph, all different and none ``taken``.

    >>> identifiers(["x", "past[0]['key']", "past[0][key]", "slice"])
    ['x', 'past_0_key', 'input_2', 'input_3']
    """
    found: list[str] = []
    for i, name in enumerate(names):
        plain = re.sub(r"\W+", "_", name).strip("_")
        wrong = not plain.isidentifier() or keyword.iskeyword(plain) or plain in _TAKEN
        name = f"input_{i}" if wrong or plain in found or plain in taken else plain
        while name in found or name in taken:
            name += "_"
        found.append(name)
    return found


_MOST = 8
"""Inputs that a message lists."""


def _facts(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
    return repr(leaf)


def _key(entry: Any) -> Any:
    """The index, dictionary key or attribute name of a step into a pytree."""
    for name in ("idx", "key", "name"):
        if hasattr(entry, name):
            return getattr(entry, name)
    return entry


def _path_name(path: tuple[Any, ...]) -> str:
    """``(1, 'mask', 0)`` -> ``mask[0]``; ``(0, 2)`` -> ``args[2]``."""
    side, first, *rest = [_key(entry) for entry in path]
    name = f"args[{first}]" if side == 0 else str(first)
    return name + "".join(f"[{key!r}]" for key in rest)


def bind(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One normal form for all ways of writing a call: what can go by name goes by name.

    Raises:
        CaptureFailed: the arguments do not fit the signature.
    """
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
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.POSITIONAL_ONLY:
            positional.append(value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return tuple(positional), named


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Flatten a bound call.

    Raises:
        CaptureFailed: an input is neither a tensor nor a plain constant.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *_CONSTANTS)):
            raise CaptureFailed(
                f"an input of type {type(leaf).__module__}.{type(leaf).__qualname__} is neither a "
                "tensor (torch.from_numpy makes one of an array), a constant nor a registered "
                "pytree; a module inside the model that takes such an input is captured in pieces"
            )
    positions = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    return Call(tuple(leaves), spec, positions, (args, kwargs))
