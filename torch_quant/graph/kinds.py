"""Kinds of calls: what decides which graph serves a call, apart from sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torch_quant.graph.trees import pack_tree, unpack_tree

if TYPE_CHECKING:
    from torch_quant.graph.calls import Call

__all__ = ["Kind", "Number", "Unread", "equal", "fits", "fits_a_tensor", "wanted"]


class Number:
    """In a :class:`Kind`: a Python number that the graph takes as a 0-dim tensor."""


class Unread:
    """In a :class:`Kind`: a constant whose value nothing in the module reads."""


@dataclass(frozen=True)
class Kind:
    """What a graph may not vary in: nesting, constants, and each tensor's dtype and rank.

    Args:
        nesting: how the leaves nest.
        leaves: for each leaf (dtype, rank), (type, value), (:class:`Number`, type) or
            (:class:`Unread`, type).
        names: of the leaves.
        spec: what ``nesting`` is the text of.
    """

    nesting: str
    leaves: tuple[tuple[Any, Any], ...]
    names: tuple[str, ...] = field(default=(), compare=False, repr=False)
    spec: pytree.TreeSpec | None = field(default=None, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        packed = None if self.spec is None else pack_tree(self.spec)
        return {
            "nesting": self.nesting, "leaves": self.leaves, "names": self.names, "spec": packed
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        packed = state["spec"]
        self.__dict__.update(state | {"spec": None if packed is None else unpack_tree(packed)})

    @cached_property
    def _tensors(self) -> tuple[list[int], list[torch.dtype], list[int]]:
        """Positions, dtypes and ranks of the tensors."""
        found = [(i, *leaf) for i, leaf in enumerate(self.leaves) if _is_tensor(leaf)]
        return [i for i, _, _ in found], [d for _, d, _ in found], [rank for *_, rank in found]

    @cached_property
    def _others(self) -> list[tuple[int, Any, Any]]:
        return [(i, *leaf) for i, leaf in enumerate(self.leaves) if not _is_tensor(leaf)]

    @property
    def numbers(self) -> list[int]:
        """Which of a graph's inputs stand for numbers."""
        kinds = [leaf for leaf in self.leaves if leaf[0] is Number or _is_tensor(leaf)]
        return [place for place, (first, _) in enumerate(kinds) if first is Number]

    @cached_property
    def _positions_of_numbers(self) -> frozenset[int]:
        return frozenset(i for i, first, _ in self._others if first is Number)

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """The tensors of a call, None if it is of another kind or has a number for the graph.

        Says the same as :meth:`accept`, in steps that ``torch.compile`` can follow.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.spec or len(leaves) != len(self.leaves):
            return None
        found = []
        for leaf, (first, second) in zip(leaves, self.leaves, strict=True):
            if isinstance(leaf, Tensor):
                if leaf.dtype != first or leaf.dim() != second:
                    return None
                found.append(leaf)
            elif first is Number or not fits(leaf, first, second):
                return None
        return found

    def accept(self, call: Call) -> Call | None:
        """``call`` as a graph of this kind takes it, or None if it is of another kind."""
        if call.nesting != self.nesting:
            return None
        if call.numbers:
            call = call.narrowed()
        positions, dtypes, ranks = self._tensors
        if list(call.positions) != positions:
            return None
        found, shapes = call.facts
        if found != dtypes or list(map(len, shapes)) != ranks:
            return None
        for i, first, second in self._others:
            if not fits(call.leaves[i], first, second):
                return None
        return call.widened(self._positions_of_numbers) if self._positions_of_numbers else call


def _is_tensor(leaf: tuple[Any, Any]) -> bool:
    return isinstance(leaf[0], torch.dtype)


def fits(value: Any, first: Any, second: Any) -> bool:
    """Whether a constant is what a :class:`Kind` has in its place."""
    if first is Number:
        return type(value) is second and fits_a_tensor(value)
    if first is Unread:
        return type(value) is second
    return type(value) is first and equal(value, second)


def fits_a_tensor(number: int | float) -> bool:
    """Whether a graph can take it as a 0-dim tensor: not an int of more than 64 bits.

    >>> fits_a_tensor(2**63 - 1), fits_a_tensor(2**63), fits_a_tensor(1e300)
    (True, False, True)
    """
    return isinstance(number, float) or -(2**63) <= number < 2**63


def equal(x: Any, y: Any) -> bool:
    """Whether two constants of one type are the same; 0.0 and -0.0 are not, two NaNs are."""
    if type(x) in (float, complex):
        return repr(x) == repr(y)
    return bool(x == y)


def wanted(first: Any, second: Any) -> str:
    """What a :class:`Kind` has in a place, for messages."""
    if isinstance(first, torch.dtype):
        return "a tensor"
    return f"any {second.__name__}" if first is Number or first is Unread else repr(second)
