"""Python's search for garbage, which walks through every node of every graph, made to wait."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

__all__ = ["no_collection"]

_LOCK = threading.Lock()
_users: list[bool] = []
"""For each thread inside: whether the collector ran before the first of them came."""


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Work that makes many objects and leaves little garbage; threads may overlap in it.

    >>> with no_collection(), no_collection():
    ...     gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    with _LOCK:
        _users.append(_users[0] if _users else gc.isenabled())
        gc.disable()
    try:
        yield
    finally:
        with _LOCK:
            if _users.pop() and not _users:
                gc.enable()
