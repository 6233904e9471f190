"""Names of layers, titles and decibels as tables and pages show them."""

from __future__ import annotations

import math
import re

__all__ = ["decibels", "printable", "shortened"]


def shortened(name: str, most: int) -> str:
    """A name in at most so many columns, without its middle: both ends tell layers apart.

    >>> shortened("encoder.layer.0.attention.output.dense", 20)
    'encoder....put.dense'
    """
    if len(name) <= most:
        return name
    head = (most - 3) // 2
    return f"{name[:head]}...{name[len(name) - (most - 3 - head) :]}"


def printable(text: str) -> str:
    """Text that UTF-8 can hold: halves of characters become U+FFFD.

    >>> printable("a" + chr(0xD800)) == "a" + chr(0xFFFD)
    True
    """
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def decibels(value: float, unit: str = " dB") -> str:
    """An SQNR in words; ``-inf`` is noise where the float model gives 0 alone.

    >>> decibels(21.26), decibels(math.inf), decibels(-math.inf), decibels(math.nan)
    ('21.3 dB', 'equal', 'no signal', 'not a number')
    """
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "equal" if value > 0 else "no signal"
    return f"{value:.1f}{unit}"
