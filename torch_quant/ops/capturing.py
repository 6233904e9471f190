"""What an operator wants of those who run and export float models; each says so in its own file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import fx

__all__ = ["Capturing", "exporting", "register_capturing", "restore_operators", "running"]


def _nothing(graph: fx.Graph) -> None:
    """For operators that leave no trace in a graph."""


@dataclass(frozen=True)
class Capturing:
    """What one operator wants while a model with it is captured.

    Args:
        running: a context for every run of the float model, exports included.
        exporting: a context for exports alone.
        restore: takes out of an exported graph what ``exporting`` brought into it.
    """

    running: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    exporting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    restore: Callable[[fx.Graph], None] = _nothing


_REGISTERED: list[Capturing] = []


def register_capturing(wish: Capturing) -> None:
    """Make known what an operator wants; for files of this room, and those who add operators.

    Args:
        wish: it changes the whole process while it lasts, so callers hold one lock around it.
    """
    _REGISTERED.append(wish)


@contextlib.contextmanager
def running() -> Iterator[None]:
    """What a float model runs in while it is looked at."""
    with contextlib.ExitStack() as entered:
        for wish in _REGISTERED:
            entered.enter_context(wish.running())
        yield


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """What a float model is exported in."""
    with contextlib.ExitStack() as entered:
        for wish in _REGISTERED:
            entered.enter_context(wish.running())
            entered.enter_context(wish.exporting())
        yield


def restore_operators(graph: fx.Graph) -> None:
    """Make an exported graph PyTorch's own again."""
    for wish in _REGISTERED:
        wish.restore(graph)
