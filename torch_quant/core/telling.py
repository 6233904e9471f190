"""What a weight method tells the user: at which layer, and the same of many layers once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar

__all__ = ["at_site", "tell", "told_together"]

logger = logging.getLogger("torch_quant")

_SITE: ContextVar[str] = ContextVar("torch_quant_site", default="a weight")
_TOLD: ContextVar[dict[str, list[str]] | None] = ContextVar("torch_quant_told", default=None)
_SHOWN = 3


@contextlib.contextmanager
def at_site(name: str) -> Iterator[None]:
    """While a weight of this site is rounded: what is told then is told of it."""
    token = _SITE.set(name)
    try:
        yield
    finally:
        _SITE.reset(token)


def tell(what: str) -> None:
    """Log a warning of the site whose weight is rounded at the moment.

    Args:
        what: the fact, what was done about it, and the fix; the same words for every site, since
            those told alike under :func:`told_together` become one warning.

    >>> with at_site("head"):
    ...     tell("no calibration data reached it")  # logs "head: no calibration data reached it"
    """
    told = _TOLD.get()
    if told is None:
        logger.warning("%s: %s", _SITE.get(), what)
    elif _SITE.get() not in told.setdefault(what, []):
        told[what].append(_SITE.get())


@contextlib.contextmanager
def told_together() -> Iterator[None]:
    """While a whole model is quantized: each warning comes once, at the end, with all its sites."""
    told: dict[str, list[str]] = {}
    token = _TOLD.set(told)
    try:
        yield
    finally:
        _TOLD.reset(token)
        for what, sites in told.items():
            rest = f" and {len(sites) - _SHOWN} more" if len(sites) > _SHOWN else ""
            logger.warning("%s%s: %s", ", ".join(sites[:_SHOWN]), rest, what)
