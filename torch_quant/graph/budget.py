"""A limit on how long one attempt at a capture may think about symbolic sizes.

On some hierarchical vision models (windows that are padded and merged at each stage) the
expressions of the image's sizes grow until sympy takes minutes. Nothing can stop it from outside,
so the thread that works checks its own clock where sympy makes expressions.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch_quant.errors import CaptureFailed
from torch_quant.graph.calls import Call
from torch_quant.graph.shapes import ShapeContract

__all__ = ["Freedom", "OutOfBudget", "limited"]

logger = logging.getLogger("torch_quant")
T = TypeVar("T")

SECONDS = 20.0
"""Processor time for an attempt with every size free."""
_SHARES = {"every size": 1.0, "the batch and the sizes that varied": 0.5, "the batch size": 3.0}
"""What an attempt with fewer free sizes may take, in units of that."""

_EVERY = 64
"""Expressions between two looks at the clock."""


class OutOfBudget(BaseException):
    """The attempt took too long. (No ``Exception``: what is under way must not catch it.)"""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Stop what runs inside, in this thread, once it has made sympy's expressions for too long.

    Args:
        seconds: of this thread's processor time, which other work on the machine does not change.

    Raises:
        OutOfBudget: it took longer.
    """
    from sympy.core.basic import Basic  # type: ignore[import-untyped]

    owner, deadline = threading.get_ident(), time.thread_time() + seconds
    original = Basic.__new__
    left = _EVERY

    def checked(cls: type, *args: Any) -> Any:
        nonlocal left
        if threading.get_ident() == owner:
            left -= 1
            if left <= 0:
                left = _EVERY
                if time.thread_time() > deadline:
                    raise OutOfBudget
        return original(cls, *args)

    Basic.__new__ = checked
    try:
        yield
    finally:
        Basic.__new__ = original


class Freedom:
    """Which dimensions the attempts at one capture leave free: fewer of them, once time is up.

    Args:
        call: the example.
        earlier: contracts of the module's graphs for calls of this kind, none of which serves it.
        reduced: whether one of those had to give up sizes.
    """

    def __init__(self, call: Call, earlier: list[ShapeContract], reduced: bool) -> None:
        self._call = call
        batch = next((x.shape[0] for x in call.tensors if x.dim()), 0)
        first: list[set[int]] = [
            {0} if x.dim() and x.shape[0] == batch else set() for x in call.tensors
        ]
        varied = [
            {
                n
                for n, size in enumerate(x.shape)
                if any(_differs(c.shapes[i][n], size) for c in earlier)
            }
            for i, x in enumerate(call.tensors)
        ]
        every = [set(range(x.dim())) for x in call.tensors]
        both = [a | b for a, b in zip(first, varied, strict=True)]
        self._levels = [] if reduced else [("every size", every)]
        if both != first:
            self._levels.append(("the batch and the sizes that varied", both))
        self._levels.append(("the batch size", first))
        self.reduced = reduced

    def attempt(self, export: Callable[[list[set[int]]], T]) -> T:
        """What ``export`` gives, called with the free axes of each tensor.

        Raises:
            CaptureFailed: not even the batch size could be left free in the time there is.
        """
        while self._levels:
            name, axes = self._levels[0]
            seconds = SECONDS * _SHARES[name]
            try:
                with limited(seconds):
                    return export(axes)
            except OutOfBudget:
                del self._levels[0]
                self.reduced = True
                self._tell(name, axes, seconds)
        raise CaptureFailed(
            "symbolic sizes took too long to reason about, the batch size alone too"
        )

    def _tell(self, name: str, before: list[set[int]], seconds: float) -> None:
        after: list[set[int]] = self._levels[0][1] if self._levels else [set() for _ in before]
        fixed = [
            f"{tensor}.shape[{axis}] = {x.shape[axis]}"
            for tensor, x, old, new in zip(
                self._call.names(), self._call.tensors, before, after, strict=True
            )
            for axis in sorted(old - new)
        ]
        logger.warning(
            "capturing with %s free took more than %g s of symbolic reasoning; it goes on with %s "
            "fixed. Run every such size that is to be served through the proxy of "
            "quantizer.calib(model): each is captured when it is first seen",
            name,
            seconds,
            ", ".join(fixed),
        )


def _differs(known: int | str, size: int) -> bool:
    return isinstance(known, int) and known != size
