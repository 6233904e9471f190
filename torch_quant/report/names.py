"""Names of layers in tables."""

from __future__ import annotations

__all__ = ["shortened"]


def shortened(name: str, most: int) -> str:
    """A name in at most so many columns, without its middle: both ends tell layers apart.

    >>> shortened("encoder.layer.0.attention.output.dense", 20)
    'encoder....put.dense'
    """
    if len(name) <= most:
        return name
    head = (most - 3) // 2
    return f"{name[:head]}...{name[len(name) - (most - 3 - head) :]}"
