"""Why a module is no graph: a plain sentence first, and what PyTorch says of it behind."""

from __future__ import annotations

import linecache
import os
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from torch_quant.errors import QuantError

__all__ = ["about_images", "first_lines", "reason_of"]

_VALUES = "its Python code asks for values of a tensor, which a graph does not know"
_SIZES = "the size of a tensor depends on the values of another"
_FOREIGN = "it takes a tensor out of PyTorch, as NumPy arrays do"
_PLAIN = (
    ("GuardOnDataDependentSymNode", "", _VALUES),
    ("DataDependentOutputException", "", _VALUES),
    ("DynamicOutputShapeException", "", _SIZES),
    ("UserError", "data-dependent", _VALUES),
    ("RuntimeError", "numpy", _FOREIGN),
)
"""Name of an error's class, a word of its text -> what it means."""
_NOT_THEIRS = tuple(
    f"{Path(file).parent}{os.sep}" for file in (torch.__file__, str(Path(__file__).parent))
)
_PYTHON = os.path.dirname(os.__file__)


def about_images(inputs: Iterable[tuple[str, Tensor]]) -> str:
    """The end of a message where inputs that a model fails on may be images of integers.

    Args:
        inputs: their names and values.

    >>> about_images([("x", torch.zeros(2, 3, 8, 8, dtype=torch.uint8))])[:29]
    ". If x has images' pixels, gi"
    """
    for name, x in inputs:
        whole = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
        if whole and x.dim() >= (3 if x.dtype == torch.uint8 else 4):
            return (
                f". If {name} has images' pixels, give floats, normalized as in training: "
                f"({name}.float() / 255 - mean) / std"
            )
    return ""


def reason_of(error: Exception) -> str:
    """The reason in a sentence, with the line of code, and PyTorch's own words behind it.

    >>> reason_of(RuntimeError(".numpy() is not supported for tensor subclasses."))[:45]
    'it takes a tensor out of PyTorch, as NumPy ar'
    """
    if isinstance(error, QuantError):
        return str(error)
    name, text = type(error).__name__, first_lines(error)
    means = (plain for of, word, plain in _PLAIN if of == name and word in text.lower())
    plain = next(means, "torch.export cannot follow its Python code")
    return f"{plain}{_line(error)}; PyTorch says: {name}: {text}"


def first_lines(error: Exception, count: int = 2) -> str:
    """The beginning of an error's text, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count])[:400]


def _is_theirs(file: str) -> bool:
    """Whether a file is neither PyTorch's nor this package's nor Python's own."""
    installed = "site-packages" in file or "dist-packages" in file
    return not file.startswith(_NOT_THEIRS) and (installed or not file.startswith(_PYTHON))


def _line(error: Exception) -> str:
    """The innermost line of the user's code, or that of a library, that led to an error."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if _is_theirs(frame.filename) and linecache.getline(frame.filename, 1)
    ]
    if not frames:
        return ""
    last = frames[-1]
    return f" ({Path(last.filename).name}:{last.lineno}, {last.line})"
