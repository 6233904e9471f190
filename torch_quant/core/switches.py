"""Switches of the whole process that are off for as long as anybody wants that."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

__all__ = ["NO_COLLECTION", "Off"]


class Off:
    """A context in which a switch is off, in whatever threads it is entered, and however often.

    Args:
        enabled: whether the switch is on.
        set_enabled: sets it.

    >>> with NO_COLLECTION, NO_COLLECTION:
    ...     gc.isenabled(), NO_COLLECTION.wanted()
    (False, True)
    >>> gc.isenabled()
    True
    """

    def __init__(self, enabled: Callable[[], bool], set_enabled: Callable[[bool], None]) -> None:
        self._enabled, self._set = enabled, set_enabled
        self._lock, self._users, self._before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before = self._enabled()
                self._set(False)
            self._users += 1

    def wanted(self) -> bool:
        """Whether it is on, but for those inside."""
        with self._lock:
            return self._before if self._users else self._enabled()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._set(self._before)


NO_COLLECTION = Off(gc.isenabled, lambda enabled: gc.enable() if enabled else gc.disable())
"""Python does not look for garbage, for which it walks through every node of every graph."""
