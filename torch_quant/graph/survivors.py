"""Tensors that a call leaves where nothing but the model's own code finds them.

A global, a closure, an attribute of a class: while a model is exported its tensors hold no values,
and one of them would stand there afterwards, for all later calls to read.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torch_quant.graph.foreign import see_higher_order

__all__ = ["Survivors"]


class Survivors(TorchDispatchMode):
    """Notes the memory that operators make while it is entered.

    >>> import torch
    >>> with Survivors() as made:
    ...     kept = torch.ones(2) + 1
    >>> del kept
    >>> made.exist()
    False
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._made: list[StorageWeakRef] = []
        see_higher_order(Survivors)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        made = (each for each in _storages(result) if each._cdata not in given)
        self._made += map(StorageWeakRef, made)
        return result

    def exist(self) -> bool:
        """Whether anything still holds some of it."""
        if self._any():
            gc.collect()  # objects that refer to each other are nobody's, and not gone yet
        return self._any()

    def _any(self) -> bool:
        self._made = [each for each in self._made if not each.expired()]
        return bool(self._made)


def _storages(value: Any) -> Iterator[Any]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            try:
                yield leaf.untyped_storage()
            except (NotImplementedError, RuntimeError):  # sparse tensors and the like have none
                continue
