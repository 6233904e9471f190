"""A line on stderr while one capture takes long; nothing where it is quick."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["Progress", "hidden", "progress"]

DELAY = 5.0
"""Seconds until it is shown."""
INTERVAL = 1.0
"""Seconds between two looks at the clock."""


def hidden(wanted: bool = True) -> bool:
    """Whether a progress bar is not to be shown.

    Bars go to a terminal or a notebook, and to no file or pipe; ``TQDM_DISABLE=1`` in the
    environment hides them, as it does all bars of tqdm.

    Args:
        wanted: whether the caller asked for one.

    >>> hidden(wanted=False)
    True
    """
    if not wanted or os.environ.get("TQDM_DISABLE", "0").lower() not in ("", "0", "false"):
        return True
    return not ("ipykernel" in sys.modules or _is_terminal(sys.stderr))


def _is_terminal(stream: Any) -> bool:
    """Services have no stderr, or one that knows nothing of terminals, or a closed one."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


class Progress:
    """What is under way, shown by a tqdm bar.

    Args:
        bar: it has no steps; it only shows a description and the time.
        what: what is captured.
        doing: what is done with it.
    """

    def __init__(self, bar: Any, what: str, doing: str) -> None:
        self._bar, self._what = bar, f"{doing} {what}"

    def say(self, step: str) -> None:
        """Show another step from now on."""
        self._bar.set_description_str(f"{self._what}: {step}", refresh=False)
        self.tick()

    def tick(self) -> None:
        """Show how much time has passed, at most once in each interval."""
        self._bar.update(0)


@contextlib.contextmanager
def progress(what: str, doing: str = "capturing") -> Iterator[Progress]:
    """A line for what runs inside; it is removed at the end."""
    from tqdm import tqdm

    with tqdm(
        bar_format="{desc} [{elapsed}]",
        delay=DELAY,
        disable=hidden(),
        miniters=0,
        mininterval=INTERVAL,
        leave=False,
    ) as bar:
        bar.set_description_str(f"{doing} {what}", refresh=False)
        yield Progress(bar, what, doing)
