"""What a convolution reads for each of its results: a window that moves over the image."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Window"]


@dataclass(frozen=True)
class Window:
    """Where the windows of a convolution lie; a number for each spatial dimension.

    Args:
        kernel: how many elements a window has.
        stride: how far apart windows are.
        before: zeros put around the image, at the beginning of each dimension.
        after: the same at its end.
        dilation: how far apart the elements of a window are.
        groups: into how many parts the channels are divided, each convolved by itself.

    >>> Window((3, 3), (1, 1), (1, 1), (1, 1), (1, 1), 8).elements
    9
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def elements(self) -> int:
        """How many elements of each channel a window has."""
        return math.prod(self.kernel)

    def places(self, image: tuple[int, ...]) -> tuple[int, ...]:
        """How many windows an image of that size has, by dimension.

        >>> Window((3,), (2,), (1,), (1,), (1,)).places((8,))
        (4,)
        """
        sides = zip(
            image, self.kernel, self.stride, self.before, self.after, self.dilation, strict=True
        )
        return tuple(
            max(0, (size + before + after - dilation * (kernel - 1) - 1) // stride + 1)
            for size, kernel, stride, before, after, dilation in sides
        )

    def __str__(self) -> str:
        options = [
            f"{name}={'x'.join(map(str, value))}"
            for name, value, plain in (
                ("stride", self.stride, 1), ("before", self.before, 0), ("after", self.after, 0),
                ("dilation", self.dilation, 1),
            )
            if any(each != plain for each in value)
        ]  # fmt: skip
        groups = [f"groups={self.groups}"] if self.groups > 1 else []
        return ", ".join(["x".join(map(str, self.kernel)), *options, *groups])
