"""A call of a module as data: its tensors, and everything that decides the graph it takes."""

from __future__ import annotations

import builtins
import keyword
import math
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torch_quant.graph.flatten import flatten
from torch_quant.graph.kinds import Kind, Number, Unread, fits, wanted
from torch_quant.graph.sealed import sealed_constant

__all__ = ["Call", "Uses", "flatten_call", "identifiers"]


_MOST = 8
"""Inputs that a message lists."""


@dataclass
class Uses:
    """What was seen of a call's numbers and constants while its module was exported."""

    symbols: dict[str, int] = field(default_factory=dict)  # of a number -> its position
    read: set[int] = field(default_factory=set)  # positions of constants


@dataclass(frozen=True)
class Call:
    """One call, flattened: ``leaves`` in ``spec``'s order, tensors at ``positions``.

    Args:
        leaves: tensors and constants.
        spec: how they nest.
        positions: where the tensors are.
        nesting: ``spec`` as text.
        source: what the caller gave, ``(args, kwargs)``; None for a call that was made up.
        numbers: those of the positions whose 0-dim tensor stands for a Python number.
        unread: the positions of constants that the module is taken not to read.
        uses: of these two, while the module is exported.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    positions: tuple[int, ...]
    nesting: str
    source: Any = field(default=None, repr=False, compare=False)
    numbers: frozenset[int] = frozenset()
    unread: frozenset[int] = frozenset()
    uses: Uses = field(default_factory=Uses, compare=False, repr=False)

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        leaves = self.leaves
        return tuple([leaves[i] for i in self.positions])

    @cached_property
    def facts(self) -> tuple[list[torch.dtype], list[torch.Size]]:
        """Dtypes and real shapes of the tensors, of which ``torch.jit.trace`` is told nothing."""
        tensors = self.tensors
        if torch.compiler.is_compiling() or (state := torch._C._get_tracing_state()) is None:
            return [x.dtype for x in tensors], [x.shape for x in tensors]
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            return [x.dtype for x in tensors], [x.shape for x in tensors]
        finally:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]

    @property
    def signature(self) -> Kind:
        """The kind of call it is."""
        leaves = tuple(self._kind(i, x) for i, x in enumerate(self.leaves))
        return Kind(self.nesting, leaves, tuple(self.paths()), self.spec)

    def _kind(self, position: int, leaf: Any) -> tuple[Any, Any]:
        if position in self.numbers:
            return Number, float if leaf.is_floating_point() else int
        if isinstance(leaf, Tensor):
            return leaf.dtype, leaf.dim()
        return (Unread, type(leaf)) if position in self.unread else (type(leaf), leaf)

    def widened(self, numbers: Iterable[int], unread: Iterable[int] = ()) -> Call:
        """The same call with the numbers at these positions as tensors, and constants unread."""
        leaves = list(self.leaves)
        for i in numbers:
            dtype = torch.float64 if isinstance(leaves[i], float) else torch.int64
            leaves[i] = torch.tensor(leaves[i], dtype=dtype)
        positions = tuple(sorted({*self.positions, *numbers}))
        return Call(
            tuple(leaves),
            self.spec,
            positions,
            self.nesting,
            self.source,
            frozenset(numbers),
            frozenset(unread),
        )

    def narrowed(self) -> Call:
        """The same call with its numbers as Python has them."""
        leaves = tuple(x.item() if i in self.numbers else x for i, x in enumerate(self.leaves))
        positions = tuple(i for i in self.positions if i not in self.numbers)
        return Call(leaves, self.spec, positions, self.nesting, self.source)

    def constant(self, position: int) -> Any:
        """The number or string at a position, as Python has it."""
        leaf = self.leaves[position]
        return leaf.item() if position in self.numbers else leaf

    def rebuild(
        self, tensors: tuple[Tensor, ...], sealed: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` of the same call with other tensors.

        Args:
            tensors: one for each position.
            sealed: put objects that raise :class:`ConstantRead` in the place of what is unread.
        """
        leaves = list(self.with_tensors(tensors).leaves)
        if sealed:
            self.uses.symbols.clear()  # of another attempt
        for i in self.numbers:
            leaves[i] = leaves[i].item()
            if isinstance(leaves[i], (torch.SymInt, torch.SymFloat)):
                self.uses.symbols[str(leaves[i].node.expr)] = i
        if sealed:
            for i in self.unread:
                leaves[i] = sealed_constant(leaves[i], i, partial(self.uses.read.add, i))
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Call:
        """The same call with other tensors."""
        leaves = list(self.leaves)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        return replace(self, leaves=tuple(leaves), source=None)

    def paths(self) -> list[str]:
        """A readable name for each leaf, such as ``pixel_values`` or ``args[0]``."""
        whole = pytree.tree_unflatten(list(self.leaves), self.spec)
        return [_path_name(path) for path, _ in pytree.tree_flatten_with_path(whole)[0]]

    def names(self) -> list[str]:
        """The names of the tensors."""
        names = self.paths()
        return [names[i] for i in self.positions]

    def describe(self) -> list[str]:
        """Name, shape and dtype of each tensor and the value of what is none, for messages."""
        found = [
            f"{name}: {_facts(leaf.item() if i in self.numbers else leaf)}"
            for i, (name, leaf) in enumerate(zip(self.paths(), self.leaves, strict=True))
            if leaf is not None
        ]
        return [*found[:_MOST], f"and {len(found) - _MOST} more"] if len(found) > _MOST else found

    def distance(self, kind: Kind) -> float:
        """How far this call is from that kind; infinite if it has other inputs.

        A tensor of another dtype or rank counts one, a tensor in the place of a constant two.
        """
        if kind.nesting != self.nesting:
            return math.inf
        steps = 0
        for leaf, (first, second) in zip(self.leaves, kind.leaves, strict=True):
            if isinstance(leaf, Tensor) and isinstance(first, torch.dtype):
                steps += (leaf.dtype, leaf.dim()) != (first, second)
            elif isinstance(leaf, Tensor) or not fits(leaf, first, second):
                steps += 2
        return steps

    def constants(self, kind: Kind) -> list[int]:
        """The positions of constants that are others in that kind of the same nesting."""
        return [
            i
            for i, (leaf, (first, second)) in enumerate(zip(self.leaves, kind.leaves, strict=False))
            if not isinstance(leaf, Tensor)
            and not isinstance(first, torch.dtype)
            and not fits(leaf, first, second)
        ]

    def difference(self, kind: Kind) -> str:
        """The first input in which this call is not of that kind; empty if it is of that kind."""
        if kind.nesting != self.nesting:
            return self._other_inputs(kind)
        for name, leaf, (first, second) in zip(self.paths(), self.leaves, kind.leaves, strict=True):
            if isinstance(leaf, Tensor) and isinstance(first, torch.dtype):
                if leaf.dtype != first:
                    return f"{name} is {leaf.dtype}; it was captured for {first}"
                if leaf.dim() != second:
                    return f"{name} has {leaf.dim()} dimensions; it was captured for {second}"
            elif isinstance(leaf, Tensor) or not fits(leaf, first, second):
                found = "a tensor" if isinstance(leaf, Tensor) else repr(leaf)
                return f"{name} is {found}; it was captured for {wanted(first, second)}"
        return ""

    def _other_inputs(self, kind: Kind) -> str:
        mine = self.paths()
        missing = [name for name in kind.names if name not in mine]
        more = [name for name in mine if name not in kind.names]
        if missing:
            given = f", and no {_listed(more)}" if more else ""
            return f"it was captured with {_listed(missing)}{given}"
        return f"it was captured without {_listed(more)}" if more else "the inputs nest otherwise"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more


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


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Flatten a bound call.

    Raises:
        CaptureFailed: an input is neither a tensor nor a plain constant.
    """
    leaves, known = flatten((args, kwargs))
    return Call(tuple(leaves), known.spec, known.positions, known.nesting, (args, kwargs))
