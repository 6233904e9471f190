"""Memory of a quantizer that a quantized model computes with, in the place of a copy.

Codes of a large model are not kept twice. A quantizer lends what nobody else can reach, so that
one living model at a time borrows it. Before new values are loaded into that model, the quantizer
moves to memory of its own. Whoever writes to it otherwise is noticed by its content.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Lender", "by_itself", "content", "move_lenders", "unshared", "was_changed"]

_LOANS: Any = WeakIdKeyDictionary()
"""A tensor of a quantizer that was lent -> a list of its content then, a new one for each loan."""
_BORROWED: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
"""Tensors of living models that are lent, by identity."""
_LOCK = Lock()
"""Held while a tensor is lent, and while a quantizer moves."""


def content(x: Tensor) -> tuple[int, int, torch.dtype]:
    """What tensors of equal values in the same order agree on, whatever their shapes.

    >>> content(torch.zeros(2, 3)) == content(torch.zeros(6))
    True
    """
    values: Any = x.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(values), x.numel(), x.dtype


def was_changed(x: Tensor) -> bool:
    """Whether a tensor of a quantizer has other values than when it was lent.

    Its version does not tell: what is written through ``.data`` or an array leaves that as it is.
    """
    loan = _LOANS.get(x)
    return loan is not None and bool(loan[0] != content(x))


def by_itself(x: Tensor) -> Tensor:
    """``x``, or the same values as no view of another tensor, which would stay alive with it.

    >>> by_itself(torch.ones(2, 3)[0])._base is None
    True
    """
    return x if x._base is None else x.detach()


def unshared(x: Tensor) -> Tensor:
    """:func:`by_itself`, or a copy if others refer to its memory, who may write to it.

    >>> x = torch.ones(2)
    >>> view = x[:]
    >>> unshared(torch.ones(2)[:])._base is None, unshared(x).data_ptr() == view.data_ptr()
    (True, False)
    """
    viewed = 0 if x._base is None else 1
    return by_itself(x) if _uses(x) <= _alone() + viewed else x.detach().clone()


def _alone() -> int:
    """What :func:`_uses` gives where nobody else refers to the memory."""
    return _uses(torch.empty(1, device="cpu"))


def _uses(x: Tensor) -> int:
    """How many refer to the memory of ``x``, itself and this question among them."""
    storage = x.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata))


def _storages(tensors: Iterable[Tensor | None]) -> set[int]:
    """Identities of the memory of those that lie on a CPU."""
    return {
        x.untyped_storage()._cdata
        for x in tensors
        if x is not None and x.layout == torch.strided and x.device.type == "cpu"
    }


class Lender:
    """Gives one quantized model its tensors, where a quantizer holds equal ones.

    It is made before the model is: what anybody else refers to by then, such as another model, what
    that one's ``state_dict`` gave, or an array, is not lent.

    Args:
        held: the quantizer's, which are never written to.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        every = list(held)
        self._storages = {x.untyped_storage()._cdata for x in every}
        alone = _alone()
        self._held = [
            x
            for x in every
            if x.device.type == "cpu" and not x.is_inference() and _uses(x) == alone
        ]
        self._loans = [_LOANS.get(x) for x in self._held]
        self._sizes = {(x.numel(), x.dtype) for x in self._held}
        self._known: dict[Any, int] | None = None
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
            held = enumerate(self._held)
            self._known = {content(each): i for i, each in held if each.is_contiguous()}
        known_content = known_content or content(x)
        number = self._known.get(known_content)
        made = None if number is None else self._lent(number, x, known_content)
        return self.own(x) if made is None else made

    def _lent(self, number: int, x: Tensor, its_content: Any) -> Tensor | None:
        """What is held, in the shape of ``x``; None if it was lent meanwhile or has other values.

        It is no view, of which PyTorch would keep what is viewed.
        """
        held, before = self._held[number], self._loans[number]
        with _LOCK:
            unchanged = before is None or before[0] == its_content
            if not unchanged or _LOANS.get(held) is not before:
                return None
            made = held.detach().view(x.shape).detach()
            if not torch.equal(made, x):
                return None
            _LOANS[held] = [its_content]
            _BORROWED[id(made)] = made
        return made


def move_lenders(model: nn.Module) -> None:
    """Give quantizers copies of what they have lent a model, before something is written to it.

    The model keeps the memory: other parts of it, and whoever has its ``state_dict``, go along.

    >>> held, model = torch.arange(6), nn.Module()
    >>> model.register_buffer("codes", Lender([held]).lent(torch.arange(6)))
    >>> move_lenders(model)
    >>> model.codes.zero_(), held
    (tensor([0, 0, 0, 0, 0, 0]), tensor([0, 1, 2, 3, 4, 5]))
    """
    if not _LOANS:
        return
    theirs: set[int] = set()
    for module in model.modules():
        theirs |= _storages(module._buffers.values()) | _storages(module._parameters.values())
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        for held in list(_LOANS.keys()):
            if held.untyped_storage()._cdata in theirs:
                held.data = held.clone()
