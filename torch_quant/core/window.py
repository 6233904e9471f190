"""What a convolution reads for each of its results: a window that moves over the image."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch_quant.errors import InvalidConfig

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

    @property
    def pointwise(self) -> bool:
        """Whether each pixel of an image is one window."""
        return (self.elements, *self.stride) == (1,) * (1 + len(self.stride)) and not any(
            (*self.before, *self.after)
        )

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

    @classmethod
    def read(cls, text: str) -> Window:
        """The window that ``str`` gives this of.

        Raises:
            InvalidConfig: it is of none.

        >>> Window.read("3x3, stride=2x2, before=1x1")
        Window(kernel=(3, 3), stride=(2, 2), before=(1, 1), after=(0, 0), dilation=(1, 1), groups=1)
        """
        kernel, *options = text.split(", ")
        parts = {"kernel": kernel, **dict(each.partition("=")[::2] for each in options)}
        numbers = {name: _numbers(part) for name, part in parts.items()}
        dims = len(numbers["kernel"])
        sides = [
            numbers.get(name, (plain,) * dims)
            for name, plain in (("stride", 1), ("before", 0), ("after", 0), ("dilation", 1))
        ]
        groups = numbers.get("groups", (1,))
        if all(len(side) == dims > 0 for side in sides) and len(groups) == 1:
            stride, before, after, dilation = sides
            found = cls(numbers["kernel"], stride, before, after, dilation, *groups)
            if str(found) == text and 0 not in (*found.kernel, *stride, *dilation, *groups):
                return found
        raise InvalidConfig(f"{text!r} is no window; expected as '3x3, stride=2x2, before=1x1'")

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


def _numbers(text: str) -> tuple[int, ...]:
    """Those of ``"3x3"``; empty if it is something else."""
    parts = text.split("x")
    return tuple(map(int, parts)) if all(re.fullmatch(r"[0-9]{1,9}", x) for x in parts) else ()
