"""Memory of a quantizer that a quantized model computes with, in the place of a copy.

Codes of a large model are not kept twice. One living model at a time borrows a tensor, and gets
memory of its own before new values are loaded into it. Whoever writes to it otherwise is noticed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Lender", "content", "take_back", "was_changed"]

_LOANS: Any = WeakIdKeyDictionary()
"""A tensor of a quantizer -> the tensor that was last lent in its place, and its version then."""
_BORROWED: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
"""Tensors of living models that are lent, by identity."""


def content(x: Tensor) -> tuple[int, int, torch.dtype]:
    """What tensors of equal values in the same order agree on, whatever their shapes.

    >>> content(torch.zeros(2, 3)) == content(torch.zeros(6))
    True
    """
    values: Any = x.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(values), x.numel(), x.dtype


def was_changed(x: Tensor) -> bool:
    """Whether a tensor of a quantizer was written to since it was first lent."""
    loan = _LOANS.get(x)
    return loan is not None and bool(loan[1] != x._version)


def _lent(x: Tensor, shape: torch.Size) -> Tensor | None:
    """A tensor of this shape over the memory of ``x``; None if a living model has one."""
    loan = _LOANS.get(x)
    if loan is not None and (loan[0]() is not None or loan[1] != x._version):
        return None
    made = x.view(shape)
    _LOANS[x] = ref(made), x._version
    _BORROWED[id(made)] = made
    return made


class Lender:
    """Gives one quantized model its tensors, where a quantizer holds equal ones.

    Args:
        held: the quantizer's, which are never written to.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        every = list(held)
        self._storages = {x.untyped_storage()._cdata for x in every}
        self._held = [x for x in every if x.device.type == "cpu" and not x.is_inference()]
        self._sizes = {(x.numel(), x.dtype) for x in self._held}
        self._known: dict[Any, Tensor] | None = None
        self._own: dict[Any, Tensor] = {}

    def own(self, x: Tensor) -> Tensor:
        """``x``, or a copy where its memory is the quantizer's; the same one for the same tensor.

        >>> x = torch.ones(2)
        >>> Lender().own(x) is x, Lender([x]).own(x) is x
        (True, False)
        """
        if x.untyped_storage()._cdata not in self._storages or _BORROWED.get(id(x)) is x:
            return x
        place = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype)
        if place not in self._own:
            self._own[place] = x.clone()
        return self._own[place]

    def lent(self, x: Tensor, known_content: Any = None) -> Tensor:
        """A tensor of the quantizer's with the values of ``x``, where it can be lent; else as own.

        Args:
            x: on a CPU.
            known_content: what :func:`content` gives for it, where the caller has asked.

        >>> held, mine = torch.arange(6), torch.arange(6).reshape(2, 3)
        >>> lender = Lender([held])
        >>> first, second = lender.lent(mine), Lender([held]).lent(mine)
        >>> first.data_ptr() == held.data_ptr(), second is mine
        (True, True)
        """
        fits = x.is_contiguous() and (x.numel(), x.dtype) in self._sizes
        if not fits or _BORROWED.get(id(x)) is x:
            return self.own(x)
        if self._known is None:
            self._known = {content(each): each for each in self._held if each.is_contiguous()}
        found = self._known.get(known_content or content(x))
        if found is None or not torch.equal(found.view(x.shape), x):
            return self.own(x)
        made = _lent(found, x.shape)
        return self.own(x) if made is None else made


def take_back(model: nn.Module) -> None:
    """Give a quantized model copies of what it has borrowed, before something is written to it.

    >>> held, model = torch.arange(6), nn.Module()
    >>> model.register_buffer("codes", Lender([held]).lent(torch.arange(6)))
    >>> take_back(model)
    >>> model.codes.data_ptr() == held.data_ptr(), torch.equal(model.codes, held)
    (False, True)
    """
    copies: dict[int, tuple[Tensor, Tensor]] = {}  # both live on, so that identities stay theirs
    for module in model.modules():
        for name, x in module._buffers.items():
            if x is None or _BORROWED.get(id(x)) is not x:
                continue
            if id(x) not in copies:
                copies[id(x)] = x, x.clone()
            module._buffers[name] = copies[id(x)][1]
