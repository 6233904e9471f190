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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from torch_quant.errors import CaptureFailed
from torch_quant.graph.calls import Call
from torch_quant.graph.progress import Progress
from torch_quant.graph.shapes import ShapeContract
from torch_quant.graph.verification import batch_size

__all__ = ["Freedom", "OutOfBudget", "limited"]

logger = logging.getLogger("torch_quant")
T = TypeVar("T")

SECONDS = 20.0
"""Processor time for an attempt with every size free."""
_SHARES = {
    "every size": 1.0,
    "what dynamic= names": 1.0,
    "the batch and the sizes that varied": 0.5,
    "the batch size": 3.0,
}
"""What an attempt with fewer free sizes may take, in units of that."""

_EVERY = 64
"""Expressions between two looks at the clock."""


class OutOfBudget(BaseException):
    """The attempt took too long. (No ``Exception``: what is under way must not catch it.)"""


@contextlib.contextmanager
def limited(seconds: float, tick: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Stop what runs inside, in this thread, once it has made sympy's expressions for too long.

    Args:
        seconds: of this thread's processor time, which other work on the machine does not change.
        tick: called now and then.

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
                tick()
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
        wanted: the dimensions of each tensor that may be free at all; None for all.
        adjustable: whether the user could have given ``wanted``.
        shown: tells the user what is under way.
    """

    def __init__(
        self,
        call: Call,
        earlier: list[ShapeContract],
        reduced: bool,
        wanted: Sequence[frozenset[int]] | None = None,
        *,
        adjustable: bool = False,
        shown: Progress | None = None,
    ) -> None:
        self._call, self._adjustable, self._shown = call, adjustable, shown
        every = [frozenset(range(x.dim())) for x in call.tensors]
        allowed = every if wanted is None else list(wanted)
        batch = batch_size(call)
        self.batch = all(
            0 in free
            for x, free in zip(call.tensors, allowed, strict=True)
            if x.dim() and x.shape[0] == batch
        )
        """Whether the batch size may be free."""
        first = [
            free & {0} if x.dim() and x.shape[0] == batch else frozenset()
            for x, free in zip(call.tensors, allowed, strict=True)
        ]
        varied = [
            {
                n
                for n, size in enumerate(x.shape)
                if any(_differs(c.shapes[i][n], size) for c in earlier)
            }
            for i, x in enumerate(call.tensors)
        ]
        both = [a | (b & free) for a, b, free in zip(first, varied, allowed, strict=True)]
        most = "every size" if allowed == every else "what dynamic= names"
        levels = [] if reduced else [(most, allowed)]
        levels += [("the batch and the sizes that varied", both), ("the batch size", first)]
        self._levels = [
            level
            for n, level in enumerate(levels)
            if n == len(levels) - 1 or level[1] != levels[n + 1][1]
        ]
        self.reduced = reduced

    def attempt(self, export: Callable[[list[frozenset[int]]], T]) -> T:
        """What ``export`` gives, called with the free axes of each tensor.

        Raises:
            CaptureFailed: not even the batch size could be left free in the time there is.
        """
        while self._levels:
            name, axes = self._levels[0]
            seconds = SECONDS * _SHARES[name]
            if self._shown:
                self._shown.say(f"{name} free, {seconds:g} s of processor time at most")
            try:
                with limited(seconds, self._shown.tick if self._shown else lambda: None):
                    return export(axes)
            except OutOfBudget:
                del self._levels[0]
                self.reduced = True
                self._tell(name, axes, seconds)
        raise CaptureFailed(
            "symbolic sizes took too long to reason about, the batch size alone too"
        )

    def _tell(self, name: str, before: list[frozenset[int]], seconds: float) -> None:
        if not self._levels:
            return
        after = self._levels[0][1]
        names, tensors = self._call.names(), self._call.tensors
        changes = [
            change
            for change in zip(names, tensors, before, after, strict=True)
            if change[2] != change[3]
        ]
        fixed = [
            f"{tensor}.shape[{axis}] = {x.shape[axis]}"
            for tensor, x, old, new in changes
            for axis in sorted(old - new)
        ]
        known = {tensor: sorted(new) for tensor, _, _, new in changes}
        advice = f". To begin there next time: Quantizer(..., dynamic={known})"
        logger.warning(
            "capturing with %s free took more than %g s of symbolic reasoning; it goes on with %s "
            "fixed. Run every such size that is to be served through the proxy of "
            "quantizer.calib(model): each is captured when it is first seen%s",
            name,
            seconds,
            ", ".join(fixed),
            advice if self._adjustable else "",
        )


def _differs(known: int | str, size: int) -> bool:
    return isinstance(known, int) and known != size
