"""A line on stderr while one capture takes long; nothing where it is quick."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["Progress", "progress"]

DELAY = 5.0
"""Seconds until it is shown."""
INTERVAL = 1.0
"""Seconds between two looks at the clock."""


class Progress:
    """What is under way, shown by a tqdm bar.

    Args:
        bar: it has no steps; it only shows a description and the time.
        what: what is captured.
    """

    def __init__(self, bar: Any, what: str) -> None:
        self._bar, self._what = bar, what

    def say(self, step: str) -> None:
        """Show another step from now on."""
        self._bar.set_description_str(f"capturing {self._what}: {step}", refresh=False)
        self.tick()

    def tick(self) -> None:
        """Show how much time has passed, at most once in each interval."""
        self._bar.update(0)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Progress]:
    """A line for what runs inside; it is removed at the end."""
    from tqdm import tqdm

    with tqdm(
        bar_format="{desc} [{elapsed}]",
        delay=DELAY,
        miniters=0,
        mininterval=INTERVAL,
        leave=False,
    ) as bar:
        yield Progress(bar, what)
